"""Figures of a comparison of reward backends: learning curves, reward against gold, KL against gold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison.outcomes import WINDOW, History, Outcome, arms_of, over_optimised_from

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES"]

Floats = NDArray[np.float64]

_COLOURS = ("#3b6fb6", "#c8553d", "#3f8f5f", "#8a5fb0", "#b58a2b", "#4aa3a2")


def _by_arm(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    trained = [outcome for outcome in outcomes if outcome.history is not None]
    return {arm: [o for o in trained if o.arm == arm] for arm in arms_of(trained)}


def _standardised(history: History) -> Floats:
    """The reward's change since the start, in standard deviations of the first updates' samples."""
    first = history.samples["reward"][history.samples["step"] <= history.steps[0] + WINDOW - 1]
    deviation = float(first.std()) or 1.0
    return np.asarray((history.curves["reward"] - first.mean()) / deviation, np.float64)


def _smooth(values: Floats) -> Floats:
    """Mean over the window that ends at each update."""
    total = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, values.size + 1)
    starts = np.maximum(ends - WINDOW, 0)
    return np.asarray((total[ends] - total[starts]) / (ends - starts), np.float64)


def _axes(panels: int) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(6, 4.2) if panels == 1 else (3.6 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for empty in axes[panels:]:
        empty.set_visible(False)
    axes = axes[:panels]
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _learning_curves(outcomes: Sequence[Outcome]) -> Figure | None:
    groups = _by_arm(outcomes)
    if not groups:
        return None
    panels: dict[str, tuple[str, Callable[[History], Floats]]] = {
        "reward": ("own reward, change in sd of the start", _standardised)
    }
    first = next(iter(groups.values()))[0].history
    assert first is not None
    for name, label in (("gold", "gold measure"), ("kl", "KL to SFT, nats"), ("length", "length, tokens")):
        if name in first.curves:
            panels[name] = (label, lambda history, name=name: history.curves[name])  # type: ignore[misc]
    figure, axes = _axes(len(panels))
    for axis, (label, curve) in zip(axes, panels.values(), strict=True):
        for colour, (arm, group) in zip(_COLOURS, groups.items(), strict=False):
            runs = [(o.history.steps, _smooth(curve(o.history))) for o in group if o.history is not None]
            length = min(len(steps) for steps, _ in runs)
            table = np.stack([values[:length] for _, values in runs])
            axis.plot(runs[0][0][:length], table.mean(0), color=colour, label=arm, linewidth=1.6)
            if len(runs) > 1:
                axis.fill_between(
                    runs[0][0][:length], table.min(0), table.max(0), color=colour, alpha=0.15, linewidth=0
                )
        axis.set_xlabel("update")
        axis.set_title(label, fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _trajectories(outcomes: Sequence[Outcome], x: str, label: str) -> Figure | None:
    """The gold measure against something, along each training."""
    groups = _by_arm(outcomes)
    some = [o.history for group in groups.values() for o in group if o.history is not None]
    if not some or "gold" not in some[0].curves or (x != "reward" and x not in some[0].curves):
        return None
    figure, (axis,) = _axes(1)
    for colour, (arm, group) in zip(_COLOURS, groups.items(), strict=False):
        for i, outcome in enumerate(group):
            history = outcome.history
            assert history is not None
            across = _smooth(_standardised(history) if x == "reward" else history.curves[x])
            gold = _smooth(history.curves["gold"])
            axis.plot(across, gold, color=colour, linewidth=1.4, alpha=0.8, label=arm if i == 0 else None)
            axis.plot(across[-1], gold[-1], "o", color=colour, markersize=5)
            since = over_optimised_from(history.steps, history.curves["reward"], history.curves["gold"])
            if since is not None:
                at = history.steps.index(since)
                axis.plot(across[at], gold[at], "X", color=colour, markersize=10)
    axis.set_xlabel(label)
    axis.set_ylabel("gold measure")
    axis.legend(frameon=False, fontsize=8)
    return figure


FIGURES: Sequence[tuple[str, str, str, Callable[[Sequence[Outcome]], Figure | None]]] = (
    (
        "curves.svg",
        "Learning curves",
        "Mean over seeds, on the training's prompts, smoothed over 5 updates; bands: least to greatest seed.",
        _learning_curves,
    ),
    (
        "reward-gold.svg",
        "Reward against gold",
        "Each training's way, smoothed over 5 updates; ● its end; ✖ where the reward goes on rising and gold falls.",
        lambda outcomes: _trajectories(outcomes, "reward", "own reward, change in sd of the start"),
    ),
    (
        "kl-gold.svg",
        "KL against gold",
        "What a nat of distance from SFT buys; each training's way, ● its end.",
        lambda outcomes: _trajectories(outcomes, "kl", "KL to SFT, nats per response"),
    ),
)
