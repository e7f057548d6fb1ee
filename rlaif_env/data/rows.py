"""Where rows come from: a file, a Hugging Face data set by its name, or rows that are there already. One door.

| source | written as |
|---|---|
| JSON lines | a path, ``.gz`` too |
| prompts, one a line | a path that ends in ``.txt``, ``.gz`` too: rows with the field ``prompt`` |
| Parquet | a path that ends in ``.parquet`` (needs ``pyarrow``) |
| what ``rlaif label`` wrote | the folder: its ``preferences.jsonl`` |
| a data set of the hub | ``owner/name``, ``owner/name:split``, ``owner/name/part:split`` (needs ``datasets``) |
| a data set on disk | its folder, or ``folder:split`` |

A part is a configuration of the data set or, if it has none of that name, a folder in it; the split is "train" where
none is given. An existing file is read as a file, whatever its name looks like.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from os.path import exists, isdir, isfile  # these never fail, whatever the name
from pathlib import Path
from typing import Any, TypeVar, cast

from rlaif_env.api import DataError
from rlaif_env.data.jsonl import checked, json_object, lines_of

R = TypeVar("R")

Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A source as above, or rows that are there already, such as a Hugging Face data set."""

_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(/(?P<part>[\w.-]+))?(:(?P<split>\S+))?")
_FILE = re.compile(r"\.(jsonl?|txt|csv|tsv|toml|parquet|gz|zst|zip)(:|$)")
_DATA = (".arrow", ".parquet", ".jsonl", ".gz")
_BATCH = 256  # rows of a Parquet file in memory at once


def parsed(source: Rows, parse: Callable[[dict[str, Any]], R], what: str) -> Iterator[R]:
    """Parsed rows of a source, one at a time, bad ones as `checked` has it.

    Args:
        source: See `Rows`.
        parse: Turns a row into a record; raises `DataError` for a bad one.
        what: What a record is called where there is none.

    Raises:
        DataError: If the source cannot be read, for all its bad rows together, or if there is no row at all.
    """
    rows, where, unit = _numbered(source)
    empty = True
    for record in checked(rows, parse, where, unit):
        empty = False
        yield record
    if empty:
        raise DataError(f"{where}: expected at least one {what}, found none")


def first_row(source: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The first row of a source; None if it is none: whoever reads the rows says what is wrong with all."""
    first = next(_numbered(source)[0], None)
    return None if first is None or isinstance(first[1], DataError) else first[1]


def dataset_rows(
    name: str, split: str = "train", *, config: str | None = None, revision: str | None = None
) -> Iterable[Mapping[str, Any]]:
    """Rows of a Hugging Face data set, from the hub or a folder on disk (needs the package ``datasets``).

    Raises:
        DataError: If ``datasets`` is not installed, or the data set or the split cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"expected the package datasets to read the data set {name!r}, found it is not installed; pip install "
            "datasets, or pass a JSON lines file"
        ) from error
    try:
        if isfile(Path(name) / "state.json") or isfile(Path(name) / "dataset_dict.json"):
            saved = datasets.load_from_disk(name)
            return cast(Iterable[Mapping[str, Any]], saved[split] if isinstance(saved, datasets.DatasetDict) else saved)
        try:
            rows = datasets.load_dataset(name, config, split=split, revision=revision)
        except ValueError as error:
            if config is None or "BuilderConfig" not in str(error):
                raise
            rows = datasets.load_dataset(name, data_dir=config, split=split, revision=revision)
        return cast(Iterable[Mapping[str, Any]], rows)
    except Exception as error:  # the package raises a dozen kinds
        raise DataError(
            f"expected the data set {name!r} with a split {split!r}, found: {type(error).__name__}: {error}"
        ) from error


def _numbered(source: Rows) -> tuple[Iterator[tuple[int, dict[str, Any] | DataError]], str, str]:
    """Rows with their numbers from 1, what the source is called, and what the numbers count."""
    if not isinstance(source, str | os.PathLike):
        return enumerate(map(_row, source), start=1), "the rows given", "row"
    path, where = Path(source), str(source)
    if isfile(path / "preferences.jsonl"):
        path = path / "preferences.jsonl"
    if path.suffix == ".parquet" and not isdir(path):
        return enumerate(map(_without_nulls, _parquet(path)), start=1), where, "row"
    if (named := _data_set(path)) is not None:
        name, part, split = named
        try:
            rows = dataset_rows(name, split or "train", config=part)
        except DataError as error:
            raise DataError(f"{where}: expected a file, or a data set's name, and found no file; {error}") from error
        return enumerate(map(_without_nulls, rows), start=1), where, "row"
    row = _text if path.name.removesuffix(".gz").endswith(".txt") else _object
    return ((number, row(line)) for number, line in lines_of(path)), str(path), "line"


def _data_set(path: Path) -> tuple[str, str | None, str | None] | None:
    """Name, part and split of a data set; None where a path is not the name of one."""
    folder, _, split = str(path).partition(":")
    if not isfile(path) and isdir(folder):
        return (folder, None, split or None) if any(f.suffix in _DATA for f in Path(folder).rglob("*.*")) else None
    match = _HUB.fullmatch(str(path))
    if match is None or exists(path) or _FILE.search(str(path)) or isdir(Path(match["name"]).parent):
        return None  # where the folder is there, a path was meant
    return match["name"], match["part"], match["split"]


def _object(line: str | DataError) -> dict[str, Any] | DataError:
    try:
        return line if isinstance(line, DataError) else json_object(line)
    except DataError as error:
        return error


def _text(line: str | DataError) -> dict[str, Any] | DataError:
    return line if isinstance(line, DataError) else {"prompt": line}


def _row(row: Any) -> dict[str, Any] | DataError:
    """A row as a dictionary, or what is wrong with it."""
    if isinstance(row, Mapping):
        return dict(row)
    return DataError(f"expected a row of named fields, found {type(row).__name__}")


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields a row of a table has: all rows have every column, empty in those that say nothing there."""
    return {name: value for name, value in row.items() if value is not None}


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, some at a time."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            f"expected the package pyarrow to read {path}, found it is not installed; pip install pyarrow, or pass a "
            "JSON lines file"
        ) from error
    try:
        with ParquetFile(path) as file:
            yield from chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(_BATCH))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: expected a Parquet file, found: {error}") from error
