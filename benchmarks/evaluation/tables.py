"""An evaluation as files and tables: every figure with its interval, what failed beside it, nothing left out.

Two files in the folder:

responses.jsonl    one line a prompt and system: the response and all it was measured by (null: the judge failed)
evaluation.json    facts, measures with intervals, win rates of all ordered pairs, and the tables as they are shown
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evaluation.length_control import RESAMPLES
from benchmarks.evaluation.systems import System
from rlaif_env.api import RLAIFError
from rlaif_env.data.jsonl import write_jsonl
from rlaif_env.records import write_json
from rlaif_env.statistics import Floats, interval_text, measure_change, measure_mean
from rlaif_env.tables import Table, count_of

Row = Mapping[str, Any]

_LABELS = {
    "gold": "gold measure",
    "kl": "KL to the reference (nats a response)",
    "length": "length (tokens)",
    "words": "words",
    "reference_nll": "negative log-likelihood under the reference (nats)",
    "perplexity": "perplexity under the reference",
    "repeated-3": "repeated 3-grams (share)",
    "distinct-2": "distinct 2-grams (share)",
    "new_numbers": "numbers not in the prompt",
    "new_names": "names not in the prompt",
}


def write_evaluation(folder: Path, systems: Sequence[System], wins: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write responses.jsonl and evaluation.json into a folder.

    Args:
        folder: An existing folder; files of these names are replaced.
        systems: What was evaluated, on the same prompts; the one named "sft", else the first, is the baseline.
        wins: Rows of `judges.win_rates` and `judges.pairwise_wins`, of all judges together.
        facts: Anything JSON can hold; "title" is the title, "task" is named in it.

    Raises:
        RLAIFError: If there is no system, or a value has no JSON form.
    """
    whole = evaluation(systems, wins, facts)
    write_jsonl(folder / "responses.jsonl", _responses(systems))
    write_json(folder / "evaluation.json", whole)


def evaluation(systems: Sequence[System], wins: Sequence[Row], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What evaluation.json holds; arguments as for `write_evaluation`.

    Returns:
        "title", "facts", "systems" (name, source, responses, empty ones), "measures" (by system and measure: estimate,
        low, high, rows, units, failed rows), "win_rates" (the rows), "position_bias" (of the pairwise judges, by pair),
        "tables" (title, caption, columns, rows of text and numbers).
    """
    if not systems:
        raise RLAIFError("expected at least one system, found none")
    on = f" on {facts['task']}" if "task" in facts else ""
    title = facts.get("title", f"{len(systems)} {'system' if len(systems) == 1 else 'systems'}{on}")
    measures = {
        s.name: {name: _summary(name, values, s.prompts) for name, values in s.measures.items()} for s in systems
    }
    biases = [
        {"judge": row["judge"], "a": row["a"], "b": row["b"], **row["position_bias"]}
        for row in _once(wins, systems)
        if row.get("position_bias")
    ]
    return {
        "title": title,
        "facts": dict(facts),
        "systems": [
            {"name": s.name, "source": s.source, "responses": len(s.responses), "empty": _empty(s)} for s in systems
        ],
        "measures": measures,
        "win_rates": [dict(row) for row in wins],
        "position_bias": biases,
        "tables": [table.to_json() for table in _tables(systems, wins, measures, biases)],
    }


def _empty(system: System) -> int:
    return sum(not response.strip() for response in system.responses)


def _responses(systems: Sequence[System]) -> Iterator[dict[str, Any]]:
    for i, prompt in enumerate(systems[0].prompts):
        for system in systems:
            values = {name: float(column[i]) for name, column in system.measures.items()}
            measures = {name: value if np.isfinite(value) else None for name, value in values.items()}
            yield {"prompt": prompt, "system": system.name, "response": system.responses[i], "measures": measures}


def _summary(name: str, values: Floats, prompts: Sequence[str]) -> dict[str, Any]:
    """Mean with its interval, prompts resampled whole, and what failed; an estimate of None where everything did."""
    rows = np.flatnonzero(np.isfinite(values)).tolist()
    failed = len(values) - len(rows)
    if not rows:
        return {"estimate": None, "low": None, "high": None, "n": 0, "units": 0, "failed": failed}
    mean = measure_mean(name, values[rows], [prompts[i] for i in rows], resamples=RESAMPLES)
    return {**asdict(mean), "failed": failed}


def _once(wins: Sequence[Row], systems: Sequence[System]) -> list[Row]:
    """The rows of each unordered pair in one direction, that of the list of systems."""
    place = {system.name: i for i, system in enumerate(systems)}
    return [row for row in wins if place[row["a"]] < place[row["b"]]]


# --- tables -----------------------------------------------------------------------------------------------------------


def _tables(
    systems: Sequence[System], wins: Sequence[Row], measures: Mapping[str, Any], biases: Sequence[Row]
) -> Iterator[Table]:
    rows, different = len(systems[0].prompts), len(set(systems[0].prompts))
    n = count_of(rows, "prompt") + (f" ({different} different)" if different < rows else "")
    names = [system.name for system in systems]
    baseline = "sft" if "sft" in names else names[0]
    if wins:
        yield _against(baseline, wins, n)
    yield _measure_table(systems, measures, n)
    if len(systems) > 1 and (changes := _change_rows(systems, baseline)):
        yield Table(
            f"Change from {baseline}",
            ["measure", *(name for name in names if name != baseline)],
            changes,
            f"Mean over prompts of the system's value minus that of {baseline} on the same prompt, with its 95 % "
            "interval; prompts that either has no value for are left out and counted.",
        )
    for judge in dict.fromkeys(row["judge"] for row in wins):
        pairs = {(row["a"], row["b"]): row for row in wins if row["judge"] == judge}
        for kind, title in (("raw", "Win rates"), ("length_controlled", "Win rates at equal length")):
            yield Table(
                f"{title}: {_label(judge)}",
                ["wins of ... against", *names],
                [[a, *("" if a == b else _cell(pairs[a, b], kind) for b in names)] for a in names],
                _matrix_caption(kind, n, list(pairs.values())),
            )
    if biases:
        yield Table(
            "Position bias of the pairwise judge",
            ["judge", "pair", "same position in both orders", "of these the first"],
            [
                [
                    row["judge"],
                    f"{row['a']} / {row['b']}",
                    *(_figure(row[key], units=True) for key in ("same_position", "first")),
                ]
                for row in biases
            ],
            "Share of prompts on which the judge prefers the same position whichever response stands there (the mean "
            "of both orders then says little of the responses), and how often that is the first position; 95 % "
            "intervals, and over how many prompts.",
        )


def _against(baseline: str, wins: Sequence[Row], n: str) -> Table:
    rows = []
    for row in wins:
        if row["b"] != baseline:
            continue
        tried = f"{row['wins']} / {row['ties']} / {row['losses']}"
        failed = str(row["failed"])
        if row["failed"] and row["raw"]:
            failed += f" ([{row['raw']['lowest']:.3f}, {row['raw']['highest']:.3f}] had they been losses or wins)"
        figures = [_figure(row["raw"]), _figure(row["length_controlled"]) + _marks(row)]
        p_values = ["" if row[key] is None else f"{row[key]:.2g}" for key in ("p_value", "p_holm")]
        counted = [tried, failed] if any(row["failed"] for row in wins) else [tried]
        rows.append([_label(row["judge"]), row["a"], *figures, *counted, *p_values, _verdict(row, baseline)])
    columns = ["judge", "system", "win rate", "at equal length", "wins / ties / losses"]
    columns += ["failed"] if any(row["failed"] for row in wins) else []
    caption = (
        f"Against {baseline}, prompt by prompt, {n}, ties ½, 95 % intervals. At equal length: the logistic "
        "regression on the length ratio, read at 1. p: of a win rate of ½; Holm: over all pairs of systems under that "
        "judge. The verdict goes by the Holm p at 0.05. A policy may have been trained on any of the judges"
        f"{' but the gold measure' if any(row['judge'] == 'gold' for row in wins) else ''}.{_mark_notes(wins)}"
    )
    return Table(f"Against {baseline}", [*columns, "p", "p (Holm)", "verdict"], rows, caption)


def _verdict(row: Row, baseline: str) -> str:
    if row["raw"] is None or row["p_holm"] is None:
        return "not judged"
    if row["p_holm"] >= 0.05 or row["raw"]["estimate"] == 0.5:
        return "none shown"
    return f"{'beats' if row['raw']['estimate'] > 0.5 else 'loses to'} {baseline}"


def _measure_table(systems: Sequence[System], measures: Mapping[str, Any], n: str) -> Table:
    names = list(dict.fromkeys(name for system in systems for name in system.measures))
    judges = [name for name in names if name == "gold" or name.startswith("judge:")]
    rows: list[list[str | int]] = []
    for name in [*judges, *(name for name in names if name not in judges)]:
        rows.append([_label(name), *(_figure(measures[system.name].get(name)) for system in systems)])
    rows.append(["empty responses", *map(_empty, systems)])
    caption = (
        f"Mean over {n} with its 95 % bootstrap interval. Length: tokens of the text under the reference's "
        "tokenizer. KL: of the sample, at its sampling temperature. Perplexity: a proxy for coherence that a cliché "
        "passes too. Numbers and names that the prompt does not have: a proxy for hallucination."
    )
    return Table("Measures", ["measure", *(system.name for system in systems)], rows, caption)


def _change_rows(systems: Sequence[System], baseline: str) -> list[list[str]]:
    first = next(system for system in systems if system.name == baseline)
    others = [system for system in systems if system is not first]
    wanted = [m for m in first.measures if m == "gold" or m.startswith("judge:")] + ["length", "perplexity"]
    return [
        [_label(name), *(_change(name, first.measures[name], s.measures.get(name), first.prompts) for s in others)]
        for name in wanted
        if name in first.measures
    ]


def _change(name: str, before: Floats, after: Floats | None, prompts: Sequence[str]) -> str:
    rows = np.flatnonzero(np.isfinite(before) & np.isfinite(before if after is None else after)).tolist()
    if after is None or not rows:
        return "–"
    change = measure_change(name, before[rows], after[rows], [prompts[i] for i in rows], resamples=RESAMPLES)
    without = f" ({len(before) - len(rows)} left out)" if len(rows) < len(before) else ""
    return interval_text(change, "+.3f") + without


def _label(measure: str) -> str:
    return _LABELS.get(measure, measure.removeprefix("judge:"))


def _figure(figure: Mapping[str, Any] | None, *, units: bool = False) -> str:
    """An estimate with its interval, and the failed rows where there are any."""
    if figure is None or figure["estimate"] is None:
        return "–"
    failed = f" ({figure['failed']} of {figure['failed'] + figure['n']} without)" if figure.get("failed") else ""
    return interval_text(figure, ".3f", units=units) + failed


def _cell(row: Row, kind: str) -> str:
    failed = f" ({row['failed']} failed)" if row["failed"] else ""
    return _figure(row[kind]) + (_marks(row) if kind == "length_controlled" else "") + failed


def _marks(row: Row) -> str:
    controlled = row["length_controlled"] or {}
    return ("*" if controlled.get("separated") else "") + ("†" if controlled.get("extrapolated") else "")


def _mark_notes(rows: Sequence[Row]) -> str:
    marks = "".join(_marks(row) for row in rows)
    separated = " * wins and losses do not overlap in length, or all outcomes are alike: the fit rests on a weak prior."
    extrapolated = " † all length ratios are on one side of 1: the figure is an extrapolation."
    return (separated if "*" in marks else "") + (extrapolated if "†" in marks else "")


def _matrix_caption(kind: str, n: str, rows: Sequence[Row]) -> str:
    shown = f"How often the row's system wins against the column's, of {n}, ties ½, with 95 % intervals."
    if kind == "raw":
        return shown
    return (
        f"{shown} Predicted at a length ratio of 1 by logistic regression; each direction has a fit of its own, so "
        f"that two cells of a pair need not add up to 1.{_mark_notes(rows)}"
    )
