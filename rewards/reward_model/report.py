"""How good a reward model is: accuracy with its interval, loss over the labels' own entropy, calibration, plots.

Every figure is on pairs whose texts were not in training. Accuracy counts ties one half. Where pairs share texts
without sharing a prompt (two of many snippets compared), the interval counts that in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from rewards.reward_model.division import counts
from rlaif_env.api import Preference, RLAIFError
from rlaif_env.statistics import (
    Clusters,
    Dyads,
    Interval,
    ReliabilityBin,
    accuracy,
    brier,
    clusters_of_pairs,
    excess_cross_entropy,
    expected_calibration_error,
    reliability_table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PairFigures:
    """Figures of predicted preferences on judged pairs."""

    pairs: int  # how many
    prompts: int  # of how many distinct prompts, 0 without any
    texts: int  # and of how many distinct texts
    accuracy: Interval  # share on which prediction and judgement prefer the same response, ties one half
    min_gap: float  # least difference of the two mean ratings in `accuracy_at_gap`
    # Accuracy where people's mean ratings differ by ``min_gap``; None where there are no ratings
    accuracy_at_gap: Interval | None
    excess_cross_entropy: float  # cross-entropy minus the labels' entropy, nats a pair; 0 is perfect
    brier: float  # mean squared difference of predicted and judged probability
    ece: float  # expected calibration error, five bins of the confidence
    longer: Interval  # accuracy of preferring the longer response, for comparison
    reliability: Sequence[ReliabilityBin]  # confidence against how often it is right

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON has them; empty bins of the reliability table are left out."""
        return asdict(self) | {"reliability": [asdict(row) for row in self.reliability if row.n]}


def pair_figures(margin: ArrayLike, records: Sequence[Preference], *, min_gap: float) -> PairFigures:
    """Figures of predicted log-odds r1 - r2, (m,), on m judged pairs; mean ratings, if any, are in ``meta["means"]``.

    No figure depends on which response of a pair is listed first.

    Raises:
        RLAIFError: If there are no pairs.
    """
    odds = np.asarray(margin, dtype=np.float64)
    target = np.array([record.p_first for record in records])
    predicted = 1 / (1 + np.exp(-odds))
    longer = [(1 + np.sign(len(r.response_1) - len(r.response_2))) / 2 for r in records]
    means = [record.meta.get("means", (math.nan, math.nan)) for record in records]
    clear = [i for i, mean in enumerate(means) if abs(mean[0] - mean[1]) >= min_gap - 1e-9]
    return PairFigures(
        **counts(records),
        accuracy=pair_accuracy(predicted, records),
        min_gap=min_gap,
        accuracy_at_gap=pair_accuracy(predicted[clear], [records[i] for i in clear]) if clear else None,
        excess_cross_entropy=excess_cross_entropy(odds, target),
        brier=brier(predicted, target),
        ece=expected_calibration_error(predicted, target),
        longer=pair_accuracy(longer, records),
        reliability=reliability_table(predicted, target, clusters=_clusters(records)),
    )


def pair_accuracy(p_first: ArrayLike, records: Sequence[Preference]) -> Interval:
    """Share of m pairs on which prediction and judgement prefer the same response, ties one half, with an interval.

    Pairs that share a prompt or, without prompts, a text depend on each other: see `clusters_of_pairs`.

    Raises:
        RLAIFError: If there are no pairs, or the numbers differ.
    """
    predicted = np.asarray(p_first, dtype=np.float64)
    if not records or len(predicted) != len(records):
        raise RLAIFError(
            f"expected a prediction for each of at least one pair, found {len(predicted)} and {len(records)}"
        )
    return accuracy(predicted, [record.p_first for record in records], clusters=_clusters(records))


def _clusters(records: Sequence[Preference]) -> Clusters | Dyads:
    return clusters_of_pairs(*zip(*((r.prompt, r.response_1, r.response_2) for r in records), strict=True))


def reliability_plot(figures: Mapping[str, PairFigures]) -> Figure:
    """Confidence in the favourite against how often it is preferred, a line for each set of pairs, with intervals."""
    figure, axes = _axes(4.6)
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1, linestyle="--")
    for name, pairs in figures.items():
        rows = [(row.predicted, row.observed) for row in pairs.reliability if row.observed is not None]
        limits = [(o.estimate, o.low, o.high) for _, o in rows]
        y = np.array(limits, dtype=np.float64)  # a bin of too few pairs for an interval has NaN here, and no bar
        label = f"{name} (n = {pairs.pairs}, ECE {pairs.ece:.3f})"
        axes.errorbar(
            [x for x, _ in rows], y[:, 0], yerr=np.abs(y[:, 1:] - y[:, :1]).T, marker="o", capsize=2, label=label
        )
    what = "confidence: predicted probability of the response it prefers"
    axes.set(xlabel=what, ylabel="how often that one is preferred", xlim=(0.5, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    return figure


def curve_plot(curve: Sequence[Mapping[str, Any]], what: str) -> Figure:
    """Accuracy by number of training pairs, with its interval."""
    from matplotlib.ticker import ScalarFormatter

    figure, axes = _axes(3.6)
    pairs = [row["pairs"] for row in curve]
    columns = ([row["accuracy"][key] for row in curve] for key in ("estimate", "low", "high"))
    estimate, low, high = (np.array(column, dtype=np.float64) for column in columns)  # None is NaN, not shown
    axes.fill_between(pairs, low, high, alpha=0.2)
    axes.plot(pairs, estimate, marker="o")
    axes.set(xlabel="training pairs", ylabel=f"accuracy on {what}")
    axes.set_xscale("log", base=2)  # the sizes double
    axes.xaxis.set_major_formatter(ScalarFormatter())
    return figure


def _axes(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes
