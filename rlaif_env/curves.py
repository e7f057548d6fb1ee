"""The picture of a training run: its metrics by update, a panel each. matplotlib loads when first drawn with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS: Mapping[str, str] = {
    "reward": "reward (mean)",
    "kl": "KL to the reference (nats per response)",
    "length": "response length (tokens)",
    "entropy": "policy entropy (nats per token)",
    "gold": "gold measure (mean)",
    "win_rate": "win rate against the start",
    "distinct-2": "distinct pairs of words over all pairs",
}
"""The metrics that are drawn, each with the label of its axis."""

_COLOURS = {"training": "tab:blue", "held-out prompts": "tab:orange"}


def draw(
    rows: Sequence[Mapping[str, float]], title: str, held_out: Sequence[Mapping[str, float]] = ()
) -> Figure | None:
    """Each update thin, the mean of the last updates thick; None where no row has a metric of `PANELS`.

    Args:
        rows: The metrics of the updates, each row with its "step".
        title: Of the picture.
        held_out: The same of validations, drawn beside those of the updates.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sources = dict(zip(_COLOURS, (rows, held_out), strict=True))
    points = {
        name: {what: [(row["step"], row[name]) for row in of if name in row] for what, of in sources.items()}
        for name in PANELS
    }
    logged = {name: found for name, two in points.items() if (found := {k: p for k, p in two.items() if p})}
    if not logged:
        return None
    columns = min(2, len(logged))
    lines = -(-len(logged) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines), layout="constrained")
    for place, (name, found) in enumerate(logged.items(), start=1):
        axes = figure.add_subplot(lines, columns, place)
        for what, pairs in found.items():
            steps, values = np.array(pairs, dtype=float).T  # (updates,) each
            window = len(values) // 10 if what == "training" else 0
            style: dict[str, Any] = {"color": _COLOURS[what], "marker": "." if len(values) < 60 else ""}
            axes.plot(steps, values, alpha=0.35 if what == "training" else 1, linewidth=1, label=what, **style)
            if window > 1:
                mean = np.convolve(values, np.full(window, 1 / window), "valid")
                axes.plot(
                    steps[window - 1 :], mean, color=_COLOURS[what], linewidth=2, label=f"mean of the last {window}"
                )
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize="small")
        axes.set(xlabel="update", ylabel=PANELS[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)
    return figure
