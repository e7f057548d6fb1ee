"""Checks of the reward as an instrument: what a judgement costs, whether it repeats, whether it tells texts apart."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.audit.api import Bound, Measurement, NotMeasured
from benchmarks.audit.materials import Materials
from benchmarks.audit.subject import Subject
from benchmarks.audit.verdicts import exactly, mean_at, root_at
from rlaif_env.statistics import Floats, Interval, rate

MOST_TIES, MOST_NOISE, MOST_DRIFT = 0.75, 0.1, 0.05
_ROWS = 24  # texts that are asked for anew
_REPEATS = 3
_GROUP = 3  # of which so many are shown to a judge of groups together
_TIE = 1e-6  # of the largest reward: what float32 cannot tell apart


def constant(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether the reward tells texts apart: a group of responses with equal rewards teaches nothing."""
    sets: dict[int, list[float]] = {}
    for one, value in zip([text.set for text in materials.known], subject.known.tolist(), strict=True):
        if np.isfinite(value):
            sets.setdefault(one, []).append(value)
    room = _TIE * max((abs(value) for values in sets.values() for value in values), default=0.0)
    shares = np.array([tied(np.array(values), room) for values in sets.values() if len(values) > 1])
    if not shares.size:
        raise NotMeasured("there are no two texts that the reward scored")
    return [
        Measurement(
            "pairs of texts with equal rewards",
            partial(_rate, shares),
            Bound(f"at most {MOST_TIES:.0%}", high=MOST_TIES),
            "Texts get different rewards, so that groups of responses have something to teach.",
            "Nearly all texts get the same reward: most groups of responses will have no advantage and teach nothing.",
            "share",
        )
    ]


def tied(values: Floats, room: float) -> float:
    """The share of pairs of n >= 2 values that differ by no more than ``room``."""
    differences = np.abs(values[:, None] - values[None])
    return float((differences[np.triu_indices(len(values), 1)] <= room).mean())


def _rate(shares: Floats, level: float) -> Interval:
    return rate(shares, level=level)


def cost(subject: Subject, materials: Materials) -> list[Measurement]:
    """What a judgement costs, and how much of a language model's probability was on the answers."""
    if not any(cost.scored for cost in subject.costs.values()):
        subject.unit  # noqa: B018  (no other check was asked for: the texts are scored now)
    scored = sum(cost.scored for cost in subject.costs.values())
    seconds = sum(cost.seconds for cost in subject.costs.values())
    processor = sum(cost.processor_seconds for cost in subject.costs.values())
    training = "An update of 64 responses takes 64 times this."
    figures = [
        Measurement("seconds a judgement", exactly(seconds / scored, scored), None, training, "", "s"),
        Measurement("processor seconds a judgement", exactly(processor / scored, scored), None, training, "", "s"),
    ]
    for model in subject.language_models:
        if (usage := getattr(model, "usage", None)) is not None and usage.tokens_in:
            tokens = (usage.tokens_in + usage.tokens_out) / scored
            said = "Of the model behind the server, answers that were stored not counted."
            figures.append(Measurement("tokens a judgement", exactly(tokens, scored), None, said))
            if usage.cost:
                said = "In the currency of the prices given."
                figures.append(Measurement("price of a judgement", exactly(usage.cost / scored, scored), None, said))
    if (mass := subject.info("label_mass")).size:
        said = "Where little of the probability is on the answers, the rest of the distribution was not asked about."
        figures.append(Measurement("probability on the answers", mean_at(mass), None, said, "", "share"))
    if subject.reasons:
        share = exactly(len(subject.reasons) / scored, scored)
        said = f"Training stops or drops groups at such rows; the first says: {next(iter(subject.reasons.values()))}"
        figures.append(Measurement("rows that it refused to score", share, None, said, "", "share"))
    return figures


def noise(subject: Subject, materials: Materials) -> list[Measurement]:
    """Whether a row gets the same reward again, alone as in a batch, and whatever the order of the batch."""
    unit = subject.unit
    texts = materials.chosen("noise", len(materials.known))
    if subject.judges_groups:  # in their own order, since another is another question: see `position`
        by_set = [[text for text in materials.known if text.set == one] for one in dict.fromkeys(t.set for t in texts)]
        texts = [text for several in by_set[: _ROWS // _GROUP] for text in several[:_GROUP]]
    else:
        texts = texts[:_ROWS]
    prompts, responses = [t.prompt for t in texts], [t.response for t in texts]
    groups = [t.set for t in texts] if subject.judges_groups else list(range(len(texts)))
    if subject.judges_groups:
        repeats = np.array([_by_group(subject, prompts, responses, groups) for _ in range(_REPEATS)])
        others = [("in the other order of groups", _by_group(subject, prompts, responses, groups, turned=True))]
    else:
        repeats = np.array([subject.ask(prompts, responses) for _ in range(_REPEATS)])
        alone = np.concatenate([subject.ask([p], [r]) for p, r in zip(prompts, responses, strict=True)])
        others = [
            ("alone instead of in a batch", alone),
            ("with the batch in the other order", subject.ask(prompts[::-1], responses[::-1])[::-1]),
        ]
    variance = repeats.var(axis=0, ddof=1)  # (rows,) of one answer
    figures = [
        Measurement(
            "spread of a row's reward over repeats",
            root_at(mean_at(variance / unit**2, groups), squares=True),
            Bound(f"at most {MOST_NOISE:g} SD of the texts", high=MOST_NOISE),
            "The same text gets the same reward, as far as matters.",
            "The same text gets another reward each time: training learns from noise, and needs more samples for it.",
            "SD",
        )
    ]
    for name, values in others:
        # what is beyond the noise of one answer and that of the mean of the repeats
        square = (values - repeats.mean(axis=0)) ** 2 - variance * (1 + 1 / _REPEATS)
        figures.append(
            Measurement(
                f"change of a row's reward {name}",
                root_at(mean_at(square / unit**2, groups)),
                Bound(f"at most {MOST_DRIFT:g} SD beyond the noise", high=MOST_DRIFT),
                "What is asked beside a row does not matter, as the contract of a reward asks.",
                "A row's reward depends on what is asked beside it: it breaks the contract (rewards.check_backend).",
                "SD",
            )
        )
    return figures


def _by_group(
    subject: Subject, prompts: list[str], responses: list[str], groups: list[int], *, turned: bool = False
) -> Floats:
    """The rewards (n,) of rows in groups, each group in one call; ``turned``: the groups in the other order."""
    values, order = np.empty(len(groups)), list(dict.fromkeys(groups))
    for one in reversed(order) if turned else order:
        rows = [row for row, group in enumerate(groups) if group == one]
        values[rows] = subject.ask([prompts[i] for i in rows], [responses[i] for i in rows])
    return values
