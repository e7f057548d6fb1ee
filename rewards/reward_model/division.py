"""What is held out of labelled pairs: by prompt, by text or by pair, so that about the share asked for is.

Pairs that share what they are divided by are linked, and linked pairs belong on one side. A division by the hash of
each prompt (or text) depends on nothing else: it is taken where it comes out as asked, as it does with many prompts.
Else linked groups are dealt out, the largest first, to the side that lacks most of its share; and where the groups
themselves are too large, which only texts that are compared with many others make, they are cut: texts are taken in the
order of a breadth-first search, so that near ones stay together, and pairs across the cut are dropped.

Notation: m pairs, n nodes (prompts, texts or pairs), S sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import Preference, RLAIFError
from rlaif_env.data.corpus import same_text, split_of
from rlaif_env.statistics import Dyads, clusters_of_pairs

SplitBy = Literal["auto", "prompt", "text", "pair"]
Ints = NDArray[np.int64]

LEAST_UNITS = 8
"""Fewer independent prompts (or pairs of texts) are no test: a warning says so, and prompts are not divided by."""

TOLERANCE = 0.2
"""A share of the one asked for that what is held out may be off by."""

MOST_DROPPED = 0.5
"""A division by text that drops more of the pairs is not made unless it is asked for."""

_FOLDS = 10
_HASHED = 1  # not the tasks' own division, which a file made from one of their splits would be on one side of
_ROUNDS = 12


@dataclass(frozen=True)
class Division:
    """m pairs on S sides."""

    unit: Literal["prompt", "text", "pair"]  # what is on one side only
    sides: Ints  # (m,) number of each pair's side; -1 for one across a cut, which is dropped
    names: Sequence[str]  # of the sides
    warning: str = ""  # what is wrong with it and what to do, "" if nothing

    def of(self, name: str) -> Ints:
        """The pairs of a side, in their order."""
        return np.flatnonzero(self.sides == list(self.names).index(name))

    @property
    def dropped(self) -> int:
        """How many pairs are across a cut."""
        return int((self.sides < 0).sum())


def divide(
    records: Sequence[Preference], shares: Mapping[str, float], split_by: SplitBy = "auto", *, hashed: bool = False
) -> Division:
    """Divide m pairs so that each side has about its share of those that are kept.

    Args:
        records: The pairs, m ≥ 1.
        shares: By name of the side; they sum to 1. With a side "train" the others are what is held out, each of which
            needs `LEAST_UNITS` (or half as many as pairs) for a division by prompt or text; without, they are folds,
            which are judged together.
        split_by: "auto" takes the first of prompt, text and pair that does; the last with a warning.
        hashed: Divide by the hash alone, by prompt where there is one and else by text.

    Raises:
        RLAIFError: If a division is asked for that cannot be made.
    """
    if hashed:
        nodes, keys = _nodes(records, "prompt")
        return Division(_named(records), _by_hash(nodes, keys, shares), list(shares))
    prompts = len({same_text(record.prompt) for record in records if record.prompt.strip()})
    if split_by == "prompt" and prompts < len(shares):
        raise RLAIFError(
            f"expected a prompt or more for each of {', '.join(shares)}, found {prompts}; divide by text or pair "
            "(--split-by)"
        )
    units: tuple[Literal["prompt", "text", "pair"], ...] = ("prompt", "text", "pair")
    for unit in units if split_by == "auto" else (split_by,):
        if unit == "prompt" and prompts < 2:
            continue
        nodes, keys = _nodes(records, unit)
        sides = _by_hash(nodes, keys, shares)
        if "train" not in shares or not _as_asked(sides, shares) or (sides < 0).mean() > MOST_DROPPED:
            sides = _dealt(nodes, keys, shares)
            if unit == "text" and not _as_asked(sides, shares):
                sides = _cut(nodes, keys, shares)
        division = Division(unit, sides, list(shares))
        if split_by != "auto" or (unit != "pair" and _serves(division, records, shares)):
            on = {(same_text(record.prompt), side) for record, side in zip(records, sides.tolist(), strict=True)}
            whole = unit == "text" and 1 < prompts == len(on)  # as it is where texts belong to one prompt each
            return replace(division, unit="prompt") if whole else division
    return Division("pair", sides, list(shares), _by_pair_only(records, prompts, "train" in shares))


def few_units(name: str, records: Sequence[Preference], folds: int) -> str:
    """A warning where a test has too few independent units, and what to do; else ""."""
    units = independent_units(records)
    if not records or units >= LEAST_UNITS:
        return ""
    what = "prompts" if any(record.prompt.strip() for record in records) else "pairs of texts"
    cure = "more labels" if folds else f"test on all labels in turn (--folds {_FOLDS}), or on a file of more (--test)"
    return (
        f"{len(records)} pairs ({name}) have {units:.0f} independent {what}, under the {LEAST_UNITS} that a test "
        f"needs: {cure}"
    )


def independent_units(records: Sequence[Preference]) -> float:
    """How many independent units pairs have: prompts, or half the effective number of texts where they have none."""
    if not records:
        return 0.0
    clusters = clusters_of_pairs(*zip(*((r.prompt, r.response_1, r.response_2) for r in records), strict=True))
    if not isinstance(clusters, Dyads):
        return float(len(set(clusters)))
    uses = clusters.sums(np.ones(len(clusters)))
    return float(uses.sum() ** 2 / (uses @ uses) / 2)


def counts(records: Sequence[Preference]) -> dict[str, int]:
    """How many pairs there are, of how many distinct prompts (0 without any) and texts."""
    texts = {(record.prompt, text) for record in records for text in (record.response_1, record.response_2)}
    return {"pairs": len(records), "prompts": len({p for p, _ in texts if p.strip()}), "texts": len(texts)}


def _named(records: Sequence[Preference]) -> Literal["prompt", "text"]:
    return "prompt" if any(record.prompt.strip() for record in records) else "text"


def node_keys(record: Preference, unit: Literal["prompt", "text", "pair"]) -> tuple[str, ...]:
    """What of a pair must not be on two sides: its prompt (without one its texts), its two texts, or all of it."""
    if unit == "prompt" and record.prompt.strip():
        return (same_text(record.prompt),)
    before = same_text(record.prompt) + "\n" if record.prompt.strip() else ""
    texts = tuple(before + same_text(text) for text in (record.response_1, record.response_2))
    return ("\n\n".join(sorted(texts)),) if unit == "pair" else texts


def _nodes(records: Sequence[Preference], unit: Literal["prompt", "text", "pair"]) -> tuple[Ints, list[str]]:
    """The two nodes of each pair, (m, 2), the same twice where it has one; and the n nodes' keys."""
    numbers: dict[str, int] = {}
    pairs = [[numbers.setdefault(key, len(numbers)) for key in node_keys(record, unit)] for record in records]
    return np.array([(row[0], row[-1]) for row in pairs], dtype=np.int64).reshape(-1, 2), list(numbers)


def _by_hash(nodes: Ints, keys: Sequence[str], shares: Mapping[str, float]) -> Ints:
    """The side that the hashes of a pair's nodes say, -1 where they differ."""
    numbers = {name: number for number, name in enumerate(shares)}
    one, two = np.array([numbers[split_of(key, shares, _HASHED)] for key in keys], dtype=np.int64)[nodes].T
    return np.where(one == two, one, -1)


def _as_asked(sides: Ints, shares: Mapping[str, float]) -> bool:
    """Whether each side but the training has its share of the pairs kept, or is one pair off; of folds up to twice."""
    kept = int((sides >= 0).sum())
    if "train" not in shares:
        return all(0 < int((sides == i).sum()) <= 2 * share * kept for i, share in enumerate(shares.values()))
    return all(
        abs(int((sides == i).sum()) - share * kept) <= max(TOLERANCE * share * kept, 1)
        for i, (name, share) in enumerate(shares.items())
        if name != "train"
    )


def _serves(division: Division, records: Sequence[Preference], shares: Mapping[str, float]) -> bool:
    """Whether a division has enough of what it divides by on each side, as asked, at a price that can be paid."""
    if not _as_asked(division.sides, shares) or division.dropped > MOST_DROPPED * len(records):
        return False
    held = [[records[i] for i in division.of(name)] for name in shares if name != "train"]
    if "train" not in shares:
        held = [[record for side in held for record in side]]
    return all(_units(side, division.unit) >= min(LEAST_UNITS, len(side) / 2) for side in held)


def _units(records: Sequence[Preference], unit: str) -> float:
    if unit == "prompt":
        return len({key for record in records for key in node_keys(record, "prompt")})
    texts = (node_keys(record, "text") for record in records)
    return independent_units([Preference("", one, two, 0.5) for one, two in texts])


def _order(keys: Sequence[str]) -> Ints:
    """The nodes in an order that depends on their texts alone."""
    digests = [hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in keys]
    return np.array(sorted(range(len(keys)), key=digests.__getitem__), dtype=np.int64)


def _graph(nodes: Ints, keys: Sequence[str]) -> tuple[Ints, object]:
    """Pairs with their nodes renumbered in `_order`, and the graph of nodes with an edge for each pair."""
    from scipy.sparse import coo_array

    rank = np.empty(len(keys), dtype=np.int64)
    rank[_order(keys)] = np.arange(len(keys))
    ranked = rank[nodes]
    return ranked, coo_array((np.ones(len(ranked)), ranked.T), shape=(len(keys), len(keys))).tocsr()


def _dealt(nodes: Ints, keys: Sequence[str], shares: Mapping[str, float]) -> Ints:
    """Linked groups whole, the largest first, each to the side with room that lacks the largest part of its share."""
    from scipy.sparse.csgraph import connected_components

    ranked, graph = _graph(nodes, keys)
    _, member = connected_components(graph, directed=False)  # numbered by their first node in the order
    group = member[ranked[:, 0]]
    sizes = np.bincount(group)
    quota = np.array(list(shares.values())) * len(nodes)
    lacking, side = quota.copy(), np.zeros(len(sizes), dtype=np.int64)
    for number in np.argsort(-sizes, kind="stable").tolist():
        room = sizes[number] <= lacking + TOLERANCE / 2 * quota
        best = int(np.argmax(np.where(room, lacking / np.maximum(quota, 1e-9), -1.0))) if room.any() else None
        side[number] = int(np.argmax(lacking)) if best is None else best
        lacking[side[number]] -= sizes[number]
    return np.asarray(side[group])


def _cut(nodes: Ints, keys: Sequence[str], shares: Mapping[str, float]) -> Ints:
    """Stretches of the nodes in the order of a breadth-first search, each as long as its share of the kept pairs needs.

    The training is what is left, or the last of the folds. Longer stretches drop more pairs, of which the share is
    then less: the lengths are found in some rounds.
    """
    ranked, graph = _graph(nodes, keys)
    place = np.empty(len(keys), dtype=np.int64)
    place[np.fromiter(_breadth_first(graph, len(keys)), np.int64, len(keys))] = np.arange(len(keys))
    low, high = np.sort(place[ranked], axis=1).T
    rest = list(shares).index("train") if "train" in shares else len(shares) - 1
    kept = len(nodes)
    sides = np.full(len(nodes), rest)
    for _ in range(_ROUNDS):
        sides, start = np.full(len(nodes), -1), 0
        for number, share in enumerate(shares.values()):
            if number == rest:
                continue
            ends = np.sort(high[low >= start])
            end = int(ends[min(len(ends), max(1, round(share * kept))) - 1]) + 1 if len(ends) else start
            sides[(low >= start) & (high < end)] = number
            start = end
        sides[low >= start] = rest
        if _as_asked(sides, shares) or (left := int((sides >= 0).sum())) == kept:
            break
        kept = left
    return sides


def _breadth_first(graph: object, n: int) -> Iterator[int]:
    """All n nodes of a graph, group by group, each from its first node."""
    from scipy.sparse.csgraph import breadth_first_order, connected_components

    _, member = connected_components(graph, directed=False)
    for first in np.unique(member, return_index=True)[1].tolist():
        yield from breadth_first_order(graph, first, directed=False, return_predecessors=False).tolist()


def _by_pair_only(records: Sequence[Preference], prompts: int, training: bool) -> str:
    have = counts(records)
    cure = "give a test file of other texts (--test)"
    if training and prompts >= LEAST_UNITS:
        cure = f"test on each of the prompts in turn (--split-by prompt --folds {min(_FOLDS, prompts)}), or {cure}"
    return (
        f"{have['pairs']} pairs of {prompts} prompts and {have['texts']} texts cannot be divided by either: they are "
        f"divided by pair, and texts of the test are in the training too. Its accuracy is of new pairs of known texts; "
        f"on new ones it is likely to be lower: {cure}"
    )
