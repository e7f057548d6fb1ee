"""A batch in parts: rows of like length together; the rows that fail found and kept apart from the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")

HOPELESS = 3
"""So many batches in a row in which every row failed mean that the model is gone; it is not the rows."""

PROMPTS_AT_ONCE = 64
"""Held-out prompts answered together, where nothing else is asked for."""

TOKENS_PER_BATCH = 2048
"""Padded tokens in one forward pass that keeps no gradient, where nothing else is asked for: memory against speed."""


def length_buckets(lengths: Sequence[int], tokens: int, *, extra: int = 0) -> list[list[int]]:
    """Row numbers, rows of like length together, with at most so many padded tokens in each bucket.

    Args:
        lengths: Tokens of each of n rows.
        tokens: Padded tokens in a bucket, at most; a longer row is one alone.
        extra: Tokens that are put behind every row.
    """
    buckets: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        widest = lengths[buckets[-1][0]] + extra if buckets else 0
        wasteful = buckets and lengths[i] + extra < 0.7 * widest and len(buckets[-1]) >= 4
        if not buckets or wasteful or widest * (len(buckets[-1]) + 1) > tokens:
            buckets.append([])
        buckets[-1].append(i)
    return buckets


def isolate_failures(
    call: Callable[[list[int]], Sequence[Result]], rows: Sequence[int], failure: type[Exception] = Exception
) -> tuple[dict[int, Result], dict[int, Exception]]:
    """Call for all rows at once; after an error leave out the rows it names, or halve the batch until they are found.

    Args:
        call: Gives a result for each of the row numbers it is called with; an error may name positions among them in
            an attribute ``rows``.
        rows: Row numbers.
        failure: Errors of this kind are a row's own; others are raised.

    Returns:
        The results and the errors, each by row number; every row is in one of them.
    """
    if not rows:
        return {}, {}
    try:
        return dict(zip(rows, call(list(rows)), strict=True)), {}
    except failure as error:
        named = {rows[i] for i in getattr(error, "rows", ()) if 0 <= i < len(rows)}
        if len(rows) == 1 or len(named) == len(rows):
            return {}, dict.fromkeys(rows, error)
        failed = dict.fromkeys(sorted(named), error)
    half = len(rows) // 2
    parts = [[row for row in rows if row not in named]] if named else [rows[:half], rows[half:]]
    results: dict[int, Result] = {}
    for part in parts:
        some, others = isolate_failures(call, part, failure)
        results |= some
        failed |= others
    return results, failed
