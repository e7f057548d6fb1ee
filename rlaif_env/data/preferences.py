"""Prompts and preferences: files, Hugging Face data sets, the built-in corpus; validation and splits.

Reading is row by row in constant memory, and strict: see `rlaif_env.data.jsonl` for what happens to bad rows and
`rlaif_env.data.forms` for the forms that are understood.
Splits and the corpus itself are in `rlaif_env.data.corpus` and offered here as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from rlaif_env.api import DataError, Preference
from rlaif_env.data.corpus import SPLITS, human_preferences, movie_snippets, split_of
from rlaif_env.data.forms import PreferenceForms, own_row, prompt_of, trl_row
from rlaif_env.data.jsonl import MAX_CHARACTERS, check_text, checked, lines_of, read_jsonl, write_jsonl

__all__ = [
    "SPLITS",
    "dataset_rows",
    "export_trl",
    "human_preferences",
    "movie_snippets",
    "read_preferences",
    "read_prompts",
    "split_of",
    "write_preferences",
]

R = TypeVar("R")

Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A file, or rows that are there already, such as a Hugging Face data set."""


def read_prompts(
    source: Rows, fields: Sequence[str] = ("prompt",), *, max_characters: int = MAX_CHARACTERS
) -> Iterator[str]:
    """Prompts of a file or of rows, in their order, repeated ones included.

    Args:
        source: A JSON lines file, a text file with one prompt a line (``.txt``), either of them ``.gz`` too, or rows.
        fields: The field with the prompt: the first of these that a row has. It holds text or a list of messages; a
            row with ``chosen`` and ``rejected`` alone gives their common beginning.
        max_characters: Longest prompt.

    Raises:
        DataError: For all bad rows together, or if there is no row at all.
    """
    if isinstance(source, str | os.PathLike) and Path(source).name.removesuffix(".gz").endswith(".txt"):

        def text(line: str) -> str:
            return check_text({"prompt": line}, "prompt", may_be_empty=False, max_characters=max_characters)

        return _some(checked(lines_of(source), text, str(source), "line"), source, "prompt")
    return _records(source, lambda row: prompt_of(row, fields, max_characters), "prompt")


def read_preferences(
    source: Rows, *, allow_identical: bool = False, allow_empty: bool = False, max_characters: int = MAX_CHARACTERS
) -> Iterator[Preference]:
    """Preferences of a file or of rows, in any of the forms of `rlaif_env.data.forms`, in constant memory.

    A hard label of ``chosen`` and ``rejected`` becomes p_first = 1 with the chosen response first: there the position
    says everything, so swap records at random before anything is measured that could look at the position.

    Args:
        source: A JSON lines file (``.gz`` too), or rows.
        allow_identical: Keep pairs of two equal responses, which say nothing; else they are bad rows.
        allow_empty: Keep empty responses (a policy may give one, the HH data have some); else they are bad rows.
        max_characters: Longest text of a field.

    Raises:
        DataError: For all bad rows together, or if there is no row at all.
    """
    forms = PreferenceForms(allow_identical=allow_identical, allow_empty=allow_empty, max_characters=max_characters)
    return _records(source, forms, "preference")


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
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            return cast(Iterable[Mapping[str, Any]], saved[split] if isinstance(saved, datasets.DatasetDict) else saved)
        return cast(Iterable[Mapping[str, Any]], datasets.load_dataset(name, config, split=split, revision=revision))
    except Exception as error:  # the package raises a dozen kinds
        raise DataError(
            f"expected the data set {name!r} with a split {split!r}, found: {type(error).__name__}: {error}"
        ) from error


def write_preferences(path: str | os.PathLike[str], records: Iterable[Preference]) -> int:
    """Write preferences as JSON lines of the own form (``.gz`` too), in one rename when all are written.

    Returns:
        The number of records.

    Raises:
        DataError: If a record's ``meta`` holds what JSON cannot; nothing is written then.
    """
    return write_jsonl(path, map(own_row, records))


def export_trl(
    records: Iterable[Preference],
    path: str | os.PathLike[str],
    conversational: bool = False,
    *,
    skip_ties: bool = False,
) -> tuple[int, int]:
    """Write preferences as TRL reads them: ``prompt``, ``chosen``, ``rejected``, as strings or as messages.

    The soft label stays in a column ``p_chosen``, which `read_preferences` reads back.

    Args:
        records: The preferences.
        path: The JSON lines file (``.gz`` too).
        conversational: Write messages; a dialogue in the HH form becomes its turns.
        skip_ties: Leave out records with p_first = 0.5, which the form cannot say; else they are an error.

    Returns:
        The number of records written, and of ties left out.

    Raises:
        DataError: For all records together that the form cannot say; nothing is written then.
    """
    ties = 0

    def decided() -> Iterator[tuple[int, Preference]]:
        nonlocal ties
        for number, record in enumerate(records, start=1):
            if skip_ties and record.p_first == 0.5:
                ties += 1
            else:
                yield number, record

    written = write_jsonl(path, checked(decided(), lambda p: trl_row(p, conversational), "export", "record"))
    return written, ties


def _records(source: Rows, parse: Callable[[dict[str, Any]], R], what: str) -> Iterator[R]:
    """Parsed rows of a file or of rows that are there already."""
    if isinstance(source, str | os.PathLike):
        return _some(read_jsonl(source, parse), source, what)
    return _some(checked(enumerate(map(_row, source), start=1), parse, "the rows given", "row"), "the rows given", what)


def _row(row: Any) -> dict[str, Any] | DataError:
    """A row as a dictionary, or what is wrong with it."""
    if isinstance(row, Mapping):
        return dict(row)
    return DataError(f"expected a row of named fields, found {type(row).__name__}")


def _some(records: Iterator[R], where: str | os.PathLike[str], what: str) -> Iterator[R]:
    """The records, of which there must be one."""
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(f"{where}: expected at least one {what}, found none")
