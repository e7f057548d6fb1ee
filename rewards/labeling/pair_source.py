"""Where the pairs to label come from: a file, the built-in corpus, or two responses sampled from a policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rlaif_env.api import BackendError, DataError, Preference, RLAIFError
from rlaif_env.data.forms import PreferenceForms, holds_responses, judgement_of
from rlaif_env.data.journal import Journal
from rlaif_env.data.jsonl import check_text
from rlaif_env.data.preferences import human_preferences, read_prompts
from rlaif_env.data.rows import first_row, parsed
from rlaif_env.data.tasks import Task

_DRAWS = 8  # attempts at two different responses that are not empty


@dataclass(frozen=True)
class Pair:
    """Two responses to label."""

    prompt: str  # what both answer; may be empty where whole texts are compared
    response_1: str  # one response
    response_2: str  # the other
    human: float | None = None  # probability that people prefer the first, where they were asked
    meta: Mapping[str, Any] = field(default_factory=dict)  # anything else that came with the pair
    problem: str = ""  # why it cannot be labelled, "" if it can


def read_pairs(path: Path) -> Iterator[Pair]:
    """Pairs of any source of `data.rows`, in any form of `data.forms`, judged or not, one by one.

    In rows with ``chosen`` and ``rejected`` the position tells the answer, so about half of them are exchanged; which
    ones is told from the texts, so it is the same every time. Empty responses are kept, and two equal ones are a pair
    with a problem.

    Raises:
        DataError: For all bad rows together, each by its number.
    """
    forms = PreferenceForms(allow_identical=True, allow_empty=True, labelled=False)

    def pair(row: dict[str, Any]) -> Pair:
        record = forms(row)
        return _pair(_mixed(record) if "chosen" in row else record, labelled=judgement_of(row) is not None)

    return parsed(path, pair, "pair")


def holds_prompts(path: Path) -> bool:
    """Whether a file holds prompts without responses, told from its first row."""
    row = first_row(path)
    return row is not None and not holds_responses(row)


def prompts_of_file(path: Path) -> Iterator[str]:
    """Prompts of a file: fields ``prompt``, ``text`` or ``context``, or the lines of a ``.txt``."""
    return read_prompts(path, ("prompt", "text", "context"))


def builtin_pairs(task: Task, split: str, *, n: int | None, seed: int, min_gap: float) -> Iterator[Pair]:
    """The first n human preferences that a task brings along, None for all of the split.

    Of the movie corpus ``seed`` says which, all are as many as it has snippets, and their mean ratings differ by
    ``min_gap`` or more. Those of a user's source are put in an order that does not tell the answer, as `read_pairs`
    does.
    """
    drawn = task.source.corpus == "movie-review" and n is not None
    records = human_preferences(split, n or 0, seed, min_gap) if drawn else islice(task.preferences(split), n)
    own = task.source.corpus is None
    return (_pair(_mixed(record) if own else record, labelled=True) for record in records)


def calibration_pairs(
    task: Task, n: int, labelled: Iterable[Pair], *, file: Path | None, seed: int, min_gap: float
) -> list[Pair]:
    """Pairs that people judged, n of them, none among those to label, to calibrate labels on.

    They are the first of a file, or the task's own of its training split; of the movie corpus another draw than that
    of `builtin_pairs` with this seed.

    Raises:
        DataError: If there are not so many, or a row of the file is bad.
        RLAIFError: If nobody judged pairs of the task.
    """
    beside = {_same_pair(pair) for pair in labelled}
    found: dict[bytes, Pair] = {}
    try:
        drawn: dict[str, Any] = {"n": n + len(beside), "seed": seed + 1, "min_gap": min_gap}
        for pair in builtin_pairs(task, "train", **drawn) if file is None else read_pairs(file):
            if (
                len(found) < n
                and pair.human is not None
                and not pair.problem
                and (key := _same_pair(pair)) not in beside
            ):
                found.setdefault(key, pair)
    except DataError:
        raise
    except RLAIFError as error:
        raise RLAIFError(
            f"{error}; or give a file of pairs that people judged, to calibrate on (calibration)"
        ) from error
    if len(found) < n:
        where = f"the training split of task {task.name!r}" if file is None else str(file)
        raise DataError(
            f"expected {n} pairs that people judged and that are not labelled in {where}, found {len(found)}; "
            "calibrate on fewer, label fewer (pairs), or give a file of other pairs (calibration)"
        )
    return list(found.values())


def _same_pair(pair: Pair) -> bytes:
    """What stands for a pair in either order."""
    return _digest(pair.prompt, *sorted((pair.response_1, pair.response_2)))


class Responder(Protocol):
    """What samples responses: a language model, or servers that have one."""

    name: str

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """As `rewards.api.LanguageModel.generate`."""


def respond(policy: Responder, task: Task, prompts: Sequence[str], *, temperature: float, seed: int) -> list[str]:
    """A policy's response to each of n prompts, none longer than the task's; in a dialogue the person does not speak.

    Raises `BackendError` where the policy does not give one text a prompt.
    """
    stop = ("\n\nHuman:",) if task.kind == "dialogue" else ()
    most = task.max_response_tokens
    texts = policy.generate(prompts, max_new_tokens=most, temperature=temperature, seed=seed, stop=stop)
    if len(texts) != len(prompts):
        raise BackendError(f"expected {len(prompts)} responses of {policy.name}, found {len(texts)}")
    return texts


class SampledPairs:
    """Pairs of responses that a policy, here its name, gives to distinct prompts, kept in a journal."""

    def __init__(
        self, policy: str, task: Task, prompts: Sequence[str], journal: Journal, *, seed: int, temperature: float
    ) -> None:
        self.policy, self.task, self.journal = policy, task, journal
        self.seed, self.temperature = seed, temperature
        settings = [policy, task.kind, task.template, task.system, task.max_response_tokens, seed, temperature]
        self.prompts = {_digest(*settings, prompt).hex(): prompt for prompt in prompts}

    def open(self) -> list[str]:
        """Keys of the prompts without responses."""
        return [key for key in self.prompts if key not in self.journal]

    def draw(self, policy: Responder, keys: Sequence[str]) -> None:
        """Sample two responses to each of some prompts; unusable ones are drawn again, some times over.

        Unusable are equal ones, empty ones, and what no preference file may hold, such as control characters.
        """
        drawn: dict[str, list[str]] = {key: [] for key in keys}
        for draw in range(_DRAWS):
            wanted = [key for key, kept in drawn.items() if len(kept) < 2]
            if not wanted:
                break
            prompts, seed = [self.prompts[key] for key in wanted], self.seed * _DRAWS + draw
            texts = respond(policy, self.task, prompts, temperature=self.temperature, seed=seed)
            for key, text in zip(wanted, texts, strict=True):
                if _usable(text) and text not in drawn[key]:
                    drawn[key].append(text)
        self.journal.append({key: {"responses": kept} for key, kept in drawn.items()})

    @staticmethod
    def check(row: Mapping[str, Any]) -> None:
        """Look at a row of the journal; raises `DataError` where it does not hold responses."""
        texts = row.get("responses")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"expected a list of responses, found {texts!r:.60}")

    def __iter__(self) -> Iterator[Pair]:
        """The pairs in the order of the prompts; all have been drawn."""
        meta = {"policy": self.policy, "seed": self.seed, "temperature": self.temperature}
        for key, prompt in self.prompts.items():
            texts = self.journal[key]["responses"]
            few = f"expected two different, plain responses of {self.policy}, found {len(texts)} in {_DRAWS} draws"
            first, second = [*texts, "", ""][:2]
            yield Pair(prompt, first, second, meta=meta, problem=few if len(texts) < 2 else "")


def _mixed(record: Preference) -> Preference:
    """The preference with its responses in an order that is told from their texts, so that half are exchanged."""
    first, second = record.response_1, record.response_2
    exchanged = _digest(record.prompt, *sorted((first, second)))[0] % 2 == (first < second)
    return record.swapped() if exchanged else record


def _pair(record: Preference, *, labelled: bool) -> Pair:
    human = float(record.p_first) if labelled and record.source.startswith("human") else None
    meta, same = dict(record.meta), record.response_1 == record.response_2
    if labelled and human is None:
        meta["previous_label"] = {"p_first": record.p_first, "source": record.source}
    problem = "expected two different responses, found the same one twice" if same else ""
    return Pair(record.prompt, record.response_1, record.response_2, human, meta, problem)


def _usable(text: str) -> bool:
    try:
        check_text({"response": text}, "response", may_be_empty=False)
    except DataError:
        return False
    return True


def _digest(*facts: Any) -> bytes:
    return hashlib.sha256(json.dumps(facts).encode()).digest()
