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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rlaif_env.api import RLAIFError
from rlaif_env.runs import write_json

__all__ = ["Stage", "Stages", "content_of", "key_of"]

_RECORD = "stage.json"


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        name: What it did.
        key: Hash of all that it depends on.
        path: Its folder.
        seconds: Wall time of the process that finished it; what killed ones before it spent is not in it.
        cpu_seconds: Likewise, processor time.
        peak_megabytes: The process's greatest resident memory up to its end.
        cached: Whether it was there already.
    """

    name: str
    key: str
    path: Path
    seconds: float
    cpu_seconds: float
    peak_megabytes: float
    cached: bool


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
        key = key_of(name, settings, needs)
        if key in self._known:
            return self._known[key]
        path = self.folder / f"{name}-{key[:12]}"
        stage = _finished(name, key, path)
        if stage is None:
            if path.exists() and not goes_on:
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            self.console.print(f"[bold]{name}[/]", highlight=False)
            started, cpu = time.monotonic(), time.process_time()
            make(path)
            record = {
                "name": name,
                "key": key,
                "settings": dict(settings),
                "needs": [{"name": other.name, "key": other.key} for other in needs],
                "seconds": round(time.monotonic() - started, 2),
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "peak_megabytes": round(_peak_megabytes(), 1),
            }
            write_json(path / _RECORD, record)
            stage = _finished(name, key, path, cached=False)
            assert stage is not None
            self.console.print(f"  {stage.seconds:.0f} s, in {path}", highlight=False, soft_wrap=True)
        else:
            self.console.print(f"[dim]{name}: there already ({path})", highlight=False, soft_wrap=True)
        self._known[key] = stage
        return stage


def _finished(name: str, key: str, path: Path, *, cached: bool = True) -> Stage | None:
    file = path / _RECORD
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        found = record["key"]
        seconds, cpu, peak = (float(record[field]) for field in ("seconds", "cpu_seconds", "peak_megabytes"))
    except (ValueError, KeyError, TypeError) as error:
        raise RLAIFError(f"expected {file} as this program wrote it, found {error!r}; remove the folder") from error
    if found != key:
        raise RLAIFError(f"expected {path} to be stage {name} with key {key[:12]}, found {found[:12]}; remove it")
    return Stage(name, key, path, seconds, cpu, peak, cached)


def key_of(name: str, settings: Mapping[str, Any], needs: Sequence[Stage] = ()) -> str:
    """SHA-256, in hexadecimal, of a stage's name, settings and needs.

    Raises:
        RLAIFError: If the settings are not JSON-able.
    """
    try:
        text = json.dumps([name, settings, [stage.key for stage in needs]], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RLAIFError(f"expected settings of stage {name!r} that JSON can hold, found {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def content_of(source: str | Path) -> str:
    """What stands for a file's or folder's content in a key: a hash; a name that is neither stands for itself."""
    path = Path(source)
    if not path.exists():
        return str(source)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        total.update(f"{file.relative_to(path)}\0{digest.hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
