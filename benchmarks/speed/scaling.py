"""The time of an update against devices, batch, length and adapter: the floors of `costs`, divided over devices.

    python -m benchmarks.speed.scaling measure    on this machine: predicted from one setting, beside measured
    python -m benchmarks.speed.scaling predict    an 8B policy on 8 GPUs: a prediction, of which nothing was run

What is divided: whole groups over the devices that sample, rows over those that train. What is not: the optimiser's
step, which every process takes. What travels: the sum of the gradients, by a ring, and where a server samples the
adapter, written and loaded once an update. docs/scale.md has the tables.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed import costs
from benchmarks.speed.one_update import Ours, Setting, model_folder
from benchmarks.speed.timing import Machine, Times, machine
from rlaif_env.models import BUILTIN_MODEL
from rlaif_env.records import write_json
from rlaif_env.tables import Cell, Table


@dataclass(frozen=True)
class Cluster:
    """Devices, and what they reach."""

    machine: Machine  # of one device, as its maker states or as measured
    trainers: int = 1  # devices that compute gradients; they sample as well where there is no server
    samplers: int = 0  # devices of the server that samples; 0 where there is none
    compute: float = 1.0  # share of the operations a second that matrix products reach
    bandwidth: float = 1.0  # share of the bytes a second that decoding reaches
    link: float = math.inf  # bytes a second between any two trainers
    exchange_overhead: float = 0.0  # seconds of one all-reduce of nothing
    adapter_overhead: float = 0.0  # seconds to write an adapter and have it loaded, on every server

    @property
    def reached(self) -> Machine:
        """What a device really reaches."""
        return Machine(self.machine.flops * self.compute, self.machine.bytes * self.bandwidth)


def update_seconds(
    sizes: costs.Sizes, setting: Setting, cluster: Cluster, *, overlap: bool = False
) -> dict[str, float]:
    """Seconds of each phase of an update of n rows in groups of K, and of the whole as "update"; scoring is not in it.

    Args:
        sizes: The policy.
        setting: n rows, K, P, T, and beta, without which there is no pass of the reference.
        cluster: Where.
        overlap: Whether a server samples the next batch while the gradient is computed.
    """
    reached, groups = cluster.reached, setting.rows // setting.group
    trained = sizes.adapter or sizes.body + sizes.head

    def shape(devices: int) -> dict[str, int]:
        rows = math.ceil(groups / devices) * setting.group  # the device with the most groups is waited for
        return {"rows": rows, "group": setting.group, "prompt": setting.prompt, "response": setting.response}

    learning = shape(cluster.trainers)
    ring = 2 * (cluster.trainers - 1) / cluster.trainers * 4 * trained / cluster.link
    seconds = {
        "sample": costs.sampling(sizes, **shape(cluster.samplers or cluster.trainers)).seconds(reached),
        "reference": costs.reference(sizes, **learning).seconds(reached) if setting.beta else 0.0,
        "gradient": costs.gradient(sizes, **learning).seconds(reached),
        "exchange": ring + cluster.exchange_overhead if cluster.trainers > 1 else 0.0,
        # AdamW reads weight, gradient and two moments and writes all but the gradient, in float32
        "optimizer": 7 * 4 * trained / reached.bytes,
        "adapter": cluster.adapter_overhead if cluster.samplers else 0.0,
    }
    sampled = seconds["sample"] + seconds["adapter"]
    learned = sum(seconds.values()) - sampled
    return {**seconds, "update": max(sampled, learned) if overlap and cluster.samplers else sampled + learned}


LLAMA_8B = costs.Sizes(
    body=32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
    head=128_256 * 4096,
    attention=32 * 4096,
    adapter=32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
    itemsize=2,
    cache=2 * 32 * 1024,
)
"""Llama-3.1-8B in bfloat16 with a LoRA adapter of rank 16 on all linear layers."""

H100 = Cluster(Machine(flops=989e12, bytes=3.35e12), compute=0.4, bandwidth=0.6, link=300e9, exchange_overhead=1e-4)
"""H100 SXM: the maker's dense bfloat16 and memory figures; the shares reached and the link are guesses."""

PREDICTED: tuple[tuple[str, Cluster, bool], ...] = (
    ("1 GPU does all", H100, False),
    ("8 GPUs do all", replace(H100, trainers=8), False),
    ("4 sample (vLLM), 4 train", replace(H100, trainers=4, samplers=4, adapter_overhead=0.5), False),
    ("4 sample, 4 train, overlapped", replace(H100, trainers=4, samplers=4, adapter_overhead=0.5), True),
    ("2 sample, 6 train, overlapped", replace(H100, trainers=6, samplers=2, adapter_overhead=0.5), True),
)


def predictions(setting: Setting) -> Table:
    """An update of an 8B policy on up to 8 GPUs, by formula."""
    phases = ("sample", "reference", "gradient", "exchange", "optimizer", "adapter", "update")
    rows: list[list[Cell]] = []
    for name, cluster, overlap in PREDICTED:
        seconds = update_seconds(LLAMA_8B, setting, cluster, overlap=overlap)
        tokens = setting.rows * setting.response / seconds["update"]
        rows.append([name, *(f"{seconds[phase]:.2f}" for phase in phases), f"{tokens:,.0f}"])
    caption = (
        f"PREDICTED, nothing of it was run: Llama-3.1-8B in bfloat16, LoRA rank 16; {setting.rows} rows, K = "
        f"{setting.group}, {setting.prompt} + {setting.response} tokens; H100 at {H100.compute:.0%} of its operations "
        f"and {H100.bandwidth:.0%} of its bytes a second"
    )
    return Table("Seconds of an update", ["", *phases, "response tokens/s"], rows, caption)


BASE = Setting(0.05, 64, 32)
VARIED = (
    BASE,
    replace(BASE, rows=8),
    replace(BASE, rows=32),
    replace(BASE, response=16),
    replace(BASE, response=64),
    replace(BASE, prompt=128),
    replace(BASE, rank=64),
)
"""What is measured: one setting, from which the shares reached are taken, and others that differ in one thing."""


def _named(setting: Setting) -> str:
    return f"n {setting.rows}, P {setting.prompt}, T {setting.response}, rank {setting.rank}"


def measured(model: str = BUILTIN_MODEL, *, repetitions: int = 3) -> dict[str, Any]:
    """Sampling and learning in each setting beside what the first setting's times and the floors predict, JSON-able."""
    parts: list[dict[str, Any]] = []
    shares: dict[str, float] = {}
    here = machine()
    for setting in VARIED:
        with tempfile.TemporaryDirectory() as name:
            ours = Ours(model_folder(model, Path(name)), setting, "cpu")
            act, learn = Times(), Times()
            for repetition in range(repetitions + 1):
                ours.step(*((act, None, learn) if repetition else (None, None, None)))
        policy = ours.agent.policy
        sizes = costs.Sizes.of(policy.backbone.model, sum(p.numel() for p in policy.parameters))
        floor = update_seconds(sizes, setting, Cluster(here))
        least = {"sample": floor["sample"], "learn": floor["update"] - floor["sample"]}
        took = {"sample": act.median, "learn": learn.median}
        shares = shares or {phase: least[phase] / took[phase] for phase in took}
        expected = {phase: least[phase] / shares[phase] for phase in took}
        expected["update"], took["update"] = sum(expected.values()), float(np.sum([*took.values()]))
        parts.append({"setting": _named(setting), "measured_s": took, "predicted_s": expected, **asdict(setting)})
    return {"model": model, "machine": asdict(here), "shares_reached": shares, "parts": parts}


def measured_table(figures: Mapping[str, Any]) -> Table:
    """Measured times, predicted ones, and their ratio."""
    rows: list[list[Cell]] = []
    for part in figures["parts"]:
        took, expected = part["measured_s"], part["predicted_s"]
        cells = [f"{took[phase]:.2f} / {expected[phase]:.2f}" for phase in ("sample", "learn", "update")]
        rows.append([part["setting"], *cells, f"{took['update'] / expected['update']:.2f}"])
    columns = ["setting", "sample, s", "learn, s", "update, s", "measured / predicted"]
    reached = ", ".join(f"{phase} {share:.2f}" for phase, share in figures["shares_reached"].items())
    return Table("Measured / predicted", columns, rows, f"share of the floor reached in the first setting: {reached}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m benchmarks.speed.scaling``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("measure", "predict"))
    parser.add_argument("--rows", type=int, default=256, help="rows of an update, for predict")
    parser.add_argument("--group", type=int, default=8, help="rows of one prompt, for predict")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens, for predict")
    parser.add_argument("--response", type=int, default=512, help="response tokens, for predict")
    parser.add_argument("--repetitions", type=int, default=3, help="timed updates of each setting, for measure")
    parser.add_argument("--out", type=Path, help="also write what was measured to this JSON file")
    options = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    if options.what == "predict":
        setting = Setting(0.05, options.prompt, options.response, rows=options.rows, group=options.group)
        print(predictions(setting).markdown())
        return 0
    figures = measured(repetitions=options.repetitions)
    if options.out:
        write_json(options.out, figures)
    print(measured_table(figures).markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
