"""Rows divided over processes, so that none has many more tokens to compute than the others."""

from __future__ import annotations

from collections.abc import Sequence


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
