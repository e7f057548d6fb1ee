"""What a run writes as JSON and reads back: whole or not at all, and finite numbers only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_env.api import DataError, RLAIFError
from rlaif_env.files import replacing
from rlaif_env.tables import is_number


class RunError(RLAIFError):
    """A run folder cannot be made, written or read."""


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file that is at every moment either the old one or the new one.

    Data classes, mappings, paths, enums, NumPy scalars and arrays are written as what they hold.

    Raises:
        RunError: If the value has no JSON form (NaN and infinities have none), or the file cannot be written.
    """
    path = Path(path)
    text = json_text(value, path.name, indent=2) + "\n"
    with writing(path), replacing(path) as stream:
        stream.write(text.encode())


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, or of a file like it, in order, each with its "step".

    A last line without a line end is still being written, or was when its process was killed; it is not a row yet.

    Raises:
        RunError: If there is no such folder or file.
        DataError: If a line is not a JSON object of numbers with a step; names file and line.
    """
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RunError(f"expected a run's metrics at {file}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: expected a JSON object, found {line[:60]!r}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int or not all(map(is_number, row.values())):
            raise DataError(f"{file}, line {number}: expected finite numbers and a step, found {line[:60]!r}")
        rows.append(row)
    return rows


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors in writing a path into a `RunError` that names it."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def json_text(value: Any, name: str, indent: int | None = None) -> str:
    """A value as JSON; RunError, with the name it goes by, if it has no such form."""
    try:
        return json.dumps(value, default=_plain, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise RunError(f"expected {name} to hold text, finite numbers and the like, found: {error}") from error


def _plain(value: Any) -> Any:
    """What JSON can hold of a value that it cannot hold itself."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    raise TypeError(f"{type(value).__name__} {value!r:.60}")
