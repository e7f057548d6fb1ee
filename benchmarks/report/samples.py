"""Responses read from JSON lines into the rows of a page: twice over the file, in bounded memory.

The first pass counts prompts, systems and bytes and sums the measures of every response; the second keeps the rows of
the prompts that are shown. Where not all are, those shown are evenly spaced in the order of the file, so that neither
its beginning nor its end is favoured, and the note says how many were left out and why.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.report.contents import SampleSet
from rlaif_env.api import DataError
from rlaif_env.data.jsonl import checked, json_object, lines_of
from rlaif_env.tables import is_number

MAX_TEXT = 200_000
"""Characters of a text that a page holds; of a longer one the beginning, with its length."""

_UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Answer:
    """A response to a prompt: who wrote it, the text, and finite numbers (or None) by name."""

    system: str
    text: str
    measures: Mapping[str, float | None]


@dataclass(frozen=True)
class Line:
    """What a line of a file holds."""

    prompt: str  # the prompt
    key: tuple[Any, ...] | None  # lines with an equal key belong to one prompt; None for a line that stands alone
    answers: list[Answer]  # one or more
    extras: Mapping[str, float | None] = field(default_factory=dict)  # numbers that belong to the prompt, by name
    once: bool = False  # a system answers a prompt once; a second answer is to another prompt of the same words


Parser = Callable[[dict[str, Any]], Line]
"""Reads a row of a file; raises `DataError` for a bad one."""


@dataclass
class Summary:
    """Mean of a measure over those of a system's responses that have it."""

    n: int = 0
    mean: float = math.nan

    def add(self, value: float | None) -> None:
        """Count one response."""
        if value is not None:
            self.n += 1
            self.mean = value if self.n == 1 else self.mean + (value - self.mean) / self.n


@dataclass
class Samples:
    """A file of responses, as far as it is shown, and figures of all of it."""

    shown: SampleSet  # the rows for the page
    size: int  # bytes of these rows
    answers: Mapping[str, int]  # how many responses each system has
    summaries: Mapping[str, Mapping[str, Summary]]  # of each system and measure, over all responses
    # How many prompts have no response of a system, by system; those that have all are not named
    unanswered: Mapping[str, int]
    torn: bool  # the file ends within a line, which was left out


def response(row: dict[str, Any]) -> Line:
    """A line of responses.jsonl: prompt, system, response, measures. Lines of one prompt belong together."""
    answer = Answer(_text(row, "system"), _text(row, "response"), _numbers(row.get("measures", {}), "measures"))
    prompt = _text(row, "prompt")
    return Line(prompt, (prompt,), [answer], once=True)


def before_after(row: dict[str, Any]) -> Line:
    """A line of a training run's evaluation.jsonl: prompt, before and after, each a response and its measures."""
    answers = []
    for name in ("before", "after"):
        if not isinstance(row.get(name), dict):
            raise DataError(f"expected {name} to be an object, found {_shown(row.get(name))}")
        answers.append(Answer(name, _text(row[name], "response"), _only_numbers(row[name])))
    return Line(_text(row, "prompt"), None, answers)


def sample(row: dict[str, Any]) -> Line:
    """A line of a run's samples.jsonl. The responses to a prompt in one update belong together."""
    numbers, prompt = _only_numbers(row), _text(row, "prompt")
    step, index = numbers.pop("step", None), numbers.pop("prompt_index", None)
    answer = Answer("policy", _text(row, "response"), numbers)
    return Line(prompt, (step, index, prompt), [answer], {"update": step})


def preference(row: dict[str, Any]) -> Line:
    """A line of preferences: two responses and the probability that the first is preferred."""
    p, meta = row.get("p_first"), row.get("meta")
    people = meta.get("human_p_first") if isinstance(meta, dict) else None
    first = _numbers({"preferred with probability": p, "people prefer it": people}, "p_first")
    second = {name: None if value is None else 1 - value for name, value in first.items()}
    answers = [Answer("first", _text(row, "response_1"), first), Answer("second", _text(row, "response_2"), second)]
    return Line(_text(row, "prompt"), None, answers)


def read_samples(path: Path, parse: Parser, *, title: str, limit: int, room: int, may_be_torn: bool) -> Samples:
    """Read a file of responses.

    Args:
        path: JSON lines.
        parse: What a line holds.
        title: Of the set.
        limit: Show at most so many prompts.
        room: Show at most so many bytes.
        may_be_torn: A last line without a line end is being written, or was when its process was killed: leave it out.

    Raises:
        DataError: If the file cannot be read, or for its bad lines, all together, with their numbers.
    """
    census = _Census()
    torn = may_be_torn and _ends_within_a_line(path)
    for line in _read(path, parse, torn):
        census.add(line)
    total = len(census.sizes)
    kept, why = _evenly_spaced(census.sizes, limit, room)
    rows = _rows(_read(path, parse, torn), census, kept)
    note = f"Shown: {len(kept):,} of {total:,} prompts, evenly spaced over the file; {why}."
    names = (list(census.answers), list(census.measures), list(census.extras))
    return Samples(
        shown=SampleSet(title, "" if len(kept) == total else note, *names, rows, total),
        size=sum(census.sizes[i] for i in kept),
        answers=census.answers,
        summaries=census.summaries,
        unanswered={name: total - len(those) for name, those in census.answered.items() if len(those) < total},
        torn=torn,
    )


class _Census:
    """The first pass: everything that must be known before the first row is written."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # bytes of each prompt's row, about
        self.index: dict[tuple[Any, ...], int] = {}
        self.measures: dict[str, None] = {}  # a set that keeps the order
        self.extras: dict[str, None] = {}
        self.answers: Counter[str] = Counter()
        self.answered: defaultdict[str, set[int]] = defaultdict(set)
        self.summaries: defaultdict[str, defaultdict[str, Summary]] = defaultdict(lambda: defaultdict(Summary))

    def add(self, line: Line) -> None:
        """Count one line."""
        new = len(self.sizes)
        place = new if line.key is None else self.index.setdefault(line.key, new)
        if place == new:
            self.sizes.append(_bytes(line.prompt) + 20)
        self.extras |= dict.fromkeys(line.extras)
        for answer in line.answers:
            self.answers[answer.system] += 1
            self.answered[answer.system].add(place)
            self.measures |= dict.fromkeys(answer.measures)
            for measure, value in answer.measures.items():
                self.summaries[answer.system][measure].add(value)
            self.sizes[place] += _bytes(answer.text) + 10 * len(answer.measures) + 12


def _rows(lines: Iterator[Line], census: _Census, kept: list[int]) -> list[str]:
    """The second pass: the JSON of the rows that are kept, in order."""
    wanted = {place: i for i, place in enumerate(kept)}
    systems = {name: i for i, name in enumerate(census.answers)}
    prompts, extras = [""] * len(kept), [""] * len(kept)
    answers: list[list[str]] = [[] for _ in kept]
    for number, line in enumerate(lines):
        row = wanted.get(number if line.key is None else census.index[line.key])
        if row is None:
            continue
        prompts[row], extras[row] = _string(line.prompt), _array(line.extras, census.extras) + _length(line.prompt)
        for answer in line.answers:
            cells = f"{systems[answer.system]},{_string(answer.text)},{_array(answer.measures, census.measures)}"
            answers[row].append(f"[{cells}{_length(answer.text)}]")
    return [f"[{p},[{','.join(a)}],{e}]" for p, a, e in zip(prompts, answers, extras, strict=True)]


def _read(path: Path, parse: Parser, torn: bool) -> Iterator[Line]:
    """The lines of a file, without the last one if that is torn."""
    lines = (line for line, _ in pairwise(lines_of(path))) if torn else lines_of(path)
    before: Counter[tuple[Any, ...]] = Counter()
    for line in checked(lines, lambda text: parse(json_object(text)), str(path), "line"):
        if line.once and line.key is not None:
            answered = (*line.key, line.answers[0].system)
            yield replace(line, key=(*line.key, before[answered]))
            before[answered] += 1
        else:
            yield line


def _ends_within_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            return size > 0 and file.read(1) != b"\n"
    except OSError as error:
        raise DataError(f"expected a file to read at {path}, found: {error.strerror or error}") from error


def _evenly_spaced(sizes: list[int], limit: int, room: int) -> tuple[list[int], str]:
    """Which prompts to show, and the reason where not all are."""
    count, why = min(len(sizes), limit), f"--samples {limit} says so"
    kept = [i * len(sizes) // count for i in range(count)]
    while kept and (size := sum(sizes[i] for i in kept)) > room:
        count = min(count - 1, int(count * room / size))
        kept = [i * len(sizes) // count for i in range(count)]
        why = f"more would not fit into the {room / 1e6:.1f} MB that this page has for them"
    return kept, why


def _string(text: str) -> str:
    """A text as a JSON string that cannot end the script element it stands in, and that UTF-8 can hold."""
    return _UNSAFE.sub(lambda sign: f"\\u{ord(sign[0]):04x}", json.dumps(text[:MAX_TEXT], ensure_ascii=False))


def _length(text: str) -> str:
    return f",{len(text)}" if len(text) > MAX_TEXT else ""


def _bytes(text: str) -> int:
    return len(_string(text).encode("utf-8"))


def _array(values: Mapping[str, float | None], names: Iterable[str]) -> str:
    """Numbers in the order of the names, to six digits."""
    numbers = map(values.get, names)
    cells = ("null" if n is None else str(n) if isinstance(n, int) else f"{n:.6g}" for n in numbers)
    return f"[{','.join(cells)}]"


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        found = f"{name}: {_shown(value)}" if name in row else "the fields " + (", ".join(row)[:80] or "(none)")
        raise DataError(f"expected {name} to be a string, found {found}")
    return value


def _numbers(values: Any, where: str) -> dict[str, float | None]:
    """Measures by name, each a number or null."""
    if not isinstance(values, dict):
        raise DataError(f"expected {where} to be an object of numbers, found {_shown(values)}")
    for name, value in values.items():
        if value is not None and not is_number(value):
            raise DataError(f"expected {where}: {name} to be a finite number or null, found {_shown(value)}")
    return dict(values)


def _only_numbers(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Those of a row's fields that are numbers."""
    return _numbers({n: v for n, v in row.items() if type(v) in (int, float)}, "the line")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
