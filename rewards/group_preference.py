"""Relative judging: the responses to one prompt are compared in pairs, and each is paid by how it fares among them.

The reward of a response is its mean probability of winning against the others of its group, each pair asked as a
`PreferenceLabeler` asks it: both orders, the mean of the two (section 2.1), or two score distributions compared. With
``strengths="bradley-terry"`` it is the strength that the Bradley-Terry model (1952) gives it, in nats, of mean 0 in a
group. The paper has no such reward: its pairs become a reward model; here they are the reward.

Where K² pairs are too many, each text meets some opponents only (`circulant`): which, the texts alone decide, so that
a group gets the same rewards in any order and in any batch.

Notation: K rows of a group, D distinct texts among them, m pairs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rewards.api import LanguageModel, Live
from rewards.direct_score import opened
from rewards.endpoint.config import ServerConfig
from rewards.labeling.config import LabelOptions, needed_shots
from rewards.labeling.labeler import LabelingConfig, PreferenceLabeler
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import BackendError, RLAIFError, Scores
from rlaif_env.batches import groups_of
from rlaif_env.data.tasks import DEFAULT_TASK, TaskLike, load_task
from rlaif_env.statistics import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Strengths = Literal["mean", "bradley-terry"]

_SURE = 1e-6
"""A probability closer to 0 or 1 would give a Bradley-Terry strength without limit."""


def circulant(texts: Sequence[str], opponents: int | None = None) -> list[tuple[int, int]]:
    """Which pairs of D distinct texts are compared, each pair once.

    The texts stand in a circle, in the order of their SHA-256, and each meets those nearest to it: so all have the
    same number of opponents (one more where both that number and D are odd), and the pairs hang together.

    Args:
        texts: D distinct texts.
        opponents: How many others each meets, at least 1; None: all. Of more than two texts each meets two at least, or
            the pairs would not hang together.

    Returns:
        Pairs of positions in ``texts``.
    """
    count = len(texts)
    circle = sorted(range(count), key=lambda i: hashlib.sha256(texts[i].encode("utf-8", "surrogatepass")).digest())
    most = count - 1 if opponents is None else min(opponents, count - 1)
    steps = [*range(1, most // 2 + 1)]
    if most % 2:  # half a turn where there is one: a single opponent more
        steps.append(count // 2 if count % 2 == 0 else most // 2 + 1)
    if 1 not in steps and steps:  # one opponent each would leave pairs that nothing ties together
        steps = [1]
    pairs = {tuple(sorted((circle[at], circle[(at + step) % count]))) for step in steps for at in range(count)}
    return sorted((one, two) for one, two in pairs)


def mean_wins(pairs: Sequence[tuple[int, int]], p_first: Floats, copies: NDArray[np.int64]) -> Floats:
    """Mean probability of winning of each of D texts against the rows that it was compared with.

    Args:
        pairs: m pairs of texts.
        p_first: Probability that the first of each pair is preferred, (m,).
        copies: How many rows have each text, (D,). Against its own copies a text wins with ½.

    Returns:
        (D,), in [0, 1].
    """
    won, met = (copies - 1) / 2.0, (copies - 1).astype(np.float64)
    for (one, two), p in zip(pairs, p_first, strict=True):
        won[one] += copies[two] * p
        won[two] += copies[one] * (1 - p)
        met[one] += copies[two]
        met[two] += copies[one]
    return np.asarray(won / met, dtype=np.float64)


def bradley_terry(pairs: Sequence[tuple[int, int]], p_first: Floats, copies: NDArray[np.int64]) -> Floats:
    """Strengths s of D texts that make sum p log sigma(s_1 - s_2) + (1 - p) log sigma(s_2 - s_1) greatest.

    Bradley and Terry (1952) with soft outcomes, each pair counted as often as rows have its texts; Newton's method. The
    pairs must hang together. Probabilities are kept ``1e-6`` away from 0 and 1, where no finite strengths would do.

    Args:
        pairs: m pairs of texts.
        p_first: Probability that the first of each pair is preferred, (m,).
        copies: How many rows have each text, (D,).

    Returns:
        (D,), in nats, of mean 0 over the rows.
    """
    count = len(copies)
    one, two = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    weight = (copies[one] * copies[two]).astype(np.float64)
    wanted = np.clip(p_first, _SURE, 1 - _SURE)

    def loss(strengths: Floats) -> float:
        apart = strengths[one] - strengths[two]
        return float((weight * (np.logaddexp(0, apart) - wanted * apart)).sum())

    strengths = np.zeros(count)
    for _ in range(100):
        expected = 1 / (1 + np.exp(-(strengths[one] - strengths[two])))
        gradient, hessian = np.zeros(count), np.zeros((count, count))
        np.add.at(gradient, one, weight * (expected - wanted))
        np.add.at(gradient, two, weight * (wanted - expected))
        curvature = weight * expected * (1 - expected)
        for rows, columns, sign in ((one, one, 1), (two, two, 1), (one, two, -1), (two, one, -1)):
            np.add.at(hessian, (rows, columns), sign * curvature)
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        size = 1.0
        while loss(strengths - size * step) > loss(strengths) and size > 1e-9:
            size /= 2
        strengths = strengths - size * step
        if np.abs(size * step).max(initial=0.0) < 1e-12:
            break
    return np.asarray(strengths - np.average(strengths, weights=copies), dtype=np.float64)


class GroupPreference(Live):
    """A language model that compares the responses to one prompt with each other; a reward backend that judges groups.

    The rows of a call that have the same prompt are a group (`rlaif_env.api.judges_groups`). ``score`` returns the mean
    probability of winning, in [0, 1], or strengths in nats, and info "label_mass", the least of the row's comparisons
    (1 where there was nothing to ask: copies of one text).

    Args:
        labeler: Who compares two responses.
        opponents: How many others each text of a group is compared with; None: all.
        strengths: "mean" or "bradley-terry".

    Raises:
        RLAIFError: If there is no such kind of strengths, or less than one opponent.
    """

    judges_groups = True

    def __init__(
        self, labeler: PreferenceLabeler, *, opponents: int | None = None, strengths: Strengths = "mean"
    ) -> None:
        if strengths not in ("mean", "bradley-terry"):
            raise RLAIFError(f"expected strengths 'mean' or 'bradley-terry', found {strengths!r}")
        if opponents is not None and (type(opponents) is not int or opponents < 1):
            raise RLAIFError(f"expected opponents to be at least 1, or None for all, found {opponents!r}")
        self.labeler, self.opponents = labeler, opponents
        self._strength = mean_wins if strengths == "mean" else bradley_terry
        self.name = f"group-preference:{labeler.language_model.name}"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """How each response fares among those to the same prompt; see `rlaif_env.api.RewardBackend`.

        Raises:
            BackendError: If a response is alone with its prompt, or a pair gets no label; the rows are all that a
                failed pair's texts stand in.
        """
        groups = groups_of(prompts)
        if alone := [rows[0] for rows in groups if len(rows) == 1]:
            raise BackendError(
                f"expected two responses or more to each prompt, for {self.name} to compare, found one to "
                f"{prompts[alone[0]][:60]!r} (and {len(alone) - 1} more); give groups (group_size)",
                alone,
            )
        texts = [sorted({responses[row] for row in rows}) for rows in groups]
        pairs = [circulant(distinct, self.opponents) for distinct in texts]
        asked = [(g, *pair) for g, group in enumerate(pairs) for pair in group]
        labels = self.labeler.label(
            [prompts[groups[g][0]] for g, _, _ in asked],
            [texts[g][one] for g, one, _ in asked],
            [texts[g][two] for g, _, two in asked],
        )
        if failed := [i for i, row in enumerate(labels.rows) if row.status != "ok"]:
            concerned = {(groups[g][0], text) for i in failed for g, *pair in [asked[i]] for text in pair}
            rows = [
                row
                for group, distinct in zip(groups, texts, strict=True)
                for row in group
                if (group[0], distinct.index(responses[row])) in concerned
            ]
            first = labels.rows[failed[0]]
            raise BackendError(
                f"expected {self.name} to compare every pair, found {len(failed)} of {len(asked)} without a label: "
                f"{first.status}: {first.reason}",
                rows,
            )
        values, mass = np.zeros(len(responses)), np.ones(len(responses))
        for g, (rows, distinct) in enumerate(zip(groups, texts, strict=True)):
            mine = [i for i, (group, _, _) in enumerate(asked) if group == g]
            counted = Counter(responses[row] for row in rows)
            copies = np.array([counted[text] for text in distinct])
            strengths = self._strength(pairs[g], labels.p_first[mine], copies)
            least = np.ones(len(distinct))
            for i in mine:
                for text in asked[i][1:]:
                    least[text] = min(least[text], labels.rows[i].mass)
            place = {text: i for i, text in enumerate(distinct)}
            for row in rows:
                values[row], mass[row] = strengths[place[responses[row]]], least[place[responses[row]]]
        return Scores(values.astype(np.float32), {"label_mass": mass})


def from_kwargs(
    *,
    task: TaskLike = DEFAULT_TASK,
    model: Any = LanguageModelConfig.model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    url: str | None = LanguageModelConfig.url,
    chat: bool = LanguageModelConfig.chat,
    device: str | None = LanguageModelConfig.device,
    dtype: str | None = LanguageModelConfig.dtype,
    server: ServerConfig | Mapping[str, Any] | None = None,
    mode: Literal["pairwise", "score"] = "score",
    prompt: Literal["base", "detailed"] = LabelingConfig.prompt,
    shots: int = LabelOptions.shots,
    scale: tuple[int, int] | None = LabelingConfig.scale,
    template: str | None = LabelingConfig.template,
    minimum_mass: float = LabelingConfig.minimum_mass,
    opponents: int | None = None,
    strengths: Strengths = "mean",
) -> GroupPreference:
    """Build the reward "group-preference", in which a language model compares the responses to one prompt in pairs.

    Args:
        task: What is judged: a task or its name.
        model: The labeler: its name, a folder, what the server calls it; or a live one: a Backbone, a Hugging Face
            model (with its tokenizer) or any LanguageModel.
        tokenizer: A live Hugging Face model's tokenizer.
        url: Base URL of an OpenAI-compatible server that has the model; None runs it here.
        chat: Put prompts through the model's chat template; on a server, use its chat route.
        device: Where a model in this process runs; by default the GPU where there is one.
        dtype: Of its weights; by default bfloat16 on a GPU that has it and float32 elsewhere.
        server: How the server is asked: fields of a ServerConfig by name.
        mode: "score": each response is scored alone and the distributions are compared. "pairwise": both are shown, in
            both orders; it takes a model that is better than chance at that, which the built-in one is not.
        prompt: Preamble of the pairwise prompt.
        shots: How many of the task's exemplars go before the sample; -1 is what the labeler needs: all for a base model
            by name in this process, none for another.
        scale: Lowest and highest score, with mode "score"; None is the task's.
        template: A whole prompt of your own, with {response_1} and {response_2} or {text_1} and {text_2}; with mode
            "score" with {response} or {text}.
        minimum_mass: A pair on whose answers the model puts less probability than this raises.
        opponents: How many others each response of a group is compared with; None: all.
        strengths: "mean": the mean probability of winning; "bradley-terry": the strengths that explain the comparisons.
    """
    named: dict[str, Any] = {"url": url, "server": server, "device": device, "dtype": dtype, "chat": chat}
    language_model: LanguageModel = opened("group-preference", model, tokenizer, **named)
    if shots == -1:
        by_name = isinstance(model, str | Path)
        shots = needed_shots(LanguageModelConfig(str(model), url), load_task(task), mode) if by_name else 0
    asked: dict[str, Any] = {"mode": mode, "prompt": prompt, "shots": shots, "template": template}
    labeler = PreferenceLabeler(language_model, task, **asked, scale=scale, minimum_mass=minimum_mass)
    return GroupPreference(labeler, opponents=opponents, strengths=strengths)
