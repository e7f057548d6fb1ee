"""Checks of whether a reward says what people say: on pairs by difficulty, on single texts, as probabilities.

Notation: T human-rated texts, n pairs of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.audit.api import Bound, Measurement, NotMeasured
from benchmarks.audit.materials import Materials
from benchmarks.audit.subject import Subject
from benchmarks.audit.verdicts import exactly, mean_at
from rlaif_env.statistics import (
    Clusters,
    Dyads,
    Floats,
    Interval,
    accuracy,
    clusters_of_pairs,
    excess_cross_entropy,
    expected_calibration_error,
    spearman,
    taken,
    word_counts,
)

CLEAR_GAP = 0.5
"""From this difference of two mean ratings on, people's preference is worth asking for (of a scale from -4 to 4)."""

LEAST_AGREEMENT, LEAST_CORRELATION = 0.6, 0.2

_GAPS = ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 99.0))
_EXAMPLES = 5


class Compared(NamedTuple):
    """n pairs whose two texts have a reward."""

    margin: Floats  # (n,) reward of the first less that of the second
    people: Floats  # (n,) how surely people prefer the first
    gap: Floats  # (n,) difference of the mean ratings; NaN where there are none
    longer: Floats  # (n,) words of the first less those of the second
    clusters: Clusters | Dyads  # which rows share a text or prompt
    rows: NDArray[np.int64]  # (n,) their places among the pairs of the materials


def compared(subject: Subject, materials: Materials) -> Compared:
    """The pairs that a reward can be held to: to a judge of groups, those that it sees together.

    Raises:
        NotMeasured: If there is none.
    """
    values, words, sets = subject.human, word_counts(materials.responses), materials.sets
    rows = [
        row
        for row, pair in enumerate(materials.pairs)
        if np.isfinite(values[pair.first] + values[pair.second])
        and (not subject.judges_groups or sets[pair.first] == sets[pair.second])
    ]
    if not rows:
        raise NotMeasured("there is no pair of texts that people compared and the reward scored")
    pairs = [materials.pairs[row] for row in rows]
    first, second = np.array([(pair.first, pair.second) for pair in pairs]).T
    texts = [[materials.texts[i] for i in side] for side in (first, second)]
    clusters = clusters_of_pairs([t.prompt for t in texts[0]], *([t.response for t in side] for side in texts))
    return Compared(
        values[first] - values[second],
        np.array([pair.p_first for pair in pairs]),
        np.array([np.nan if pair.gap is None else pair.gap for pair in pairs]),
        (words[first] - words[second]).astype(np.float64),
        clusters,
        np.array(rows),
    )


def choice(margin: Floats) -> Floats:
    """Which of two a margin (n,) prefers: 1 the first, 0 the second, ½ neither."""
    return (1 + np.sign(margin)) / 2


def right(margin: Floats, people: Floats) -> Floats:
    """How right a choice by margins (n,) is by people's (n,): 1, 0, and ½ where either has no preference."""
    return (1 + np.sign(margin) * np.sign(people - 0.5)) / 2


def agreement(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether the reward prefers what people prefer: on pairs by difficulty, and by single ratings."""
    pairs = compared(subject, materials)
    rated = bool(np.isfinite(pairs.gap).any())
    clear = np.flatnonzero(pairs.gap >= CLEAR_GAP) if rated else np.arange(len(pairs.gap))
    if not clear.size:
        raise NotMeasured(f"no two of the texts are {CLEAR_GAP} apart in people's rating")
    of = f" on pairs {CLEAR_GAP:g} or more apart in people's rating" if rated else ""
    figures = [
        Measurement(
            f"agreement with people{of}",
            partial(_agreement, pairs, clear),
            Bound(f"at least {LEAST_AGREEMENT:.0%}; chance is 50%", low=LEAST_AGREEMENT),
            "What training will raise is, more often than not, what people prefer.",
            "What training will raise is hardly what people prefer: take another reward.",
            "share",
            _wrong(pairs, clear, materials),
        )
    ]
    for low, high in _GAPS if rated else ():
        rows = np.flatnonzero((pairs.gap >= low) & (pairs.gap < high))
        if rows.size:
            name = f"{low:g} to {high:g}" if high < 10 else f"{low:g} or more"
            fine = "Where people differ little, no reward can agree with them by much."
            figures.append(
                Measurement(f"agreement, {name} apart", partial(_agreement, pairs, rows), None, fine, "", "share")
            )
    figures += [_above(pairs, clear, name, margin) for name, margin in _rules(pairs).items()]
    if all(text.rating is not None for text in materials.texts) and np.ptp(pairs.margin):
        figures.append(_correlation(subject, materials))
    return figures


def _agreement(pairs: Compared, rows: NDArray[np.int64], level: float) -> Interval:
    clusters = taken(pairs.clusters, rows)
    return accuracy(choice(pairs.margin[rows]), pairs.people[rows], clusters=clusters, level=level)


def _rules(pairs: Compared) -> dict[str, Floats]:
    """Choices that read nothing: margins (n,) by name."""
    return {"the longer": pairs.longer, "the first": np.ones(len(pairs.longer))}


def _above(pairs: Compared, rows: NDArray[np.int64], name: str, rule: Floats) -> Measurement:
    more = right(pairs.margin[rows], pairs.people[rows]) - right(rule[rows], pairs.people[rows])
    return Measurement(
        f"agreement above that of always taking {name}",
        mean_at(more, taken(pairs.clusters, rows)),
        Bound("more than 0", low=0.0),
        f"It says more than a rule that takes {name} and reads nothing.",
        f"A rule that takes {name} and reads nothing agrees with people better.",
        "share",
    )


def _wrong(pairs: Compared, rows: NDArray[np.int64], materials: Materials) -> tuple[dict[str, str | float], ...]:
    """Pairs on which people are surest and the reward prefers the other."""
    wrong = rows[right(pairs.margin[rows], pairs.people[rows]) == 0]
    worst = wrong[np.argsort(-np.abs(pairs.people[wrong] - 0.5), kind="stable")][:_EXAMPLES]
    shown: list[dict[str, str | float]] = []
    for i in worst.tolist():
        pair = materials.pairs[pairs.rows[i]]
        better, worse = (pair.first, pair.second) if pair.p_first > 0.5 else (pair.second, pair.first)
        shown.append(
            {
                "people prefer": materials.texts[better].response,
                "the reward prefers": materials.texts[worse].response,
                "people who do": round(max(pair.p_first, 1 - pair.p_first), 3),
                "reward's margin": round(abs(float(pairs.margin[i])), 4),
            }
        )
    return tuple(shown)


def _correlation(subject: Subject, materials: Materials) -> Measurement:
    there = np.flatnonzero(np.isfinite(subject.human))
    values, ratings = subject.human[there], materials.ratings[there]
    groups = [materials.sets[i] for i in there.tolist()]
    if subject.judges_groups:  # a group's mean says nothing of the texts in it
        values, ratings = within(values, groups), within(ratings, groups)
    clusters = groups if subject.judges_groups else None
    return Measurement(
        "rank correlation with people's ratings" + (", within groups" if subject.judges_groups else ""),
        partial(_spearman, values, ratings, clusters),
        Bound(f"at least {LEAST_CORRELATION:g}", low=LEAST_CORRELATION),
        "It orders single texts as people do, as far as the figure says.",
        "It orders texts by something that people do not rate.",
    )


def _spearman(x: Floats, y: Floats, clusters: Clusters | None, level: float) -> Interval:
    return spearman(x, y, clusters=clusters, level=level)


def within(values: Floats, groups: Sequence[int]) -> Floats:
    """Values (n,) less the mean of their group."""
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    means: Floats = np.bincount(codes, weights=values) / np.bincount(codes)
    return values - means[codes]


# --- calibration ------------------------------------------------------------------------------------------------------


def fitted_scale(margin: Floats, people: Floats) -> float:
    """The a for which 1 / (1 + exp(-a · margin)) predicts people's preferences best (cross-entropy), both (n,).

    1/a is the temperature; below 0 the reward is turned round.
    """
    from scipy.optimize import minimize_scalar

    spread = float(np.abs(margin).mean()) or 1.0
    found = minimize_scalar(lambda a: excess_cross_entropy(a / spread * margin, people), bounds=(-20.0, 20.0))
    return float(found.x) / spread


def calibration(subject: Subject, materials: Materials) -> list[Measurement]:
    """How sure people are where the reward tells two texts apart (Bradley-Terry; a temperature fitted held out)."""
    pairs, unit = compared(subject, materials), subject.unit
    halves = np.array([materials.sets[materials.pairs[row].first] % 2 for row in pairs.rows])
    others = np.array([materials.sets[materials.pairs[row].second] % 2 for row in pairs.rows])
    parts = [np.flatnonzero((halves == half) & (others == half)) for half in (0, 1)]
    if min(part.size for part in parts) < 10:
        raise NotMeasured("there are too few pairs to fit a temperature on one half and hold it to the other")
    scales = [fitted_scale(pairs.margin[part], pairs.people[part]) for part in parts]
    rows = np.concatenate(parts)
    logit = np.concatenate([scales[1 - half] * pairs.margin[part] for half, part in enumerate(parts)])
    people = pairs.people[rows]
    predicted = 1 / (1 + np.exp(-np.clip(logit, -500, 500)))
    plain = 1 / (1 + np.exp(-np.clip(pairs.margin[rows], -500, 500)))
    clusters = taken(pairs.clusters, rows)
    scale = float(np.mean(scales))
    n = rows.size
    return [
        Measurement(
            "how surely people prefer a text that the reward puts one SD higher",
            exactly(1 / (1 + float(np.exp(-np.clip(scale * unit, -500, 500)))), n),
            None,
            f"Differences of the reward divided by {1 / scale if scale else np.inf:.3g} are log-odds of people's "
            "preference (fitted by cross-entropy).",
            "",
            "share",
        ),
        Measurement(
            "over-confidence, were its differences log-odds as they are",
            mean_at(_overconfidence(plain, people), clusters),
            None,
            "Above 0 it is surer than people are: a reward model's rewards want a smaller scale, or a larger beta.",
            "",
            "share",
        ),
        Measurement(
            "calibration error with the temperature of the other half",
            exactly(expected_calibration_error(predicted, people), n),
            None,
            "Mean distance between the probability that it implies and how often people agree, five bins.",
            "",
            "share",
        ),
        Measurement(
            "excess cross-entropy with the temperature of the other half",
            exactly(excess_cross_entropy(logit, people), n),
            None,
            f"A reward that knows nothing has {excess_cross_entropy(np.zeros(n), people):.3f}, a perfect one 0 (nats).",
        ),
    ]


def _overconfidence(predicted: Floats, people: Floats) -> Floats:
    """Confidence of a prediction less people's own share of its favourite, (n,)."""
    favours = np.where(predicted >= 0.5, people, 1 - people)
    return np.maximum(predicted, 1 - predicted) - favours
