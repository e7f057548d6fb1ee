"""Cases of the user's own: pairs of responses of which one should win, or neither (``rlaif audit --test FILE``).

A line of the file is a JSON object: ``name``, ``prompt`` (may be ""), and either ``better`` and ``worse``, or
``response``, ``other`` and ``"expect": "unchanged"``. Lines of one name make one figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from benchmarks.audit.api import Bound, Check, Measurement, NotMeasured
from benchmarks.audit.materials import Materials
from benchmarks.audit.subject import Subject
from benchmarks.audit.verdicts import mean_at
from rlaif_env.api import DataError
from rlaif_env.data.jsonl import check_text, listing, read_jsonl
from rlaif_env.statistics import Floats, rate

LEAST_WINS, MOST_CHANGE = 0.5, 0.25
"""How often the better response should win; how far, in SDs, a response may be from another of the same worth."""


@dataclass(frozen=True)
class Case:
    """Two responses to a prompt and what is expected of their rewards."""

    name: str
    prompt: str
    first: str  # the better one, where one is
    second: str
    unchanged: bool = False  # whether both should get the same


def case_of(row: Mapping[str, Any]) -> Case:
    """The case that a line holds.

    Raises:
        DataError: If a field is missing, unknown, or no text; if both responses are the same.
    """
    fields = ("better", "worse") if "expect" not in row else ("response", "other")
    if "expect" in row and row["expect"] != "unchanged":
        raise DataError(f"expected 'expect' to be \"unchanged\" (or no such field), found {row['expect']!r:.60}")
    if unknown := sorted(set(row) - {"name", "prompt", "expect", *fields}):
        raise DataError(
            f"expected the fields name, prompt and better, worse, or name, prompt and response, other, expect; found "
            f"{', '.join(unknown)} in {listing(row)}"
        )
    name = check_text(row, "name", may_be_empty=False)
    prompt, first, second = (check_text(row, field, may_be_empty=True) for field in ("prompt", *fields))
    if first == second:
        raise DataError(f"expected {fields[0]} and {fields[1]} to differ, found {first[:60]!r} twice")
    return Case(name, prompt, first, second, "expect" in row)


def read_cases(files: Sequence[str | PathLike[str]]) -> list[Case]:
    """The cases of some files, in order.

    Raises:
        DataError: If a file cannot be read or is empty, for its bad lines, all together, or if a name stands for both
            kinds of cases.
    """
    cases = []
    for file in files:
        read = list(read_jsonl(file, case_of))
        if not read:
            raise DataError(f"{file}: expected at least one case, found none")
        cases += read
    kinds: dict[str, bool] = {}
    for case in cases:
        if kinds.setdefault(case.name, case.unchanged) != case.unchanged:
            raise DataError(
                f"expected the cases of a name to be of one kind, found {case.name!r} with and without 'expect': give "
                "them two names"
            )
    return cases


def check_of(cases: Sequence[Case]) -> Check:
    """The check that these cases make."""
    return partial(_measured, cases)


def _measured(cases: Sequence[Case], subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether the better response of each of the user's cases wins."""
    rows = [(case.prompt, text, ("case", i)) for i, case in enumerate(cases) for text in (case.first, case.second)]
    prompts, responses, sets = (list(column) for column in zip(*rows, strict=True))
    values = subject.score(prompts, responses, sets).reshape(-1, 2)
    figures = []
    for name in dict.fromkeys(case.name for case in cases):
        places = [i for i, case in enumerate(cases) if case.name == name and np.isfinite(values[i]).all()]
        if places:
            of = [cases[i] for i in places]
            figures.append(_unchanged(subject, of, values[places]) if of[0].unchanged else _won(of, values[places]))
    if not figures:
        raise NotMeasured("the reward refused a response of every case")
    return figures


def _clusters(cases: Sequence[Case]) -> list[str] | None:
    prompts = [case.prompt for case in cases]
    return prompts if any(prompts) else None


def _won(cases: Sequence[Case], values: Floats) -> Measurement:
    won = (1 + np.sign(values[:, 0] - values[:, 1])) / 2
    return Measurement(
        f"{cases[0].name}: wins of the better response",
        lambda level: rate(won, clusters=_clusters(cases), level=level),
        Bound(f"over {LEAST_WINS:.0%}", low=LEAST_WINS),
        "The reward takes the better one more often than not.",
        "The reward takes the worse one more often: training on it will, too.",
        "share",
        _examples(cases, values, np.argsort(values[:, 0] - values[:, 1], kind="stable"), ("better", "worse")),
    )


def _unchanged(subject: Subject, cases: Sequence[Case], values: Floats) -> Measurement:
    change = (values[:, 1] - values[:, 0]) / subject.unit
    return Measurement(
        f"{cases[0].name}: the other response less the first",
        mean_at(change, _clusters(cases)),
        Bound(f"within ±{MOST_CHANGE:g} SD", -MOST_CHANGE, MOST_CHANGE),
        "The difference moves the reward by little.",
        "A difference that should not matter moves the reward.",
        "SD",
        _examples(cases, values, np.argsort(-np.abs(change), kind="stable"), ("response", "other")),
    )


def _examples(
    cases: Sequence[Case], values: Floats, order: Any, names: tuple[str, str]
) -> tuple[dict[str, str | float], ...]:
    return tuple(
        {
            "prompt": cases[i].prompt,
            names[0]: cases[i].first,
            f"reward of {names[0]}": round(float(values[i, 0]), 3),
            names[1]: cases[i].second,
            f"reward of {names[1]}": round(float(values[i, 1]), 3),
        }
        for i in order[:3].tolist()
    )
