"""Figures of a comparison of reward backends: learning curves, reward against gold, KL against gold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.comparison.outcomes import WINDOW, History, Outcome, arms_of, over_optimised_from
from rlaif_env.statistics import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#3b6fb6", "#c8553d", "#3f8f5f", "#8a5fb0", "#b58a2b", "#4aa3a2")
_REWARD = "own reward, change in sd of the start"
_PANELS = {"reward": _REWARD, "gold": "gold measure", "kl": "KL to SFT, nats", "length": "length, tokens"}


def _histories(outcomes: Sequence[Outcome]) -> dict[str, list[History]]:
    """The trainings of each arm that has any."""
    by_arm = {arm: [o.history for o in outcomes if o.arm == arm and o.history] for arm in arms_of(outcomes)}
    return {arm: histories for arm, histories in by_arm.items() if histories}


def _curve(history: History, name: str) -> Floats:
    """A curve as the mean over the window that ends at each update, (U,).

    The reward is its change since the start, in standard deviations of the first updates' samples.
    """
    values = history.curves[name]
    if name == "reward":
        first = history.samples.measures["reward"][history.samples.measures["step"] < history.steps[0] + WINDOW]
        values = (values - first.mean()) / (float(first.std()) or 1.0)
    total = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, values.size + 1)
    starts = np.maximum(ends - WINDOW, 0)
    return np.asarray((total[ends] - total[starts]) / (ends - starts), np.float64)


def _axes(panels: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(6, 4.2) if panels == 1 else (3.6 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for empty in axes[panels:]:
        empty.set_visible(False)
    for axis in axes[:panels]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:panels]


def _learning_curves(outcomes: Sequence[Outcome]) -> Figure | None:
    histories = _histories(outcomes)
    if not histories:
        return None
    some = next(iter(histories.values()))[0]
    names = [name for name in _PANELS if name in some.curves]
    figure, axes = _axes(len(names))
    for axis, name in zip(axes, names, strict=True):
        for colour, (arm, group) in zip(_COLOURS, histories.items(), strict=False):
            length = min(len(history.steps) for history in group)
            steps, curves = group[0].steps[:length], np.stack([_curve(one, name)[:length] for one in group])
            axis.plot(steps, curves.mean(0), color=colour, label=arm, linewidth=1.6)
            if len(group) > 1:
                axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel("update")
        axis.set_title(_PANELS[name], fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _trajectories(outcomes: Sequence[Outcome], x: str, label: str) -> Figure | None:
    """The gold measure against another curve, along each training."""
    histories = _histories(outcomes)
    if not histories or not {"gold", x} <= next(iter(histories.values()))[0].curves.keys():
        return None
    figure, (axis,) = _axes(1)
    for colour, (arm, group) in zip(_COLOURS, histories.items(), strict=False):
        for i, history in enumerate(group):
            across, gold = _curve(history, x), _curve(history, "gold")
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
        lambda outcomes: _trajectories(outcomes, "reward", _REWARD),
    ),
    (
        "kl-gold.svg",
        "KL against gold",
        "What a nat of distance from SFT buys; each training's way, ● its end.",
        lambda outcomes: _trajectories(outcomes, "kl", "KL to SFT, nats per response"),
    ),
)
"""File, title, caption, and what draws it (None where there is nothing to draw)."""
