"""AI preferences: which of two responses a language model prefers, and how surely (section 2.1, appendix D).

Two ways of asking, each of two questions a pair:

* ``pairwise``, the paper's: both responses are shown, in both orders; the likelihoods of "1" and "2" are normalised,
  mapped back to the responses and averaged.
* ``score``: each response is scored by itself as in `rewards.direct_score`, and the two distributions are compared:
  p_first = sum_{i>j} P1(i) P2(j) + 1/2 sum_i P1(i) P2(i). There is no position to be biased by.

The questions of a call are asked in an order of their own, so exchanging the two responses asks the very same ones, and
p_first is kept on a grid of 2^-52, so that the exchange gives exactly 1 - p_first.

How this differs from the paper: "1" does not count the beginning of "10" (see `rewards.language_model.label_tree`); the
probability on the labels together, the label mass, is kept; a row without a trustworthy answer gets no label (NaN) and
the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rewards.api import BoundedModel, LanguageModel, seen_logprobs, usable_scale
from rewards.direct_score import ScoreConfig, expected_scores, score_distribution
from rewards.labeling.answers import Answer, Label, Labels
from rewards.labeling.pairwise_prompts import label_prompt, pair_wording, pairwise_prompt
from rewards.prompts import score_prompt
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.data.tasks import Task, load_task

__all__ = ["Answer", "Label", "LabelingConfig", "Labels", "PreferenceLabeler"]

_TOP_K = 40  # of the sampled rationales, as in the paper
_SEVERAL = 0.3  # temperature of several rationales: the best of the paper's for 16 samples


@dataclass(frozen=True)
class LabelingConfig(ScoreConfig):
    """How a language model is asked for a preference.

    Attributes:
        mode: Shown both responses in both orders, or scoring each by itself and comparing the distributions.
        prompt: The preamble of the pairwise prompt.
        cot: Whether a rationale is written first.
        samples: How many rationales for each order.
        temperature: Of the rationales; None is 0 for one and 0.3 for several.
        rationale_tokens: Longest rationale.
        max_tokens: The labeler's context.
        seed: Of the rationales.
    """

    mode: Literal["pairwise", "score"] = "pairwise"
    prompt: Literal["base", "detailed"] = "base"
    cot: bool = False
    samples: int = 1
    temperature: float | None = None
    rationale_tokens: int = 512
    max_tokens: int = 4096
    seed: int = 0


class PreferenceLabeler:
    """A language model that says which of two responses is better.

    Args:
        language_model: The labeler. As large as the policy it makes same-size RLAIF, and the policy's own initial
            checkpoint makes strict self-improvement.
        task: What is judged: a task or its name.
        mode: "pairwise" or "score".
        prompt: The preamble of the pairwise prompt: "base" or "detailed".
        shots: How many of the task's exemplars go before the sample.
        cot: Whether a rationale is written first, for each order its own (pairwise only).
        samples: How many rationales for each order; their label distributions are averaged.
        temperature: Of the rationales; None is 0 for one and 0.3 for several.
        seed: Of the rationales.
        rationale_tokens: Longest rationale.
        scale: Lowest and highest score (score only).
        template: A whole prompt of your own: see `rewards.labeling.pairwise_prompts.pairwise_prompt` and
            `rewards.prompts.score_prompt`. It asks for the better response, whatever the task.
        minimum_mass: A pair for which the label mass is less gets no label.
        max_tokens: The labeler's context; a longer prompt gets no label. Needs a model that counts tokens
            (`LocalLM`); another model says so by failing.

    Raises:
        RLAIFError: If the settings make no sense together.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        task: str | Path | Task | Mapping[str, Any] = "movie-review",
        *,
        mode: str = "pairwise",
        prompt: str = "base",
        shots: int = 0,
        cot: bool = False,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        rationale_tokens: int = 512,
        scale: tuple[int, int] | None = (1, 10),
        template: str | None = None,
        minimum_mass: float = 0.01,
        max_tokens: int = 4096,
    ) -> None:
        self.language_model = language_model
        self.task = load_task(task)
        self.mode, self.prompt, self.shots, self.template = mode, prompt, shots, template
        self.cot, self.samples, self.seed, self.rationale_tokens = cot, samples, seed, rationale_tokens
        self.temperature = (0.0 if samples == 1 else _SEVERAL) if temperature is None else temperature
        self.scale = scale = self.task.scale if scale is None else scale
        self.minimum_mass, self.max_tokens = minimum_mass, max_tokens
        self._check()
        self.fallback = ""  # why the scale is not the one that was asked for
        if mode == "score":
            self.scale, self.fallback = usable_scale(language_model, scale, template)
        low, high = self.scale
        self.labels = ["1", "2"] if mode == "pairwise" else [str(i) for i in range(low, high + 1)]
        self._inverted = mode == "pairwise" and template is None and pair_wording(self.task).inverted
        self.questions("", "", "")  # a bad template or number of shots is an error now, not in the first batch

    def _check(self) -> None:
        if self.mode not in ("pairwise", "score"):
            raise RLAIFError(f"expected mode 'pairwise' or 'score', found {self.mode!r}")
        if self.mode == "score" and (self.cot or self.prompt != "base"):
            what = "cot" if self.cot else f"prompt {self.prompt!r}"
            raise RLAIFError(f"expected {what} with mode 'pairwise' only, found mode 'score'")
        if self.cot and self.template is not None:
            raise RLAIFError(
                "expected cot or a template of your own, found both; a template has no place for a rationale"
            )
        if self.samples < 1 or self.rationale_tokens < 1 or self.temperature < 0:
            raise RLAIFError(
                "expected samples >= 1, rationale_tokens >= 1 and temperature >= 0, found "
                f"{self.samples}, {self.rationale_tokens} and {self.temperature}"
            )
        if self.samples > 1 and not (self.cot and self.temperature > 0):
            raise RLAIFError(
                f"expected cot and a temperature above 0 for {self.samples} samples, found cot={self.cot} and "
                f"temperature {self.temperature}: without them all samples are the same"
            )
        low, high = self.scale
        if not 0 <= low < high <= 100:
            raise RLAIFError(
                f"expected a scale of two whole numbers from 0 to 100, the lower first, found {self.scale}"
            )
        if not 0 < self.minimum_mass < 1:
            raise RLAIFError(f"expected a minimum_mass between 0 and 1, found {self.minimum_mass}")

    @property
    def parameters(self) -> dict[str, Any]:
        """All that decides what is asked and how, beside the model and the texts."""
        shared = {"task": self.task.name, "mode": self.mode, "shots": self.shots, "labels": self.labels}
        own = {} if self.template is None else {"template": self.template}
        if self.mode == "score":
            return {**shared, **own}
        asked = {**shared, "prompt": self.prompt, "inverted": self._inverted, **own}
        if not self.cot:
            return asked
        return asked | {
            "ending": pair_wording(self.task).ending,
            "samples": self.samples,
            "temperature": self.temperature,
            "top_k": _TOP_K,
            "seed": self.seed,
            "rationale_tokens": self.rationale_tokens,
        }

    def questions(self, prompt: str, response_1: str, response_2: str) -> tuple[str, str]:
        """The two prompts of a pair: with the first response shown first or scored, then with the second."""
        if self.mode == "score":
            one, two = (
                score_prompt(self.task, prompt, y, scale=self.scale, shots=self.shots, template=self.template)
                for y in (response_1, response_2)
            )
        else:
            one, two = (
                pairwise_prompt(
                    self.task,
                    prompt,
                    a,
                    b,
                    preamble=self.prompt,
                    shots=self.shots,
                    rationale=self.cot,
                    template=self.template,
                )
                for a, b in ((response_1, response_2), (response_2, response_1))
            )
        return one, two

    def key(self, question: str) -> str:
        """SHA-256 of a question, the model and the parameters: equal keys have equal answers."""
        facts = json.dumps([self.language_model.name, self.parameters, question], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def label(self, prompts: Sequence[str], responses_1: Sequence[str], responses_2: Sequence[str]) -> Labels:
        """Label n pairs; each distinct question is asked once.

        Args:
            prompts: n prompts; empty where whole texts are compared.
            responses_1: n responses.
            responses_2: n responses.

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
        answers: list[Answer | None] = [self._too_long(question) for question in questions]
        open_ = [i for i, answer in enumerate(answers) if answer is None]
        for i, answer in zip(open_, self._ask_apart([questions[i] for i in open_]), strict=True):
            answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _too_long(self, question: str) -> Answer | None:
        count = getattr(self.language_model, "count_tokens", None)
        if count is None:
            return None
        room = self.max_tokens - (self.rationale_tokens if self.cot else 0)
        try:
            tokens = int(count([question])[0])
        except RLAIFError as error:  # longer than the model itself takes
            return Answer(status="too long", reason=str(error))
        if tokens <= room:
            return None
        beside = f" beside a rationale of {self.rationale_tokens}" if self.cot else ""
        return Answer(
            status="too long",
            reason=f"expected at most {room} tokens{beside} in the context, found {tokens}; shorten the texts "
            "or use fewer exemplars",
        )

    def _ask_apart(self, questions: list[str]) -> list[Answer]:
        """Ask all at once; after an error leave out the rows it names, or halve the batch until they are found."""
        if not questions:
            return []
        try:
            return self._ask(questions)
        except Exception as error:  # whatever a model raises, it is these rows' failure and no label
            reason = f"{type(error).__name__}: {error}"
            named = set(getattr(error, "rows", ())) & set(range(len(questions)))
            if len(questions) == 1 or len(named) == len(questions):
                return [Answer(status="failed", reason=reason)] * len(questions)
        if named:
            others = iter(self._ask_apart([q for i, q in enumerate(questions) if i not in named]))
            return [
                Answer(status="failed", reason=reason) if i in named else next(others) for i in range(len(questions))
            ]
        half = len(questions) // 2
        return self._ask_apart(questions[:half]) + self._ask_apart(questions[half:])

    def _ask(self, questions: list[str]) -> list[Answer]:
        if not self.cot:
            rows, bounded = self._label_logprobs(questions)
            return [self._answer([row], [which], ()) for row, which in zip(rows, bounded, strict=True)]
        wording = pair_wording(self.task)
        rationales: list[list[str]] = []
        likelihoods: list[tuple[NDArray[np.float64], NDArray[np.bool_]]] = []
        for k in range(self.samples):
            written = self.language_model.generate(
                questions,
                max_new_tokens=self.rationale_tokens,
                temperature=self.temperature,
                top_k=_TOP_K,
                seed=self.seed * self.samples + k,
                stop=(wording.ending, "\n\n" + wording.sample.partition("{")[0]),
            )
            if len(written) != len(questions):
                raise BackendError(f"expected {len(questions)} rationales, found {len(written)}")
            rationales.append([text.strip() for text in written])
            asked = [label_prompt(self.task, q, r) for q, r in zip(questions, rationales[-1], strict=True)]
            likelihoods.append(self._label_logprobs(asked))
        return [
            self._answer(
                [rows[i] for rows, _ in likelihoods],
                [bounded[i] for _, bounded in likelihoods],
                tuple(of_k[i] for of_k in rationales),
            )
            for i in range(len(questions))
        ]

    def _label_logprobs(self, prompts: list[str]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        found, bounded = seen_logprobs(self.language_model, prompts, self.labels)
        if found.shape != (expected := (len(prompts), len(self.labels))):
            raise BackendError(f"expected label log-likelihoods of shape {expected}, found {found.shape}")
        return found, bounded

    def _answer(
        self,
        logprobs: Sequence[NDArray[np.float64]],
        bounded: Sequence[NDArray[np.bool_]],
        rationales: tuple[str, ...],
    ) -> Answer:
        for row in logprobs:
            if np.isnan(row).any() or row.max() in (np.inf, -np.inf):
                shown = [round(value, 3) for value in row.tolist()]
                return Answer(status="failed", reason=f"expected log-likelihoods of {self.labels}, found {shown}")
        labels = [tuple(label for label, is_bound in zip(self.labels, row, strict=True) if is_bound) for row in bounded]
        return Answer(
            tuple(tuple(row.tolist()) for row in logprobs),
            rationales,
            bounded=tuple(labels) if any(labels) else (),
            server=self._server(),
        )

    def _server(self) -> dict[str, Any]:
        """What a label of a model behind a server says of it."""
        if not isinstance(self.language_model, BoundedModel):
            return {}
        return {**self.language_model.label_facts(), **({"fallback": self.fallback} if self.fallback else {})}

    def combine(self, questions: tuple[str, str], answers: tuple[Answer, Answer]) -> Label:
        """The label of a pair from the answers to its two questions."""
        record: dict[str, Any] = {
            "mode": self.mode,
            "model": self.language_model.name,
            "parameters": self.parameters,
            "answers": [],
        }
        distributions, masses = [], []
        for question, answer in zip(questions, answers, strict=True):
            digest = hashlib.sha256(question.encode("utf-8", "surrogatepass")).hexdigest()
            entry: dict[str, Any] = {"prompt_hash": digest}
            if answer.status == "ok":
                each, mass = score_distribution(np.array(answer.logprobs))  # (k, labels), (k,)
                mean = each.mean(axis=0)
                distributions.append(mean)
                masses.append(float(mass.mean()))
                entry |= {**answer.to_json(), "mass": masses[-1]}
                if self.mode == "pairwise":
                    entry["p_1"] = float(mean[0])
                else:
                    entry["score"] = float(expected_scores(mean[None], self.scale)[0])
            record["answers"].append(entry)
        for answer in answers:
            if answer.status != "ok":
                return Label(math.nan, math.nan, answer.status, answer.reason, record)
        least = min(masses)
        record["mass"] = least
        if not least >= self.minimum_mass:
            reason = (
                f"expected at least {self.minimum_mass:g} of the probability on the labels {self.labels[0]} to "
                f"{self.labels[-1]}, found {least:.2g}; use another prompt, exemplars (shots) or model"
            )
            return Label(math.nan, least, "low mass", reason, record)
        return Label(self._p_first(*distributions), least, "ok", "", record)

    def _p_first(self, one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
        """p_first = 1/2 + d with d(two, one) = -d(one, two) to the last bit, and 1 - p_first exact."""
        if self.mode == "pairwise":  # P("1") in both orders; the second speaks of the second response
            difference = float(one[0] - two[0]) * (-1 if self._inverted else 1)
        else:  # P(first scores higher) - P(second scores higher)
            joint = np.outer(one, two)
            lower, upper = np.tril(joint, -1), np.tril(joint.T, -1)
            difference = float((lower - upper).sum())
        return 0.5 + round(min(max(difference / 2, -0.5), 0.5) * 2**52) / 2**52
