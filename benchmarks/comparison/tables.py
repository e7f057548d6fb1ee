"""The tables of a comparison of reward backends, shaped as the paper's.

Pure functions of the outcomes. B prompts, S seeds; win rates pool the seeds and count a prompt once (its rows are one
cluster).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison.costs import cost_table
from benchmarks.comparison.outcomes import Outcome, arms_of
from benchmarks.comparison.stages import Stage
from benchmarks.evaluation.aggregates import iqm_over_seeds
from benchmarks.evaluation.judges import preferred
from benchmarks.evaluation.length_control import length_control
from benchmarks.evaluation.metrics import holm, paired_bootstrap_test
from benchmarks.evaluation.systems import System
from rlaif_env.data.tasks import Task
from rlaif_env.statistics import FEWEST_UNITS, Floats, Interval, interval_text, measure_change, measure_mean
from rlaif_env.tables import Cell, Table, count_of

PAPER: Sequence[tuple[str, str, str, str, str]] = (
    ("distilled-rm", "sft", "RLAIF vs SFT", "71; 63", "59; 61"),
    ("human-rm", "sft", "RLHF vs SFT", "73; 64", "61; 61"),
    ("distilled-rm", "human-rm", "RLAIF vs RLHF", "50; 52", "47; 50"),
    ("same-size-rm", "sft", "same-size RLAIF vs SFT", "68; -", "59; -"),
    ("direct-llm", "sft", "d-RLAIF vs SFT", "74; 66", "65; -"),
    ("direct-llm", "same-size-rm", "d-RLAIF vs same-size RLAIF", "60; -", "56; -"),
    ("direct-llm", "distilled-rm", "d-RLAIF vs RLAIF", "-", "-"),
    ("direct-llm", "human-rm", "d-RLAIF vs RLHF", "-", "-"),
    ("self-llm", "sft", "strict self-improvement vs SFT", "-", "-"),
    ("combined-rm", "sft", "RLHF + RLAIF data vs SFT", "71; -", "61; -"),
    ("combined-rm", "human-rm", "RLHF + RLAIF data vs RLHF", "-", "-"),
)
"""The paper's comparisons: two arms, their name, and what its raters preferred in %: summaries; helpful dialogue. Raw,
then at equal length (sections 4.1 to 4.4, appendix J)."""

_MAIN_JUDGES = 3  # that the main table has room for
_WRITING = {
    "length": "length, tokens",
    "kl": "KL to SFT, nats",
    "perplexity": "perplexity under SFT",
    "distinct-2": "distinct-2",
    "repeated-3": "repeated 3-grams",
    "new_numbers": "numbers not in the prompt",
    "new_names": "names not in the prompt",
}


def comparison_tables(
    outcomes: Sequence[Outcome], stages: Sequence[Stage], judges: Mapping[str, str], price_per_hour: float | None = None
) -> list[Table]:
    """All tables, the main one first; those that there is nothing for are left out."""
    tables = [_main(outcomes, judges), _by_judge(outcomes, judges), _writing(outcomes)]
    if len({outcome.seed for outcome in outcomes}) > 1:
        tables.append(_over_seeds(outcomes, judges))
    if models := [stage for stage in stages if stage.name.startswith("rm-")]:
        tables.append(_reward_models(models))
    return [*tables, cost_table(outcomes, price_per_hour)]


def judges_of(outcomes: Sequence[Outcome], task: Task) -> dict[str, str]:
    """Measures that say which response is better, with their names for people; what no arm was trained on first."""
    measures = outcomes[0].system.measures
    independent = {"judge:gold-rm": "people (gold RM)", "gold": f"gold ({task.gold})"}
    judges = {name: title for name, title in independent.items() if name in measures}
    rest = [name for name in measures if name.startswith("judge:") and name not in judges]
    rest.sort(key=lambda name: name != "judge:direct-llm")
    return judges | {name: name.removeprefix("judge:") for name in rest}


def terminal_table(main: Table, judges: Mapping[str, str]) -> Table:
    """The main table for a terminal: a line for what is raw, and one for what is at equal length."""
    rows = []
    for name, *cells in main.rows:
        *ours, _, raw, controlled = cells
        pairs = [*zip(ours[::2], ours[1::2], strict=True), (raw, controlled)]
        rows.append([str(name).replace(" (", "\n("), *(f"{upper}\n{lower}" for upper, lower in pairs)])
    columns = ["first against second", *list(judges.values())[:_MAIN_JUDGES], "the paper"]
    caption = (
        "upper line: wins in %, 95 % intervals; lower: at equal length. The paper's: its raters on summaries; dialogue"
    )
    return Table(main.title, columns, rows, caption)


def percent(interval: Interval | Mapping[str, Any], *, units: bool = False) -> str:
    """A share with its interval, as JSON holds one, in whole percent."""
    return interval_text(interval, ".0f", scale=100, units=units)


def with_interval(interval: Interval, *, sign: bool = False, units: bool = False) -> str:
    """A figure with its interval."""
    digits = 1 if max(abs(x) for x in (interval.estimate, interval.low, interval.high) if x is not None) >= 20 else 2
    return interval_text(interval, f"{'+' if sign else ''}.{digits}f", units=units)


def _systems(outcomes: Sequence[Outcome], arm: str) -> list[System]:
    """An arm's answers by seed."""
    chosen = sorted((o for o in outcomes if o.arm == arm), key=lambda outcome: outcome.seed)
    return [outcome.system for outcome in chosen]


def _pooled(outcomes: Sequence[Outcome], arm: str, measure: str) -> Floats:
    """A measure of an arm over seeds and prompts, (S * B,)."""
    return np.concatenate([system.measures[measure] for system in _systems(outcomes, arm)])


def _prompts(outcomes: Sequence[Outcome], rows: NDArray[np.bool_]) -> list[str]:
    """The prompts of chosen rows of a pooled measure, (S * B,)."""
    prompts = outcomes[0].system.prompts
    return [prompts[row % len(prompts)] for row in np.flatnonzero(rows).tolist()]


def _over(outcomes: Sequence[Outcome]) -> str:
    return count_of(len(set(outcomes[0].system.prompts)), "held-out prompt")


def _mean(outcomes: Sequence[Outcome], arm: str, measure: str, start: str | None = None) -> str:
    """Mean of a measure of an arm with its interval; of its change against ``start``, where that is given."""
    values, before = (_pooled(outcomes, whose, measure) for whose in (arm, start or arm))
    known = np.isfinite(values) & np.isfinite(before)
    if not known.any():
        return "-"
    prompts = _prompts(outcomes, known)
    if start is None:
        return with_interval(measure_mean(measure, values[known], prompts))
    return with_interval(measure_change(measure, before[known], values[known], prompts), sign=True)


def _main(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Table:
    """Win rates in the paper's comparisons, raw and at equal length, beside the paper's own."""
    arms, shown = arms_of(outcomes), list(judges)[:_MAIN_JUDGES]
    rows, tested, p_values = list[list[Cell]](), list[list[Cell]](), list[float]()
    for a, b, name, *paper in PAPER:
        if a not in arms or b not in arms:
            continue
        row: list[Cell] = [f"{name} ({a} vs {b})" if b != "sft" else f"{name} ({a})"]
        for measure in shown:
            p_all = np.concatenate(
                [preferred(*pair, measure) for pair in zip(_systems(outcomes, a), _systems(outcomes, b), strict=True)]
            )
            judged = np.isfinite(p_all)
            p_first, clusters = p_all[judged], _prompts(outcomes, judged)
            lengths = [np.maximum(_pooled(outcomes, arm, "length")[judged], 1) for arm in (a, b)]
            wins = length_control(p_first, *lengths, clusters=clusters)
            failed = "" if judged.all() else f"; {int((~judged).sum())} failed"
            row += [percent(wins.raw) + failed, percent(wins.controlled)]
            if measure == shown[0] and wins.raw.units >= FEWEST_UNITS:
                p_values.append(paired_bootstrap_test(np.full(p_first.size, 0.5), p_first, clusters=clusters))
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
        "predicted at 1, refitted in every resample; p: no difference, by the first judge, Holm over the rows. The "
        "paper's figures are its human raters' on summaries; helpful dialogue, with PaLM 2 (arXiv 2309.00267): other "
        "tasks and models, so shape and order compare, not the numbers.",
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
        f"Means over {_over(outcomes)} with 95 % intervals. Perplexity under SFT (none for an empty response) stands "
        "for coherence, names and numbers that the prompt does not hold for hallucination: cheap signs, not proofs.",
    )


def _over_seeds(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Table:
    """Over seeds: the interquartile mean of each arm's change against SFT of the same seed."""
    systems = {(outcome.arm, outcome.seed): outcome.system for outcome in outcomes}
    rows: list[list[Cell]] = []
    for arm in arms_of(outcomes)[1:]:
        row: list[Cell] = [arm]
        for measure in judges:
            changes = [
                float(np.nanmean(system.measures[measure] - systems["sft", seed].measures[measure]))
                for (whose, seed), system in systems.items()
                if whose == arm
            ]
            spread = f"{min(changes):+.3f} … {max(changes):+.3f}"
            row.append(f"{with_interval(iqm_over_seeds(changes), sign=True)}; {spread}")
        rows.append(row)
    return Table(
        "Over seeds",
        ["policy", *judges.values()],
        rows,
        "Interquartile mean of the change against SFT with its bootstrap interval; least … greatest seed.",
    )


def _reward_models(models: Sequence[Stage]) -> Table:
    """How good the reward models are on people's held-out preferences."""
    rows: list[list[Cell]] = []
    for stage in models:
        report = stage.read_json("run/report.json")
        trained_on = [report["training"]["pairs"], report["training"]["texts"]]
        for judged_by, figures in report["figures"].items():
            at_gap = figures.get("accuracy_at_gap")
            accuracy = ["-" if a is None else percent(a, units=True) for a in (figures["accuracy"], at_gap)]
            calibration = [f"{figures['ece']:.3f}", f"{figures['brier']:.3f}"]
            name = stage.name.removeprefix("rm-")
            rows.append([name, judged_by, *trained_on, *accuracy, *calibration, percent(figures["longer"])])
    trained, tested = ["labels", "tested on", "pairs", "texts"], ["accuracy, %", "wider gap, %", "ECE", "Brier"]
    return Table(
        "Reward models on held-out pairs",
        [*trained, *tested, "always the longer, %"],
        rows,
        "Pairwise accuracy with 95 % intervals and the number of independent pairs, ties ½; the wider gap: pairs "
        "whose mean human ratings differ by 0.5 or "
        "more; always the longer: what that rule would get. The paper's: human RM 79.3 (summaries), 76.0 (helpful); "
        "AI RM 74.2, 67.8.",
    )
