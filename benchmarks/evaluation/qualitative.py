"""Length, unsupported content and incoherence, as in the paper's qualitative section: the measures that stand for them.

How far they can be believed is measured on responses judged by hand: docs/evaluation.md, and
tests/benchmarks/evaluation/test_qualitative.py, which computes the figures anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.evaluation.systems import System
from rlaif_env.tables import Cell, Table

_WORST, _BEST = 2, 1  # examples of each policy
_SHOWN = 300  # characters of a text


@dataclass(frozen=True)
class Sign:
    """A measure that stands for a judgement, the higher the worse."""

    title: str  # what tables call it
    area: str  # under the ROC curve on held-out hand-judged responses, with its 95 % interval


SIGNS: Mapping[str, Sign] = {
    "unsupported": Sign("names and numbers not in the prompt", "0.57 [0.51, 0.62]"),
    "perplexity": Sign("perplexity under SFT", "0.64 [0.53, 0.73]"),
}
"""One for unsupported content, one for incoherence. Both are weak: on single responses they are little over ½, which is
what guessing gets."""


def with_unsupported(system: System) -> System:
    """The system with the measure "unsupported", the names and numbers of a response that its prompt does not have."""
    count = system.measures["new_names"] + system.measures["new_numbers"]
    return replace(system, measures={**system.measures, "unsupported": count})


def example_tables(policies: Mapping[str, Sequence[System]]) -> list[Table]:
    """For each sign the responses of each policy, over its seeds, that it is highest for (the worst) and lowest.

    A response that has no value of it is left out; of equal ones the first is taken.
    """
    return [
        Table(
            f"Examples by {sign.title}",
            ["policy", sign.title, "prompt ▸ response"],
            [row for policy, systems in policies.items() for row in _examples(policy, systems, name)],
            "Of each policy's held-out responses, over all seeds. Read them to see how weak a sign it is: on responses "
            f"of movie-review judged by hand its area under the ROC curve is {sign.area} (docs/evaluation.md).",
        )
        for name, sign in SIGNS.items()
        if all(name in system.measures for systems in policies.values() for system in systems)
    ]


def _examples(policy: str, systems: Sequence[System], name: str) -> list[list[Cell]]:
    values = np.concatenate([system.measures[name] for system in systems])
    texts = [pair for system in systems for pair in zip(system.prompts, system.responses, strict=True)]
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(-values[known], kind="stable")].tolist()
    lowest = known[np.argsort(values[known], kind="stable")].tolist()[: min(_BEST, max(0, len(order) - _WORST))]
    chosen = [("worst", i) for i in order[:_WORST]] + [("best", i) for i in lowest]
    return [[f"{policy}, {which}", _figure(float(values[i])), _shown(*texts[i])] for which, i in chosen]


def _figure(value: float) -> Cell:
    return int(value) if value.is_integer() else value


def _shown(prompt: str, response: str) -> str:
    """The end of a prompt and the beginning of its response."""
    start, end = "…" * (len(prompt) > _SHOWN), "…" * (len(response) > _SHOWN)
    return f"{start}{prompt[-_SHOWN:]} ▸ {response[:_SHOWN].strip()}{end}"
