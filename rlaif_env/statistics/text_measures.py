"""Simple measures of text: length, repetition, and what a response names that its prompt does not."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import RLAIFError

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_NUMBER = re.compile(r"(?<![^\W_])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_SENTENCE_END = ".!?:;…\n"


def _words(texts: Sequence[str]) -> list[list[str]]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise RLAIFError(f"expected texts to be a list of strings, found {str(texts)[:80]!r}")
    if not texts:
        raise RLAIFError("expected at least one text in texts, found none")
    return [_WORD.findall(text) for text in texts]


def word_counts(texts: Sequence[str]) -> NDArray[np.int64]:
    """Words in each text, int64 (n,): runs of letters and digits, joined by apostrophes and hyphens.

    Raises:
        RLAIFError: If there is no text, or something else than strings.
    """
    return np.array([len(words) for words in _words(texts)], dtype=np.int64)


def repeated_ngrams(texts: Sequence[str], n: int = 3) -> NDArray[np.float64]:
    """Share of each text's n-grams of words that occurred in it before, float64: 0 for none, near 1 for a loop.

    Case is ignored; a text of fewer than n words repeats nothing.

    Raises:
        RLAIFError: If there is no text, something else than strings, or n < 1.
    """
    if n < 1:
        raise RLAIFError(f"expected n-grams of at least one word, found n = {n}")
    words = [[word.casefold() for word in row] for row in _words(texts)]
    grams = [list(zip(*(row[i:] for i in range(n)), strict=False)) for row in words]
    return np.array([1 - len(set(row)) / len(row) if row else 0.0 for row in grams])


def new_numbers(prompt: str, response: str) -> list[str]:
    """Numbers of a response that its prompt does not have: a proxy for hallucination, counted by eye on samples.

    "1,000" and "1000", "2.50" and "2.5" are the same; digits inside a word ("gpt4") are none, "3rd" is 3.

    Returns:
        Each once, normalised, in order of appearance.
    """

    def numbers_of(text: str) -> dict[str, None]:
        numbers = (match.replace(",", "").lstrip("0") or "0" for match in _NUMBER.findall(text))
        return dict.fromkeys(x.rstrip("0").rstrip(".") or "0" if "." in x else x for x in numbers)

    known = numbers_of(prompt)
    return [number for number in numbers_of(response) if number not in known]


def new_names(prompt: str, response: str) -> list[str]:
    """Capitalised words inside the sentences of a response that its prompt does not have: a proxy like `new_numbers`.

    Neighbouring ones make one name ("New York"), which is new if any of its words is. "I" and its contractions are
    no names; case is ignored when looking into the prompt.

    Returns:
        Each once, in order of appearance.
    """
    known = {word.casefold() for word in _WORD.findall(prompt)}
    names: dict[str, None] = {}
    run: list[str] = []
    end = 0
    for match in [*_WORD.finditer(response), None]:
        gap = response[end : match.start()] if match else "."
        word = re.sub(r"['’]s$", "", match.group()) if match else ""
        opens = end == 0 or any(mark in gap for mark in _SENTENCE_END)
        if run and (gap.strip(" ") or not word[:1].isupper()):
            if any(part.casefold() not in known for part in run):
                names[" ".join(run)] = None
            run = []
        if word[:1].isupper() and not opens and re.split(r"['’]", word)[0] != "I":
            run.append(word)
        end = match.end() if match else end
    return list(names)
