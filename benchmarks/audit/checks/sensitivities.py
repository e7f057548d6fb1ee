"""Checks of what a reward should not heed, the form of a text, and of what it should: its words' meaning and order.

Effects are in SDs of the reward over the human-rated texts, each the change of one text against itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.audit.api import Bound, Measurement, NotMeasured
from benchmarks.audit.checks.changes import Change, changed, effect
from benchmarks.audit.checks.transforms import (
    INSTRUCTIONS,
    INVARIANCES,
    Transform,
    crossed,
    cut,
    negated,
    shuffled,
    swapped,
)
from benchmarks.audit.materials import Materials, RatedText
from benchmarks.audit.subject import Subject
from benchmarks.audit.verdicts import exactly, mean_at, root_at
from rlaif_env.statistics import Floats

MOST_FORM, LEAST_FALL, MOST_CUT = 0.25, 0.2, 0.2
"""How much form may move a reward; how far it must fall with what spoils a text; how much half a text may gain."""

_TEXTS = 48  # of each kind


def worth(materials: Materials) -> Floats:
    """How good people find each text, (T,): the mean rating; without ratings, the share of its comparisons it won.

    Raises:
        NotMeasured: If people judged none.
    """
    if not materials.texts:
        raise NotMeasured(f"the task {materials.task.name!r} has no texts that people judged")
    if all(text.rating is not None for text in materials.texts):
        return materials.ratings
    won: list[list[float]] = [[] for _ in materials.texts]
    for pair in materials.pairs:
        won[pair.first].append(pair.p_first)
        won[pair.second].append(1 - pair.p_first)
    return np.array([np.mean(shares) if shares else 0.5 for shares in won])


def thirds(materials: Materials, n: int, name: str) -> tuple[list[RatedText], list[RatedText]]:
    """At most n of the texts that people rate low and n that they rate high, text i of both of one prompt.

    Of every prompt the third of its texts that is rated lowest and the third rated highest, one at least; equal ratings
    are no pair.

    Args:
        materials: Whose.
        n: How many of each.
        name: The check's: they are drawn at random for it.

    Raises:
        NotMeasured: If no prompt has two texts of different ratings.
    """
    value = worth(materials)
    by_prompt: dict[str, list[int]] = {}
    for place in materials.rng(name).permutation(len(value)).tolist():
        by_prompt.setdefault(materials.texts[place].prompt, []).append(place)
    low, high = [], []
    for places in by_prompt.values():
        size = max(1, len(places) // 3)
        order = sorted(places, key=lambda place: value[place])
        best = set(order[-size:])
        poor, good = [p for p in places if p in order[:size]], [p for p in places if p in best]
        for one, two in zip(poor, good, strict=True):
            if value[one] < value[two]:
                low.append(materials.texts[one])
                high.append(materials.texts[two])
    if not low:
        raise NotMeasured("no prompt has two texts that people judge differently")
    return low[:n], high[:n]


# --- form -------------------------------------------------------------------------------------------------------------


def invariances(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether form moves the reward: white space, quotes, the full stop, the first letter, how the prompt asks."""
    texts = materials.chosen("invariances", subject.affordable(_TEXTS))
    found: Mapping[str, Change | None] = dict.fromkeys(INVARIANCES) | changed(subject, texts, INVARIANCES)
    found = {**found, "with the instruction said in other words": _asked_otherwise(subject, materials)}
    there = {name: change for name, change in found.items() if change is not None}
    if not there:
        raise NotMeasured("no change of form applies to any text, or the reward refused them all")
    figures = [
        effect(
            f"the same text {name}",
            change,
            Bound(f"within ±{MOST_FORM:g} SD", -MOST_FORM, MOST_FORM),
            "This form is neither paid for nor punished.",
            "This form alone moves the reward: training will take it up, or avoid it, whatever the text says.",
        )
        for name, change in there.items()
    ]
    squares = np.concatenate([change.scored**2 for change in there.values()])
    rows = [text for change in there.values() for text, e in zip(change.before, change.effect, strict=True) if e == e]
    figures.append(
        Measurement(
            "usual change by form, either way (root mean square)",
            root_at(mean_at(squares, rows), squares=True),
            None,
            "What form moves a single reward by, up or down: noise that training can choose from; 1.4 would be as much "
            "as another text.",
            unit="SD",
        )
    )
    return figures + _without(found, len(texts))


def _asked_otherwise(subject: Subject, materials: Materials) -> Change | None:
    """Whole sets of texts whose prompt asks in more words; None where prompts hold no instruction."""
    said, unit = INSTRUCTIONS.get(materials.task.kind), subject.unit
    if said is None:
        return None
    place: dict[int, None] = {}
    for text in materials.known:
        place.setdefault(text.set)
    sets = set(list(place)[: subject.affordable(_TEXTS)])
    rows = [i for i, text in enumerate(materials.known) if text.set in sets]
    texts = [materials.known[i] for i in rows]
    prompts = [said + text.prompt for text in texts]
    values = subject.score(prompts, [text.response for text in texts], [("asked", text.set) for text in texts])
    plain = subject.known[rows] / unit
    before = [f"{text.prompt}\n\n{text.response}" for text in texts]
    after = [f"{prompt}\n\n{text.response}" for prompt, text in zip(prompts, texts, strict=True)]
    made = Change(before, after, plain, values / unit - plain, [text.prompt for text in texts])
    return made if made.scored.size else None


# --- meaning ----------------------------------------------------------------------------------------------------------

_FALLS = Bound(f"falls by {LEAST_FALL:g} SD or more", high=-LEAST_FALL)


def sensitivities(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether what spoils a text lowers its reward: negation, lost order, a lost half, wrong names."""
    poor, good = thirds(materials, subject.affordable(_TEXTS), "sensitivities")
    whole = materials.task.kind != "continuation"
    changes, replaced = _spoilt(materials, poor, good)
    found: dict[str, Change | None] = dict.fromkeys(changes) | dict(changed(subject, good, changes))
    turned = {"negated": negated}
    raised: dict[str, Change | None] = dict.fromkeys(turned) | dict(changed(subject, poor, turned))
    figures = []
    for name, change in found.items():
        if change is None:
            continue
        bound, fault = _FALLS, "What spoils a good text hardly lowers its reward: training need not avoid it."
        if name == "cut after half its words" and not whole:  # a policy's responses are cut there, too
            bound, fault = Bound(f"rises by at most {MOST_CUT:g} SD", high=MOST_CUT), "Broken-off text is paid for."
        figures.append(effect(f"a good text {name}", change, bound, "The reward heeds it.", fault))
    if (change := raised["negated"]) is not None:
        fault = "Negation lowers the reward of a poor text too: the word is heeded, not what it says."
        figures.append(effect("a poor text negated", change, Bound("does not fall", low=0.0), "It is heeded.", fault))
    if not figures:
        raise NotMeasured("no change applies to any text, or the reward refused them all")
    notes = {f"a good text {name}": change for name, change in found.items()}
    return figures + _without({**notes, "a poor text negated": raised["negated"]}, len(good) + len(poor), replaced)


def _spoilt(materials: Materials, poor: list[RatedText], good: list[RatedText]) -> tuple[dict[str, Transform], str]:
    """What spoils a good text, and what was done in place of another prompt's response."""
    names = {text.response: swapped(text.prompt, text.response) for text in good}
    changes: dict[str, Transform] = {
        "negated": negated,
        "with its words shuffled": shuffled,
        "cut after half its words": cut,
        "with other names and numbers than its prompt": names.get,
    }
    if materials.task.kind == "continuation":
        second = {g.response: crossed(g.response, p.response) for g, p in zip(good, poor, strict=True)}
        done = "Prompt and response are one text here, so another prompt's response is a poor text's second half."
        return {**changes, "that goes on as a poor text does": second.get}, done
    others = good[1:] + good[:1]
    strange = {g.response: o.response if o.prompt != g.prompt else None for g, o in zip(good, others, strict=True)}
    return {**changes, "in place of which another prompt's stands": strange.get}, ""


def _without(found: Mapping[str, Change | None], n: int, note: str = "") -> list[Measurement]:
    """One figure that says which changes applied to no text, and what was done instead."""
    missing = [name for name, change in found.items() if change is None]
    said = f"These apply to no text of the task: {'; '.join(missing)}. " if missing else ""
    if not said and not note:
        return []
    count = exactly(float(len(missing)), n)
    return [Measurement("changes that were not measured", count, None, (said + note).strip())]
