"""What an altered text does to a reward: the same texts with and without a change, in the reward's own unit.

Notation: m texts, each with k altered copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.audit.api import Bound, Measurement
from benchmarks.audit.materials import RatedText
from benchmarks.audit.subject import Subject
from benchmarks.audit.verdicts import mean_at
from rlaif_env.statistics import Floats

EXAMPLES = 3


@dataclass(frozen=True)
class Change:
    """Texts before and after a change, and what the reward says of both."""

    before: list[str]  # (m,)
    after: list[str]  # (m,)
    reward: Floats  # (m,) reward before, in units of `Subject.unit`; NaN where a row was refused
    effect: Floats  # (m,) reward after less reward before, in the same
    prompts: list[str]  # (m,) "" where whole texts are judged

    @property
    def scored(self) -> Floats:
        """The effects of the rows that were scored."""
        scored: Floats = self.effect[np.isfinite(self.effect)]
        return scored

    @property
    def clusters(self) -> list[str] | None:
        """Which of the scored rows belong together: those of a prompt; None where each text is its own."""
        return [self.prompts[i] for i in np.flatnonzero(np.isfinite(self.effect))] if any(self.prompts) else None

    def examples(self, n: int = EXAMPLES) -> tuple[dict[str, str | float], ...]:
        """The rows that changed most."""
        order = np.argsort(-np.abs(np.nan_to_num(self.effect)), kind="stable")[:n].tolist()
        return tuple(
            {"text": self.before[i], "changed": self.after[i], "change (SD)": round(float(self.effect[i]), 3)}
            for i in order
            if np.isfinite(self.effect[i])
        )


def changed(
    subject: Subject, texts: Sequence[RatedText], changes: Mapping[str, Callable[[str], str | None]]
) -> dict[str, Change]:
    """Have texts scored as they are and after each of some changes; a judge of groups sees a text's versions together.

    Args:
        subject: The reward.
        texts: m texts.
        changes: By name, what makes the altered text of a text, or None where it does not apply.

    Returns:
        By name, the texts that a change applied to; not a change that applied to none, or of which no row was scored.
    """
    unit = subject.unit
    versions = [
        {"": text.response, **{name: new for name, change in changes.items() if (new := change(text.response))}}
        for text in texts
    ]
    rows = [
        (text.prompt, version, place)
        for place, (text, made) in enumerate(zip(texts, versions, strict=True))
        for version in made.values()
        if len(made) > 1
    ]
    if not rows:
        return {}
    prompts, responses, sets = (list(column) for column in zip(*rows, strict=True))
    values = iter(subject.score(prompts, responses, sets).tolist())
    rewards = [{name: next(values) for name in made} if len(made) > 1 else {} for made in versions]
    found = {}
    for name in changes:
        there = [i for i, of in enumerate(rewards) if name in of]
        if there:
            before, after = ([versions[i][key] for i in there] for key in ("", name))
            values = np.array([(rewards[i][""], rewards[i][name]) for i in there]) / unit
            prompts = [texts[i].prompt for i in there]
            found[name] = Change(before, after, values[:, 0], values[:, 1] - values[:, 0], prompts)
    return {name: change for name, change in found.items() if change.scored.size}


def effect(name: str, change: Change, bound: Bound | None, fine: str, fault: str) -> Measurement:
    """The mean effect of a change as a figure."""
    return Measurement(name, mean_at(change.scored, change.clusters), bound, fine, fault, "SD", change.examples())
