"""What a policy wrote where a qualitative measure says the worst of it, and the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.comparison.outcomes import Outcome, arms_of
from rlaif_env.tables import Cell, Table

WORST, BEST = 2, 1


def example_table(outcomes: Sequence[Outcome], measure: str, title: str, caption: str) -> Table:
    """The responses of each arm, over all seeds, that a measure is highest for (the worst) and lowest.

    Args:
        outcomes: The policies.
        measure: What is the worse the higher it is; a response without a value is left out.
        title: What the measure is called.
        caption: How far it can be believed.
    """
    rows: list[list[Cell]] = []
    for arm in arms_of(outcomes):
        systems = [outcome.system for outcome in outcomes if outcome.arm == arm]
        values = np.concatenate([system.measures[measure] for system in systems])
        texts = [pair for system in systems for pair in zip(system.prompts, system.responses, strict=True)]
        known = np.flatnonzero(np.isfinite(values))
        order = known[np.argsort(-values[known], kind="stable")].tolist()
        worst = order[:WORST]
        best = order[len(worst) :][-BEST:]
        rows += [
            [arm, which, float(values[i]), *texts[i]]
            for which, some in (("worst", worst), ("best", best))
            for i in some
        ]
    return Table(f"Examples by {title}", ["policy", "by the measure", title, "prompt", "response"], rows, caption)
