"""Prompts and preferences: files, Hugging Face data sets, the built-in corpus; validation and splits.

Reading is row by row in constant memory, and strict: see `rlaif_env.data.rows` for where rows come from,
`rlaif_env.data.jsonl` for what happens to bad ones and `rlaif_env.data.forms` for the forms that are understood.
Splits and the corpus itself are in `rlaif_env.data.corpus` and offered here as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rlaif_env.api import Preference
from rlaif_env.data.corpus import SPLITS, human_preferences, movie_snippets, split_of
from rlaif_env.data.forms import PreferenceForms, own_row, prompt_of, trl_row
from rlaif_env.data.jsonl import MAX_CHARACTERS, checked, write_jsonl
from rlaif_env.data.rows import Rows, dataset_rows, parsed

__all__ = [
    "SPLITS",
    "Rows",
    "averaged",
    "dataset_rows",
    "export_trl",
    "human_preferences",
    "movie_snippets",
    "read_preferences",
    "read_prompts",
    "split_of",
    "write_preferences",
]


def read_prompts(
    source: Rows, fields: Sequence[str] = ("prompt",), *, max_characters: int = MAX_CHARACTERS
) -> Iterator[str]:
    """Prompts of a file or of rows, in their order, repeated ones included.

    Args:
        source: Any of `rlaif_env.data.rows`, or a text file with one prompt a line (``.txt``, ``.gz`` too).
        fields: The field with the prompt: the first of these that a row has. It holds text or a list of messages; a
            row with ``chosen`` and ``rejected`` alone gives their common beginning.
        max_characters: Longest prompt.

    Raises:
        DataError: For all bad rows together, or if there is no row at all.
    """
    if isinstance(source, str | os.PathLike) and Path(source).name.removesuffix(".gz").endswith(".txt"):
        fields = ("prompt",)
    return parsed(source, lambda row: prompt_of(row, fields, max_characters), "prompt")


def read_preferences(
    source: Rows, *, allow_identical: bool = False, allow_empty: bool = False, max_characters: int = MAX_CHARACTERS
) -> Iterator[Preference]:
    """Preferences of a file or of rows, in any of the forms of `rlaif_env.data.forms`, in constant memory.

    A hard label of ``chosen`` and ``rejected`` becomes p_first = 1 with the chosen response first: there the position
    says everything, so swap records at random before anything is measured that could look at the position.

    Args:
        source: Any of `rlaif_env.data.rows`.
        allow_identical: Keep pairs of two equal responses, which say nothing; else they are bad rows.
        allow_empty: Keep empty responses (a policy may give one, the HH data have some); else they are bad rows.
        max_characters: Longest text of a field.

    Raises:
        DataError: For all bad rows together, or if there is no row at all.
    """
    forms = PreferenceForms(allow_identical=allow_identical, allow_empty=allow_empty, max_characters=max_characters)
    return parsed(source, forms, "preference")


def averaged(records: Iterable[Preference]) -> list[Preference]:
    """Several judgements of one pair by one source as one, in the place of the first: p_first is their mean.

    Several people's answers in rows of their own become a soft label so; which response a row lists first does not
    matter. A pair that is judged once stays as it is, else ``meta["judgements"]`` says how often it was.
    """
    sums: dict[tuple[str, ...], list[float]] = {}  # of p_first, and how many
    first: dict[tuple[str, ...], Preference] = {}
    for record in records:
        key = (record.source, record.prompt, *sorted((record.response_1, record.response_2)))
        same = first.setdefault(key, record)
        turned = same.response_1 != record.response_1
        total = sums.setdefault(key, [0.0, 0])
        total[0] += 1 - record.p_first if turned else record.p_first
        total[1] += 1
    return [
        record
        if sums[key][1] == 1
        else replace(record, p_first=sums[key][0] / sums[key][1], meta={**record.meta, "judgements": sums[key][1]})
        for key, record in first.items()
    ]


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
