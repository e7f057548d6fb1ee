"""Figures of a comparison of reward backends: learning curves, reward against gold, KL against gold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.comparison.outcomes import WINDOW, History, Outcome, arms_of, over_optimised_from
from rlaif_env.statistics import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#3b6fb6", "#c8553d", "#3f8f5f", "#8a5fb0", "#c39a1f", "#2ba6a4", "#6b6b6b", "#d0559b")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
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


def _looks(histories: Mapping[str, Sequence[History]]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each arm; two are alike after 24 only."""
    return {
        arm: {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _DASHES[i // 4 % len(_DASHES)]}
        for i, arm in enumerate(histories)
    }


def _mean_curve(histories: Sequence[History], name: str) -> tuple[Floats, Floats]:
    """A curve of each seed (S, U), as far as the shortest training goes, and their mean (U,)."""
    length = min(len(history.steps) for history in histories)
    curves = np.stack([_curve(history, name)[:length] for history in histories])
    return curves, np.asarray(curves.mean(0))


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
        for arm, look in _looks(histories).items():
            curves, mean = _mean_curve(histories[arm], name)
            steps = histories[arm][0].steps[: len(mean)]
            axis.plot(steps, mean, **look, label=arm, linewidth=1.6)
            if len(curves) > 1:
                axis.fill_between(steps, curves.min(0), curves.max(0), color=look["color"], alpha=0.12, linewidth=0)
        axis.set_xlabel("update")
        axis.set_title(_PANELS[name], fontsize=10)
    _legend(figure, axes[0])
    return figure


def _legend(figure: Figure, axis: Any) -> None:
    """The arms below the panels, where no curve is."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=8)


def _trajectories(outcomes: Sequence[Outcome], x: str, label: str) -> Figure | None:
    """The gold measure against another curve: each arm's way, mean over its seeds, and where each seed ends."""
    histories = _histories(outcomes)
    if not histories or not {"gold", x} <= next(iter(histories.values()))[0].curves.keys():
        return None
    figure, (axis,) = _axes(1)
    for arm, look in _looks(histories).items():
        (across, mean_across), (gold, mean_gold) = (_mean_curve(histories[arm], name) for name in (x, "gold"))
        axis.plot(mean_across, mean_gold, **look, linewidth=1.8, label=arm)
        for history, one, other in zip(histories[arm], across, gold, strict=True):
            axis.plot([mean_across[-1], one[-1]], [mean_gold[-1], other[-1]], color=look["color"], lw=0.7, alpha=0.6)
            axis.plot(one[-1], other[-1], "o", color=look["color"], markersize=5)
            since = over_optimised_from(history.steps, history.curves["reward"], history.curves["gold"])
            if since is not None and (at := history.steps.index(since)) < len(one):
                axis.plot(one[at], other[at], "X", color=look["color"], markersize=9)
    axis.set_xlabel(label)
    axis.set_ylabel("gold measure")
    _legend(figure, axis)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG; the same figure is the same file."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})


FIGURES: Sequence[tuple[str, str, str, Callable[[Sequence[Outcome]], Figure | None]]] = (
    (
        "curves.svg",
        "Learning curves",
        "Mean over seeds, on the training's prompts, smoothed over 5 updates; bands: least to greatest seed. The own "
        "reward is in standard deviations of its first updates' samples.",
        _learning_curves,
    ),
    (
        "reward-gold.svg",
        "Reward against gold",
        "Each arm's way, mean over seeds, smoothed over 5 updates; ● where each seed ends; ✖ from where a seed's "
        "reward goes on rising and its gold falls.",
        lambda outcomes: _trajectories(outcomes, "reward", _REWARD),
    ),
    (
        "kl-gold.svg",
        "KL against gold",
        "What a nat of distance from SFT buys: each arm's way, mean over seeds; ● where each seed ends.",
        lambda outcomes: _trajectories(outcomes, "kl", "KL to SFT, nats per response"),
    ),
)
"""File, title, caption, and what draws it (None where there is nothing to draw)."""
