"""The figures in a run's JSON files as tables, and what a training run's figures amount to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from rlaif_env.api import DataError
from rlaif_env.statistics import interval_text
from rlaif_env.tables import Cell, Table, is_number

_INTERVAL = {"estimate", "low", "high"}
_HEADLINES = ("gold", "reward", "score", "kl", "length", "distinct-2")


def before_after_table(evaluation: Mapping[str, Any], where: str) -> Table:
    """The table of a training run's evaluation.json: each measure before, after, and the paired change.

    Raises:
        DataError: If a measure is not three intervals.
    """
    rows: list[list[Cell]] = []
    for name in [*(n for n in _HEADLINES if n in evaluation), *(n for n in evaluation if n not in _HEADLINES)]:
        three = evaluation[name]
        if not isinstance(three, list) or len(three) != 3 or not all(map(_is_interval, three)):
            raise DataError(f"{where}: expected {name} to be three intervals, found {str(three)[:60]!r}")
        rows.append([name, *(interval["estimate"] for interval in three), three[2]["low"], three[2]["high"]])
    counts = {three[2].get("n") for three in evaluation.values()}
    prompts = f"{counts.pop():,} held-out prompts" if len(counts) == 1 and None not in counts else "held-out prompts"
    return Table(
        "Before and after training",
        ["measure", "before", "after", "change", "95 % from", "to"],
        rows,
        f"Means over {prompts}. The change is paired by prompt; its 95 % interval is a bootstrap over prompts and says "
        "nothing about other seeds.",
        by_row=True,
    )


def verdict(evaluation: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What a reader should take from an evaluation, as it came out.

    Returns:
        A sentence about the gold measure ("" where there is none), and warnings: no gain on the gold measure, or a
        reward that rose while the gold measure fell.
    """
    if "gold" not in evaluation:
        return "", ["No gold measure was taken: nothing here says whether a higher reward is a better text."]
    before, after, change = evaluation["gold"]
    levels = (f"{interval['estimate']:.3f}" for interval in (before, after))
    start, end, gain = (text.replace("-", "−") for text in (*levels, interval_text(change, "+.3f")))
    lede = f"The gold measure, which no reward sees, went from {start} to {end} on held-out prompts: {gain}."
    warnings = []
    if change["low"] is None:
        warnings.append(
            "Too few held-out prompts for an interval of the change in the gold measure: nothing was shown."
        )
    elif change["high"] < 0:
        rose = "reward" in evaluation and (evaluation["reward"][2]["low"] or 0) > 0
        warnings.append("The gold measure fell" + (" while the reward rose: over-optimisation." if rose else "."))
    elif change["low"] <= 0:
        warnings.append("The interval of the change in the gold measure holds 0: no gain was shown.")
    return lede, warnings


def as_tables(report: Mapping[str, Any]) -> list[Table]:
    """A report.json as tables: its intervals, its other figures, and each of its lists of objects.

    Names of nested figures are joined by " · ". Nothing is left out.
    """
    intervals, others = list[list[Cell]](), list[list[Cell]]()
    tables: list[Table] = []
    for name, value in _leaves(report):
        if _is_interval(value):
            limits = [value[key] for key in ("estimate", "low", "high")]
            intervals.append([name, *limits, value.get("n"), value.get("units")])
        elif isinstance(value, list):
            tables.append(_list_table(name, value))
        else:
            others.append([name, _cell(value)])
    if others:
        tables.insert(0, Table("More figures" if intervals else "Figures", ["figure", "value"], others, by_row=True))
    if intervals:
        tables.insert(0, Table("Figures", ["figure", "estimate", "95 % from", "to", "n", "units"], intervals))
    return tables


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values that are shown as one row, or as one table, with their names."""
    if isinstance(value, dict) and not _is_interval(value):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} · {key}" if name else str(key))
    elif isinstance(value, list) and not (value and all(isinstance(v, dict) for v in value)):
        yield name, ", ".join(map(str, value))
    else:
        yield name, value


def _list_table(name: str, rows: list[dict[str, Any]]) -> Table:
    flat = [dict(_row(row)) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    return Table(name, columns, [[row.get(column) for column in columns] for row in flat])


def _row(row: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    for name, value in row.items():
        if _is_interval(value):
            yield name, value["estimate"]
            yield f"{name}, from", value["low"]
            yield f"{name}, to", value["high"]
            yield f"{name}, units", value.get("units")
        else:
            yield name, _cell(value)


def _cell(value: Any) -> Cell:
    return cast(Cell, value) if value is None or is_number(value) else str(value)


def _is_interval(value: Any) -> bool:
    """Whether a JSON value is an interval; both limits are null where there were too few units for one."""
    if not isinstance(value, dict) or not set(value) >= _INTERVAL or not is_number(value["estimate"]):
        return False
    limits = [value["low"], value["high"]]
    return limits == [None, None] or all(map(is_number, limits))
