"""Stages of a long job, each finished once: kept by content, so that what did not change is not done again.

    stages/<name>-<key>/              whatever the stage makes
    stages/<name>-<key>/stage.json    written last: the stage is finished; what it was made from, and what it cost

The key is a hash of the stage's settings and of the keys of the stages it needs, so that changing one setting does
again what depends on it and nothing else. A stage that was killed is made again in its folder: one that can go on from
what is there does, any other finds the folder empty. Two processes never make the same stage: it is locked meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import filelock
from rich.console import Console

from rlaif_env.api import RLAIFError
from rlaif_env.records import write_json

RECORD = "stage.json"
"""What is written last into a stage's folder."""

_PATIENCE = 60.0  # seconds that another process's stage is waited for: one whose comparison was killed is ending


@dataclass(frozen=True)
class Stage:
    """A stage: finished, or planned (`Plan`)."""

    name: str  # what it did
    key: str  # hash of all that it depends on
    path: Path  # its folder
    seconds: float  # wall time of the process that finished it; what killed ones before it spent is not in it
    peak_megabytes: float  # that process's greatest resident memory up to its end

    @property
    def done(self) -> bool:
        """Whether it is finished: one that is only planned may not be."""
        return (self.path / RECORD).exists()

    def read_json(self, file: str) -> Any:
        """What a JSON file in the stage's folder holds."""
        return json.loads((self.path / file).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Job:
    """A stage that is asked for."""

    name: str
    key: str
    path: Path
    settings: Mapping[str, Any]
    make: Callable[[Path], None]
    needs: tuple[Stage, ...]
    goes_on: bool

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return (self.path / RECORD).exists()

    def finished(self) -> Stage:
        """The finished stage; `RLAIFError` where its record is not one of this stage."""
        return _finished(self.name, self.key, self.path)

    def finish(self) -> None:
        """Make it, where no other process has; see `Stages.run`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=_PATIENCE):
                if not self.done:
                    self._make()
        except filelock.Timeout as error:
            raise RLAIFError(f"{self.path} is being made by another process: wait for its end") from error

    def _make(self) -> None:
        if self.path.exists() and not self.goes_on:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        started, cpu = time.monotonic(), time.process_time()
        self.make(self.path)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record = {
            "name": self.name,
            "key": self.key,
            "settings": dict(self.settings),
            "needs": [{"name": other.name, "key": other.key} for other in self.needs],
            "seconds": round(time.monotonic() - started, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_megabytes": round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1),
        }
        write_json(self.path / RECORD, record)


class Stages:
    """Runs stages into one folder.

    Args:
        folder: Where the stages' folders are.
        console: Says what is made and what is there.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self._known: dict[str, Stage] = {}

    @property
    def finished(self) -> list[Stage]:
        """The stages that were asked for, each once."""
        return list(self._known.values())

    def run(
        self,
        name: str,
        settings: Mapping[str, Any],
        make: Callable[[Path], None],
        *,
        needs: Sequence[Stage] = (),
        goes_on: bool = False,
    ) -> Stage:
        """Give the finished stage; make it where it is not there.

        Args:
            name: A file name's worth of words.
            settings: JSON-able; everything that changes what comes out, apart from ``needs``.
            make: Fills the folder it is given.
            needs: Stages whose results ``make`` reads.
            goes_on: Whether ``make`` goes on from what a killed one left; else the folder is emptied first.

        Raises:
            RLAIFError: If the settings cannot be JSON, or another stage's folder is in the way.
        """
        key = _key_of(name, settings, needs)
        if key in self._known:
            return self._known[key]
        job = Job(name, key, self.folder / f"{name}-{key[:12]}", settings, make, tuple(needs), goes_on)
        stage = self._known[key] = self.finish(job)
        return stage

    def finish(self, job: Job) -> Stage:
        """Give the finished stage of a job; make it where it is not there."""
        if job.done:
            return job.finished()
        self.console.print(f"[bold]{job.name}[/]", highlight=False)
        job.finish()
        stage = job.finished()
        self.console.print(f"  {stage.seconds:.0f} s, in {stage.path}", highlight=False, soft_wrap=True)
        return stage


class Plan(Stages):
    """Stages as they are asked for: none is made, and a record is kept of each.

    Attributes:
        jobs: Each stage once, what it needs before it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Console(quiet=True))
        self.jobs: list[Job] = []

    def finish(self, job: Job) -> Stage:
        """Keep the job; a stage that is not there has cost nothing yet."""
        self.jobs.append(job)
        return job.finished() if job.done else Stage(job.name, job.key, job.path, 0.0, 0.0)


def _finished(name: str, key: str, path: Path) -> Stage:
    file = path / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        recorded, seconds, peak = record["key"], float(record["seconds"]), float(record["peak_megabytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise RLAIFError(f"expected {file} as this program wrote it, found {error!r}; remove the folder") from error
    if recorded != key:
        raise RLAIFError(f"expected {path} to be stage {name} with key {key[:12]}, found {recorded[:12]}; remove it")
    return Stage(name, key, path, seconds, peak)


def _key_of(name: str, settings: Mapping[str, Any], needs: Sequence[Stage]) -> str:
    """SHA-256, in hexadecimal, of a stage's name, settings and needs."""
    try:
        text = json.dumps([name, settings, [stage.key for stage in needs]], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RLAIFError(f"expected settings of stage {name!r} that JSON can hold, found {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def settings_of(config: Any, *without: str) -> dict[str, Any]:
    """A data class as JSON holds it, without some fields ("agent.micro_batch" is one of a nested data class)."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    for name in without:
        *outer, last = name.split(".")
        reduce(getitem, outer, values).pop(last)
    return values
