"""Checkpoints: all that decides how a training goes on, in a folder that is whole or not there.

    agent.safetensors   trained weights, value head, what the optimiser keeps
    state.json          update, generators, order of the prompts, averages, and how far the run's files had come
    manifest.json       the SHA-256 of both

`RunFolder.checkpoint` writes the folder aside, syncs it to the disk and renames it. Here it is filled, checked by its
manifest when it is read, and chosen: the newest that is whole. Safetensors and JSON only: nothing in a checkpoint can
run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.passes import NonFiniteError
from rlaif_env.api import RLAIFError
from rlaif_env.runs import RunError, RunFolder

if TYPE_CHECKING:
    from agents.reinforce import ReinforceAgent

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "agent_tensors",
    "agent_values",
    "cut_back",
    "load_agent",
    "newest",
    "not_identical",
    "numerics",
    "position",
    "prune",
    "read",
    "write",
]

_TENSORS, _STATE, _MANIFEST = "agent.safetensors", "state.json", "manifest.json"
_LOGS = ("metrics.jsonl", "samples.jsonl", "validation.jsonl", "warnings.jsonl")


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


# --- the agent --------------------------------------------------------------------------------------------------------


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
        for name, value in kept.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.detach().cpu().contiguous().clone()
    return tensors


def agent_values(agent: ReinforceAgent) -> dict[str, Any]:
    """Everything else that decides how an agent goes on, as JSON can hold it; a copy."""
    kept = agent.optimizer.state_dict()["state"]
    numbers = {
        str(index): {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        for index, state in kept.items()
    }
    return {
        "updates": agent.updates,
        "generator": agent.rng.bit_generator.state,
        "average": agent.average,
        "moments": list(agent.moments),
        "micro_batch": agent.passes.micro_batch,
        "optimizer": numbers,
    }


def load_agent(agent: ReinforceAgent, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Make an agent go on exactly where `agent_tensors` and `agent_values` were taken.

    Args:
        agent: Of the same model and configuration.
        tensors: Its tensors then.
        values: Its values then.

    Raises:
        CheckpointError: If they are those of another agent.
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
    }


def not_identical(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The numerics that differ, in words; "" where none does."""
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in differing)


# --- writing and reading ----------------------------------------------------------------------------------------------


def write(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Fill a checkpoint folder.

    Raises:
        RunError: If it cannot be written.
    """
    try:
        save_file(dict(tensors), folder / _TENSORS)
        (folder / _STATE).write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
        (folder / _MANIFEST).write_bytes(_manifest(folder))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write a checkpoint into {folder.parent}: {reason}; the one before is kept. Make room or mend the "
            "folder, then start the same command again: it goes on from there"
        ) from error


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint, every byte checked.

    Raises:
        CheckpointError: If it is not there, not whole, or not as it was written.
    """
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
    except (OSError, ValueError, AttributeError, LookupError, RuntimeError, TypeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from error


def _manifest(folder: Path) -> bytes:
    """The one manifest that fits the files that are there: comparing it bytewise also checks the manifest itself."""
    files = {}
    for file in sorted(folder.iterdir()):
        if file.name != _MANIFEST:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            files[file.name] = {"sha256": digest.hexdigest(), "bytes": file.stat().st_size}
    return (json.dumps({"format": 1, "files": files}, indent=2) + "\n").encode()


def _damage(there: bytes, expected: bytes) -> str:
    """Which files a manifest does not agree with."""
    try:
        then, now = json.loads(there)["files"], json.loads(expected)["files"]
        odd = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        odd = []
    return f"{', '.join(odd)} and {_MANIFEST} do not agree" if odd else f"{_MANIFEST} is not as it was written"


# --- those of a run ---------------------------------------------------------------------------------------------------


def _saved(run: Path) -> list[Path]:
    """A run's checkpoints, newest first, whole or not."""
    folder = run / "checkpoints"
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in there if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name), reverse=True)


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is as it was written, None where none was ever saved.

    Returns:
        The checkpoint, and a message for each newer one that is damaged.

    Raises:
        CheckpointError: If there are some, but none that is whole.
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
    """Remove all checkpoints but the last ones, the best and the current; also what killed processes left behind.

    Args:
        run: The run folder.
        keep: How many of the last stay.
        best: The update whose checkpoint is the best by validation.
        current: The update the run is at; those of later ones are of a run that was cut back, and go.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        return
    for left in [*folder.glob(".unfinished-*"), *folder.glob(".replaced-*"), *folder.glob(".old-*")]:
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


# --- how far the run's files had come ---------------------------------------------------------------------------------


def position(run: RunFolder) -> dict[str, int]:
    """The sizes of the files that a run appends to, synced to the disk."""
    run.flush()
    files = [run.path / name for name in _LOGS]
    if (events := run.path / "tensorboard").is_dir():
        files += sorted(events.iterdir())
    found = {}
    for file in files:
        if file.exists():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                found[str(file.relative_to(run.path))] = os.fstat(stream.fileno()).st_size
    return found


def cut_back(run: Path, to: Mapping[str, int]) -> None:
    """Bring the files that a run appends to back to a position: what came after it comes again.

    Raises:
        CheckpointError: If a file is shorter than it was then: nothing is changed.
        RunError: If a file cannot be written.
    """
    for name, size in to.items():
        found = (run / name).stat().st_size if (run / name).is_file() else 0
        if found < size:
            raise CheckpointError(
                f"expected {run / name} to hold at least the {size} bytes it had at the checkpoint, found {found}: it "
                "was changed since; put it back, or name another folder for the run"
            )
    events = sorted((run / "tensorboard").iterdir()) if (run / "tensorboard").is_dir() else []
    for file in [*(run / name for name in _LOGS), *events]:
        size = to.get(str(file.relative_to(run)), 0)
        with _told(file):
            if size == 0:
                file.unlink(missing_ok=True)
            elif file.stat().st_size > size:
                os.truncate(file, size)


@contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror or error}") from error
