"""What a comparison knows of each policy: how its training went, what it answered, what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.comparison.stages import Stage
from benchmarks.evaluation.judges import with_gold
from benchmarks.evaluation.systems import System
from rlaif_env.data.jsonl import read_jsonl
from rlaif_env.data.tasks import Task
from rlaif_env.records import read_metrics
from rlaif_env.statistics import Floats

WINDOW = 5
"""Updates that curves are smoothed over."""

_SURE = 3.0  # standard errors: the highest of many windows is high by chance too


@dataclass(frozen=True)
class History:
    """How a training went."""

    steps: list[int]  # U updates
    curves: Mapping[str, Floats]  # by name, (U,): "reward", "kl", "length", "entropy", "gold"
    samples: System  # the sampled responses, with the measures "step", "reward" and "gold"

    @classmethod
    def read(cls, folder: Path, task: Task) -> History:
        """The history in a training's folder; the gold measure of each update is taken from its samples."""
        metrics = read_metrics(folder / "metrics.jsonl")
        steps = [int(row["step"]) for row in metrics]
        names: Sequence[str] = [name for name in ("reward", "kl", "length", "entropy") if name in metrics[0]]
        curves = {name: np.array([row[name] for row in metrics], np.float64) for name in names}
        rows = list(read_jsonl(folder / "samples.jsonl", lambda row: row))
        prompts, responses = ([row[name] for row in rows] for name in ("prompt", "response"))
        measures = {name: np.array([row[name] for row in rows], np.float64) for name in ("step", "reward")}
        samples = with_gold(System(folder.name, str(folder), prompts, responses, measures), task)
        if task.gold is not None:
            gold, step_of = samples.measures["gold"], samples.measures["step"]
            curves["gold"] = np.array([gold[step_of == step].mean() for step in steps])
        return cls(steps, curves, samples)


@dataclass(frozen=True)
class Tokens:
    """What a language model read and wrote."""

    input: float
    output: float
    exact: bool  # counted, and not guessed from the characters
    price: float | None = None  # None where the model has no prices

    def __str__(self) -> str:
        return f"{'' if self.exact else 'about '}{self.input:,.0f} + {self.output:,.0f}"


@dataclass(frozen=True)
class Outcome:
    """One policy: an arm, a seed, its answers and what was measured of them, how it got there, what it cost."""

    arm: str
    seed: int
    system: System
    history: History | None
    costs: Mapping[str, Stage]
    # Of a language model: "labels" and "training", where there is one
    tokens: Mapping[str, Tokens] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What an arm took, from labels to policy; what arms share is in each one's."""

    people: int  # judgements by people
    labels: int  # by the labeler
    labelling: float  # seconds, as the others
    reward_model: float
    training: float  # mean over seeds

    @property
    def seconds(self) -> float:
        """All of it; people's own time is in none."""
        return self.labelling + self.reward_model + self.training


def cost_of(outcomes: Sequence[Outcome], arm: str) -> Cost:
    """What an arm cost, by the reports of its stages."""
    chosen = [outcome.costs for outcome in outcomes if outcome.arm == arm]
    labels, model = chosen[0].get("labels"), chosen[0].get("reward model")
    report = {} if labels is None else labels.read_json("report.json")
    sources = {} if model is None else model.read_json("run/report.json")["labels"]["sources"]
    people = sum(count for who, count in sources.items() if who.startswith("human"))
    people += (report.get("calibration") or {"asked": 0})["asked"]
    labelling, modelling = (0.0 if stage is None else stage.seconds for stage in (labels, model))
    training = sum(costs["training"].seconds for costs in chosen) / len(chosen)
    return Cost(people, report.get("labelled", 0), labelling, modelling, training)


def arms_of(outcomes: Sequence[Outcome]) -> list[str]:
    """The arms in their order, "sft" first."""
    return list(dict.fromkeys(outcome.arm for outcome in outcomes))


def over_optimised_from(steps: Sequence[int], reward: Floats, gold: Floats) -> int | None:
    """The update since which the reward rises while the gold measure falls (Gao et al. 2023), None if it does not.

    Windows of five updates. It is told where the last window's gold mean is under the best window's by more than three
    standard errors of the difference, and its reward above.

    Args:
        steps: U updates.
        reward: (U,) mean reward of each.
        gold: (U,) mean gold measure of each.
    """
    count = len(steps) // WINDOW
    if count < 3:
        return None
    cut = len(steps) - count * WINDOW  # the first ones, so that the end is whole
    golds, rewards = (np.asarray(values)[cut:].reshape(count, WINDOW) for values in (gold, reward))
    best = int(golds.mean(1).argmax())
    if best == count - 1 or rewards[-1].mean() <= rewards[best].mean():
        return None
    error = float(np.sqrt((golds[best].var(ddof=1) + golds[-1].var(ddof=1)) / WINDOW))
    fall = float(golds[best].mean() - golds[-1].mean())
    return int(steps[cut + best * WINDOW]) if fall > _SURE * error else None
