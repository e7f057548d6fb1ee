"""A batch in parts: rows of like length together; rows over processes; those that fail kept apart from the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import BackendError, RewardBackend, checked_scores, judges_groups

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


def shares(
    prompts: Sequence[int], responses: Sequence[int], group_size: int, size: int, *, whole: bool = False
) -> list[list[int]]:
    """Row numbers, ascending, for each of so many processes; some have none where there are few rows.

    The longest first, each to the process that has then the fewest tokens (Graham's rule, 1969). A prompt is counted
    once in each process that reads it.

    Args:
        prompts: Tokens in each of n prompts, K consecutive ones the same.
        responses: Tokens in each of n responses.
        group_size: K.
        size: How many processes.
        whole: Groups stay whole; else they do unless single rows come out more even.
    """
    if size == 1:
        return [list(range(len(responses)))]

    def dealt(rows_together: int) -> tuple[int, list[list[int]]]:
        units = [range(at, at + rows_together) for at in range(0, len(responses), rows_together)]
        written = [sum(responses[row] for row in unit) for unit in units]
        loads, given = [0] * size, [list[int]() for _ in range(size)]
        read = [set[int]() for _ in range(size)]
        for index in sorted(range(len(units)), key=written.__getitem__, reverse=True):
            group = units[index][0] // group_size
            after = [
                load + written[index] + (0 if group in known else prompts[units[index][0]])
                for load, known in zip(loads, read, strict=True)
            ]
            to = min(range(size), key=after.__getitem__)
            loads[to] = after[to]
            read[to].add(group)
            given[to] += units[index]
        return max(loads), [sorted(rows) for rows in given]

    return min(map(dealt, (group_size,) if whole else (group_size, 1)), key=lambda found: found[0])[1]


def groups_of(prompts: Sequence[str]) -> list[list[int]]:
    """Row numbers of each distinct prompt, in the order of the first."""
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    return list(groups.values())


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


def scored_rows(
    backend: RewardBackend, prompts: Sequence[str], responses: Sequence[str], *, apart: bool = True
) -> tuple[NDArray[np.float32], list[dict[str, Any]], dict[int, str]]:
    """Score n pairs; with ``apart`` one that cannot be scored does not take the rewards of others away.

    Where the backend judges groups, it takes those of its group.

    Returns:
        The rewards (n,), NaN where there is none; what the backend tells beside each, NaN in place of every floating
        figure of a row without a reward; and why there is none, by row.

    Raises:
        BackendError: Where not ``apart``, as `rlaif_env.api.checked_scores` does.
    """
    units = groups_of(prompts) if judges_groups(backend) else [[i] for i in range(len(responses))]

    def score(numbers: Sequence[int]) -> list[list[tuple[np.float32, dict[str, Any]]]]:
        """What each unit's rows get, of units by number; an error names units."""
        rows = [i for number in numbers for i in units[number]]
        try:
            scores = checked_scores(backend, [prompts[i] for i in rows], [responses[i] for i in rows])
        except BackendError as error:
            if not apart:
                raise BackendError(str(error), [rows[i] for i in error.rows if i < len(rows)]) from error
            at = [place for place, number in enumerate(numbers) for _ in units[number]]
            raise BackendError(str(error), sorted({at[i] for i in error.rows if i < len(at)})) from error
        parts = {key: np.asarray(array) for key, array in scores.info.items()}
        told = iter([(v, {key: array[i] for key, array in parts.items()}) for i, v in enumerate(scores.values)])
        return [[next(told) for _ in units[number]] for number in numbers]

    every = range(len(units))
    found, without = isolate_failures(score, every, BackendError) if apart else (dict(enumerate(score(every))), {})
    scored = {row: value for number, values in found.items() for row, value in zip(units[number], values, strict=True)}
    failed = {row: error for number, error in without.items() for row in units[number]}
    told = (part for _, parts in scored.values() for part in parts.items()) if failed else ()
    unknown = np.float32(np.nan), {key: type(value)(np.nan) for key, value in told if isinstance(value, np.floating)}
    rewards, parts = (
        zip(*(scored.get(i, unknown) for i in range(len(responses))), strict=True) if responses else ((), ())
    )
    return np.array(rewards, dtype=np.float32), list(parts), {i: str(error) for i, error in failed.items()}
