"""The run folder: what a command leaves behind so that its run can be read, plotted and run again.

    config.json      the resolved configuration, seeds included; versions, commit, platform and command line
    metrics.jsonl    one JSON object a line: the step and its finite figures
    samples.jsonl    one JSON object a line: every response with its step, prompt, reward and the reward's parts
    warnings.jsonl   one JSON object a line: what a command warned about, if anything
    tensorboard/     the same scalars, and text samples
    checkpoints/     one folder a saved step, whole or not there
    curves.png       reward, KL, length, entropy and gold by update

Importing this module is light; torch (for TensorBoard) and matplotlib load when first written to.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
from numpy.typing import ArrayLike

from rlaif_env.curves import draw
from rlaif_env.files import sync
from rlaif_env.records import RunError, json_text, read_metrics, write_json, writing
from rlaif_env.tables import is_number


class OtherRunError(RunError):
    """A folder holds a run of another configuration; ``settings`` are the names of those that differ."""

    def __init__(self, message: str, settings: Sequence[str]) -> None:
        super().__init__(message)
        self.settings = tuple(settings)


class RunFolder:
    """A folder, ``path``, that one process writes a run of a configuration to, from `create` to `close`."""

    def __init__(self, path: Path, config: Mapping[str, Any], lock: filelock.BaseFileLock) -> None:
        self.path, self.config = path, config  # as JSON holds it, and as the caller gave it
        self._lock = lock
        self._writer: Any = None
        self._rows: dict[str, int] = {}

    @classmethod
    def create(
        cls,
        path: str | Path | None,
        config: Mapping[str, Any],
        *,
        command: str = "run",
        exist: bool | Literal["changed"] = False,
        free: Collection[str] = (),
    ) -> RunFolder:
        """Make the folder, take its lock and write config.json.

        Args:
            path: A new or empty folder; None names one ``runs/<command>-<task>-<timestamp>``.
            config: The resolved configuration, seeds included, as `write_json` takes it.
            command: For the record and for the default name.
            exist: Go on with a folder that already holds a run of this same command and configuration; with "changed",
                of this same command: the new configuration is then recorded in place of the old one.
            free: Settings that may differ from those of the run that is there ("agent.micro_batch" where nested), or
                groups of them.

        Raises:
            RunError: If the folder cannot be written, is being written by another process, holds other files, or holds
                a run (with ``exist``: a run of another configuration, which is an `OtherRunError`).
        """
        resolved = json.loads(json_text(config, "the configuration"))
        folder = _new_default_folder(command, resolved) if path is None else Path(path)
        file = folder / "config.json"
        lock = _take_folder(folder)
        try:
            for left in folder.glob(".*.json-*" if file.exists() else ".config.json-*"):
                left.unlink(missing_ok=True)  # of a process killed while it wrote a JSON file
            if known := file.exists():
                _refuse_another_run(file, command, resolved, exist, free)
                for name in ("metrics.jsonl", "samples.jsonl", "validation.jsonl", "warnings.jsonl"):
                    # What follows the last line end is a line whose writer was killed in the middle.
                    with writing(folder / name), suppress(FileNotFoundError), (folder / name).open("rb+") as stream:
                        stream.truncate(stream.read().rfind(b"\n") + 1)
            elif others := sorted(p.name for p in folder.iterdir() if p.name != "run.lock"):
                shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
                raise RunError(f"expected {folder} to be new or empty, found {shown}: name another folder for the run")
            if not known or exist == "changed":
                write_json(file, {"command": command, "config": resolved, **_provenance()})
        except BaseException:
            if not file.exists():  # not a run's folder: leave no lock file in it
                (folder / "run.lock").unlink(missing_ok=True)
            lock.release()
            raise
        return cls(folder, resolved, lock)

    def amend(self, names: Collection[str], **facts: Any) -> None:
        """Have config.json say of some settings what they are now, and facts beside the settings."""
        record = json.loads((self.path / "config.json").read_bytes())
        amended = {**record, "config": record["config"] | {name: self.config[name] for name in names}, **facts}
        if amended != record:
            write_json(self.path / "config.json", amended)

    def log(self, step: int, metrics: Mapping[str, Any], name: str = "metrics") -> None:
        """Append an update's figures (NumPy scalars and one-element tensors too) to <name>.jsonl and to TensorBoard.

        Raises:
            RunError: If a figure is not a finite number. Nothing is written then.
        """
        figures: dict[str, Any] = {}
        for metric, value in metrics.items():
            figures[metric] = number = value.item() if math.prod(getattr(value, "shape", (2,))) == 1 else value
            if not is_number(number):
                raise RunError(f"expected metric {metric!r} at step {step} to be a finite number, found {number!r}")
        if "step" in figures:
            raise RunError("expected metrics by other names than 'step', which is the line's own")
        self.record(f"{name}.jsonl", {"step": step, **figures})
        with self._tensorboard() as writer:
            for metric, value in figures.items():
                writer.add_scalar(metric if name == "metrics" else f"{name}/{metric}", value, step)

    def log_samples(
        self,
        step: int,
        prompts: Sequence[str],
        responses: Sequence[str],
        rewards: ArrayLike,
        parts: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Append an update's n responses, their rewards (n,) and further columns (n,) by name to samples.jsonl.

        Raises:
            RunError: If the columns differ in length or hold a number that is not finite. Nothing is written then.
        """
        figures = {
            name: np.atleast_1d(column).tolist() for name, column in {"reward": rewards, **(parts or {})}.items()
        }
        columns = {"prompt": list(prompts), "response": list(responses), **figures}
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) > 1:
            raise RunError(f"expected columns of one length at step {step}, found {sizes}")
        rows = zip(*columns.values(), strict=True)
        self.record("samples.jsonl", *({"step": step, **dict(zip(columns, row, strict=True))} for row in rows))

    def record(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Append lines to a file of the folder, such as "warnings.jsonl", in one write: a reader sees whole lines."""
        file = self.path / name
        lines = "".join(json_text(row, f"each line of {file}") + "\n" for row in rows)
        with writing(file), file.open("a", encoding="utf-8") as stream:
            stream.write(lines)
        if name in self._rows:
            self._rows[name] += len(rows)

    def rows(self, name: str) -> int:
        """How many lines a file that `record` appends to has."""
        if name not in self._rows:
            file = self.path / name
            self._rows[name] = file.read_bytes().count(b"\n") if file.exists() else 0
        return self._rows[name]

    def log_text(self, step: int, name: str, text: str) -> None:
        """Show a text in TensorBoard exactly as it is: model output is never read as Markdown or HTML."""
        # TensorBoard renders Markdown; an indented block is the one form in which every character stands for itself.
        block = "\n".join("    " + line for line in text.expandtabs(4).splitlines())
        with self._tensorboard() as writer:
            writer.add_text(name, block, step)

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Give a folder to save into, which becomes ``checkpoints/<step>`` when the block ends without an error.

        It is synced to the disk first, so that after a crash it is whole or not there. A step saved before is replaced.
        After an error nothing is left of the new one.
        """
        parent = self.path / "checkpoints"
        with writing(parent):
            parent.mkdir(exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
        final, replaced = parent / f"{step:06d}", parent / f".replaced-{step:06d}"
        try:
            yield unfinished
            with writing(final):
                unfinished.chmod(0o755)  # mkdtemp makes a folder that only its owner can read
                for path in (*unfinished.iterdir(), unfinished):
                    sync(path)
                if final.exists():
                    final.rename(replaced)
                unfinished.rename(final)
                sync(parent)
                shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def curves(self) -> Path | None:
        """Draw the figures by update into curves.png; None where none of `rlaif_env.curves.PANELS` has been logged."""
        rows = read_metrics(self.path) if (self.path / "metrics.jsonl").exists() else []
        held_out = read_metrics(validation) if (validation := self.path / "validation.jsonl").exists() else []
        figure, file = draw(rows, self.path.resolve().name, held_out), self.path / "curves.png"
        if figure is None:
            return None
        with writing(file):
            figure.savefig(file, dpi=120)
        return file

    def flush(self) -> None:
        """Bring what TensorBoard still holds back to its file."""
        if self._writer is not None:
            with self._tensorboard() as writer:
                writer.flush()

    def close(self) -> None:
        """Finish the TensorBoard file and give up the lock; a second call does nothing."""
        try:
            if self._writer is not None:
                with self._tensorboard() as writer:
                    self._writer = None
                    writer.close()
        finally:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        with suppress(*(() if kind is None else (RunError,))):  # the first error is the one to be raised
            self.close()

    @contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        """TensorBoard's writer, made when first asked for."""
        folder = self.path / "tensorboard"
        with writing(folder):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder), flush_secs=10)
            yield self._writer


def _take_folder(folder: Path) -> filelock.BaseFileLock:
    """Make a folder and lock it. The system frees the lock of a process that dies, so a stale file holds nobody up."""
    lock = filelock.FileLock(folder / "run.lock")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            message = f"{folder} is being written by another run: wait for its end, or name another folder"
            raise RunError(message) from error
    return lock


def _new_default_folder(command: str, config: Mapping[str, Any]) -> Path:
    """``runs/<command>-<task>-<timestamp>``, made; a number is added where two start within one second."""
    task = config.get("task", "")
    task = task.get("name", "") if isinstance(task, dict) else str(task or "")
    words = [command, Path(task).stem if task.endswith(".toml") else task, time.strftime("%Y%m%d-%H%M%S")]
    stem = "-".join(word for word in (re.sub(r"[^\w.]+", "-", w).strip("-.") for w in words) if word)
    for count in itertools.count(1):
        folder = Path("runs", stem if count == 1 else f"{stem}-{count}")
        with writing(folder), suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def _refuse_another_run(
    file: Path, command: str, config: Mapping[str, Any], exist: bool | Literal["changed"], free: Collection[str]
) -> None:
    if not exist:
        raise RunError(f"expected {file.parent} to be new or empty, found a run in it: name another folder")
    try:
        record = json.loads(file.read_bytes())
        before, now = {"command": record["command"]}, {"command": command}
        settings = settled(record["config"], free)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"expected {file} to be a run's configuration, found something else: {error}") from error
    if exist != "changed":
        before, now = before | settings, now | settled(config, free)
    missing = object()
    different = [k for k in {**before, **now} if before.get(k, missing) != now.get(k, missing)]
    if different:
        shown = "; ".join(f"{k}: {before.get(k, 'nothing')!r} there, {now.get(k, 'nothing')!r} here" for k in different)
        message = f"expected {file.parent} to hold a run of this configuration, found another ({shown})"
        raise OtherRunError(message, different)


def settled(config: Mapping[str, Any], free: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, without those that are free and those in groups that are."""
    names: dict[str, Any] = {}
    for name, value in ((f"{prefix}{name}", value) for name, value in config.items()):
        if name not in free:
            names |= settled(value, free, f"{name}.") if isinstance(value, dict) else {name: value}
    return names


def _provenance() -> dict[str, Any]:
    """When, by what and on what a run was made."""
    versions = {"python": platform.python_version()}
    for name in ("rlaif-env", "torch", "transformers", "peft", "gymnasium", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command_line": sys.argv,
        "versions": versions,
        "git_commit": _git_commit(),
        "platform": {"system": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()},
    }


def _git_commit() -> str | None:
    """The commit of this code, "+changes" added where files differ from it; None outside a checkout of it."""
    here = Path(__file__)
    git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True, check=True, timeout=10)
    try:
        # A copy installed inside somebody else's checkout is not part of it: the first call fails there.
        git(["git", "ls-files", "--error-unmatch", here.name])
        commit = git(["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"])
        return str(commit.stdout).strip()
    except (OSError, subprocess.SubprocessError):
        return None
