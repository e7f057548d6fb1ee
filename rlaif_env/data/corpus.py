"""Splits told from the text itself, and the built-in corpus of rated movie reviews that is divided by them.

A split is a hash of the text, so it is the same on every machine, in every order and after rows were added, and the
same text is never on two sides.

The corpus (Hutto & Gilbert 2014) holds one or two sentences a snippet, rated one by one by 15 to 29 people. It is UTF-8
with CRLF line ends. Its makers took hyphens and dashes out (a double space shows where), doubled single quotes for
double ones and left HTML entities in; entities and double spaces are mended here, the rest is kept as people read it.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlaif_env.api import DataError, Preference
from rlaif_env.models import assets

SPLITS = ("train", "validation", "test", "gold")
SPLIT_FRACTIONS: Mapping[str, float] = {"train": 0.60, "validation": 0.05, "test": 0.15, "gold": 0.20}


def split_of(text: str, fractions: Mapping[str, float] = SPLIT_FRACTIONS, seed: int = 0) -> str:
    """The side a text belongs to, told from the text alone (white space and case do not count).

    Args:
        text: A prompt, or whatever must not be on two sides.
        fractions: The expected share of each side by name; they sum to 1.
        seed: Another number gives another division.

    Raises:
        DataError: If the fractions are no shares that sum to 1.
    """
    if not fractions or min(fractions.values()) < 0 or not math.isclose(sum(fractions.values()), 1, abs_tol=1e-9):
        raise DataError(f"expected shares from 0 that sum to 1, found {dict(fractions)}")
    key = f"{seed}:{same_text(text)}"
    left = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    for name, share in fractions.items():
        left -= share
        if left < 0:
            return name
    return [name for name, share in fractions.items() if share > 0][-1]  # the sum fell short of 1 by rounding


def same_text(text: str) -> str:
    """A text without what does not count when two are compared: runs of white space, and case."""
    return " ".join(text.split()).casefold()


def check_split(split: str) -> None:
    """Raise a `DataError` unless it is one of `SPLITS`."""
    if split not in SPLITS:
        raise DataError(f"expected a split of {', '.join(SPLITS)}, found {split!r}")


@dataclass(frozen=True)
class Snippet:
    """One sentence or two of a movie review and what people said of it."""

    id: int  # its number in the corpus
    text: str  # the words as the raters read them; HTML entities resolved, runs of white space made one space
    ratings: tuple[int, ...]  # one number a rater, from -4 (very negative) to 4 (very positive); 15 to 29 raters

    @property
    def mean(self) -> float:
        """The mean rating."""
        return sum(self.ratings) / len(self.ratings)

    @property
    def split(self) -> str:
        """The side it belongs to; equal texts are on one side."""
        return split_of(self.text)


def movie_snippets(split: str | None = None) -> list[Snippet]:
    """The rated movie-review snippets of the built-in corpus, in its order (fetched on first use).

    Args:
        split: One of `SPLITS`, or None for all 10,605.

    Raises:
        AssetError: If the corpus cannot be fetched.
        DataError: If there is no such split.
    """
    if split is not None:
        check_split(split)
    folder = assets.corpus_folder()
    texts = _columns(folder / "movieReviewSnippets_GroundTruth.txt", 3)
    ratings = _columns(folder / "movieReviewSnippets_anonDataRatings.txt", 4)
    snippets = []
    for (number, _, text), (same, _, _, given) in zip(texts, ratings, strict=True):
        if number != same:
            raise DataError(f"{folder}: expected the ratings of snippet {number}, found those of {same}")
        snippet = Snippet(int(number), " ".join(html.unescape(text).split()), tuple(json.loads(given)))
        if split is None or snippet.split == split:
            snippets.append(snippet)
    return snippets


def human_preferences(split: str, n: int, seed: int = 0, min_gap: float = 0.0) -> list[Preference]:
    """Real human preferences on movie reviews: which of two snippets is more positive about its film.

    They compare *different texts*, not two answers to one prompt, so ``prompt`` is empty. p_first is the share of
    pairs of one rater of each snippet in which the first snippet got the higher rating, equal ratings counting one
    half. The pairs are drawn evenly, without repeats, from all pairs of the split, and put in a random order.

    Args:
        split: One of `SPLITS`; both snippets are of it.
        n: How many pairs.
        seed: The same seed gives the same pairs.
        min_gap: Least difference of the two mean ratings, to within rounding.

    Returns:
        n preferences with ``source`` "human"; ``meta`` holds ``ids``, ``means`` and ``raters``, two numbers each.

    Raises:
        AssetError: If the corpus cannot be fetched.
        DataError: If there is no such split, or fewer pairs than asked for.
    """
    snippets = sorted(movie_snippets(split), key=lambda snippet: (snippet.mean, snippet.id))
    means = np.array([snippet.mean for snippet in snippets])
    places = np.arange(len(snippets))
    # A pair is (low, high) in the order of the means; those of a low one are the places from starts[low] on.
    starts = np.maximum(places + 1, np.searchsorted(means, means + min_gap - 1e-9))
    ends = np.cumsum(len(snippets) - starts)
    total = int(ends[-1])
    if not 1 <= n <= total:
        raise DataError(f"expected n from 1 to {total}, the pairs of {split!r} with a gap of {min_gap}; found {n}")
    random = np.random.default_rng(seed)
    drawn = random.choice(total, size=n, replace=False)
    lows = np.searchsorted(ends, drawn, side="right")
    highs = len(snippets) - (ends[lows] - drawn)
    preferences = []
    for low, high, swap in zip(lows, highs, random.random(n) < 0.5, strict=True):
        pair = (snippets[high], snippets[low]) if swap else (snippets[low], snippets[high])
        p = preferred_share(*pair)
        meta = {
            "ids": [snippet.id for snippet in pair],
            "means": [snippet.mean for snippet in pair],
            "raters": [len(snippet.ratings) for snippet in pair],
        }
        preferences.append(Preference("", pair[0].text, pair[1].text, p, "human", meta))
    return preferences


def preferred_share(one: Snippet, other: Snippet) -> float:
    """The share of pairs of one rater of each in which the first got the higher rating, equal ones counting ½."""
    first, second = (np.array(snippet.ratings) for snippet in (one, other))
    return float(np.mean(first[:, None] > second) + 0.5 * np.mean(first[:, None] == second))


def _columns(path: Path, width: int) -> list[list[str]]:
    """The tab-separated columns of a corpus file: UTF-8, CRLF, no end after the last line."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    if any(len(row) != width for row in rows):
        raise DataError(f"{path}: expected {width} columns in every line, found other numbers")
    return rows
