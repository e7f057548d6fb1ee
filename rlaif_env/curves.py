"""The picture of a training run: its metrics by update, a panel each. matplotlib loads when first drawn with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS: Mapping[str, str] = {
    "reward": "reward (mean of the update)",
    "kl": "KL to the reference (nats per response)",
    "length": "response length (tokens)",
    "entropy": "policy entropy (nats per token)",
}
"""The metrics that are drawn, each with the label of its axis."""


def draw(rows: Sequence[Mapping[str, float]], title: str) -> Figure | None:
    """Each update thin, the mean of the last updates thick; None where no row has a metric of `PANELS`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    points = {name: [(row["step"], row[name]) for row in rows if name in row] for name in PANELS}
    logged = {name: np.array(pairs, dtype=float).T for name, pairs in points.items() if pairs}  # (2, updates)
    if not logged:
        return None
    columns = min(2, len(logged))
    lines = -(-len(logged) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines), layout="constrained")
    for place, (name, (steps, values)) in enumerate(logged.items(), start=1):
        axes = figure.add_subplot(lines, columns, place)
        axes.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=1, marker="." if len(values) < 60 else "")
        if (window := len(values) // 10) > 1:
            mean = np.convolve(values, np.full(window, 1 / window), "valid")
            axes.plot(steps[window - 1 :], mean, color="tab:blue", linewidth=2, label=f"mean of the last {window}")
            axes.legend(frameon=False, fontsize="small")
        axes.set(xlabel="update", ylabel=PANELS[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)
    return figure
