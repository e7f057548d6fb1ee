"""What a policy wrote where a qualitative measure says the worst of it, and the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.comparison.outcomes import Outcome, arms_of
from benchmarks.evaluation.qualitative import SIGNS
from rlaif_env.tables import Cell, Table

_WORST, _BEST = 2, 1  # examples of each arm
_SHOWN = 300  # characters of a text


def example_tables(outcomes: Sequence[Outcome]) -> list[Table]:
    """For each sign the responses of each arm, over all seeds, that it is highest for (the worst) and lowest.

    A response that has no value of it is left out; of equal ones the first is taken.
    """
    return [
        Table(
            f"Examples by {sign.title}",
            ["policy", sign.title, "prompt ▸ response"],
            [row for arm in arms_of(outcomes) for row in _examples(outcomes, arm, name)],
            "Of each policy's held-out responses, over all seeds. Read them to see how weak a sign it is: on responses "
            f"of movie-review judged by hand its area under the ROC curve is {sign.area} (docs/evaluation.md).",
        )
        for name, sign in SIGNS.items()
        if name in outcomes[0].system.measures
    ]


def _examples(outcomes: Sequence[Outcome], arm: str, name: str) -> list[list[Cell]]:
    systems = [outcome.system for outcome in outcomes if outcome.arm == arm]
    values = np.concatenate([system.measures[name] for system in systems])
    texts = [pair for system in systems for pair in zip(system.prompts, system.responses, strict=True)]
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(-values[known], kind="stable")].tolist()
    lowest = known[np.argsort(values[known], kind="stable")].tolist()[: min(_BEST, max(0, len(order) - _WORST))]
    chosen = [("worst", i) for i in order[:_WORST]] + [("best", i) for i in lowest]
    return [[f"{arm}, {which}", _figure(float(values[i])), _shown(*texts[i])] for which, i in chosen]


def _figure(value: float) -> Cell:
    return int(value) if value.is_integer() else value


def _shown(prompt: str, response: str) -> str:
    """The end of a prompt and the beginning of its response."""
    start, end = "…" * (len(prompt) > _SHOWN), "…" * (len(response) > _SHOWN)
    return f"{start}{prompt[-_SHOWN:]} ▸ {response[:_SHOWN].strip()}{end}"
