"""An append-only file of finished work that survives its process being killed.

One JSON object a line, under a key that says what was asked. A batch is written in one go and synced to the disk before
it counts as done, so a process killed at any moment loses at most the batch it was in. What it may leave is the
beginning of a line, which is cut off when the file is opened again. Only the places of the rows are kept in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from rlaif_env.api import DataError
from rlaif_env.data.jsonl import json_object


class Journal:
    """The finished rows of a job, by key.

    One process at a time: the caller holds the lock of the folder.

    Args:
        path: The file; made when the first rows come.
        each: Called with every row that is there already; raises `DataError` for one that is damaged.

    Raises:
        DataError: If a whole line is no row: the file was damaged after it was written. The line is named.
    """

    def __init__(self, path: Path, each: Callable[[Mapping[str, Any]], None] = lambda row: None) -> None:
        self.path, self._end = path, 0
        self._places: dict[str, int] = {}
        self._file: IO[bytes] | None = None
        try:
            with suppress(FileNotFoundError), path.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if not line.endswith(b"\n"):
                        break  # torn: its batch was never reported as done
                    self._places[self._row(line, number, each)["key"]] = self._end
                    self._end += len(line)
        except OSError as error:
            raise DataError(f"expected a file to read at {path}, found: {error.strerror or error}") from error

    def _row(self, line: bytes, number: int, each: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
        try:
            row = json_object(line.decode("utf-8"))
            if not isinstance(row.get("key"), str):
                raise DataError(f"expected a key, found the fields {', '.join(row)}")
            each(row)
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.path}, line {number}: expected a row of finished work, found a damaged line ({error}); remove "
                "this line, and what was in it is done again"
            ) from error
        return row

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, key: str) -> dict[str, Any]:
        with self.path.open("rb") as stream:
            stream.seek(self._places[key])
            return cast(dict[str, Any], json.loads(stream.readline()))

    def append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write rows by key; when it returns they are on the disk. Keys that are there already are left as they are.

        Raises:
            DataError: If the file cannot be written; the rows do not count as done then.
        """
        new = {key: row for key, row in rows.items() if key not in self._places}
        if not new:
            return
        lines = {key: (json.dumps({"key": key, **row}, allow_nan=False) + "\n").encode() for key, row in new.items()}
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
                self._file.truncate(self._end)  # what a killed process left of a line
            left = memoryview(b"".join(lines.values()))
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # the rows that got through whole must not be followed by a torn one
                os.truncate(self.path, self._end)
            raise DataError(f"cannot write {self.path}: {error.strerror or error}; what was there is kept") from error
        for key, line in lines.items():
            self._places[key] = self._end
            self._end += len(line)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
