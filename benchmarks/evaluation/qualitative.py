"""Length, unsupported content and incoherence, as in the paper's qualitative section: the measures that stand for them.

How far they can be believed is measured on responses judged by hand: docs/evaluation.md, and
tests/benchmarks/evaluation/test_qualitative.py, which computes the figures anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.evaluation.systems import System


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
