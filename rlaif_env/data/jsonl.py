"""JSON lines and text files: read row by row with every problem named by line, written in one rename.

`checked` is the rule all reading follows: rows are handed on one at a time, so a file of any length needs constant
memory; after the first bad row none is handed on any more, the rest is read for its problems only, and all of them
are raised together. So nothing is dropped in silence, and whoever collects the rows never holds part of a bad file.

What carries no data is accepted: a byte-order mark at the start, CRLF line ends, empty lines at the end.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from rlaif_env.api import DataError
from rlaif_env.files import replacing

T = TypeVar("T")
R = TypeVar("R")

MAX_CHARACTERS = 1_000_000
"""Longest text a row may hold unless the caller says otherwise."""

_SHOWN = 20
_LINE_LIMIT = 1 << 26  # bytes; a longer line is no row but a file without line ends
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip (name it .gz)",
    b"PK\x03\x04": "a zip archive",
}


def checked(rows: Iterable[tuple[int, T | DataError]], parse: Callable[[T], R], where: str, unit: str) -> Iterator[R]:
    """Parse numbered rows, one at a time, and raise all that is wrong with them together.

    Args:
        rows: Pairs of a number from 1 and either a row or what is wrong with it.
        parse: Turns a row into a record; raises `DataError` for a bad one.
        where: The file or data set, for the message.
        unit: What the numbers count: "line" or "row".

    Yields:
        The records in order, up to the first bad row.

    Raises:
        DataError: After the last row, if any was bad: the first 20 by number, and how many there are.
    """
    shown: list[str] = []
    bad = 0
    for number, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            record = parse(row)
        except DataError as error:
            bad += 1
            if bad <= _SHOWN:
                shown.append(f"{unit} {number}: {error}")
        else:
            if not bad:
                yield record
    if bad:
        more = f"\n  ... and {bad - _SHOWN} more" if bad > _SHOWN else ""
        rows_are = f"1 bad {unit}" if bad == 1 else f"{bad} bad {unit}s"
        raise DataError(f"{where}: {rows_are}; mend or remove what is named here\n  " + "\n  ".join(shown) + more)


def read_jsonl(path: str | os.PathLike[str], parse: Callable[[dict[str, Any]], R]) -> Iterator[R]:
    """Records of a JSON lines file (UTF-8, ``.gz`` too), parsed as `checked` does, in constant memory.

    Raises:
        DataError: If there is no such file, or for its bad lines, all together.
    """
    return checked(lines_of(path), lambda line: parse(json_object(line)), str(path), "line")


def lines_of(path: str | os.PathLike[str]) -> Iterator[tuple[int, str | DataError]]:
    """Numbered lines of a UTF-8 file (``.gz`` too) without their ends; a line that is no text comes as its problem.

    Raises:
        DataError: If the file cannot be opened, or is not text at all.
    """
    path = Path(path)
    try:
        file = cast(IO[bytes], gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))
    except (OSError, ValueError) as error:  # ValueError: no path can have a zero byte
        raise DataError(f"expected a file to read at {path}, found: {getattr(error, 'strerror', error)}") from error
    with file:
        empty = 0  # lines without data just before this one, a problem only if data follows
        for number in count(1):
            try:
                raw = file.readline(_LINE_LIMIT)
                long = len(raw) == _LINE_LIMIT
                while long and raw and not raw.endswith(b"\n"):
                    raw = file.readline(_LINE_LIMIT)
            except (OSError, EOFError, zlib.error) as error:
                yield number, DataError(f"expected a whole file, found that it cannot be read on: {error}")
                return
            if not raw and not long:
                return
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
                for mark, kind in _MARKS.items():
                    if raw.startswith(mark):
                        raise DataError(f"{path}: expected UTF-8 text, found what looks like {kind}")
            if not long and not raw.strip():
                empty += 1
                continue
            for before in range(number - empty, number):
                yield before, DataError("expected a row, found an empty line")
            empty = 0
            if long:
                yield number, DataError(f"expected a line of less than {_LINE_LIMIT} bytes, found a longer one")
            else:
                yield number, _decoded(raw.rstrip(b"\r\n"))


def _decoded(line: bytes) -> str | DataError:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return DataError(f"expected UTF-8, found the byte 0x{line[error.start]:02x} at byte {error.start + 1}")


def json_object(line: str) -> dict[str, Any]:
    """The object a line holds.

    Raises:
        DataError: If it is no JSON, no object, nested too deeply, has a key twice, or NaN or an infinity in it
            (a number beyond every float is one too).
    """
    try:
        row = json.loads(line, object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(f"expected a JSON object, found {error.msg} at column {error.colno}: {line[:60]!r}") from error
    except RecursionError:
        raise DataError(f"expected a JSON object, found one nested too deeply: {line[:20]!r}...") from None
    except ValueError as error:
        raise DataError(f"expected a JSON object, found {error}") from error  # an integer of thousands of digits
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, found {type(row).__name__}: {line[:60]!r}")
    return row


def check_text(row: Mapping[str, Any], name: str, *, may_be_empty: bool, max_characters: int = MAX_CHARACTERS) -> str:
    """The text of a field.

    Raises:
        DataError: If the field is missing, no string, empty (white space only) unless it may be, longer than
            ``max_characters``, or holds control characters other than tab, line feed and carriage return, or half a
            surrogate pair.
    """
    if row.get(name) is None:
        actual = "null" if name in row else listing(row)
        raise DataError(f"expected a field {name!r}, found {actual}")
    text = row[name]
    if not isinstance(text, str):
        raise DataError(f"expected {name} to be a string, found {type(text).__name__}: {str(text)[:40]}")
    if not may_be_empty and not text.strip():
        raise DataError(f"expected {name} to hold text, found {text[:20]!r}")
    if len(text) > max_characters:
        raise DataError(f"expected {name} to have at most {max_characters} characters, found {len(text)}")
    if bad := _CONTROL.search(text):
        raise DataError(f"expected {name} to be plain text, found the control character U+{ord(bad[0]):04X} in it")
    return text


def listing(row: Mapping[str, Any]) -> str:
    """The fields a row has, for a message."""
    return "the fields " + (", ".join(sorted(map(str, row))[:8]) or "(none)")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON lines (gzip for ``.gz``), in one rename when all are written; a failure leaves no trace.

    Returns:
        The number of rows written.

    Raises:
        DataError: If a row cannot be written as JSON (its number is named) or the folder cannot be written to.
    """
    path, number = Path(path), 0
    with ExitStack() as stack:
        try:
            file = cast(IO[bytes], stack.enter_context(replacing(path)))
        except OSError as error:
            raise DataError(f"expected a folder to write to at {path.parent}, found: {error.strerror}") from error
        if path.suffix == ".gz":  # no name and no time in the header: the same rows give the same bytes
            file = stack.enter_context(cast(IO[bytes], gzip.GzipFile("", "wb", fileobj=file, mtime=0)))
        for number, row in enumerate(rows, start=1):
            try:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"row {number}: expected values that JSON can hold, found: {error}") from error
            file.write(line + b"\n")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"expected each key once, found {twice!r} twice")
    return row


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise DataError(f"expected numbers that a float can hold, found {text[:20]}")
    return number


def _constant(name: str) -> float:
    raise DataError(f"expected numbers, found {name}")
