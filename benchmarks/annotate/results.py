"""What people answered, as a preference file, and what AI labelers did on the same pairs.

How an item is counted: the first answer of each annotator (a repeat measures consistency and nothing else); skips are
no answers; attention checks are counted for the annotator alone. Two equal responses that nobody was asked about are a
tie. An item's label is the mean over its annotators, its verdict the side of ½ that this is on. Lengths are characters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.annotate.items import Form, Item
from benchmarks.annotate.project import Judgement
from benchmarks.annotate.store import Store
from rlaif_env.api import Preference, RLAIFError
from rlaif_env.data.jsonl import write_jsonl
from rlaif_env.data.preferences import read_preferences, write_preferences


@dataclass(frozen=True)
class Labels:
    """An AI labeler's judgements of the items, matched by prompt and responses."""

    p_first: Mapping[int, float]  # by item: the probability that its first response is preferred
    # By item: the probability given to the position shown first, in the item's order and after the swap; only where
    # both orders were asked
    positions: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    unmatched: int = 0  # pairs of the file that are no item here


@dataclass(frozen=True)
class People:
    """What people answered."""

    items: Mapping[int, Item]  # all of them, by id
    answers: Mapping[int, Mapping[str, Judgement]]  # those that count, by item, then by annotator
    everything: Sequence[Judgement]  # all answers that stand: skips, repeats and checks too

    def counted(self, name: str | None = None) -> list[Judgement]:
        """The answers that count of an annotator, or of all, by item."""
        return [j for given in self.answers.values() for j in given.values() if name in (None, j.annotator)]

    def repeats(self, name: str | None = None) -> list[tuple[Judgement, Judgement]]:
        """What an annotator, or each of all, chose at first and at the repeat of an item, skips left out."""
        own = [j for j in self.everything if name in (None, j.annotator) and j.choice != "skip"]
        first = {(j.annotator, j.item): j for j in own if j.kind == "item"}
        again = [j for j in own if j.kind == "repeat" and (j.annotator, j.item) in first]
        return [(first[j.annotator, j.item], j) for j in again]

    def labels(self) -> dict[int, float]:
        """The mean preference of each judged item."""
        return {number: float(np.mean([j.p_first for j in given.values()])) for number, given in self.answers.items()}


def people_of(store: Store, exclude: Sequence[str] = ()) -> People:
    """The answers that count, without those of some annotators; raises `RLAIFError` where one is not among them."""
    names = [one.name for one in store.annotators()]
    if unknown := [name for name in exclude if name not in names]:
        raise RLAIFError(f"expected annotators of {', '.join(names) or '(nobody yet)'}, found {', '.join(unknown)}")
    kept = [j for j in store.judgements() if j.annotator not in exclude]
    answers: dict[int, dict[str, Judgement]] = defaultdict(dict)
    for judgement in kept:
        if judgement.kind == "item" and judgement.choice != "skip":
            answers[judgement.item][judgement.annotator] = judgement
    return People(store.items(), dict(answers), kept)


def export(store: Store, people: People, path: Path) -> tuple[int, int]:
    """Write what people answered: preferences that ``rlaif train-rm --labels`` reads, or one rated response a line.

    Returns:
        The lines written, and the items left out because nobody has judged them.

    Raises:
        RLAIFError: If nothing was judged yet.
        DataError: If the file cannot be written.
    """
    judged = [number for number in people.items if number in people.answers]
    asked = sum(item.kind == "item" for item in people.items.values())
    if not judged:
        raise RLAIFError(f"expected judgements in {store.path}, found none yet; nothing was written")
    if store.plan.form == "preference":
        written = write_preferences(path, (_preference(people, number) for number in judged))
    else:
        written = write_jsonl(path, (_rated(store.plan.form, people, number) for number in judged))
    return written, asked - written


def _preference(people: People, number: int) -> Preference:
    item, (answers, p_first) = people.items[number], _answers("preference", people, number)
    systems = {"systems": list(item.systems)} if item.systems else {}
    first, second = item.responses
    return Preference(item.prompt, first, second, p_first, "human", {"answers": answers, **systems})


def _rated(form: Form, people: People, number: int) -> dict[str, Any]:
    item, (answers, mean) = people.items[number], _answers(form, people, number)
    row = {"prompt": item.prompt, "response": item.responses[0], form: mean}
    return row | ({"system": item.systems[0]} if item.systems else {}) | {"source": "human", "answers": answers}


def _answers(form: Form, people: People, number: int) -> tuple[list[dict[str, Any]], float]:
    """What each annotator answered to an item, with strength and comment where they are given, and the mean."""
    rows = []
    for j in people.answers[number].values():
        given = {name: text for name, text in (("strength", j.strength), ("comment", j.comment)) if text}
        rows.append({"annotator": j.annotator, "value": j.value(form), "seconds": j.seconds, **given})
    return rows, float(np.mean([row["value"] for row in rows]))


def read_labels(paths: Sequence[Path], items: Mapping[int, Item]) -> dict[str, Labels]:
    """AI labels by labeler: those of files (or folders that ``rlaif label`` wrote), and those that came with the items.

    Raises:
        DataError: If a file has bad rows.
        RLAIFError: If no pair of a file is an item here.
    """
    places: dict[tuple[str, str, str], list[tuple[int, bool]]] = defaultdict(list)
    labelers: dict[str, Labels] = {}
    own: dict[str, dict[int, float]] = defaultdict(dict)
    for number, item in items.items():
        if item.kind == "item" and len(item.responses) == 2:
            first, second = item.responses
            places[item.prompt, first, second].append((number, False))
            places[item.prompt, second, first].append((number, True))
            for source, p in item.labels.items():
                own[source][number] = p
    for path in paths:
        file = path / "preferences.jsonl" if path.is_dir() else path
        for source, labels in _matched(read_preferences(file, allow_empty=True), places).items():
            if not labels.p_first:
                raise RLAIFError(f"expected labels of the pairs that people judged in {file}, found none of them")
            names = source, f"{source} ({path.name})", f"{source} ({path})"
            labelers[next((name for name in names if name not in labelers), names[-1])] = labels
    return {source: Labels(p) for source, p in own.items() if source not in labelers} | labelers


def _matched(
    records: Iterable[Preference], places: Mapping[tuple[str, str, str], Sequence[tuple[int, bool]]]
) -> dict[str, Labels]:
    p_first: dict[str, dict[int, float]] = defaultdict(dict)
    positions: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    unmatched: dict[str, int] = defaultdict(int)
    for record in records:
        where = places.get((record.prompt, record.response_1, record.response_2), ())
        p_first[record.source].update({n: 1 - record.p_first if turned else record.p_first for n, turned in where})
        unmatched[record.source] += not where
        label = record.meta.get("label")
        if isinstance(label, Mapping) and label.get("mode") == "pairwise":
            one, two = (float(answer["p_1"]) for answer in label["answers"])
            positions[record.source].update({n: (two, one) if turned else (one, two) for n, turned in where})
    return {source: Labels(p, positions[source], unmatched[source]) for source, p in p_first.items()}
