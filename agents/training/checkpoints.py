"""Checkpoints: all that decides how a training goes on, in a folder that is whole or not there.

    agent.safetensors   trained weights, value head, what the optimiser keeps
    state.json          update, generators, order of the prompts, averages, and how far the run's files had come
    manifest.json       the SHA-256 of both

`RunFolder.checkpoint` writes the folder aside, syncs it to the disk and renames it. Here it is filled, checked by its
manifest when it is read, and chosen: the newest that is whole. Safetensors and JSON only: nothing in a checkpoint can
run code.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.reinforce import ReinforceAgent
from agents.rollout import NonFiniteError
from rlaif_env.api import RLAIFError
from rlaif_env.files import file_sha256
from rlaif_env.records import RunError
from rlaif_env.runs import RunFolder

_TENSORS, _STATE, _MANIFEST = "agent.safetensors", "state.json", "manifest.json"
_LOGS = ("metrics.jsonl", "samples.jsonl", "validation.jsonl", "warnings.jsonl")
_ROWS = "samples.jsonl"
"""The file whose place is counted in rows: one that is scored later (`rlaif rescore`) changes its length."""


class CheckpointError(RLAIFError):
    """A checkpoint is missing, damaged, or not one of this run."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a checkpoint folder."""

    path: Path
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    @property
    def update(self) -> int:
        """The update it was taken after."""
        return int(self.values["agent"]["updates"])


def agent_tensors(agent: ReinforceAgent) -> dict[str, Tensor]:
    """What an agent has learned and what its optimiser keeps, on the CPU.

    Raises:
        NonFiniteError: If a weight is not finite: such a state is not worth keeping.
    """
    tensors = {f"policy/{name}": tensor.contiguous() for name, tensor in agent.policy.state().items()}
    if agent.value_head is not None:
        tensors |= {f"value/{name}": p.detach().cpu().clone() for name, p in agent.value_head.named_parameters()}
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise NonFiniteError(
            f"expected finite weights after update {agent.updates}, found others in {len(broken)} tensors "
            f"({broken[0]}, ...): this state is not saved; go on from the checkpoint before with a lower learning_rate"
        )
    for index, kept in agent.optimizer.state_dict()["state"].items():
        of = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        tensors |= {f"optimizer/{index}/{name}": v.detach().cpu().contiguous().clone() for name, v in of.items()}
    return tensors


def agent_values(agent: ReinforceAgent) -> dict[str, Any]:
    """Everything else that decides how an agent goes on, as JSON can hold it; a copy."""
    kept = agent.optimizer.state_dict()["state"].items()
    return {
        "updates": agent.updates,
        "generator": agent.rng.bit_generator.state,
        "average": agent.average,
        "moments": list(agent.moments),
        "micro_batch": agent.passes.micro_batch,
        "optimizer": {str(i): {n: v for n, v in state.items() if not isinstance(v, Tensor)} for i, state in kept},
    }


def load_agent(agent: ReinforceAgent, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Make an agent go on exactly where `agent_tensors` and `agent_values` were taken.

    Raises:
        CheckpointError: If they are those of an agent of another model or configuration.
    """
    parts: dict[str, dict[str, Tensor]] = {"policy": {}, "value": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parts.setdefault(kind, {})[rest] = tensor
    try:
        state: dict[int, dict[str, Any]] = {int(index): dict(kept) for index, kept in values["optimizer"].items()}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = tensor
        agent.policy.load_state(parts["policy"])
        if agent.value_head is not None:
            agent.value_head.load_state_dict(parts["value"])
        groups = agent.optimizer.state_dict()["param_groups"]  # their settings are the configuration's
        agent.optimizer.load_state_dict({"state": state, "param_groups": groups})
        agent.rng.bit_generator.state = values["generator"]
        count, mean, m2 = values["moments"]
        agent.updates, agent.average, agent.moments = int(values["updates"]), values["average"], (count, mean, m2)
        agent.passes.micro_batch = int(values["micro_batch"])
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"expected the state of an agent of this model and configuration, found another: {error}"
        ) from error


def numerics(agent: ReinforceAgent) -> dict[str, Any]:
    """What the last bits of every figure depend on beside the configuration."""
    device = agent.policy.backbone.device
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "machine": platform.machine(),
        "dtype": str(agent.policy.reference.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "agent.micro_batch": agent.config.micro_batch,
        "tokens in a gradient pass": agent.passes.tokens,
        "processes": agent.passes.ranks.size,
    }


def differing_in(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The figures or settings that differ, in words; "" where none does."""
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!s:.60} -> {now.get(name)!s:.60}" for name in differing)


def write(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Fill a checkpoint folder; RunError if it cannot be written."""
    try:
        save_file(dict(tensors), folder / _TENSORS)
        (folder / _STATE).write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
        (folder / _MANIFEST).write_bytes(_manifest(folder))
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot write a checkpoint into {folder.parent}: {getattr(error, 'strerror', None) or error}; the one "
            "before is kept. Make room or mend the folder, then start the same command again: it goes on from there"
        ) from error


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint, every byte checked; CheckpointError if it is not there, not whole, or not as written."""
    if not folder.is_dir():
        raise CheckpointError(f"expected a checkpoint at {folder}, found no folder")
    try:
        there = (folder / _MANIFEST).read_bytes()
        if there != (expected := _manifest(folder)):
            raise CheckpointError(f"{folder} is damaged: {_damage(there, expected)}")
        values = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or type(values.get("agent", {}).get("updates")) is not int:
            raise CheckpointError(f"{folder} is not a whole checkpoint: {_STATE} does not say which update it is of")
        return Checkpoint(folder, load_file(folder / _TENSORS), values)
    except CheckpointError:
        raise
    except (OSError, ValueError, AttributeError, LookupError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from error


def _manifest(folder: Path) -> bytes:
    """The one manifest that fits the files that are there: comparing it bytewise also checks the manifest itself."""
    files = {}
    for file in sorted(path for path in folder.iterdir() if path.name != _MANIFEST):
        files[file.name] = {"sha256": file_sha256(file), "bytes": file.stat().st_size}
    return (json.dumps({"format": 1, "files": files}, indent=2) + "\n").encode()


def _damage(there: bytes, expected: bytes) -> str:
    """Which files a manifest does not agree with."""
    try:
        then, now = json.loads(there)["files"], json.loads(expected)["files"]
        odd = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        odd = []
    return f"{', '.join(odd)} and {_MANIFEST} do not agree" if odd else f"{_MANIFEST} is not as it was written"


def _saved(run: Path) -> list[Path]:
    """A run's checkpoints, newest first, whole or not."""
    there = (run / "checkpoints").iterdir() if (run / "checkpoints").is_dir() else ()
    return sorted((p for p in there if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name), reverse=True)


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is as it was written, and a message for each newer one that is damaged.

    None where none was ever saved; CheckpointError if there are some, but none that is whole.
    """
    damaged: list[str] = []
    for aside in (run / "checkpoints").glob(".replaced-*"):  # killed while one took the place of another
        if not (final := aside.with_name(aside.name.removeprefix(".replaced-"))).exists():
            aside.rename(final)
    for folder in _saved(run):
        try:
            return read(folder), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(
            f"expected a whole checkpoint in {run / 'checkpoints'}, found none: {'; '.join(damaged)}. To begin again, "
            "name another folder for the run"
        )
    return None, damaged


def prune(run: Path, keep: int, best: int | None, current: int) -> None:
    """Remove all checkpoints but the last few and the best, given by its update, and what killed processes left behind.

    Those of updates later than the current one are of a run that was cut back, and go too.
    """
    folder = run / "checkpoints"
    for left in (path for kind in ("unfinished", "replaced", "old") for path in folder.glob(f".{kind}-*")):
        shutil.rmtree(left, ignore_errors=True)
    for unfinished in folder.glob(".best.json-*"):
        unfinished.unlink(missing_ok=True)
    past = [p for p in _saved(run) if int(p.name) <= current]
    kept = past[:keep] + [p for p in past if int(p.name) == best]
    for path in _saved(run):
        if path not in kept:
            aside = folder / f".old-{path.name}"  # a half-removed one must not look like a checkpoint
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def _appended(run: Path) -> list[Path]:
    """The files that a run appends to, there or not."""
    events = sorted((run / "tensorboard").iterdir()) if (run / "tensorboard").is_dir() else []
    return [*(run / name for name in _LOGS), *events]


def position(run: RunFolder, synced: bool = True) -> dict[str, int]:
    """The sizes of the files that a run appends to, bytes, of samples.jsonl rows; on the disk unless that can wait."""
    run.flush()
    sizes = {}
    for file in filter(Path.exists, _appended(run.path)):
        with file.open("rb") as stream:
            if synced:
                os.fsync(stream.fileno())
            size = run.rows(_ROWS) if file.name == _ROWS else os.fstat(stream.fileno()).st_size
            sizes[str(file.relative_to(run.path))] = size
    return sizes


def cut_back(run: Path, to: Mapping[str, int]) -> None:
    """Bring the files that a run appends to back to a position: what came after it comes again.

    Raises:
        CheckpointError: If a file is shorter than it was then: nothing is changed.
        RunError: If a file cannot be written.
    """
    sizes = dict(to)
    for name, size in to.items():
        file, unit = run / name, "rows" if name == _ROWS else "bytes"
        there = file.stat().st_size if file.is_file() else 0
        if unit == "rows" and there:
            ends = list(accumulate(map(len, file.read_bytes().splitlines(keepends=True))))
            there, sizes[name] = len(ends), ends[size - 1] if 0 < size <= len(ends) else 0
        if there < size:
            raise CheckpointError(
                f"expected {file} to hold at least the {size} {unit} it had at the checkpoint, found {there}: it "
                "was changed since; put it back, or name another folder for the run"
            )
    for file in _appended(run):
        size = sizes.get(str(file.relative_to(run)), 0)
        try:
            if size == 0:
                file.unlink(missing_ok=True)
            elif file.stat().st_size > size:
                os.truncate(file, size)
        except OSError as error:
            raise RunError(f"cannot write {file}: {error.strerror or error}") from error
