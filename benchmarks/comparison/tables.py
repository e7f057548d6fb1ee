"""The tables of a comparison of reward backends, shaped as the paper's.

Pure functions of the outcomes. B prompts, S seeds. Every figure is the mean over both; its interval, from three seeds
on, is for another training and other prompts (`rlaif_env.statistics.Crossed`), and for other prompts alone with fewer:
a prompt's rows are one cluster then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison.outcomes import Outcome, arms_of, cost_of, cost_table
from benchmarks.comparison.stages import Stage
from benchmarks.evaluation.judges import preferred
from benchmarks.evaluation.length_control import LengthControl, length_control
from benchmarks.evaluation.metrics import holm, win_rate_test
from benchmarks.evaluation.qualitative import SIGNS, example_tables
from benchmarks.evaluation.systems import System
from rlaif_env.data.tasks import Task
from rlaif_env.statistics import (
    FEWEST_SEEDS,
    FEWEST_UNITS,
    Clusters,
    Crossed,
    Floats,
    Interval,
    crossed,
    interval_text,
    measure_change,
    measure_mean,
    rate,
)
from rlaif_env.tables import Cell, Table, count_of

PAPER: Sequence[tuple[str, str, str, str, str]] = (
    ("distilled-rm", "sft", "RLAIF vs SFT", "71; 63", "59; 61"),
    ("human-rm", "sft", "RLHF vs SFT", "73; 64", "61; 61"),
    ("distilled-rm", "human-rm", "RLAIF vs RLHF", "50; 52", "47; 50"),
    ("pairwise-rm", "sft", "RLAIF, pairwise labels vs SFT", "71; 63", "59; 61"),
    ("pairwise-rm", "human-rm", "RLAIF, pairwise labels vs RLHF", "50; 52", "47; 50"),
    ("pairwise-rm", "distilled-rm", "RLAIF, pairwise labels vs RLAIF", "-", "-"),
    ("same-size-rm", "sft", "same-size RLAIF vs SFT", "68; -", "59; -"),
    ("combined-rm", "sft", "RLHF + RLAIF data vs SFT", "71; -", "61; -"),
    ("combined-rm", "human-rm", "RLHF + RLAIF data vs RLHF", "-", "-"),
    ("direct-llm", "sft", "d-RLAIF vs SFT", "74; 66", "65; -"),
    ("direct-llm", "same-size-rm", "d-RLAIF vs same-size RLAIF", "60; -", "56; -"),
    ("direct-llm", "distilled-rm", "d-RLAIF vs RLAIF", "-", "-"),
    ("direct-llm", "human-rm", "d-RLAIF vs RLHF", "-", "-"),
    ("self-llm", "sft", "strict self-improvement vs SFT", "-", "-"),
    ("self-llm", "same-size-rm", "strict self-improvement vs same-size RLAIF", "-", "-"),
    ("group-preference", "sft", "group preference vs SFT", "-", "-"),
    ("group-preference", "direct-llm", "group preference vs d-RLAIF", "-", "-"),
)
"""The paper's comparisons: two arms, their name, and what its raters preferred in %: summaries; helpful dialogue. Raw,
then at equal length (sections 4.1 to 4.4, appendix J)."""

_MAIN_JUDGES = 3  # that the main table has room for
_SHORT = {"kl": "KL", "length": "tokens", "distinct-2": "distinct-2"}
_OWN = "reward, SD"
_WIDE = (_OWN, "tokens")  # columns that a terminal of 80 characters has no room for
_OWN_SAID = " Reward: the change of its own, in standard deviations of what it gives SFT."
_COARSE = 2.0  # from where on one decimal does in the table of all arms, which is wide
_WRITING = {
    "length": "length, tokens",
    "kl": "KL to SFT, nats",
    "distinct-2": "distinct-2",
    "repeated-3": "repeated 3-grams",
    **{name: sign.title for name, sign in SIGNS.items()},
}


def comparison_tables(
    outcomes: Sequence[Outcome], stages: Sequence[Stage], judges: Mapping[str, str], price_per_hour: float | None = None
) -> list[Table]:
    """All tables, `_every_arm` and `_main` first; those that there is nothing for are left out."""
    tables = [_every_arm(outcomes, judges), _main(outcomes, judges), _by_judge(outcomes, judges), _writing(outcomes)]
    if len({outcome.seed for outcome in outcomes}) > 1:
        tables.append(_each_seed(outcomes, judges))
    if models := [stage for stage in stages if stage.name.startswith("rm-")]:
        tables.append(_reward_models(models, outcomes))
    return [
        *tables,
        cost_table(outcomes, price_per_hour),
        *example_tables({arm: _systems(outcomes, arm) for arm in arms_of(outcomes)}),
    ]


INDEPENDENT = ("judge:gold-rm", "gold")
"""Measures of the judges that no arm was trained on, the first one best."""


def judges_of(outcomes: Sequence[Outcome], task: Task) -> dict[str, str]:
    """Measures that say which response is better, with their names for people; what no arm was trained on first."""
    measures = outcomes[0].system.measures
    titles = dict(zip(INDEPENDENT, ("people (gold RM)", f"gold ({task.gold})"), strict=True))
    judges = {name: title for name, title in titles.items() if name in measures}
    rest = [name for name in measures if name.startswith("judge:") and name not in judges]
    rest.sort(key=lambda name: name != "judge:direct-llm")
    return judges | {name: name.removeprefix("judge:") for name in rest}


def terminal_tables(every_arm: Table, main: Table, judges: Mapping[str, str]) -> list[Table]:
    """The first two tables for 80 characters: what is at equal length on a line of its own, intervals of wins only."""
    heads, arms = [every_arm.columns[1], *every_arm.columns[3:]], []
    shown = [i for i, head in enumerate(heads) if head not in _WIDE]
    for arm, raw, controlled, *cells in every_arm.rows:
        figures = [f"{raw}\n{controlled}" if raw else "-", *("-" if cell is None else str(cell) for cell in cells)]
        arms.append([arm, *(figures[i] if "wins" in heads[i] else figures[i].split(" [")[0] for i in shown)])
    heads = [heads[i].removesuffix(": wins, %").replace(" (", "\n(") for i in shown]
    rows = []
    for name, *cells in main.rows:
        *ours, _, raw, controlled = cells
        pairs = [*zip(ours[::2], ours[1::2], strict=True), (raw, controlled)]
        rows.append([str(name).replace(" (", "\n("), *(f"{upper}\n{lower}" for upper, lower in pairs)])
    lines = "upper line: wins in %, 95 % intervals; lower: at equal length"
    caption = every_arm.caption.removeprefix("95 % intervals ").replace(_OWN_SAID, "")
    columns = ["first against second", *list(judges.values())[:_MAIN_JUDGES], "the paper"]
    return [
        Table(every_arm.title, ["arm", *heads], arms, f"{lines}; {caption}"),
        Table(main.title, columns, rows, f"{lines}. The paper's: its raters on summaries; dialogue"),
    ]


def percent(interval: Interval | Mapping[str, Any], *, units: bool = False) -> str:
    """A share with its interval, as JSON holds one, in whole percent."""
    return interval_text(interval, ".0f", scale=100, units=units)


def with_interval(interval: Interval, *, sign: bool = False, units: bool = False, coarse: float = 20.0) -> str:
    """A figure with its interval, to one decimal where it or a limit is as great as ``coarse``, else to two."""
    greatest = max(abs(x) for x in (interval.estimate, interval.low, interval.high) if x is not None)
    digits = 1 if greatest >= coarse else 2
    return interval_text(interval, f"{'+' if sign else ''}.{digits}f", units=units)


def _systems(outcomes: Sequence[Outcome], arm: str) -> list[System]:
    """An arm's answers by seed."""
    chosen = sorted((o for o in outcomes if o.arm == arm), key=lambda outcome: outcome.seed)
    return [outcome.system for outcome in chosen]


def _pooled(outcomes: Sequence[Outcome], arm: str, measure: str) -> Floats:
    """A measure of an arm over seeds and prompts, (S * B,)."""
    return np.concatenate([system.measures[measure] for system in _systems(outcomes, arm)])


def _clusters(outcomes: Sequence[Outcome], rows: NDArray[np.bool_]) -> Clusters | Crossed:
    """What makes chosen rows of a pooled measure, (S * B,), depend on each other."""
    prompts, chosen = outcomes[0].system.prompts, np.flatnonzero(rows).tolist()
    return crossed([row // len(prompts) for row in chosen], [prompts[row % len(prompts)] for row in chosen])


def _over(outcomes: Sequence[Outcome]) -> str:
    prompts, seeds = len(set(outcomes[0].system.prompts)), len({outcome.seed for outcome in outcomes})
    return (f"{seeds} seeds and " if seeds >= FEWEST_SEEDS else "") + count_of(prompts, "held-out prompt")


def _mean(
    outcomes: Sequence[Outcome],
    arm: str,
    measure: str,
    start: str | None = None,
    *,
    unit: float = 1.0,
    coarse: float = 20.0,
) -> str:
    """Mean of a measure of an arm in some unit, with its interval; of its change from ``start`` where that is given."""
    values, before = (_pooled(outcomes, whose, measure) / unit for whose in (arm, start or arm))
    known = np.isfinite(values) & np.isfinite(before)
    if not known.any():
        return "-"
    clusters = _clusters(outcomes, known)
    if start is None:
        return with_interval(measure_mean(measure, values[known], clusters), coarse=coarse)
    return with_interval(measure_change(measure, before[known], values[known], clusters), sign=True, coarse=coarse)


def share_of_wins(outcomes: Sequence[Outcome], a: str, b: str, measure: str) -> Interval:
    """How often arm a is preferred to arm b by a measure, ties ½, over the rows that it judged."""
    p_first, judged = _compared(outcomes, a, b, measure)
    return rate(p_first[judged], clusters=_clusters(outcomes, judged))


def _compared(outcomes: Sequence[Outcome], a: str, b: str, measure: str) -> tuple[Floats, NDArray[np.bool_]]:
    """Which of two arms is preferred over seeds and prompts, (S * B,), and which of these were judged."""
    pairs = zip(_systems(outcomes, a), _systems(outcomes, b), strict=True)
    p_all = np.concatenate([preferred(*pair, measure) for pair in pairs])
    return p_all, np.isfinite(p_all)


def _wins(
    outcomes: Sequence[Outcome], a: str, b: str, measure: str
) -> tuple[LengthControl, list[Cell], Callable[[], float]]:
    """How often a wins against b; in words, raw and at equal length; and the p-value of no difference, when called."""
    p_all, judged = _compared(outcomes, a, b, measure)
    p_first, clusters = p_all[judged], _clusters(outcomes, judged)
    lengths = [np.maximum(_pooled(outcomes, arm, "length")[judged], 1) for arm in (a, b)]
    wins = length_control(p_first, *lengths, clusters=clusters)
    failed = "" if judged.all() else f"; {int((~judged).sum())} failed"
    words: list[Cell] = [percent(wins.raw) + failed, percent(wins.controlled)]
    return wins, words, partial(win_rate_test, p_first, clusters=clusters)


def _every_arm(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Table:
    """Which reward: each arm against SFT by what no arm was trained on, and what that took, the most wins first."""
    independent = [name for name in INDEPENDENT if name in judges]
    first, *others = independent or list(judges)[:1]
    present = [name for name in _SHORT if name in outcomes[0].system.measures]
    rows, mean = [], partial(_mean, outcomes, coarse=_COARSE)
    for arm in arms_of(outcomes)[1:]:
        wins, (raw, controlled), _ = _wins(outcomes, arm, "sft", first)
        more = [_wins(outcomes, arm, "sft", measure)[1][0] for measure in others]
        minutes = cost_of(outcomes, arm).seconds / 60
        took: list[Cell] = [_own_reward(outcomes, arm), *(mean(arm, name) for name in present), round(minutes)]
        rows.append((wins.raw.estimate, [arm, raw, controlled, *more, *took]))
    sft: list[Cell] = ["sft", *[None] * (3 + len(others)), *(mean("sft", name) for name in present), None]
    wins_by = [f"{judges[first]}: at equal length, %", *(f"{judges[measure]}: wins, %" for measure in others)]
    took_by = [_OWN, *(_SHORT[name] for name in present), "minutes"]
    return Table(
        "Every arm against SFT",
        ["arm", f"{judges[first]}: wins, %", *wins_by, *took_by],
        [*(row for _, row in sorted(rows, key=lambda pair: -pair[0])), sft],
        f"95 % intervals over {_over(outcomes)}. Wins against SFT on the same prompt, ties ½, the most first"
        f"{'; no arm was trained on these judges' if independent else ''}.{_OWN_SAID} KL to SFT in nats. Minutes: "
        "labels, reward model and one training.",
    )


def _own_reward(outcomes: Sequence[Outcome], arm: str) -> str | None:
    """Change of an arm's own reward against SFT, in standard deviations of SFT's."""
    measure = f"judge:{arm}"
    if measure not in outcomes[0].system.measures:
        return None
    spread = float(np.nanstd(_pooled(outcomes, "sft", measure)))
    return _mean(outcomes, arm, measure, "sft", unit=spread or 1.0, coarse=_COARSE)


def _main(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Table:
    """Win rates in the paper's comparisons, raw and at equal length, beside the paper's own."""
    arms, shown = arms_of(outcomes), list(judges)[:_MAIN_JUDGES]
    rows, tested, p_values = list[list[Cell]](), list[list[Cell]](), list[float]()
    for a, b, name, *paper in PAPER:
        if a not in arms or b not in arms:
            continue
        row: list[Cell] = [f"{name} ({a} vs {b})" if b != "sft" else f"{name} ({a})"]
        for measure in shown:
            wins, words, p_value = _wins(outcomes, a, b, measure)
            row += words
            if measure == shown[0] and wins.raw.units >= FEWEST_UNITS:
                p_values.append(p_value())
                tested.append(row)
        rows.append(row)
        row += ["-", *paper]
    for row, p in zip(tested, holm(p_values).tolist() if p_values else [], strict=True):
        row[-3] = f"{p:.3f}" if p >= 0.001 else "< 0.001"
    ours = [f"{judges[measure]}: {what}, %" for measure in shown for what in ("wins", "at equal length")]
    return Table(
        "Main results: how often the first is preferred",
        ["first against second", *ours, "p", "paper: wins, %", "paper: at equal length, %"],
        rows,
        f"95 % intervals over {_over(outcomes)}, ties ½; at equal length: logistic regression on the length ratio, "
        "predicted at 1, with the uncertainty of the fit; p: no difference, by the first judge, Holm over the rows. "
        "The paper's figures are its human raters' on summaries; helpful dialogue, with PaLM 2 (arXiv 2309.00267): "
        "other tasks and models, so shape and order compare, not the numbers.",
    )


def _by_judge(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Table:
    """What every judge says of every policy: the change against SFT."""
    rows: list[list[Cell]] = [["sft", *(_mean(outcomes, "sft", measure) for measure in judges)]]
    for arm in arms_of(outcomes)[1:]:
        own = {f"judge:{arm}": " (its own)"}
        rows.append([arm, *(_mean(outcomes, arm, measure, "sft") + own.get(measure, "") for measure in judges)])
    return Table(
        "What each judge says of each policy",
        ["policy", *judges.values()],
        rows,
        f"SFT: the mean over {_over(outcomes)}; the others: the change on them, 95 % intervals. Rewards have different "
        "units: compare within a column. No arm was trained on the gold measures.",
    )


def _writing(outcomes: Sequence[Outcome]) -> Table:
    """How the policies write: length, distance from SFT, repetition, what the prompt does not say."""
    present = [name for name in _WRITING if name in outcomes[0].system.measures]
    return Table(
        "How the policies write",
        ["policy", *(_WRITING[name] for name in present)],
        [[arm, *(_mean(outcomes, arm, name) for name in present)] for arm in arms_of(outcomes)],
        f"Means over {_over(outcomes)} with 95 % intervals. Names and numbers that the prompt does not have stand for "
        "unsupported content, perplexity (none for an empty response) for incoherence. Both are weak signs: on "
        "responses of movie-review judged by hand the areas under the ROC curve are "
        f"{SIGNS['unsupported'].area} and {SIGNS['perplexity'].area}, where guessing gets 0.5 (docs/evaluation.md).",
    )


def _each_seed(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Table:
    """How far apart the trainings of an arm end: each seed's mean change against SFT of the same seed."""
    rows: list[list[Cell]] = []
    for arm in arms_of(outcomes)[1:]:
        pairs = list(zip(_systems(outcomes, "sft"), _systems(outcomes, arm), strict=True))
        changes = {
            name: [np.nanmean(end.measures[name] - start.measures[name]) for start, end in pairs] for name in judges
        }
        rows.append([arm, *(", ".join(f"{change:+.2f}" for change in changes[name]) for name in judges)])
    seeds = ", ".join(map(str, sorted({outcome.seed for outcome in outcomes})))
    return Table(
        "Seed by seed",
        ["policy", *judges.values()],
        rows,
        f"The mean change against SFT of the same seed, for seeds {seeds} in this order: how far apart trainings that "
        "differ in nothing else end.",
    )


def _reward_models(models: Sequence[Stage], outcomes: Sequence[Outcome]) -> Table:
    """How good the reward models are on people's held-out preferences; by their arms, where they have any."""
    rows: list[list[Cell]] = []
    made_for = {o.arm: o.costs["reward model"].key for o in outcomes if "reward model" in o.costs}
    for stage in models:
        arms = [arm for arm, key in made_for.items() if key == stage.key]
        report = stage.read_json("run/report.json")
        trained_on = [report["training"]["pairs"], report["training"]["texts"]]
        for judged_by, figures in report["figures"].items():
            at_gap = figures.get("accuracy_at_gap")
            accuracy = ["-" if a is None else percent(a, units=True) for a in (figures["accuracy"], at_gap)]
            calibration = [f"{figures['ece']:.3f}", f"{figures['brier']:.3f}"]
            name = ", ".join(arms) or stage.name.removeprefix("rm-")
            rows.append([name, judged_by, *trained_on, *accuracy, *calibration, percent(figures["longer"])])
    trained, tested = ["reward model", "tested on", "pairs", "texts"], ["accuracy, %", "wider gap, %", "ECE", "Brier"]
    return Table(
        "Reward models on held-out pairs",
        [*trained, *tested, "always the longer, %"],
        rows,
        "Pairwise accuracy with 95 % intervals and the number of independent pairs, ties ½; the wider gap: pairs "
        "whose mean human ratings differ by 0.5 or "
        "more; always the longer: what that rule would get. The paper's: human RM 79.3 (summaries), 76.0 (helpful); "
        "AI RM 74.2, 67.8.",
    )
