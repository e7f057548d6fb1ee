"""Stages of a long job, each finished once: kept by content, so that what did not change is not done again.

    stages/<name>-<key>/              whatever the stage makes
    stages/<name>-<key>/stage.json    written last: the stage is finished; what it was made from, and what it cost

The key is a hash of the stage's settings and of the keys of the stages it needs, so that changing one setting does
again what depends on it and nothing else. A stage that was killed is made again in its folder: one that can go on from
what is there does, any other finds the folder empty.
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

from rich.console import Console

from rlaif_env.api import RLAIFError
from rlaif_env.records import write_json

_RECORD = "stage.json"


@dataclass(frozen=True)
class Stage:
    """A finished stage."""

    name: str  # what it did
    key: str  # hash of all that it depends on
    path: Path  # its folder
    seconds: float  # wall time of the process that finished it; what killed ones before it spent is not in it
    peak_megabytes: float  # that process's greatest resident memory up to its end
    cached: bool  # whether it was there already

    def read_json(self, file: str) -> Any:
        """What a JSON file in the stage's folder holds."""
        return json.loads((self.path / file).read_text(encoding="utf-8"))


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
        path = self.folder / f"{name}-{key[:12]}"
        cached = (path / _RECORD).exists()
        message = f"[dim]{name}: there already ({path})" if cached else f"[bold]{name}[/]"
        self.console.print(message, highlight=False, soft_wrap=True)
        if not cached:
            if path.exists() and not goes_on:
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            started, cpu = time.monotonic(), time.process_time()
            make(path)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            record = {
                "name": name,
                "key": key,
                "settings": dict(settings),
                "needs": [{"name": other.name, "key": other.key} for other in needs],
                "seconds": round(time.monotonic() - started, 2),
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "peak_megabytes": round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1),
            }
            write_json(path / _RECORD, record)
        stage = self._known[key] = _finished(name, key, path, cached)
        if not cached:
            self.console.print(f"  {stage.seconds:.0f} s, in {path}", highlight=False, soft_wrap=True)
        return stage


def _finished(name: str, key: str, path: Path, cached: bool) -> Stage:
    file = path / _RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        recorded, seconds, peak = record["key"], float(record["seconds"]), float(record["peak_megabytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise RLAIFError(f"expected {file} as this program wrote it, found {error!r}; remove the folder") from error
    if recorded != key:
        raise RLAIFError(f"expected {path} to be stage {name} with key {key[:12]}, found {recorded[:12]}; remove it")
    return Stage(name, key, path, seconds, peak, cached)


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
