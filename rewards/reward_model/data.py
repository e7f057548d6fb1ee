"""Preferences for a reward model: where they come from, what is held out of them, and as token ids.

What is held out is divided by prompt, or by text where whole texts are compared, never across: no text of a validation
or test pair is in training.

Notation: n distinct texts, m pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rewards.reward_model.features import encode_for_reward
from rewards.reward_model.head import Pairs
from rlaif_env.api import Preference, RLAIFError
from rlaif_env.data.preferences import human_preferences, movie_snippets, read_preferences, split_of
from rlaif_env.data.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIDES = {"train": 0.8, "validation": 0.1, "test": 0.1}
_DIVISION = 1  # not the tasks' own, which a file made from one of their splits would be on one side of
_VALIDATION_PAIRS, _VALIDATION_TEXTS = 4000, 500


@dataclass(frozen=True)
class LabelledData:
    """Preferences, divided."""

    train: Sequence[Preference]  # to train on
    validation: Sequence[Preference]  # to choose settings and stop by, from the same labels
    # Held-out pairs by who judged them: "labels" (the same source as in training) or "human"
    tests: Mapping[str, Sequence[Preference]]
    left_out: Mapping[str, int]  # how many pairs were left out, by reason


@dataclass(frozen=True)
class Judged:
    """Pairs as token ids, each distinct text once."""

    rows: Sequence[Sequence[int]]  # n texts, numbered in the order of their first pair
    pairs: Pairs  # m pairs of them
    truncated: int  # texts of which a beginning had to be cut
    records: Sequence[Preference]  # the m preferences

    @classmethod
    def encode(
        cls, tokenizer: PreTrainedTokenizerBase, task: Task, records: Sequence[Preference], max_tokens: int
    ) -> Judged:
        """Encode preferences with `encode_for_reward`."""
        index: dict[tuple[str, str], int] = {}
        numbers = [[index.setdefault(text, len(index)) for text in _texts(record)] for record in records]
        encoded = [encode_for_reward(tokenizer, task, *text, max_tokens) for text in index]
        first, second = torch.tensor(numbers, dtype=torch.int64).reshape(-1, 2).T
        pairs = Pairs(first, second, torch.tensor([r.p_first for r in records], dtype=torch.float32))
        return cls([row for row, _ in encoded], pairs, sum(cut > 0 for _, cut in encoded), records)


def load_labels(task: Task, labels: str | Path, *, pairs: int, texts: int, test_pairs: int, seed: int) -> LabelledData:
    """Preferences to train on and to hold out.

    Args:
        task: What is judged.
        labels: "human" for the task's own preferences, or a preference file, which is divided 8 : 1 : 1.
        pairs: Train on at most so many pairs.
        texts: And on at most so many distinct texts; 0 is no limit.
        test_pairs: At most so many pairs in each test.
        seed: Of the pairs drawn from the built-in corpus.

    Raises:
        DataError: If the file has bad rows.
        RLAIFError: If there are no preferences to train on or none to hold out.
    """
    corpus, human = task.source.corpus is not None, str(labels) == "human"
    left_out: Counter[str] = Counter()

    def people(split: str, count: int) -> Iterable[Preference]:
        return human_preferences(split, count, seed) if corpus else task.preferences(split)

    tests: dict[str, list[Preference]] = {}
    if human:
        train = people("train", _enough_pairs(pairs, texts) if corpus else pairs)
        validation = people("validation", _VALIDATION_PAIRS)
    else:
        sides: dict[str | None, list[Preference]] = {side: [] for side in (*_SIDES, None)}
        for record in read_preferences(labels, allow_empty=True):
            sides[side_of(record)].append(record)
        train, validation, tests["labels"] = sides["train"], sides["validation"], sides["test"][:test_pairs]
        left_out["texts of two sides"] = len(sides[None])
    if human or corpus or task.source.preferences is not None:  # whoever made the labels, people's are the yardstick
        tests["human"] = _limited(people("test", test_pairs), test_pairs, 0, left_out)
    asked_for = Counter[str]() if human and corpus else left_out  # of drawn pairs what is over was never asked for
    chosen = {
        "train": _limited(train, pairs, texts, asked_for),
        "validation": _limited(validation, _VALIDATION_PAIRS, _VALIDATION_TEXTS, Counter()),
    }
    for side, records in chosen.items():
        if not records:
            raise RLAIFError(
                f"expected preferences in the {side} split of {labels}, found none; about 20 pairs with different "
                "prompts are the least that can be divided"
            )
    seen = {key for record in chosen["train"] for key in _keys(record)}
    for name, records in tests.items():
        tests[name] = [record for record in records if seen.isdisjoint(_keys(record))]
        left_out[f"{name} test pairs with a text of the training"] = len(records) - len(tests[name])
    return LabelledData(tests={name: held for name, held in tests.items() if held}, left_out=+left_out, **chosen)


def side_of(record: Preference) -> str | None:
    """The side a preference belongs to by its prompt, else by its texts; None if those are of two sides."""
    sides = {split_of(key, _SIDES, _DIVISION) for key in _keys(record)}
    return sides.pop() if len(sides) == 1 else None


def _keys(record: Preference) -> tuple[str, ...]:
    """What must not be on two sides."""
    return (record.prompt,) if record.prompt.strip() else (record.response_1, record.response_2)


def _texts(record: Preference) -> tuple[tuple[str, str], tuple[str, str]]:
    """The two texts that are compared, each with its prompt."""
    return (record.prompt, record.response_1), (record.prompt, record.response_2)


def _enough_pairs(pairs: int, texts: int) -> int:
    """So many pairs of the built-in corpus that so many are left when only so many texts are kept."""
    size = len(movie_snippets("train"))
    share = (min(texts or size, size) / size) ** 2
    return min(size * (size - 1) // 2, math.ceil(1.3 * pairs / share) + size)


def _limited(records: Iterable[Preference], pairs: int, texts: int, left_out: Counter[str]) -> list[Preference]:
    """The first pairs, as many as are wanted, that need no more distinct texts than are wanted."""
    kept: list[Preference] = []
    seen: set[tuple[str, str]] = set()
    for record in records:
        if len(kept) == pairs:
            left_out["beyond the number of pairs"] += 1
        elif texts and len(seen.union(_texts(record))) > texts:
            left_out["beyond the number of texts"] += 1
        else:
            seen.update(_texts(record))
            kept.append(record)
    return kept
