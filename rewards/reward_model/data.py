"""Preferences for a reward model: where they come from, what is held out of them, and as token ids.

No text of a validation or test pair is in training, but where pairs cannot be divided so: see
`rewards.reward_model.division`.

Notation: n distinct texts, m pairs.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rewards.reward_model.division import (
    LEAST_UNITS,
    Division,
    SplitBy,
    counts,
    divide,
    few_units,
    independent_units,
    node_keys,
)
from rewards.reward_model.features import encode_for_reward
from rewards.reward_model.head import Pairs
from rlaif_env.api import Preference, RLAIFError
from rlaif_env.data.forms import TURN
from rlaif_env.data.preferences import averaged, human_preferences, movie_snippets, read_preferences
from rlaif_env.data.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VALIDATION_PAIRS, _VALIDATION_TEXTS = 4000, 500
_FEW = 100  # pairs that are too few to choose a layer by


@dataclass(frozen=True)
class HoldOut:
    """What is held out of a file of labels.

    Attributes:
        split_by: What is on one side only: "prompt", "text" (pairs across the cut are dropped) or "pair"; "auto" takes
            the first of these that there is enough of.
        validation_share: Share of the pairs to choose the layer, the penalty and the end of the training by.
        test_share: Share of the pairs that the accuracy is measured on; none where there is a test file or folds.
        folds: Measure the accuracy on all pairs by cross-validation: train so many times more, each time without one
            fold; 0 does not.
    """

    split_by: SplitBy = "auto"
    validation_share: float = 0.1
    test_share: float = 0.1
    folds: int = 0

    def shares(self, test: bool) -> dict[str, float]:
        """The share of each side; without a test unless there is to be one."""
        held = {"validation": self.validation_share} | ({"test": self.test_share} if test else {})
        return {"train": round(1 - sum(held.values()), 9), **held}


@dataclass(frozen=True)
class LabelledData:
    """Preferences, divided."""

    train: Sequence[Preference]  # to train on
    validation: Sequence[Preference]  # to choose settings and stop by, from the same labels
    # Held-out pairs by who judged them: "labels" (the same source as in training), "human", or "test file"
    tests: Mapping[str, Sequence[Preference]]
    left_out: Mapping[str, int]  # how many pairs were left out, by reason
    # How it was divided, JSON-able: "unit", "dropped" pairs, "warnings", and `counts` of each side
    division: Mapping[str, Any] = field(default_factory=dict)
    folds: Sequence[LabelledData] = ()  # the same pairs divided so often that each is in one test


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
        rows = [array("i", row) for row, _ in encoded]  # a list of many texts' ids takes several times as much
        return cls(rows, pairs, sum(cut > 0 for _, cut in encoded), records)


def load_labels(
    task: Task,
    labels: str | Path,
    *,
    pairs: int,
    texts: int,
    test_pairs: int,
    seed: int,
    hold_out: HoldOut | None = None,
    test: str | Path | None = None,
) -> LabelledData:
    """Preferences to train on and to hold out.

    Args:
        task: What is judged.
        labels: "human" for the task's own preferences, which its splits divide, or any source of `rlaif_env.data.rows`.
        pairs: Train on at most so many pairs.
        texts: And on at most so many distinct texts; 0 is no limit.
        test_pairs: At most so many pairs in each test.
        seed: Of the pairs drawn from the built-in corpus.
        hold_out: How labels that are not the task's own are divided. Those of texts of the built-in corpus are divided
            by hash unless something else is asked for: what one file of them holds out the others do too.
        test: A source of pairs to measure the accuracy on; those that share a text with it are not trained on.

    Raises:
        DataError: If the file has bad rows.
        RLAIFError: If there are no preferences to train on or none to hold out, or the task is not one of their kind.
    """
    corpus, human, hold_out = task.source.corpus is not None, str(labels) == "human", hold_out or HoldOut()
    left_out: Counter[str] = Counter()
    tests: dict[str, Sequence[Preference]] = {}
    seen: set[str] = set()
    if test is not None:
        tests["test file"] = _read(test, Counter())[:test_pairs]
        seen = {key for record in tests["test file"] for key in node_keys(record, _unit_of_test(hold_out))}

    def people(split: str, count: int) -> Iterable[Preference]:
        return human_preferences(split, count, seed) if corpus else task.preferences(split)

    def unseen(records: Iterable[Preference]) -> Iterator[Preference]:
        for record in records:
            if seen.isdisjoint(node_keys(record, _unit_of_test(hold_out))):
                yield record
            else:
                left_out["texts of the test file"] += 1

    division: dict[str, Any] = {"unit": "the splits of the task", "dropped": 0, "warnings": []}
    folds: list[LabelledData] = []
    if human:
        if hold_out.folds:
            raise RLAIFError("expected a file of labels to make folds of, found the task's own, which has its splits")
        train = list(unseen(people("train", _enough_pairs(pairs, texts) if corpus else pairs)))
        validation = list(unseen(people("validation", _VALIDATION_PAIRS)))
    else:
        records = list(unseen(_read(labels, left_out)))
        if not records:
            raise RLAIFError(f"expected pairs to train on in {labels}, found none left: {dict(+left_out)}")
        if task.kind != "dialogue" and 2 * sum(r.prompt.rstrip().endswith(TURN) for r in records) > len(records):
            raise RLAIFError(
                f"expected a dialogue task, such as helpful or harmless, for the conversations in {labels}, found "
                f"{task.name}, a {task.kind} task, which reads prompt and response another way; name the task"
            )
        split_by, warning = hold_out.split_by, ""
        if hold_out.folds:
            parts = divide(records, {str(i): 1 / hold_out.folds for i in range(hold_out.folds)}, split_by)
            folds = list(_folds(records, parts, pairs=pairs, texts=texts, test_pairs=test_pairs))
            once = sum(len(f.tests["labels"]) for f in folds)
            division["folds"] = {"pairs": once, "of": len(records), "dropped": parts.dropped}
            split_by, warning = parts.unit, parts.warning
        shares = hold_out.shares(test=test is None and not hold_out.folds)
        divided = divide(records, shares, split_by, hashed=corpus and split_by == "auto")
        division |= {"unit": divided.unit, "dropped": divided.dropped, "warnings": [warning or divided.warning]}
        sides = {name: [records[i] for i in divided.of(name)] for name in divided.names}
        kept = len(records) - divided.dropped
        division["shares"] = {name: round(len(side) / kept, 4) for name, side in sides.items()}
        train, validation = sides["train"], sides["validation"]
        if "test" in sides:
            tests["labels"] = _some(sides["test"], test_pairs, 0, Counter(), in_order=corpus)
        left_out["texts of two sides"] = divided.dropped
    if human or corpus or task.source.preferences is not None:  # whoever made the labels, people's are the yardstick
        tests["human"] = _limited(people("test", test_pairs), test_pairs, 0, left_out)
    asked_for = Counter[str]() if human and corpus else left_out  # of drawn pairs what is over was never asked for
    chosen = {"train": _some(train, pairs, texts, asked_for, in_order=corpus or human)}
    # A training on few texts for a trial does not read many more for its choice of a layer.
    few = min(_VALIDATION_TEXTS, max(counts(chosen["train"])["texts"], 2 * _FEW))
    chosen["validation"] = _some(validation, _VALIDATION_PAIRS, few, Counter(), in_order=corpus or human)
    for side, found in chosen.items():
        if not found:
            raise RLAIFError(
                f"expected preferences in the {side} split of {labels}, found none; about 20 pairs with different "
                "prompts are the least that can be divided"
            )
    trained_on = {key for record in chosen["train"] for key in node_keys(record, "prompt")}
    for name in tests.keys() & {"human"}:  # the others were divided above
        held = [r for r in tests[name] if trained_on.isdisjoint(node_keys(r, "prompt"))]
        left_out[f"{name} test pairs with a text of the training"] = len(tests[name]) - len(held)
        tests[name] = held
    tests = {name: side for name, side in tests.items() if side}
    division["sides"] = {name: counts(side) for name, side in {**chosen, **tests}.items()}
    division["known"] = _known(chosen["train"], tests.get("test file", tests.get("labels", ())))
    tested = {f"labels, {len(folds)} folds": [r for fold in folds for r in fold.tests["labels"]]} if folds else {}
    division["warnings"] += [few_units(name, side, len(folds)) for name, side in {**tests, **tested}.items()]
    if len(chosen["validation"]) < _FEW or independent_units(chosen["validation"]) < LEAST_UNITS:
        have = division["sides"]["validation"]
        of = f"{have['prompts']} prompts and {have['texts']} texts" if have["prompts"] else f"{have['texts']} texts"
        cure = ", a larger --validation-share" + (" or --split-by text" if corpus and not human else "")
        division["warnings"].append(
            f"the layer and the penalty are chosen on {have['pairs']} validation pairs of {of} only: more labels"
            f"{'' if human else cure} would help"
        )
    division["warnings"] = [warning for warning in division["warnings"] if warning]
    return LabelledData(**chosen, tests=tests, left_out=+left_out, division=division, folds=folds)


def _known(train: Sequence[Preference], test: Sequence[Preference]) -> dict[str, int]:
    """How many of a test's prompts and texts are in the training too."""
    sides = [{record.prompt for record in side if record.prompt.strip()} for side in (train, test)]
    texts = [{text for record in side for text in _texts(record)} for side in (train, test)]
    return {"prompts": len(set.intersection(*sides)), "texts": len(set.intersection(*texts))}


def _unit_of_test(hold_out: HoldOut) -> Any:
    """What pairs may not share with a test file: a text, or the prompt if that was asked for."""
    return "prompt" if hold_out.split_by == "prompt" else "text"


def _read(source: str | Path, left_out: Counter[str]) -> list[Preference]:
    """The judged pairs of a source, each once, equal texts kept once, of ``meta`` what figures need."""
    texts: dict[str, str] = {}

    def slim() -> Iterator[Preference]:
        for record in read_preferences(source, allow_empty=True, allow_identical=True):
            if record.response_1 == record.response_2:
                left_out["two equal responses"] += 1
                continue
            left_out["further judgements of a pair, averaged"] += 1
            prompt, *both = (texts.setdefault(t, t) for t in (record.prompt, record.response_1, record.response_2))
            means = {"means": record.meta["means"]} if "means" in record.meta else {}
            yield Preference(prompt, both[0], both[1], record.p_first, record.source, means)

    records = averaged(slim())
    left_out["further judgements of a pair, averaged"] -= len(records)
    return records


def _folds(
    records: Sequence[Preference], parts: Division, *, pairs: int, texts: int, test_pairs: int
) -> Iterator[LabelledData]:
    """Each fold once as the test, with the next one for validation."""
    sides = [[records[i] for i in parts.of(name)] for name in parts.names]
    for number, held in enumerate(sides):
        following = (number + 1) % len(sides)
        rest = [r for i, side in enumerate(sides) if i not in (number, following) for r in side]
        yield LabelledData(
            _some(rest, pairs, texts, Counter()),
            _some(sides[following], _VALIDATION_PAIRS, _VALIDATION_TEXTS, Counter()),
            {"labels": _some(held, math.ceil(test_pairs / len(sides)), 0, Counter())},
            {},
        )


def _texts(record: Preference) -> tuple[tuple[str, str], tuple[str, str]]:
    """The two texts that are compared, each with its prompt."""
    return (record.prompt, record.response_1), (record.prompt, record.response_2)


def _enough_pairs(pairs: int, texts: int) -> int:
    """So many pairs of the built-in corpus that so many are left when only so many texts are kept."""
    size = len(movie_snippets("train"))
    share = (min(texts or size, size) / size) ** 2
    return min(size * (size - 1) // 2, math.ceil(1.3 * pairs / share) + size)


def _some(
    records: Sequence[Preference], pairs: int, texts: int, left_out: Counter[str], *, in_order: bool = False
) -> list[Preference]:
    """`_limited`; where not all are kept, of all parts of the file, which may be sorted by prompt."""
    dropped = Counter[str]()
    kept = _limited(records, pairs, texts, dropped)
    if dropped and not in_order:
        dropped.clear()
        order = np.random.default_rng(0).permutation(len(records)).tolist()
        kept = _limited((records[i] for i in order), pairs, texts, dropped)
    left_out += dropped
    return kept


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
