"""The check of how far a reward may be pushed: reward and gold of the best of n samples, before any training.

The best of n samples by a reward is a policy whose Kullback-Leibler divergence from the sampled one is at most
log n - (n - 1) / n nats (Stiennon et al. 2020, appendix G.3, as an equality; Beirami et al. 2024: an upper bound, close
where no single response is likely). From N samples of a prompt its expected reward and gold are estimated without bias
over all subsets of n (Nakano et al. 2021, appendix I; so do Gao et al. 2022): the i-th lowest of them is the best of
C(i - 1, n - 1) of the C(N, n) subsets. Where gold falls while the reward rises, the reward is over-optimised.

Training spends its KL otherwise than picking does (Gao et al. 2022 find that it needs more for the same reward): what
runs did is drawn beside the curve, by their own KL.

Notation: P prompts, N samples of each, m numbers n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.audit.api import Bound, Measured, Measurement, NotMeasured
from benchmarks.audit.materials import Materials, SampledPrompt
from benchmarks.audit.subject import Subject
from benchmarks.audit.verdicts import LEVEL, IntervalAt, exactly, mean_at, slope_at
from benchmarks.evaluation.systems import run_of
from benchmarks.report.contents import Figure
from benchmarks.report.curves import Line, lines
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.data.jsonl import check_text, read_jsonl
from rlaif_env.data.tasks import load_task
from rlaif_env.records import read_metrics
from rlaif_env.statistics import Floats

MOST_FALL = 0.1
"""How far gold may be under its highest at the largest n, in SDs of gold over the samples of a prompt."""

_OF_GROUPS = 32  # samples of a prompt that a judge of groups compares, which costs each as many opponents
_STRETCHES = 10  # of a run's updates


# --- the curve --------------------------------------------------------------------------------------------------------


def kl_of(n: NDArray[np.int64]) -> Floats:
    """The bound on the KL of the best of n samples, nats: log n - (n - 1) / n."""
    kl: Floats = np.log(n) - (n - 1) / n
    return kl


def best_of(rewards: Floats, figures: Floats, n: NDArray[np.int64]) -> Floats:
    """The expected figures of the best of n of N samples, over all subsets of n.

    Among equal rewards each is as likely to be taken.

    Args:
        rewards: What is picked by, (N,).
        figures: What is wanted of the picked sample, (N,): the rewards themselves, or gold.
        n: (m,), from 1 to N.

    Returns:
        (m,).

    Raises:
        RLAIFError: If an n is under 1 or over N.
    """
    from scipy.special import gammaln

    size = len(rewards)
    if n.min() < 1 or n.max() > size:
        raise RLAIFError(f"expected the best of 1 to {size} samples, as many as there are, found n = {n.tolist()}")
    order = np.argsort(rewards, kind="stable")
    rank, of = np.arange(1, size + 1)[None, :], n[:, None]  # (1, N), (m, 1)

    def log_choose(a: NDArray[np.int64], b: NDArray[np.int64]) -> Floats:
        logs: Floats = gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)
        return logs

    there = rank >= of  # a lower one is the best of no n
    weights = np.where(
        there, np.exp(log_choose(np.where(there, rank, of) - 1, of - 1) - log_choose(np.array(size), of)), 0
    )
    starts = np.flatnonzero(np.diff(rewards[order], prepend=-np.inf) > 0)
    sizes = np.diff(np.append(starts, size))
    means = np.add.reduceat(figures[order], starts) / sizes
    expected: Floats = np.add.reduceat(weights, starts, axis=1) @ means
    return expected


@dataclass(frozen=True)
class Curve:
    """Reward and gold of the best of n by prompt, in SDs over the samples of a prompt, above a single sample's."""

    n: NDArray[np.int64]  # (m,) 1, 2, 4, ..., N
    reward: Floats  # (P, m)
    gold: Floats  # (P, m)
    gold_sd: float  # what gold is measured in

    @property
    def kl(self) -> Floats:
        """Bounds on the KL, nats, (m,)."""
        return kl_of(self.n)

    @property
    def highest(self) -> int:
        """Place of the n with the highest mean gold."""
        return int(self.gold.mean(axis=0).argmax())

    @property
    def highest_without(self) -> NDArray[np.int64]:
        """The same without each prompt in turn, (P,)."""
        places: NDArray[np.int64] = (self.gold.sum(axis=0) - self.gold).argmax(axis=1)
        return places

    @property
    def fall(self) -> Floats:
        """Gold at the largest n less that at the n that is best for all other prompts, (P,).

        The n is chosen without the prompt: the highest of several means would be too high for its own prompts.
        """
        fall: Floats = self.gold[:, -1] - np.take_along_axis(self.gold, self.highest_without[:, None], axis=1)[:, 0]
        return fall


def curve_of(rewards: Sequence[Floats], golds: Sequence[Floats]) -> Curve:
    """The curve of P prompts, each with the rewards and the gold of its samples; n goes up to the fewest samples.

    Raises:
        NotMeasured: If there are under two prompts or samples, or no sample differs from others in reward and in gold.
    """
    fewest = min((len(row) for row in rewards), default=0)
    if len(rewards) < 2 or fewest < 2:
        raise NotMeasured(f"it takes 2 prompts of 2 samples, and there are {len(rewards)} of {fewest}")
    n = np.unique(np.append(2 ** np.arange(int(np.log2(fewest)) + 1), fewest))
    spreads = [float(np.sqrt(np.mean([row.var(ddof=1) for row in rows]))) for rows in (rewards, golds)]
    if min(spreads) <= 0:
        raise NotMeasured("all samples of a prompt have the same reward, or the same gold")
    reward, gold = (
        np.array([best_of(row, values, n) for row, values in zip(rewards, rows, strict=True)]) / spread
        for rows, spread in zip((rewards, golds), spreads, strict=True)
    )
    return Curve(n, reward - reward[:, :1], gold - gold[:, :1], spreads[1])


def best_of_n(subject: Subject, materials: Materials) -> Measured:
    """How far the reward may be pushed: where gold turns down among the best of n samples of the policy."""
    materials.gold([], [])
    samples = materials.samples
    most = _OF_GROUPS if subject.judges_groups else None
    rewards, golds = [], []
    for one in (SampledPrompt(one.prompt, one.responses[:most]) for one in samples):
        prompts = [one.prompt] * len(one.responses)
        values = subject.score(prompts, one.responses, [("best-of-n", one.prompt)] * len(prompts))
        there = np.isfinite(values)
        rewards.append(values[there])
        golds.append(materials.gold(prompts, one.responses)[there])
    curve = curve_of(rewards, golds)
    runs = [read_run(path, materials, curve.gold_sd) for path in materials.runs]
    figures = [*_figures(curve), *(_beside(run, curve) for run in runs)]
    return Measured(figures, [_picture(curve, runs, subject)])


def _figures(curve: Curve) -> list[Measurement]:
    last, top, kl = int(curve.n[-1]), curve.highest, curve.kl
    gained, reward = curve.gold[:, -1], float(curve.reward[:, -1].mean())
    ends = [f"{kl[place]:.1f}" for place in (curve.highest_without.min(), curve.highest_without.max())]
    spread = f" ({ends[0]} to {ends[1]} as prompts are left out)" if ends[0] != ends[1] else ""
    where = f"gold is highest at KL {kl[top]:.1f} nats{spread}"
    return [
        Measurement(
            f"gold of the best of {last} above that of a sample",
            mean_at(gained),
            Bound("more than a sample's", low=0.0),
            "What the reward picks is better by the gold measure, too.",
            "What the reward picks is worse by the gold measure: do not train on it.",
            "SD",
        ),
        Measurement(
            f"gold of the best of {last} under its highest at a smaller n",
            mean_at(curve.fall),
            Bound(f"falls by at most {MOST_FALL:g} SD", low=-MOST_FALL),
            f"No turn up to n = {last}: it may be pushed to about KL {kl[-1]:.1f} nats.",
            f"Gold turns down while the reward rises: {where}; stop there, or weigh the KL so that it stays under it.",
            "SD",
        ),
        Measurement(
            "KL at which gold is highest (nats)",
            exactly(float(kl[top]), len(gained)),
            None,
            f"By the estimate {where}.",
        ),
        Measurement(
            f"reward of the best of {last} above that of a sample",
            mean_at(curve.reward[:, -1]),
            None,
            "What picking gains by the reward itself; 2.8 for one that spreads as a normal variable and n = 256.",
            unit="SD",
        ),
        Measurement(
            f"gold gained for reward gained, both in SD, at n = {last}",
            _ratio_at(gained, curve.reward[:, -1], reward),
            None,
            "1 is a reward that is the gold measure; near 0, one that is blind to it.",
        ),
    ]


def _ratio_at(above: Floats, below: Floats, mean: float) -> IntervalAt:
    """The ratio of two means over prompts, its error linearised; (P,) each, and the mean of the second."""
    ratio = float(above.mean()) / mean
    return mean_at(ratio + (above - ratio * below) / mean)


# --- runs beside it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What a run of ``rlaif train`` did, in stretches of equally many updates."""

    name: str
    kl: Floats  # (s,) mean KL of each stretch, nats a response
    gold: Floats  # (s,) mean gold above the first stretch's, in the curve's SDs
    updates: tuple[Floats, ...]  # gold of each update of each stretch, in the same unit

    def fall_at(self) -> IntervalAt:
        """Gold of the last stretch less the highest: the level is shared by all stretches that may be it."""
        top = int(self.gold.argmax())
        if top == len(self.gold) - 1:
            return exactly(0.0, len(self.updates[top]))
        pair = (self.updates[top], self.updates[-1])
        late = np.repeat([0.0, 1.0], [len(part) for part in pair])
        difference = slope_at(late, np.concatenate(pair))
        return lambda level: difference(1 - (1 - level) / (len(self.gold) - 1))


def read_run(folder: Path, materials: Materials, gold_sd: float = 1.0) -> Trained:
    """A run's gold by its KL, from its metrics.jsonl; gold that was not logged is measured on its samples.jsonl.

    Args:
        folder: Of the run.
        materials: Whose task and gold measure; what a gold model says is always measured on the samples.
        gold_sd: What its gold is divided by.

    Raises:
        RLAIFError: If it is no folder of a training on this task, or has under 20 updates with gold and KL.
        DataError: For bad lines of its samples.
        BackendError: If the gold model fails.
    """
    rows, task = [row for row in read_metrics(folder) if "kl" in row], materials.task
    if (config := run_of(folder, "train")) is None:
        raise RLAIFError(f"expected a run of rlaif train in {folder}, found no configuration of one; name its folder")
    if (other := load_task(config["task"]).name) != task.name:
        raise RLAIFError(
            f"expected a run on the task {task.name!r} in {folder}, found one on {other!r}: its gold would be another; "
            "give runs on the audited task, or --task"
        )
    if materials.gold_model is not None:
        rows = [{name: value for name, value in row.items() if name != "gold"} for row in rows]
    if (folder / "samples.jsonl").is_file() and materials.gold_name != "none" and any("gold" not in r for r in rows):
        measured = _gold_of_samples(folder / "samples.jsonl", materials)
        rows = [{"gold": measured[step], **row} if (step := int(row["step"])) in measured else row for row in rows]
    rows = [row for row in rows if "gold" in row]
    if len(rows) < 2 * _STRETCHES:
        raise RLAIFError(
            f"expected at least {2 * _STRETCHES} updates with their KL and gold in {folder}, found {len(rows)}: give "
            "the folder of a longer run of rlaif train, with its samples.jsonl, and a gold measure (the task's or "
            "--gold)"
        )
    kl, gold = (np.array([row[name] for row in rows]) for name in ("kl", "gold"))
    parts = np.array_split(np.arange(len(rows)), _STRETCHES)
    scaled = gold / gold_sd
    means = np.array([scaled[part].mean() for part in parts])
    name = folder.resolve().name
    return Trained(
        name, np.array([kl[part].mean() for part in parts]), means - means[0], tuple(scaled[p] for p in parts)
    )


def _gold_of_samples(file: Path, materials: Materials) -> dict[int, float]:
    """Mean gold of a run's responses by update."""
    rows = list(read_jsonl(file, _sample))
    gold = materials.gold([prompt for _, prompt, _ in rows], [response for *_, response in rows])
    steps = np.array([step for step, *_ in rows])
    return {step: float(gold[steps == step].mean()) for step in dict.fromkeys(steps.tolist())}


def _sample(row: Mapping[str, Any]) -> tuple[int, str, str]:
    prompt, response = (check_text(row, name, may_be_empty=True) for name in ("prompt", "response"))
    if type(step := row.get("step")) is not int:
        raise DataError(f"expected the number of an update as step, found {step!r:.60}")
    return step, prompt, response


def _beside(run: Trained, curve: Curve) -> Measurement:
    """Whether and where gold turned down in a run, beside what the curve says."""
    top, fall = int(run.gold.argmax()), run.fall_at()
    sure, last = fall(LEVEL), run.kl[-1]
    said = mean_at(curve.fall)(LEVEL)
    predicted = "no turn up to KL" if said.high is None or said.high >= 0 else "a turn at KL"
    place = -1 if predicted.startswith("no") else curve.highest
    did = (
        f"turned at KL {run.kl[top]:.1f}" if sure.high is not None and sure.high < 0 else f"no turn up to KL {last:.1f}"
    )
    return Measurement(
        f"run {run.name}: gold at its end (KL {last:.1f}) less that of its best tenth (KL {run.kl[top]:.1f})",
        fall,
        None,
        f"Training: {did}. The best of n: {predicted} {curve.kl[place]:.1f}.",
        unit="SD",
    )


def _picture(curve: Curve, runs: Sequence[Trained], subject: Subject) -> Figure:
    drawn = []
    for name, values in (("reward", curve.reward), ("gold", curve.gold)):
        ends = [mean_at(column)(LEVEL) for column in values.T]
        known = all(end.low is not None and end.high is not None for end in ends)
        band = [np.array([getattr(end, side) for end in ends], float) if known else None for side in ("low", "high")]
        drawn.append(Line(name, curve.kl, values.mean(axis=0), *band))
    drawn += [Line(f"gold, run {run.name}", run.kl, run.gold) for run in runs]
    last = int(curve.n[-1])
    size = f"{len(curve.gold)} prompts, n = 1 to {last}; bands of 95 % over prompts at each n"
    caption = (
        f"Above one sample's, in SDs over a prompt's samples; {size}. The KL of the best of n is at most "
        f"log n - (n - 1)/n. Gold: {subject.materials.gold_name}."
    )
    if subject.judges_groups:
        caption += (
            f" A judge of groups compares {last} samples of a prompt with each other, as many as it is asked for."
        )
    if runs:
        caption += " Runs: tenths of their updates by their mean KL, gold above that of their first."
    return lines("Reward and gold of the best of n", drawn, across="KL from the sampled policy (nats)", caption=caption)
