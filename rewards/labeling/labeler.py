"""AI preferences: which of two responses a language model prefers, and how surely (section 2.1, appendix D).

Two ways of asking, each of two questions a pair:

* ``pairwise``, the paper's: both responses are shown, in both orders; the likelihoods of "1" and "2" are normalised,
  mapped back to the responses and averaged (`mean_of_orders`).
* ``score``: each response is scored by itself as in `rewards.direct_score`, and the two distributions are compared
  (`compare_scores`). There is no position to be biased by.

The questions of a call are asked in an order of their own, so exchanging the two responses asks the very same ones, and
p_first is kept on a grid of 2^-52, so that the exchange gives exactly 1 - p_first.

How this differs from the paper: "1" does not count the beginning of "10" (see `rewards.language_model.answer_tree`);
the probability on the answer tokens together, the label mass, is kept; a row without a trustworthy answer gets no label
(NaN) and the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from rewards.api import BoundedModel, LanguageModel, seen_logprobs, usable_scale
from rewards.direct_score import ScoreConfig, expected_scores, score_distribution
from rewards.labeling.answers import Answer, Label, Labels
from rewards.labeling.pairwise_prompts import label_prompt, pair_wording, pairwise_prompt
from rewards.labeling.probabilities import compare_scores, mean_of_orders
from rewards.prompts import score_prompt
from rlaif_env.api import BackendError, ContextError, RLAIFError
from rlaif_env.batches import isolate_failures
from rlaif_env.data.tasks import DEFAULT_TASK, TaskLike, checked_scale, load_task

__all__ = ["Answer", "Label", "LabelingConfig", "Labels", "PreferenceLabeler"]

_Seen = tuple[NDArray[np.float64], NDArray[np.bool_]]  # of one prompt: log-likelihoods and bounds, (answer tokens,)

_TOP_K = 40  # of the sampled rationales, as in the paper
_SEVERAL = 0.3  # temperature of several rationales: the best of the paper's for 16 samples


@dataclass(frozen=True)
class LabelingConfig(ScoreConfig):
    """How a labeler is asked.

    Attributes:
        scale: Lowest and highest score, with mode "score"; None is the task's.
        template: A whole prompt of your own, with {response_1} and {response_2} or {text_1} and {text_2}, and {prompt}
            where wanted; with mode "score" with {response} or {text}. It asks for the better response, whatever the
            task.
        minimum_mass: A pair for which the label mass is less gets no label.
        mode: Show both responses in both orders, or score each by itself and compare the distributions.
        prompt: Preamble of the pairwise prompt.
        cot: Have a rationale written first, for each order its own (pairwise only).
        samples: How many rationales for each order; their distributions are averaged.
        temperature: Of the rationales; None is 0 for one and 0.3 for several.
        rationale_tokens: Longest rationale.
        max_tokens: The labeler's context; a longer prompt gets no label. Needs a model that counts tokens (one in this
            process); another model says so by failing.
        seed: Of the rationales.

    Raises:
        RLAIFError: If the settings make no sense together.
    """

    mode: Literal["pairwise", "score"] = "pairwise"
    prompt: Literal["base", "detailed"] = "base"
    cot: bool = False
    samples: int = 1
    temperature: float | None = None
    rationale_tokens: int = 512
    max_tokens: int = 4096
    seed: int = 0

    @property
    def rationale_temperature(self) -> float:
        """The temperature of the rationales, chosen where none is given."""
        return (0.0 if self.samples == 1 else _SEVERAL) if self.temperature is None else self.temperature

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("pairwise", "score"):
            raise RLAIFError(f"expected mode 'pairwise' or 'score', found {self.mode!r}")
        if self.mode == "score" and (self.cot or self.prompt != "base"):
            what = "cot" if self.cot else f"prompt {self.prompt!r}"
            raise RLAIFError(f"expected {what} with mode 'pairwise' only, found mode 'score'")
        if self.cot and self.template is not None:
            raise RLAIFError(
                "expected cot or a template of your own, found both; a template has no place for a rationale"
            )
        temperature = self.rationale_temperature
        if self.samples < 1 or self.rationale_tokens < 1 or temperature < 0:
            raise RLAIFError(
                "expected samples >= 1, rationale_tokens >= 1 and temperature >= 0, found "
                f"{self.samples}, {self.rationale_tokens} and {temperature}"
            )
        if self.samples > 1 and not (self.cot and temperature > 0):
            raise RLAIFError(
                f"expected cot and a temperature above 0 for {self.samples} samples, found cot={self.cot} and "
                f"temperature {temperature}: without them all samples are the same"
            )
        if not 0 < self.minimum_mass < 1:
            raise RLAIFError(f"expected a minimum_mass between 0 and 1, found {self.minimum_mass}")

    @property
    def preference(self) -> Self:
        """How a preference is asked for; a pairwise prompt has no scale, which is then the direct score's alone."""
        return self if self.mode == "score" else replace(self, scale=None)

    @property
    def score(self) -> ScoreConfig:
        """How one response's score is asked for; shots and template of a pairwise prompt are no score's."""
        asked = self if self.mode == "score" else replace(self, shots=0, template=None)
        return ScoreConfig(**{entry.name: getattr(asked, entry.name) for entry in fields(ScoreConfig)})


class PreferenceLabeler:
    """A language model that says which of two responses is better.

    Args:
        language_model: The labeler. As large as the policy it makes same-size RLAIF, and the policy's own initial
            checkpoint makes strict self-improvement.
        task: What is judged: a task or its name.
        settings: The fields of `LabelingConfig`.

    Attributes:
        config: The settings.
        scale: Lowest and highest score that are asked for.
        fallback: Why they are not the ones that were to be, where a server cannot tell those apart; else "".

    Raises:
        RLAIFError: If the settings make no sense together, or the task has not so many exemplars.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        task: TaskLike = DEFAULT_TASK,
        **settings: Any,
    ) -> None:
        self.language_model = language_model
        self.task = load_task(task)
        self.config = LabelingConfig(**settings)
        self.scale, self.fallback = checked_scale(self.config.scale or self.task.scale), ""
        self._answer_tokens, self._inverted = ["1", "2"], False
        if self.config.mode == "score":
            self.scale, self.fallback = usable_scale(language_model, self.scale, self.config.template)
            self._answer_tokens = [str(i) for i in range(self.scale[0], self.scale[1] + 1)]
        elif self.config.template is None:
            self._inverted = pair_wording(self.task).inverted
        self.questions("", "", "")  # a bad template or number of shots is an error now, not in the first batch

    @property
    def parameters(self) -> dict[str, Any]:
        """All that decides what is asked and how, beside the model and the texts."""
        c = self.config
        shared = {"task": self.task.name, "mode": c.mode, "shots": c.shots, "labels": self._answer_tokens}
        shared |= {} if c.template is None else {"template": c.template}
        if c.mode == "score":
            return shared
        shared |= {"prompt": c.prompt, "inverted": self._inverted}
        if not c.cot:
            return shared
        shared |= {"ending": pair_wording(self.task).ending, "samples": c.samples}
        shared |= {"temperature": c.rationale_temperature, "top_k": _TOP_K}
        return shared | {"seed": c.seed, "rationale_tokens": c.rationale_tokens}

    def questions(self, prompt: str, response_1: str, response_2: str) -> tuple[str, str]:
        """The two prompts of a pair: with the first response shown first or scored, then with the second."""
        c = self.config

        def question(y1: str, y2: str) -> str:
            if c.mode == "score":
                return score_prompt(self.task, prompt, y1, scale=self.scale, shots=c.shots, template=c.template)
            shown: dict[str, Any] = {"preamble": c.prompt, "shots": c.shots, "rationale": c.cot}
            return pairwise_prompt(self.task, prompt, y1, y2, template=c.template, **shown)

        return question(response_1, response_2), question(response_2, response_1)

    def key(self, question: str) -> str:
        """SHA-256 of a question, the model and the parameters: equal keys have equal answers."""
        return _sha256(json.dumps([self.language_model.name, self.parameters, question], sort_keys=True))

    def label(self, prompts: Sequence[str], responses_1: Sequence[str], responses_2: Sequence[str]) -> Labels:
        """Label n pairs (prompts may be empty where whole texts are compared); each distinct question is asked once.

        Returns:
            n labels in the same order. A row that failed has p_first NaN; it does not stop the others.

        Raises:
            RLAIFError: If the three differ in length.
        """
        sizes = len(prompts), len(responses_1), len(responses_2)
        if len(set(sizes)) > 1:
            raise RLAIFError("expected as many prompts as responses of each side, found {}, {} and {}".format(*sizes))
        pairs = [self.questions(*row) for row in zip(prompts, responses_1, responses_2, strict=True)]
        distinct = sorted({question for pair in pairs for question in pair})
        answers = dict(zip(distinct, self.ask(distinct), strict=True))
        return Labels(tuple(self.combine((one, two), (answers[one], answers[two])) for one, two in pairs))

    def ask(self, questions: Sequence[str]) -> list[Answer]:
        """The model's answers to n questions; where it fails, the answer says so and the others are not touched."""
        answers = {i: answer for i, question in enumerate(questions) if (answer := self._too_long(question))}
        rest = [i for i in range(len(questions)) if i not in answers]
        # whatever a model raises, it is these rows' failure and no label
        answered, errors = isolate_failures(lambda rows: self._ask([questions[i] for i in rows]), rest)
        answers |= answered
        for i, error in errors.items():
            answers[i] = Answer(status="failed", reason=f"{type(error).__name__}: {error}")
            if isinstance(error, ContextError):  # such as a question with its rationale
                answers[i] = Answer(status="too long", reason=str(error))
        return [answers[i] for i in range(len(questions))]

    def _too_long(self, question: str) -> Answer | None:
        count = getattr(self.language_model, "count_tokens", None)
        if count is None:
            return None
        beside = self.config.rationale_tokens if self.config.cot else 0
        context = getattr(self.language_model, "context", None) or self.config.max_tokens
        room = min(self.config.max_tokens, context) - beside
        try:
            tokens = int(count([question])[0])
        except RLAIFError as error:  # longer than the model itself takes
            return Answer(status="too long", reason=str(error))
        if tokens <= room:
            return None
        reason = f"expected at most {room} tokens" + (f" beside a rationale of {beside}" if beside else "")
        reason += f" in the context, found {tokens}; shorten the texts or use fewer exemplars"
        return Answer(status="too long", reason=reason)

    def _ask(self, questions: list[str]) -> list[Answer]:
        if not self.config.cot:
            return [self._answer([row]) for row in self._label_logprobs(questions)]
        rationales, seen = [], []
        for k in range(self.config.samples):
            rationales.append(self._rationales(questions, k))
            asked = [label_prompt(self.task, q, r) for q, r in zip(questions, rationales[-1], strict=True)]
            seen.append(self._label_logprobs(asked))
        each = zip(zip(*seen, strict=True), zip(*rationales, strict=True), strict=True)
        return [self._answer(*both) for both in each]

    def _rationales(self, questions: list[str], k: int) -> list[str]:
        """The k-th rationale of each question."""
        wording = pair_wording(self.task)
        written = self.language_model.generate(
            questions,
            max_new_tokens=self.config.rationale_tokens,
            temperature=self.config.rationale_temperature,
            top_k=_TOP_K,
            seed=self.config.seed * self.config.samples + k,
            stop=(wording.ending, "\n\n" + wording.sample.partition("{")[0]),
        )
        if len(written) != len(questions):
            raise BackendError(f"expected {len(questions)} rationales, found {len(written)}")
        return [text.strip() for text in written]

    def _label_logprobs(self, prompts: list[str]) -> list[_Seen]:
        """Of each prompt the log-likelihood of each answer token, and which of them are only upper bounds."""
        logprobs, bounded = seen_logprobs(self.language_model, prompts, self._answer_tokens)
        if logprobs.shape != (expected := (len(prompts), len(self._answer_tokens))):
            raise BackendError(f"expected label log-likelihoods of shape {expected}, found {logprobs.shape}")
        return list(zip(logprobs, bounded, strict=True))

    def _answer(self, rows: Sequence[_Seen], rationales: tuple[str, ...] = ()) -> Answer:
        """What the model answered to one question, after each of its rationales."""
        for row, _ in rows:
            if np.isnan(row).any() or row.max() in (np.inf, -np.inf):
                shown = [round(value, 3) for value in row.tolist()]
                return Answer(
                    status="failed", reason=f"expected log-likelihoods of {self._answer_tokens}, found {shown}"
                )
        bounds = tuple(tuple(np.array(self._answer_tokens)[bounded].tolist()) for _, bounded in rows)
        server: dict[str, Any] = {}
        if isinstance(self.language_model, BoundedModel):
            server = {**self.language_model.label_facts(), **({"fallback": self.fallback} if self.fallback else {})}
        logprobs = tuple(tuple(row.tolist()) for row, _ in rows)
        return Answer(logprobs, rationales, bounded=bounds if any(bounds) else (), server=server)

    def combine(self, questions: tuple[str, str], answers: tuple[Answer, Answer]) -> Label:
        """The label of a pair from the answers to its two questions."""
        pairwise = self.config.mode == "pairwise"
        distributions, masses, entries = [], [], []
        for question, answer in zip(questions, answers, strict=True):
            entry: dict[str, Any] = {"prompt_hash": _sha256(question)}
            if answer.status == "ok":
                each, mass = score_distribution(np.array(answer.logprobs))  # (k, answer tokens), (k,)
                mean = each.mean(axis=0)
                distributions.append(mean)
                masses.append(float(mass.mean()))
                score = {} if pairwise else {"score": float(expected_scores(mean[None], self.scale)[0])}
                entry |= {**answer.to_json(), "mass": masses[-1], **({"p_1": float(mean[0])} if pairwise else score)}
            entries.append(entry)
        record: dict[str, Any] = {"mode": self.config.mode, "model": self.language_model.name}
        record |= {"parameters": self.parameters, "answers": entries}
        if failed := [answer for answer in answers if answer.status != "ok"]:
            return Label(math.nan, math.nan, failed[0].status, failed[0].reason, record)
        record["mass"] = least = min(masses)
        if not least >= self.config.minimum_mass:
            reason = (
                f"expected at least {self.config.minimum_mass:g} of the probability on the labels "
                f"{self._answer_tokens[0]} to {self._answer_tokens[-1]}, found {least:.2g}; use another prompt, "
                "exemplars (shots) or model"
            )
            return Label(math.nan, least, "low mass", reason, record)
        one, two = reversed(distributions) if self._inverted else distributions  # asked for the worse, or the better
        p_first = mean_of_orders(float(one[0]), float(two[0])) if pairwise else compare_scores(one, two)
        return Label(p_first, least, "ok", "", record)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
