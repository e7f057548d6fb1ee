"""What is held out: shares as asked, nothing on two sides, and what is said where that cannot be had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.reward_model.division import (
    LEAST_UNITS,
    TOLERANCE,
    Division,
    SplitBy,
    divide,
    few_units,
    independent_units,
    node_keys,
)
from rlaif_env.api import Preference, RLAIFError
from rlaif_env.data.preferences import split_of

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
FOLDS = {str(i): 0.1 for i in range(10)}


def pair(prompt: str, one: str, two: str) -> Preference:
    return Preference(prompt, one, two, 1.0)


def drawn(prompts: int, texts: int, n: int, *, named: bool = True) -> list[Preference]:
    """n different pairs of a few texts on a few prompts."""
    random, found = np.random.default_rng(0), set()
    while len(found) < n:
        one, two = sorted(random.choice(texts, 2, replace=False).tolist())
        found.add((int(random.integers(prompts)), one, two))
    return [pair(f"topic {p}" if named else "", f"{p} text {a}", f"{p} text {b}") for p, a, b in sorted(found)]


OWN_TEXTS = [pair(f"topic {i % 30}", f"a{i}", f"b{i}") for i in range(1500)]
SHARED = drawn(30, 33, 9900)  # each text in 20 pairs
FEW_SHARED = drawn(30, 15, 1500)
NO_PROMPTS = drawn(30, 33, 9900, named=False)
ONE_BLOCK = drawn(1, 150, 1500, named=False)
CHAIN = [pair("", f"t{i}", f"t{i + step}") for i in range(700) for step in (1, 2)]
MANY = [pair(f"q{i}", "a", "b") for i in range(4000)]
UNEVEN = [pair(f"q{int(p) % 200}", f"a{i}", f"b{i}") for i, p in enumerate(np.random.default_rng(0).zipf(1.5, 5000))]


def held_out(division: Division, name: str) -> float:
    return len(division.of(name)) / int((division.sides >= 0).sum())


def on_each_side(records: Sequence[Preference], division: Division, unit: SplitBy) -> list[set[str]]:
    assert unit != "auto"
    return [{key for i in division.of(name) for key in node_keys(records[i], unit)} for name in division.names]


@pytest.mark.parametrize(
    ("records", "unit", "dropped"),
    [
        (OWN_TEXTS, "text", 0),  # three prompts in the test would be too few, and texts can be kept apart
        (SHARED, "prompt", 0),  # texts belong to one prompt each, so they cannot be kept apart otherwise
        (FEW_SHARED, "prompt", 0),
        (NO_PROMPTS, "text", 0),
        (CHAIN, "text", 30),
        (ONE_BLOCK, "pair", 0),
        (MANY, "prompt", 0),
        (UNEVEN, "prompt", 0),
        (OWN_TEXTS[:60], "prompt", 0),
        (MANY[:60], "prompt", 0),
    ],
    ids=[
        "own texts",
        "shared",
        "few shared",
        "no prompts",
        "chain",
        "one block",
        "many",
        "uneven",
        "two a prompt",
        "60",
    ],
)
def test_about_the_share_asked_for_is_held_out(records: list[Preference], unit: SplitBy, dropped: int) -> None:
    division = divide(records, SHARES)
    assert division.unit == unit
    assert division.dropped <= dropped
    for name in ("validation", "test"):
        assert abs(held_out(division, name) - 0.1) <= max(TOLERANCE * 0.1, 1 / len(records))
    sides = on_each_side(records, division, unit)
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert bool(division.warning) == (unit == "pair")
    again = divide(records[::-1], SHARES)
    assert (again.sides[::-1] == division.sides).all()  # the order of the rows says nothing


@pytest.mark.parametrize("unit", ["prompt", "text", "pair"])
@pytest.mark.parametrize("records", [OWN_TEXTS, FEW_SHARED, UNEVEN], ids=["own texts", "few shared", "uneven"])
def test_a_division_that_is_asked_for_is_made(records: list[Preference], unit: SplitBy) -> None:
    division = divide(records, SHARES, unit)
    sides = on_each_side(records, division, unit)
    assert sum(map(len, sides)) == len(set.union(*sides))
    for name in ("validation", "test"):
        assert abs(held_out(division, name) - 0.1) <= TOLERANCE * 0.1


def test_texts_that_cannot_be_kept_apart_are_cut_and_what_crosses_is_dropped() -> None:
    division = divide(ONE_BLOCK, SHARES, "text")
    sides = on_each_side(ONE_BLOCK, division, "text")
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert 0 < division.dropped < 0.65 * len(ONE_BLOCK)
    for name in ("validation", "test"):
        assert abs(held_out(division, name) - 0.1) <= TOLERANCE * 0.1


def test_many_prompts_are_divided_by_their_hash_alone() -> None:
    division = divide(MANY, SHARES)
    expected = [split_of(record.prompt, SHARES, 1) for record in MANY]
    assert [division.names[side] for side in division.sides] == expected
    whole = [pair("", f"t{i}", f"t{i + 1}") for i in range(300)]
    by_hash = divide(whole, SHARES, hashed=True)
    for record, side in zip(whole, by_hash.sides.tolist(), strict=True):
        sides = {split_of(text, SHARES, 1) for text in (record.response_1, record.response_2)}
        assert sides == {by_hash.names[side]} if side >= 0 else len(sides) == 2


@pytest.mark.parametrize(
    ("records", "unit"), [(OWN_TEXTS, "prompt"), (SHARED, "prompt"), (NO_PROMPTS, "text"), (ONE_BLOCK, "pair")]
)
def test_folds_test_every_pair_once(records: list[Preference], unit: SplitBy) -> None:
    division = divide(records, FOLDS)
    assert (division.unit, division.dropped) == (unit, 0)
    sizes = Counter(division.sides.tolist())
    assert len(sizes) == 10 and max(sizes.values()) <= 0.2 * len(records)
    sides = on_each_side(records, division, unit)
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_what_cannot_be_divided_says_so_and_what_to_do() -> None:
    warning = divide(ONE_BLOCK, SHARES).warning
    assert "1500 pairs of 0 prompts and 150 texts cannot be divided by either" in warning
    assert "texts of the test are in the training too" in warning and "--test" in warning
    # one topic has nine tenths of the pairs, so that neither prompts nor its texts can be divided as asked
    uneven = [pair("big", r.response_1, r.response_2) for r in ONE_BLOCK] + OWN_TEXTS[:100]
    division = divide(uneven, SHARES)
    assert division.unit == "pair" and "--split-by prompt --folds 10" in division.warning
    with pytest.raises(RLAIFError, match="expected a prompt or more for each of train, validation, test, found 0; div"):
        divide(ONE_BLOCK, SHARES, "prompt")


def test_independent_units() -> None:
    assert independent_units([]) == 0
    assert independent_units(OWN_TEXTS) == 30
    assert independent_units([pair("", f"a{i}", f"b{i}") for i in range(12)]) == pytest.approx(12)
    assert independent_units([pair("", "hub", f"b{i}") for i in range(50)]) < 2
    assert few_units("test", OWN_TEXTS, 0) == ""
    few = [record for record in OWN_TEXTS if record.prompt in ("topic 0", "topic 1")]
    assert "have 2 independent prompts, under the 8" in few_units("test", few, 0)
    assert "--folds 10" in few_units("test", few, 0) and "--folds" not in few_units("test", few, 10)
    assert LEAST_UNITS == 8


NAMES = st.sampled_from(["", "p", "q", "r", "s"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(NAMES, st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=80))
def test_whatever_the_pairs_nothing_is_on_two_sides(rows: list[tuple[str, int, int]]) -> None:
    records = [pair(prompt, f"t{a}", f"u{b}") for prompt, a, b in rows]
    for shares in (SHARES, FOLDS):
        for unit in ("auto", "text", "pair"):
            division = divide(records, shares, unit)
            sides = on_each_side(records, division, division.unit)
            assert sum(map(len, sides)) == len(set.union(*sides))
            assert len(division.sides) == len(records)
