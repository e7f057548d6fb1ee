"""Learning curves as SVG whose colours the page decides, so that they are readable by day and by night."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.contents import Figure
from rlaif_env.curves import PANELS

_WIDTH, _HEIGHT = 440, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 34
_POINTS = 400
_ROW, _NAMES = 22, 204  # of shares: height of a line, width of the names


def curves(rows: Sequence[Mapping[str, float]], of: str = "") -> list[Figure]:
    """A figure for every metric of a run.

    Args:
        rows: The lines of metrics.jsonl, or of a file like it, each with its "step".
        of: What stands before each figure's title.

    Returns:
        First those that `rlaif_env.curves.PANELS` names, then the others, folded.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    first = [name for name in PANELS if name in names] or names[:4]
    figures = []
    for name in [*first, *(n for n in names if n not in first)]:
        points = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=float)
        figures.append(curve(of + PANELS.get(name, name), points, folded=name not in first))
    return figures


def curve(title: str, points: NDArray[np.float64], *, folded: bool = False) -> Figure:
    """A metric by update: each update thin, the mean of the last tenth thick.

    Args:
        title: What is drawn.
        points: Updates and values, (n, 2), n >= 1.
        folded: See `Figure`.
    """
    steps, values = points.T  # (n,), (n,)
    window = max(1, len(values) // 10)
    mean = np.convolve(values, np.full(window, 1 / window), "valid") if window > 1 else values
    low, high, ticks = _scale(float(values.min()), float(values.max()))
    span = max(float(steps[-1] - steps[0]), 1e-9)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(step: Any) -> Any:
        return _LEFT + (step - steps[0]) / span * (right - _LEFT)

    def down(value: Any) -> Any:
        return _TOP + (high - value) / (high - low) * (bottom - _TOP)

    def path(xs: NDArray[np.float64], ys: NDArray[np.float64], name: str) -> str:
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(across(xs), down(ys), strict=True))
        return f'<path class="{name}" d="M{line}{"h.1" if len(xs) == 1 else ""}"/>'

    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {down(tick):.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{down(tick) + 4:.1f}" text-anchor="end">{_label(tick, ticks)}</text>')
    for step in _whole_ticks(float(steps[0]), float(steps[-1])):
        parts.append(f'<text x="{across(step):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{step:,}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 1}" text-anchor="middle">update</text>')
    thin_x, thin_y = _thinned(steps, values)
    parts.append(path(thin_x, thin_y, "raw" if window > 1 else "mean"))
    if window > 1:
        parts.append(path(*_thinned(steps[window - 1 :], mean), "mean"))
    ends = f"{mean[0]:.4g} to {mean[-1]:.4g}"
    label = html.escape(f"{title}, updates {steps[0]:.0f} to {steps[-1]:.0f}: from {ends}")
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    caption = f"Thick: mean of the last {window} updates, from {ends}." if window > 1 else f"From {ends}."
    if len(thin_x) < len(steps):
        caption += f" Drawn: means of {len(thin_x)} stretches of the {len(steps):,} updates."
    return Figure(title, caption, svg=svg, folded=folded)


@dataclass(frozen=True)
class Line:
    """A line of a picture of several."""

    name: str
    x: NDArray[np.float64]  # (n,) rising
    y: NDArray[np.float64]  # (n,)
    low: NDArray[np.float64] | None = None  # (n,) the band around it
    high: NDArray[np.float64] | None = None


_KINDS = ("mean", "second", "third", "fourth")  # classes of the page's style, one a line, then again from the second


def lines(title: str, drawn: Sequence[Line], *, across: str, caption: str = "") -> Figure:
    """Several lines over one axis, each with its band where it has one and its name at its end.

    Args:
        title: What is drawn.
        drawn: At least one line, each of at least one point.
        across: What the horizontal axis says.
        caption: A sentence below.
    """
    xs = np.concatenate([line.x for line in drawn])
    ends = [end for line in drawn for end in (line.y, line.low, line.high) if end is not None]
    low, high, ticks = _scale(*(float(end(np.concatenate(ends))) for end in (np.min, np.max)))
    left, span = float(xs.min()), max(float(np.ptp(xs)), 1e-9)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def points(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
        places = _LEFT + (x - left) / span * (right - _LEFT), _TOP + (high - y) / (high - low) * (bottom - _TOP)
        return "L".join(f"{place:.1f} {height:.1f}" for place, height in zip(*places, strict=True))

    parts = []
    for tick in ticks:
        down = _TOP + (high - tick) / (high - low) * (bottom - _TOP)
        parts.append(f'<path class="grid" d="M{_LEFT} {down:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{down + 4:.1f}" text-anchor="end">{_label(tick, ticks)}</text>')
    step = _round_step(span / 5)
    marks = [number * step for number in _within(left, left + span, step)]
    for mark in marks:
        place = _LEFT + (mark - left) / span * (right - _LEFT)
        shown = _label(mark, marks) if len(marks) > 1 else f"{mark:g}"
        parts.append(f'<text x="{place:.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{shown}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 1}" text-anchor="middle">{html.escape(across)}</text>')
    for number, line in enumerate(drawn):
        kind = _KINDS[number] if number < len(_KINDS) else _KINDS[1 + (number - 1) % (len(_KINDS) - 1)]
        if line.low is not None and line.high is not None:
            around = points(np.append(line.x, line.x[::-1]), np.append(line.high, line.low[::-1]))
            parts.append(f'<path class="band {kind}" d="M{around}Z"/>')
        parts.append(f'<path class="{kind}" d="M{points(line.x, line.y)}{"h.1" if len(line.x) == 1 else ""}"/>')
        end, height = map(float, points(line.x[-1:], line.y[-1:]).split())
        name = html.escape(line.name)
        parts.append(f'<text x="{end - 4:.1f}" y="{height - 6:.1f}" text-anchor="end">{name}</text>')
    names = ", ".join(f"{line.name} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in drawn)
    label = html.escape(f"{title}: {names}", quote=True)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return Figure(title, caption, svg=svg)


def shares(
    title: str, rows: Sequence[tuple[str, float, float | None, float | None]], mark: float, caption: str = ""
) -> Figure:
    """Shares from 0 to 1, one a line.

    Args:
        title: What is drawn.
        rows: Of each its name, the share and the ends of its interval, or None twice.
        mark: A share that a line is drawn at, across all.
        caption: A sentence below.
    """
    left, right, bottom = _NAMES, _WIDTH - _RIGHT, _TOP + _ROW * len(rows)
    places = {share: left + share * (right - left) for share in (0.0, 0.5, 1.0, mark)}
    parts = [f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>' for x in places.values()]
    parts.append(f'<path class="raw" d="M{places[mark]:.1f} {_TOP}V{bottom}"/>')
    parts += [
        f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{share:.0%}</text>' for share, x in places.items()
    ]
    for number, (name, share, low, high) in enumerate(rows):
        y, x = _TOP + _ROW * (number + 0.5), left + share * (right - left)
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{html.escape(name)}</text>')
        if low is not None and high is not None:
            ends = [left + end * (right - left) for end in (low, high)]
            parts.append(f'<path class="mean" d="M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}"/>')
        parts.append(f'<path class="mean" d="M{x:.1f} {y - 6:.1f}V{y + 6:.1f}"/>')
    label = html.escape(f"{title}: " + ", ".join(f"{name} {share:.0%}" for name, share, _, _ in rows), quote=True)
    svg = f'<svg viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return Figure(title, caption, svg=svg)


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most so many points: means of neighbours where there are more."""
    if len(x) <= _POINTS:
        return x, y
    starts = np.arange(_POINTS) * len(x) // _POINTS
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """The ends of an axis and round ticks within."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    pad, ticks = 0.05 * (high - low), [0.0]
    for parts in (4, 8):  # of a coarse step one multiple alone may lie within
        step = _round_step((high - low) / parts)
        ticks = [i * step for i in _within(low - pad, high + pad, step)]
        if len(ticks) > 1:
            break
    return low - pad, high + pad, ticks


def _within(low: float, high: float, step: float) -> range:
    """The multiples of a step between two values."""
    return range(math.ceil(low / step), math.floor(high / step) + 1)


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, not under the given."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _whole_ticks(first: float, last: float) -> list[int]:
    step = max(1, round(_round_step(max(last - first, 1) / 5)))
    return [i * step for i in _within(first, last, step)] or [round(first)]


def _label(tick: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as the step between ticks needs."""
    step = ticks[1] - ticks[0]
    if step < 1e-4 or max(map(abs, ticks)) >= 1e6:
        text = f"{tick:.1e}" if tick else "0"
    else:
        text = f"{tick:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    return text.replace("-", "−")
