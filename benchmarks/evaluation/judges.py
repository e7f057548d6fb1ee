"""Judges of systems: scores by any reward backend and the gold measure, pairs by a language model in both orders.

A row that a judge fails on is NaN: it counts neither as a loss nor as a tie, and is counted beside every rate. Two
responses of the same text are a tie, whatever a judge makes of them: its scores differ in the last digits from one
batch to the next, and a choice between them is one of position.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import combinations, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.evaluation.length_control import RESAMPLES, length_control
from benchmarks.evaluation.metrics import holm, paired_bootstrap_test, sign_test, win_rate
from benchmarks.evaluation.systems import System
from rewards.labeling.labeler import Answer, Label, PreferenceLabeler
from rlaif_env.api import BackendError, RewardBackend, RLAIFError
from rlaif_env.batches import HOPELESS, scored_rows
from rlaif_env.data.journal import Journal
from rlaif_env.data.tasks import Task, gold_scores
from rlaif_env.statistics import FEWEST_UNITS, Floats, bootstrap_mean, position_bias

Progress = Callable[[int, int], None]


def score_rows(
    backend: RewardBackend, prompts: Sequence[str], responses: Sequence[str], *, batch: int = 32, give_up: bool = True
) -> tuple[Floats, dict[int, str]]:
    """Scores of n responses, (n,), NaN where there is none, and why, by row: a row that fails does not stop the others.

    Raises:
        BackendError: With ``give_up``, after three batches (of ``batch`` rows) in a row without one score.
    """
    values = np.full(len(responses), np.nan)
    reasons: dict[int, str] = {}
    without = 0
    for start in range(0, len(responses), batch):
        part = slice(start, start + batch)
        values[part], _, failed = scored_rows(backend, prompts[part], responses[part])
        reasons |= {start + row: reason for row, reason in failed.items()}
        without = without + 1 if np.isnan(values[part]).all() else 0
        if give_up and without == HOPELESS:
            raise BackendError(
                f"expected scores from the judge {backend.name!r}, found that every row of {HOPELESS} batches "
                f"in a row failed ({reasons[start]})",
                sorted(reasons),
            )
    return values, reasons


def judged(system: System, name: str, backend: RewardBackend, task: Task) -> System:
    """A copy of a system that answered a task, a judge's scores as its measure "judge:<name>", NaN where it failed.

    Raises:
        RLAIFError: If the judge was made for another task.
        BackendError: If it failed on all rows.
    """
    own = getattr(backend, "task", task)
    if isinstance(own, Task) and own.name != task.name:
        raise RLAIFError(f"expected a judge of the task {task.name!r}, found that {name!r} judges {own.name!r}")
    values, reasons = score_rows(backend, system.prompts, system.responses)
    check_scored(name, system.name, values, reasons)
    return replace(system, measures={**system.measures, f"judge:{name}": values})


def check_scored(judge: str, system: str, values: Floats, reasons: dict[int, str]) -> None:
    """Raise `BackendError` where a judge scored no response of a system: there is nothing to compare then."""
    if np.isnan(values).all():
        raise BackendError(
            f"expected scores of {system!r} from the judge {judge!r}, found that all {values.size} rows failed "
            f"({next(iter(reasons.values()))})",
            sorted(reasons),
        )


def with_gold(system: System, task: Task) -> System:
    """A copy of a system with the task's gold measure as "gold"; the system itself where the task has none."""
    if task.gold is None:
        return system
    texts = [task.judged(*pair) for pair in zip(system.prompts, system.responses, strict=True)]
    return replace(system, measures={**system.measures, "gold": gold_scores(task, texts)})


def win_rates(
    systems: Sequence[System], measure: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """How often each system's response has more of a measure than another's to the same prompt; ties count 1/2.

    Args:
        systems: Any number, on the same prompts.
        measure: "judge:<name>", "gold", ...
        seed: Of the bootstrap.
        resamples: Each with its own fit of the length control.

    Returns:
        One row for every ordered pair: "judge" (the measure), "a", "b", "raw" (how often a wins: estimate, low, high,
        and "lowest" and "highest", had the failed rows all been losses or wins), "length_controlled" (the same at equal
        length, with the "slope", and whether the fit was "separated" or "extrapolated"; None under two judged prompts),
        "wins", "ties", "losses", "failed", "p_value" (two-sided: the exact sign test, or the bootstrap clustered by
        prompt where prompts repeat) and "p_holm" (over all pairs of this measure). Where all rows failed, "raw" and the
        p-values are None.

    Raises:
        RLAIFError: If a system lacks the measure, or the prompts differ.
    """
    _check_alike(systems)
    for system in systems:
        if measure not in system.measures:
            raise RLAIFError(
                f"expected the measure {measure!r} of system {system.name!r}, found {', '.join(system.measures)}"
            )
    p_first = {}
    for i, j in combinations(range(len(systems)), 2):
        p_first[i, j] = preferred(systems[i], systems[j], measure)
    return _rows(systems, measure, p_first, seed, resamples)


def preferred(first: System, second: System, measure: str) -> Floats:
    """Which of two systems has more of a measure on each of n prompts, (n,): 1 the first, 0 the second, ½ a tie.

    NaN where either has none of it, unless the two responses are the same text, which is a tie.
    """
    with np.errstate(invalid="ignore"):
        p_first = (1 + np.sign(first.measures[measure] - second.measures[measure])) / 2
    return np.where(_same(first, second), 0.5, p_first)


def _same(first: System, second: System) -> NDArray[np.bool_]:
    """Where two systems give the same text, (n,)."""
    return np.array([one == two for one, two in zip(first.responses, second.responses, strict=True)])


def pairwise_wins(
    systems: Sequence[System],
    labeler: PreferenceLabeler,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    batch: int = 32,
    journal: Journal | None = None,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """How often a language model prefers each system's response to another's, asked in both orders.

    About two responses of the same text it is not asked: they are a tie.

    Args:
        systems: Any number, on the same prompts.
        labeler: The judge.
        seed: Of the bootstrap.
        resamples: As in `win_rates`.
        batch: Questions asked at a time.
        journal: Keeps answers, so that they need not be asked again; failures are not kept.
        progress: Told how many of the questions are answered.

    Returns:
        The rows of `win_rates`, a pair won where p_first is above 1/2, and in each: "soft" (mean p_first: estimate,
        low, high) and, of the pairs asked about, "label_mass" (mean), "position_bias" ("same_position" and "first", as
        `PositionBias`; None in score mode, which has no positions), and "reasons" (of failures, with their numbers).

    Raises:
        RLAIFError: If the prompts differ.
        BackendError: If the labeler failed on everything some batches in a row. What was answered is kept.
    """
    _check_alike(systems)
    pairs = list(combinations(range(len(systems)), 2))
    open_ = {(i, j): np.flatnonzero(~_same(systems[i], systems[j])) for i, j in pairs}
    questions = {
        (i, j): [
            labeler.questions(systems[i].prompts[row], systems[i].responses[row], systems[j].responses[row])
            for row in open_[i, j].tolist()
        ]
        for i, j in pairs
    }
    distinct = sorted({question for rows in questions.values() for both in rows for question in both})
    answers = _answers(labeler, distinct, journal, batch, progress)
    labels = {
        pair: [labeler.combine(both, (answers[both[0]], answers[both[1]])) for both in rows]
        for pair, rows in questions.items()
    }
    prompts = {pair: [systems[pair[0]].prompts[row] for row in open_[pair].tolist()] for pair in pairs}
    p_first = {pair: np.full(len(systems[0].prompts), 0.5) for pair in pairs}
    for pair in pairs:
        p_first[pair][open_[pair]] = [label.p_first for label in labels[pair]]
    judge = f"{'pairwise' if labeler.config.mode == 'pairwise' else 'score pairs'}:{labeler.language_model.name}"
    rows = _rows(systems, judge, p_first, seed, resamples)
    for (i, j), row in zip(permutations(range(len(systems)), 2), rows, strict=True):
        pair, p = _directed(p_first, i, j)
        row |= {
            "soft": _soft(p, systems[i].prompts, seed, resamples),
            **_labelling(labels[pair], labeler, prompts[pair]),
        }
    return rows


def _answers(
    labeler: PreferenceLabeler, questions: list[str], journal: Journal | None, batch: int, progress: Progress
) -> dict[str, Answer]:
    keys = {question: labeler.key(question) for question in questions}
    stored = {q: Answer.from_json(journal[k]) for q, k in keys.items() if k in journal} if journal is not None else {}
    answers: dict[str, Answer] = dict(stored)
    open_ = [question for question in questions if question not in stored]
    without = 0
    for start in range(0, len(open_), batch):
        progress(len(answers), len(questions))
        asked = open_[start : start + batch]
        given = dict(zip(asked, labeler.ask(asked), strict=True))
        answers |= given
        if journal is not None:
            journal.append({keys[q]: answer.to_json() for q, answer in given.items() if answer.status == "ok"})
        without = 0 if any(answer.status == "ok" for answer in given.values()) else without + 1
        if without == HOPELESS and not stored:  # what is open of a job may be just what always fails
            raise BackendError(
                f"expected answers from {labeler.language_model.name}, found that every question of {HOPELESS} "
                f"batches in a row failed ({given[asked[-1]].reason}); what was answered is kept"
            )
    progress(len(questions), len(questions))
    return answers


def _check_alike(systems: Sequence[System]) -> None:
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        raise RLAIFError(f"expected systems of different names, found {', '.join(names)}")
    for system in systems[1:]:
        if system.prompts != systems[0].prompts:
            raise RLAIFError(
                f"expected responses to the same prompts in the same order, found others in {names[0]!r} and "
                f"{system.name!r}"
            )


def _rows(
    systems: Sequence[System], judge: str, p_first: dict[tuple[int, int], Floats], seed: int, resamples: int
) -> list[dict[str, Any]]:
    """The rows of all ordered pairs from p_first (n,) of each unordered one, NaN where a row failed."""
    tests = {pair: _p_value(p, systems[pair[0]].prompts, seed, resamples) for pair, p in p_first.items()}
    tested = {pair: p for pair, p in tests.items() if p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())).tolist(), strict=True)) if tested else {}
    rows = []
    for i, j in permutations(range(len(systems)), 2):
        pair, p = _directed(p_first, i, j)
        lengths = [np.maximum(systems[k].measures["length"], 1) for k in (i, j)]
        row = {"judge": judge, "a": systems[i].name, "b": systems[j].name}
        row |= _rate(p, systems[i].prompts, lengths, seed, resamples)
        rows.append({**row, "p_value": tests[pair], "p_holm": adjusted.get(pair)})
    return rows


def _directed(p_first: dict[tuple[int, int], Floats], i: int, j: int) -> tuple[tuple[int, int], Floats]:
    """The unordered pair of two systems, and how surely the first one is preferred, (n,)."""
    return ((i, j), p_first[i, j]) if i < j else ((j, i), 1 - p_first[j, i])


def _kept(p: Floats, prompts: list[str]) -> tuple[Floats, list[str]]:
    """The rows that did not fail, and their prompts."""
    rows = np.flatnonzero(~np.isnan(p))
    return p[rows], [prompts[i] for i in rows]


def _rate(p: Floats, prompts: list[str], lengths: list[Floats], seed: int, resamples: int) -> dict[str, Any]:
    failed = np.isnan(p)
    if failed.all():
        return {"raw": None, "length_controlled": None, "wins": 0, "ties": 0, "losses": 0, "failed": p.size}
    share = win_rate(p, failed=failed, clusters=prompts)
    raw = {**asdict(share.interval), "lowest": share.lowest, "highest": share.highest}
    judged, kept = _kept(p, prompts)
    one, two = (values[~failed] for values in lengths)
    fit = length_control(judged, one, two, clusters=kept, resamples=resamples, seed=seed)
    flags = {"slope": fit.slope, "separated": fit.separated, "extrapolated": fit.extrapolated}
    controlled = {**asdict(fit.controlled), **flags}
    counts = {"wins": share.wins, "ties": share.ties, "losses": share.losses, "failed": share.failed}
    return {"raw": raw, "length_controlled": controlled, **counts}


def _p_value(p: Floats, prompts: list[str], seed: int, resamples: int) -> float | None:
    """Of a win rate of 1/2; None where no row was judged, or too few prompts several times for an interval."""
    judged, kept = _kept(p, prompts)
    if not kept:
        return None
    outcomes = (1 + np.sign(judged - 0.5)) / 2
    if len(set(kept)) == len(kept):
        return sign_test(int((outcomes == 1).sum()), int((outcomes == 0).sum()))
    if len(set(kept)) < FEWEST_UNITS:
        return None
    half = np.full(len(kept), 0.5)
    return paired_bootstrap_test(half, outcomes, clusters=kept, resamples=resamples, seed=seed)


def _soft(p: Floats, prompts: list[str], seed: int, resamples: int) -> dict[str, Any] | None:
    judged, kept = _kept(p, prompts)
    if not kept:
        return None
    return asdict(bootstrap_mean(judged, clusters=kept, resamples=resamples, seed=seed).clipped(0.0, 1.0))


def _labelling(labels: Sequence[Label], labeler: PreferenceLabeler, prompts: Sequence[str]) -> dict[str, Any]:
    """What the labels of one pair of systems say of the judge; the same for both directions."""
    reasons = dict(Counter(label.reason for label in labels if label.status != "ok"))
    masses = [label.mass for label in labels if not math.isnan(label.mass)]
    bias = None
    answered = [(*label.record["answers"], p) for label, p in zip(labels, prompts, strict=True) if label.status == "ok"]
    if labeler.config.mode == "pairwise" and answered:
        first, swapped, kept = zip(*answered, strict=True)
        shown = position_bias([one["p_1"] for one in first], [two["p_1"] for two in swapped], clusters=kept)
        bias = {"same_position": asdict(shown.same_position), "first": asdict(shown.first) if shown.first else None}
    return {"label_mass": float(np.mean(masses)) if masses else None, "position_bias": bias, "reasons": reasons}
