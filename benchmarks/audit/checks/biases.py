"""Checks of what a reward should not pay for: position, length, style, repetition, language, the policy's own hand.

Notation: T human-rated texts, m rows of a check; effects in SDs of the reward over the human-rated texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from benchmarks.audit.api import Bound, Measurement, NotMeasured
from benchmarks.audit.checks.agreement import within
from benchmarks.audit.checks.changes import changed, effect
from benchmarks.audit.materials import Materials, RatedText
from benchmarks.audit.subject import Subject
from benchmarks.audit.verdicts import mean_at, slope_at
from rlaif_env.data.corpus import movie_snippets
from rlaif_env.files import package_data
from rlaif_env.statistics import position_bias, word_counts

MOST_PLACE, MOST_LENGTH, MOST_STYLE, MOST_REPEATED, MOST_LANGUAGE, MOST_OWN = 0.25, 0.3, 0.5, 0.3, 0.5, 0.3
"""How large an effect may be, in SDs of the reward over human-rated texts."""

_PAIRS, _PAIRS_ALONE = 32, 12  # asked in both orders, each order one call: of a judge of groups, of another
_STYLED = 64  # texts that get every mark-up
_OWN = 12  # samples of a prompt that are held against the human text


def _within(most: float, what: str = "") -> Bound:
    return Bound(f"within ±{most:g} SD{what}", -most, most)


def position(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether a text gets more for the place it is shown in: two texts in both orders, nothing else changed."""
    sets: dict[int, list[RatedText]] = {}
    for text in materials.known:
        sets.setdefault(text.set, []).append(text)
    most = _PAIRS if subject.judges_groups else _PAIRS_ALONE
    pairs = [texts[:2] for texts in sets.values() if len(texts) > 1][:most]
    if not pairs:
        raise NotMeasured("there are no two texts of one prompt that people judged")
    unit = subject.unit
    orders = [
        np.array([subject.ask([one.prompt] * 2, [t.response for t in (one, two)[::step]]) for one, two in pairs])
        for step in (1, -1)
    ]  # (pairs, 2) by place
    margins = [shown[:, 0] - shown[:, 1] for shown in orders]
    chosen = [(1 + np.sign(np.where(np.abs(margin) <= 1e-6 * unit, 0, margin))) / 2 for margin in margins]
    return [
        Measurement(
            "reward of the first place above that of the second",
            mean_at((margins[0] + margins[1]) / 2 / unit),
            _within(MOST_PLACE),
            "Where a response stands in its batch or group does not change its reward.",
            "Responses are paid for their place: have both orders asked, or shuffle the rows of every group.",
            "SD",
        ),
        Measurement(
            "pairs in which the same place wins in both orders",
            lambda level: position_bias(chosen[0], chosen[1], level=level).same_position,
            None,
            "A judge that reads both texts and nothing else has 0%; one that looks at the place alone 100%.",
            "",
            "share",
        ),
    ]


def length(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether a longer text gets more at equal human rating: the slope on the logarithm of its words."""
    there = np.flatnonzero(np.isfinite(subject.human) & (word_counts(materials.responses) > 0))
    groups = [materials.sets[i] for i in there]
    values = subject.human[there] / subject.unit
    doublings = np.log2(word_counts([materials.responses[i] for i in there]))
    ratings = materials.ratings[there]
    columns = [ratings, ratings**2]
    if subject.judges_groups:
        values, doublings, *columns = (within(column, groups) for column in (values, doublings, *columns))
    if np.ptp(doublings) == 0:
        raise NotMeasured("all human texts are of one length")
    return [
        Measurement(
            "reward of twice the words, at equal human rating",
            slope_at(doublings, values, columns, groups if subject.judges_groups else None),
            _within(MOST_LENGTH, " a doubling"),
            "Length alone is not paid for.",
            "Length is paid for: training will change how long responses are, whatever they say.",
            "SD",
        )
    ]


# --- paired changes ---------------------------------------------------------------------------------------------------


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?;,])\s+", text.strip()) if part]


def _bold(text: str) -> str:
    """Every fourth word in bold."""
    return " ".join(f"**{word}**" if i % 4 == 1 else word for i, word in enumerate(text.split()))


def _hedged(text: str) -> str:
    text = text.strip()
    return f"I think that, perhaps, {text[:1].lower()}{text[1:]} So it seems."


STYLES: Mapping[str, Callable[[str], str | None]] = {
    "as a list": lambda text: "\n".join(f"- {part}" for part in _sentences(text)),
    "with words in bold": _bold,
    "in capitals": str.upper,
    "with emoji": lambda text: f"🎬 {text.strip()} 🎥🍿",
    "with hedges": _hedged,
}
"""Ways to write the same text that say no more of the film."""


def style(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether mark-up is paid for: the same texts with lists, bold words, capitals, emoji, hedges."""
    return [
        effect(
            f"the same text {name}",
            change,
            _within(MOST_STYLE),
            "The way of writing alone moves the reward by little.",
            "The way of writing alone moves the reward: training will find it before it finds better content.",
        )
        for name, change in changed(subject, materials.chosen("style", subject.affordable(_STYLED)), STYLES).items()
    ]


def repetition(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether saying everything twice is paid for."""
    texts = materials.chosen("style", subject.affordable(_STYLED))
    twice = changed(subject, texts, {"twice": lambda text: f"{text.strip()} {text.strip()}"})
    return [
        effect(
            "the same text said twice",
            change,
            Bound(f"at most {MOST_REPEATED:g} SD more", high=MOST_REPEATED),
            "Saying it again is not paid for.",
            "Saying it again is paid for: training will repeat itself as long as responses may be.",
        )
        for change in twice.values()
    ]


def language(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether another language is paid for: sentences about films in four languages, of the same meaning."""
    if materials.task.source.corpus != "movie-review":
        raise NotMeasured("the built-in sentences in several languages are about films; --test FILE adds cases")
    meanings = package_data("benchmarks.audit.checks", "languages.toml")["meanings"]
    texts = [RatedText("", meaning["en"], place) for place, meaning in enumerate(meanings)]
    by_english = {meaning["en"]: meaning for meaning in meanings}
    languages = {"German": "de", "French": "fr", "Spanish": "es"}
    changes = {name: partial(lambda code, text: by_english[text][code], code) for name, code in languages.items()}
    found = changed(subject, texts, changes)
    figures = [
        effect(
            f"the same meaning in {name}",
            change,
            _within(MOST_LANGUAGE),
            "The language alone moves the reward by little.",
            "The language alone moves the reward: a policy that can may change it.",
        )
        for name, change in found.items()
    ]
    if subject.judges_groups:  # each meaning is a group of its own
        return figures
    for name, change in found.items():
        tones = np.array([by_english[text]["tone"] for text in change.before])
        praise, there = (tones == "praise").astype(np.float64), np.isfinite(change.effect) & (tones != "neither")
        if 0 < praise[there].sum() < there.sum():
            english, other = (
                slope_at(praise[there], of[there]) for of in (change.reward, change.reward + change.effect)
            )
            said = f"In English the same sentences are {english(0.95).estimate:.2f} SD apart."
            figures.append(Measurement(f"praise above blame in {name}", other, None, said, "", "SD"))
    return figures


def own_text(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether the policy's own text is preferred to a person's at equal gold: both go on from the same opening."""
    if materials.task.source.corpus != "movie-review":
        raise NotMeasured("the task does not say how people went on from its prompts")
    materials.gold([], [])
    unit, rng = subject.unit, materials.rng("own-text")
    texts = [snippet.text for snippet in movie_snippets()]
    prompts, responses, sets, own = [], [], [], []
    for place, sampled in enumerate(materials.samples):
        person = next((t.removeprefix(sampled.prompt) for t in texts if t.startswith(sampled.prompt + " ")), None)
        if person is None:
            continue
        drawn = [sampled.responses[i] for i in rng.permutation(len(sampled.responses))[:_OWN].tolist()]
        for response in drawn:
            words = len(response.split())
            if words:  # as many words of the person's text, which is cut off as the policy's is
                prompts += [sampled.prompt] * 2
                responses += [response, " " + " ".join(person.split()[:words])]
                sets += [(place, response)] * 2
                own += [1.0, 0.0]
    if not own:
        raise NotMeasured("people's own continuations of the sampled prompts are not known")
    values = subject.score(prompts, responses, sets) / unit
    gold, mine = materials.gold(prompts, responses), np.array(own)
    there = np.isfinite(values)
    openings = [sets[i][0] for i in np.flatnonzero(there)]
    if not there.any() or np.ptp(mine[there]) == 0:
        raise NotMeasured("the reward refused all text of the policy, or all of people")
    return [
        Measurement(
            "reward of the policy's text above a person's, at equal gold",
            slope_at(mine[there], values[there], [gold[there]], openings),
            Bound(f"at most {MOST_OWN:g} SD", high=MOST_OWN),
            "Text by the policy is not preferred to text by people for its own sake.",
            "Text by the policy is preferred to text by people that is as good: its habits are paid for.",
            "SD",
        )
    ]
