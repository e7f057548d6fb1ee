"""The one way of timing: contenders that take turns; and what the machine itself can do.

A shared machine is never twice the same, so contenders are run in turn in one process and only their ratio is a figure.
Beside the time on the wall stands the processor time of all threads, which other people's work disturbs less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Times:
    """What several runs of one thing took, in seconds."""

    wall: list[float] = field(default_factory=list)  # by the clock on the wall, one a run
    cpu: list[float] = field(default_factory=list)  # processor time of all the process's threads, one a run

    @property
    def median(self) -> float:
        """Median time on the wall."""
        return float(np.median(self.wall))

    def without(self, runs: int) -> Times:
        """These times without the first few runs."""
        return Times(self.wall[runs:], self.cpu[runs:])

    def summary(self) -> dict[str, Any]:
        """Median and quartiles, JSON-able."""
        low, middle, high = np.percentile(self.wall, [25, 50, 75])
        return {
            "median_s": float(middle),
            "quartiles_s": [float(low), float(high)],
            "median_cpu_s": float(np.median(self.cpu)),
            "runs": len(self.wall),
        }


@contextmanager
def stopwatch(times: Times | None) -> Iterator[None]:
    """Add the time of the block, if there is anything to add it to; a GPU's queue is awaited at both ends."""
    _finish()
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    _finish()
    if times is not None:
        times.wall.append(time.perf_counter() - wall)
        times.cpu.append(time.process_time() - cpu)


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(
    contenders: Mapping[str, Callable[[], Any]], *, repetitions: int, warmup: int = 1, calls: int = 1
) -> dict[str, Times]:
    """Time calls of several functions, taking turns, the order turned round each time.

    Args:
        contenders: What to call, by name.
        repetitions: Timed turns of each.
        warmup: Turns of each before that.
        calls: Calls in a turn, each timed.
    """
    times = {name: Times() for name in contenders}
    for i in range(warmup + repetitions):
        for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
            for _ in range(calls):
                with stopwatch(times[name] if i >= warmup else None):
                    contenders[name]()
    return times


def beside(ours: Times, theirs: Times) -> dict[str, Any]:
    """How many times ours the other side took, JSON-able: of the medians, its quartiles by turn, and by CPU time."""
    return {
        "ratio": theirs.median / ours.median,
        "ratio_quartiles": [float(q) for q in np.percentile(np.array(theirs.wall) / np.array(ours.wall), [25, 75])],
        "ratio_cpu": float(np.median(theirs.cpu) / np.median(ours.cpu)),
    }


@dataclass(frozen=True)
class Machine:
    """What the machine reaches by itself."""

    flops: float  # floating-point operations a second in matrix products of a transformer's shapes
    bytes: float  # bytes a second, read and written, in a copy too large for any cache


def machine(
    *, hidden: int = 576, inner: int = 1536, rows: int = 512, copied: int = 1 << 26, device: str = "cpu"
) -> Machine:
    """Measure the machine in float32, the median of 15 runs of each.

    Args:
        hidden: Hidden size of the model in question.
        inner: Width of its feed-forward layers.
        rows: Tokens in a product.
        copied: Numbers in a copy.
        device: Where.
    """
    a, b = torch.randn(rows, hidden, device=device), torch.randn(inner, hidden, device=device)
    large = torch.zeros(copied, device=device)
    target = torch.empty_like(large)
    repeats = 8

    def products() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(a, b)

    with torch.inference_mode():
        times = alternate({"products": products, "copy": lambda: target.copy_(large)}, repetitions=15, warmup=3)
    flops = 2.0 * rows * hidden * inner * repeats / times["products"].median
    return Machine(flops, 2.0 * large.nbytes / times["copy"].median)
