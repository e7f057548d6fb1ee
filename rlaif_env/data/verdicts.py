"""What people say of a pair, as a probability that its first response is preferred.

A verdict (``winner``, ``preference``, ``choice``, ``label``, ``better_response_id``) names one of the two fields, by
its whole name or its ending (``response_a``, ``a``, ``model_a``; the number 1 is ``response_1``), or is a tie; a number
that no field ends in could mean either response and is refused. ``votes`` holds the verdicts of several people, or how
many gave each: the soft label is their mean. Ties are p = 0.5: also ``tie`` = true, a ``margin`` of 0, and equal
``score_chosen`` and ``score_rejected``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlaif_env.api import DataError

_TIES = {"tie", "draw", "equal", "both", "neither", "bothbad", "both_bad", "tie (bothbad)"}


def verdict_of(value: Any, field: str, names: tuple[str, str]) -> float:
    """1 for the first response, 0 for the second, 0.5 for a tie."""
    said = str(value).strip().casefold() if isinstance(value, str) else value
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    if isinstance(said, str | int | float) and not isinstance(said, bool):
        if said in _TIES or said == 0.5:
            return 0.5
        for p, name in zip((1.0, 0.0), names, strict=True):
            end = name.rpartition("_")[2]
            if str(said) in (name, end, f"model_{end}"):
                return p
    one, two = names
    raise DataError(
        f"expected {field} to be {one!r}, {two!r}, an ending of theirs or 'tie', found {value!r:.40}; where that is a "
        f"code, write p_first instead, the probability that {one} is preferred"
    )


def votes_of(votes: Any, names: tuple[str, str]) -> float:
    """The mean of several verdicts: a list of them, or how many gave each."""
    counted = isinstance(votes, Mapping)
    each = list(votes.items()) if counted else [(vote, 1) for vote in votes] if isinstance(votes, list) else []
    if not all(type(count) is int and count >= 0 for _, count in each) or not sum(count for _, count in each):
        raise DataError(f"expected votes to be a list of verdicts, or how many gave each, found {votes!r:.60}")
    asked = [(verdict_of(verdict, "a vote", names), count) for verdict, count in each if count]
    return float(sum(p * count for p, count in asked) / sum(count for _, count in asked))


def no_difference(row: Mapping[str, Any]) -> bool:
    """Whether a row of chosen and rejected says that neither is better."""
    scores = [row.get(name) for name in ("score_chosen", "score_rejected")]
    margin = row.get("margin")
    if margin is None and None not in scores:
        try:
            margin = scores[0] - scores[1]  # type: ignore[operator]
        except TypeError:
            raise DataError(f"expected score_chosen and score_rejected to be numbers, found {scores!r:.60}") from None
    if margin is None:
        return False
    if isinstance(margin, bool) or not isinstance(margin, int | float) or margin < 0:
        raise DataError(f"expected a margin of chosen over rejected from 0, found {margin!r:.40}")
    return margin == 0
