"""What a comparison knows of each policy: how its training went, what it answered, what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.comparison.stages import Stage
from benchmarks.evaluation.asked import Tokens
from benchmarks.evaluation.judges import with_gold
from benchmarks.evaluation.systems import System
from rlaif_env.data.jsonl import read_jsonl
from rlaif_env.data.tasks import Task
from rlaif_env.records import read_metrics
from rlaif_env.statistics import Floats
from rlaif_env.tables import Cell, Table

WINDOW = 5
"""Updates that curves are smoothed over."""

_SURE = 3.0  # standard errors: the highest of many windows is high by chance too


HUMAN_LABEL, AI_LABEL = 0.67, 0.06
"""US dollars for a preference by people, and by PaLM 2 L with a rationale in both orders (the paper's cost section)."""


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


def _mean(several: Sequence[Tokens]) -> Tokens | None:
    if not several:
        return None
    read, written = (sum(values) / len(several) for values in zip(*((t.input, t.output) for t in several), strict=True))
    prices = [t.price for t in several if t.price is not None]
    return Tokens(read, written, all(t.exact for t in several), sum(prices) / len(prices) if prices else None)


def cost_table(outcomes: Sequence[Outcome], price_per_hour: float | None = None) -> Table:
    """People's judgements, tokens, time and price of each arm; of what a training took, the mean over seeds.

    Args:
        outcomes: The policies.
        price_per_hour: Of the machine; None leaves its time without a price.
    """
    rows: list[list[Cell]] = []
    priced_tokens = any(t.price is not None for outcome in outcomes for t in outcome.tokens.values())
    for arm in arms_of(outcomes)[1:]:
        cost, chosen = cost_of(outcomes, arm), [outcome.tokens for outcome in outcomes if outcome.arm == arm]
        tokens = chosen[0].get("labels"), _mean([each["training"] for each in chosen if "training" in each])
        seconds = (cost.labelling, cost.reward_model, cost.training, cost.seconds)
        prices = [cost.people * HUMAN_LABEL]
        if priced_tokens:
            prices.append(sum((each.price or 0.0 for each in tokens if each), 0.0))
        if price_per_hour is not None:
            prices.append(cost.seconds / 3600 * price_per_hour)
        prices += [*([sum(prices)] if len(prices) > 1 else []), cost.labels * AI_LABEL]
        asked_for = ("0" if each is None else str(each) for each in tokens)
        rows.append(
            [arm, cost.people, cost.labels, *asked_for, *map(round, seconds), *(f"{price:,.2f}" for price in prices)]
        )
    asked = ["people's judgements", "AI labels", "tokens for labels, in + out", "tokens in training, in + out"]
    spent = [f"{stage}, s" for stage in ("labelling", "reward model", "training", "sum")]
    prices_of = [f"people at ${HUMAN_LABEL}, $", *(["tokens, $"] if priced_tokens else [])]
    prices_of += [] if price_per_hour is None else [f"machine at ${price_per_hour:g} an hour, $"]
    prices_of += ["price, $"] if len(prices_of) > 1 else []
    return Table(
        "What each arm cost",
        ["arm", *asked, *spent, *prices_of, f"for comparison: AI labels at ${AI_LABEL}, $"],
        rows,
        "From labels to policy; what two arms share is counted in both; of a training, the mean over seeds. Seconds: "
        "wall time on the machine that made it, other work on it included. Tokens: of all questions, those too that a "
        f"cache answered. People's judgements at the paper's ${HUMAN_LABEL}, also where they came with the task; for "
        f"comparison what the labels would have cost by the paper's PaLM 2 L (${AI_LABEL}, with rationales)."
        + ("" if priced_tokens else " The labeler's tokens have no price (--labeler.server.limits.price-in).")
        + ("" if price_per_hour is not None else " The machine has no price (--price-per-hour)."),
    )


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
