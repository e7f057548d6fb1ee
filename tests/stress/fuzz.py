"""Throw hostile inputs at every reader: ``python -m tests.stress.fuzz [READER ...] --inputs 100000 --seed 0``.

One JSON line a reader: how many inputs were accepted, how many refused with the project's own error, how many raised
anything else or lost something, and how long the slowest took. For each different fault the first input that shows it
is saved; ``--replay FILE --inputs 1 READER`` reads it again, with the traceback. Input number i of a reader is drawn
from (seed, reader, i) alone. With ``--atheris`` inputs come from that coverage-guided fuzzer instead (one reader, needs
the package ``atheris``).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

from rlaif_env.api import RLAIFError
from tests.stress.fuzz_models import MODEL_READERS
from tests.stress.fuzz_readers import FILE_READERS, Read, Reader
from tests.stress.fuzz_servers import SERVER_READERS

__all__ = ["READERS", "Outcome", "fuzz", "main"]

READERS = FILE_READERS | SERVER_READERS
"""The readers that need no model."""

_ALL = READERS | MODEL_READERS
_MEMORY = 24 << 30  # address space, bytes: a reader that is told to allocate more raises instead
_SLOW_SECONDS = 10  # of processor time, so that a busy machine makes no faults


@dataclass
class Outcome:
    """What became of a reader's inputs.

    Accepted are those that were the same after writing and reading again, refused those that raised the project's own
    error, uncaught all others. ``slowest`` is the longest processor time of one input in seconds, ``faults`` each
    different fault: what it was, and the file with its first input.
    """

    reader: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    uncaught: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)


class _TooSlow(Exception):
    """An input took longer than any reader may."""


def fuzz(name: str, inputs: int, *, seed: int = 0, faults: Path | None = None) -> Outcome:
    """Throw so many inputs at a reader, each decided by the seed, the reader's name and the input's number.

    The first input of each fault is saved in the folder ``faults``.

    Raises:
        RLAIFError: If there is no such reader.
    """
    outcome = Outcome(name)
    started = time.perf_counter()
    with _ready(name) as (reader, read):
        for number in range(inputs):
            data = reader.inputs(random.Random(f"{seed}:{name}:{number}"))
            before = time.process_time()
            try:
                with _limited():
                    read(data)
                outcome.accepted += 1
            except RLAIFError:
                outcome.refused += 1
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic of a Rust extension is none of Exception
                outcome.uncaught += 1
                _note(outcome, error, data, faults)
            outcome.slowest = max(outcome.slowest, time.process_time() - before)
            outcome.inputs += 1
    outcome.seconds = time.perf_counter() - started
    return outcome


def _note(outcome: Outcome, error: BaseException, data: bytes, folder: Path | None) -> None:
    """Keep the first input of each fault; a fault is known by its kind and the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "rlaif_env" in frame.filename or "rewards" in frame.filename]
    place = (own or frames)[-1]
    what = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    if what in outcome.faults:
        return
    where = ""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{outcome.reader}-{hashlib.sha256(data).hexdigest()[:12]}"
        file.write_bytes(data)
        where = str(file)
    outcome.faults[what] = f"{str(error)[:160]} {where}".strip()


@contextmanager
def _ready(name: str) -> Iterator[tuple[Reader, Read]]:
    """A reader in a folder of its own, on a disk in memory where there is one."""
    if name not in _ALL:
        raise RLAIFError(f"expected readers of {', '.join(_ALL)}, found {name!r}")
    memory, here = Path("/dev/shm"), Path.cwd()
    parent = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=parent, ignore_cleanup_errors=True) as folder:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield _ALL[name], _ALL[name].make(Path(folder))
        finally:
            os.chdir(here)


@contextmanager
def _limited() -> Iterator[None]:
    """Stop an input that takes too long."""

    def stop(number: int, frame: object) -> None:
        raise _TooSlow(f"longer than {_SLOW_SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _SLOW_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _replay(name: str, data: bytes) -> int:
    with _ready(name) as (_, read):
        try:
            read(data)
            print("accepted")
        except RLAIFError as error:
            print(f"refused: {error}")
    return 0


def _guided(name: str, inputs: int, seed: int) -> int:
    """Hand a reader to atheris, which does not return."""
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError as error:
        raise RLAIFError("expected the package atheris, found it is not installed; leave out --atheris") from error
    with _ready(name) as (_, read):

        def one(data: bytes) -> None:
            with suppress(RLAIFError):
                read(data)

        for module in [m for key, m in sys.modules.items() if key.partition(".")[0] in ("rlaif_env", "rewards")]:
            for function in [f for f in vars(module).values() if isinstance(f, FunctionType)]:
                if function.__module__ == module.__name__:
                    atheris.instrument_func(function)
        atheris.Setup([sys.argv[0], f"-runs={inputs}", f"-seed={seed + 1}"], one)
        atheris.Fuzz()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 1 if any input was neither read nor refused."""
    parser = argparse.ArgumentParser("python -m tests.stress.fuzz", description="Throw hostile inputs at readers.")
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(_ALL)} (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs a reader (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other inputs (default: %(default)s)")
    parser.add_argument("--faults", type=Path, default=Path("runs/fuzz"), help="folder for inputs that show a fault")
    parser.add_argument("--replay", type=Path, help="read this file instead, and show the traceback")
    parser.add_argument("--atheris", action="store_true", help="let atheris make the inputs")
    config = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    names = config.readers or list(_ALL)
    if config.atheris:
        return _guided(names[0], config.inputs, config.seed)
    if config.replay is not None:
        return _replay(names[0], config.replay.read_bytes())
    _limit_memory()
    bad = 0
    for name in names:
        outcome = fuzz(name, config.inputs, seed=config.seed, faults=config.faults.absolute())
        times = {"seconds": round(outcome.seconds, 1), "slowest": round(outcome.slowest, 3)}
        print(json.dumps(vars(outcome) | times), flush=True)
        bad += outcome.uncaught
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
