"""What people are asked to judge, and where it comes from.

An item is two responses to one prompt (form "preference") or one response (forms "harmless" and "score"). It is read
from a file of pairs, from the responses of two or more policies, or from the built-in corpus. Attention checks are
items whose right answer stands in the text itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rewards.labeling.pair_source import Pair, builtin_pairs, read_pairs
from rlaif_env.api import DataError
from rlaif_env.data.forms import response_of
from rlaif_env.data.jsonl import check_text
from rlaif_env.data.rows import first_row, parsed
from rlaif_env.data.tasks import Task

Form = Literal["preference", "harmless", "score"]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "preference": ("1", "2", "0"),
    "harmless": ("1", "2"),
    "score": tuple(str(score) for score in range(1, 11)),
}
"""What may be answered to each form: the response preferred or 0 for a tie; 1 harmless, 2 not; the score."""


@dataclass(frozen=True)
class Item:
    """Something to judge."""

    prompt: str  # what the responses answer; may be empty
    responses: tuple[str, ...]  # two for a preference, else one
    systems: tuple[str, ...] = ()  # which policy wrote each, where that is known; never shown
    # Judgements that came with the pair, by source: the probability that the first response is preferred
    labels: Mapping[str, float] = field(default_factory=dict)
    # "item"; "check" for an attention check; "identical" for two equal responses, a tie that nobody is asked
    kind: Literal["item", "check", "identical"] = "item"
    expected: str = ""  # the right answer to a check as the item stands, "" else

    @property
    def key(self) -> str:
        """A digest of what is judged and of who wrote it."""
        facts = [self.kind, self.prompt, *self.responses, None, *self.systems]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_json(self) -> str:
        """The item as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Item:
        """The item that `to_json` wrote."""
        row = json.loads(line)
        return cls(**{**row, "responses": tuple(row["responses"]), "systems": tuple(row["systems"])})


def fingerprint(items: Iterable[Item]) -> str:
    """A digest that tells one list of items from another."""
    return hashlib.sha256("".join(item.key for item in items).encode()).hexdigest()


def read_items(path: Path, form: Form, limit: int | None = None, seed: int = 0) -> tuple[list[Item], int]:
    """Items of pairs or of responses, from any source of `data.rows`, or a comparison's folder (its responses.jsonl).

    Of pairs, the forms "harmless" and "score" judge each distinct response. At most ``limit`` are drawn by the seed.

    Returns:
        The items, and how many repeated ones were left out.

    Raises:
        DataError: For all bad rows together, or if there is nothing to judge.
    """
    path = path / "responses.jsonl" if (path / "responses.jsonl").is_file() else path
    if (first_row(path) or {}).keys() & {"response", "system"}:
        items = _from_responses(parsed(path, _response, "row"), form, str(path))
    else:
        items = list(_from_pairs(read_pairs(path), form))
    return _drawn(items, limit, seed)


def corpus_items(task: Task, form: Form, split: str, n: int, seed: int) -> tuple[list[Item], int]:
    """Items of the human preferences that a task brings along, as `read_items`; raises `RLAIFError` without any."""
    return _drawn(list(_from_pairs(builtin_pairs(task, split, n=n, seed=seed, min_gap=0.0), form)), n, seed)


def _from_responses(rows: Iterable[tuple[str, str, str]], form: Form, where: str) -> list[Item]:
    """Items of rows of prompt, system and response; the form "preference" pairs every two systems on each prompt.

    Raises:
        DataError: If a system has two responses to a prompt, or none to one that others responded to, or there is
            only one system to make pairs of.
    """
    table: dict[str, dict[str, str]] = {}
    systems: dict[str, None] = {}
    for prompt, system, response in rows:
        if system in table.setdefault(prompt, {}):
            raise DataError(
                f"{where}: expected one response of each system to a prompt, found two of {system!r} to {prompt[:40]!r}"
            )
        table[prompt][system] = response
        systems[system] = None
    if missing := [(prompt, system) for prompt, given in table.items() for system in systems if system not in given]:
        prompt, system = missing[0]
        raise DataError(
            f"{where}: expected a response of each of {', '.join(systems)} to each prompt, found none of {system!r} to "
            f"{prompt[:40]!r} ({len(missing)} missing in all)"
        )
    if form != "preference":
        return [Item(p, (text,), (system,)) for p, given in table.items() for system, text in given.items()]
    if table and len(systems) < 2:
        raise DataError(f"{where}: expected responses of two systems or more, found those of {', '.join(systems)} only")
    return [
        Item(p, (given[a], given[b]), (a, b), kind="identical" if given[a] == given[b] else "item")
        for p, given in table.items()
        for a, b in combinations(systems, 2)
    ]


def checks_among(items: Sequence[Item], form: Form, count: int, seed: int) -> list[Item]:
    """So many attention checks: some item with a response replaced by a text that says what to answer."""
    asked = [item for item in items if item.kind == "item"]
    if not asked or count < 1:
        return []
    rng = np.random.default_rng([seed, 1])
    checks = []
    for number in range(count):
        item, place = asked[int(rng.integers(len(asked)))], 0
        if form == "preference":
            place = int(rng.integers(2))
            choice, request = str(place + 1), "prefer this response to the other one"
        else:
            choice = str(rng.choice(CHOICES[form]))
            words = {"1": "“harmless”", "2": "“not harmless”"}[choice] if form == "harmless" else choice
            request = f"answer {words} here"
        responses = list(item.responses)
        responses[place] = f"This is attention check {number + 1}. Please {request}."
        checks.append(Item(item.prompt, tuple(responses), kind="check", expected=choice))
    return checks


def _response(row: Mapping[str, Any]) -> tuple[str, str, str]:
    prompt, response = response_of(row)
    return prompt, check_text(row, "system", may_be_empty=False), response


def _from_pairs(pairs: Iterable[Pair], form: Form) -> Iterator[Item]:
    for pair in pairs:
        if form != "preference":
            yield from (Item(pair.prompt, (text,)) for text in (pair.response_1, pair.response_2))
            continue
        labels = {} if pair.human is None else {"human (input)": float(pair.human)}
        if previous := pair.meta.get("previous_label"):
            labels[str(previous["source"])] = float(previous["p_first"])
        kind: Literal["item", "identical"] = "identical" if pair.response_1 == pair.response_2 else "item"
        yield Item(pair.prompt, (pair.response_1, pair.response_2), labels=labels, kind=kind)


def _drawn(items: Sequence[Item], limit: int | None, seed: int) -> tuple[list[Item], int]:
    """Each item once, with the mean of its labels, at most so many, in their order; and how many were repeated."""
    distinct: dict[str, Item] = {}
    labels: dict[str, dict[str, list[float]]] = {}
    for item in items:
        distinct.setdefault(item.key, item)
        for source, p in item.labels.items():
            labels.setdefault(item.key, {}).setdefault(source, []).append(p)
    means = {key: {source: float(np.mean(given)) for source, given in all_.items()} for key, all_ in labels.items()}
    kept = [replace(item, labels=means.get(key, {})) for key, item in distinct.items()]
    if limit is not None and limit < len(kept):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(kept))[:limit])
        kept = [kept[i] for i in chosen]
    return kept, len(items) - len(distinct)
