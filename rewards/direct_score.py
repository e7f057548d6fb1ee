"""Direct RLAIF: the language model's own score of a response is the reward (section 2.2.2).

s(y|x) = sum_i i P(i | y, x) over the scores i = 1 ... 10, with P the exact likelihoods of the ten answers normalised
over them, then mapped affinely to [-1, 1]: 2 (s - 1) / 9 - 1.

How this differs from the paper: the likelihood of "1" does not hold that of "10" (see
`rewards.language_model.label_tree`); the mass that the model puts on the ten answers together is reported with every
score; other ranges than 1 ... 10 are possible.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.api import MINIMUM_MASS, BoundedModel, LanguageModel, seen_logprobs, usable_scale
from rewards.language_model.choice import language_model_from
from rewards.prompts import score_prompt
from rlaif_env.api import BackendError, RLAIFError, Scores
from rlaif_env.data.tasks import Task, load_task
from rlaif_env.models import BUILTIN_MODEL

__all__ = ["DirectLLMScore", "ScoreConfig", "expected_scores", "from_kwargs", "score_distribution"]


def score_distribution(logprobs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Normalise label log-likelihoods (n, k) over the labels: probabilities (n, k) and the label mass (n,)."""
    top = logprobs.max(axis=1, keepdims=True)
    weights = np.exp(logprobs - top)
    total = weights.sum(axis=1)
    return weights / total[:, None], np.exp(top[:, 0]) * total


def expected_scores(probabilities: NDArray[np.float64], scale: tuple[int, int] = (1, 10)) -> NDArray[np.float64]:
    """Mean score of each distribution over the scores of a scale: (n, k) -> (n,)."""
    low, high = scale
    scores: NDArray[np.float64] = probabilities @ np.arange(low, high + 1, dtype=np.float64)
    return scores


@dataclass(frozen=True)
class ScoreConfig:
    """How a language model is asked for a score.

    Attributes:
        scale: Lowest and highest score; None is the task's.
        shots: How many of the task's exemplars go before the sample.
        template: A whole prompt of your own.
        minimum_mass: Least probability on all scores together; under it there is no score.
    """

    scale: tuple[int, int] | None = None
    shots: int = 0
    template: str | None = None
    minimum_mass: float = MINIMUM_MASS


class DirectLLMScore:
    """A language model that scores each response; a reward backend.

    Args:
        language_model: The scorer.
        task: What is judged: a task or its name.
        scale: Lowest and highest score; (1, 10) is the paper's.
        shots: How many of the task's scored exemplars go before the sample.
        template: A scoring prompt of your own with ``{prompt}`` and ``{response}`` or ``{text}``; it should end where
            the score is to follow.
        minimum_mass: A row on whose scores the model puts less probability than this cannot be scored: it raises.

    ``score`` returns values in [-1, 1] and info "score" (on the scale), "label_mass" and "score_std"; with a model
    behind a server also "labels_bounded" (how many scores' likelihoods are only upper bounds), "scale" (a narrower one
    where the server cannot tell the scores apart; ``fallback`` says why) and "server" (what it can do, as JSON).
    """

    def __init__(
        self,
        language_model: LanguageModel,
        task: str | Path | Task | Mapping[str, Any] = "movie-review",
        *,
        scale: tuple[int, int] = (1, 10),
        shots: int = 0,
        template: str | None = None,
        minimum_mass: float = 1e-3,
    ) -> None:
        whole = isinstance(scale, tuple | list) and len(scale) == 2 and all(type(end) is int for end in scale)
        if not whole or not 0 <= scale[0] < scale[1] <= 100:
            raise RLAIFError(f"expected a scale of two whole numbers from 0 to 100, the lower first, found {scale}")
        self.language_model = language_model
        self.task = load_task(task)
        self.scale, self.fallback = usable_scale(language_model, scale, template)
        low, high = self.scale
        self.shots = shots
        self.template = template
        self.minimum_mass = minimum_mass
        self.labels = [str(i) for i in range(low, high + 1)]
        self.name = f"direct-llm:{language_model.name}"
        self.render("", "")  # a bad template or number of shots is an error now, not in the first batch

    def __deepcopy__(self, memo: object) -> DirectLLMScore:
        """A live backend is shared, never cloned."""
        return self

    def render(self, prompt: str, response: str) -> str:
        """The scoring prompt for one response."""
        return score_prompt(self.task, prompt, response, scale=self.scale, shots=self.shots, template=self.template)

    def distributions(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """P(score | response) normalised over the scale, (n, k), and the label mass, (n,).

        Raises:
            BackendError: If the mass of a row is under ``minimum_mass`` or is not a number.
        """
        probabilities, mass, _ = self._seen(prompts, responses)
        return probabilities, mass

    def _seen(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """`distributions`, and which likelihoods are only upper bounds, (n, k)."""
        rendered = [self.render(p, r) for p, r in zip(prompts, responses, strict=True)]
        logprobs, bounded = seen_logprobs(self.language_model, rendered, self.labels)
        if logprobs.shape != (len(rendered), len(self.labels)):
            raise BackendError(
                f"expected label log-likelihoods of shape {(len(rendered), len(self.labels))} from "
                f"{self.language_model.name}, found {logprobs.shape}"
            )
        probabilities, mass = score_distribution(logprobs) if len(rendered) else (logprobs, np.zeros(0))
        bad = [int(i) for i in np.flatnonzero(~(mass >= self.minimum_mass))]
        if bad:
            raise BackendError(
                f"expected {self.name} to put at least {self.minimum_mass:g} of its probability on the scores "
                f"{self.labels[0]} to {self.labels[-1]}, found {mass[bad[0]]:.2g} in row {bad[0]} "
                f"(and {len(bad) - 1} more) for response {responses[bad[0]][:60]!r}; "
                "use another template, exemplars (shots) or model",
                bad,
            )
        return probabilities, mass, bounded

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Rewards in [-1, 1]; see `rlaif_env.api.RewardBackend`."""
        probabilities, mass, bounded = self._seen(prompts, responses)
        scores = expected_scores(probabilities, self.scale)
        low, high = self.scale
        grid = np.arange(low, high + 1, dtype=np.float64)
        spread = np.sqrt((probabilities * (grid[None] - scores[:, None]) ** 2).sum(axis=1))
        values = (2 * (scores - low) / (high - low) - 1).astype(np.float32)
        info = {"score": scores, "label_mass": mass, "score_std": spread}
        if not isinstance(self.language_model, BoundedModel):
            return Scores(values, info)
        facts = {**self.language_model.label_facts(), **({"fallback": self.fallback} if self.fallback else {})}
        same = {"scale": f"{low} to {high}", "server": json.dumps(facts)}
        told = {name: np.full(len(scores), text) for name, text in same.items()}
        return Scores(values, {**info, "labels_bounded": bounded.sum(axis=1).astype(np.float64), **told})


def from_kwargs(
    *,
    task: str | Path | Task | Mapping[str, Any] = "movie-review",
    model: Any = BUILTIN_MODEL,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    chat: bool = False,
    llm_url: str | None = None,
    llm: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> DirectLLMScore:
    """Build the backend "direct-llm" from JSON-able settings (or a live model).

    Args:
        task: As in `DirectLLMScore`.
        model: A model name, a `Backbone`, a live model (with ``tokenizer``), or any `LanguageModel`.
        tokenizer: A live model's tokenizer.
        device: As in `rlaif_env.models.backbone`.
        dtype: As in `rlaif_env.models.backbone`.
        chat: As in `LocalLM`.
        llm_url: Base URL of an OpenAI-compatible server that has ``model``.
        llm: The other arguments of `rewards.endpoint.model.EndpointLM`.
        kwargs: The other arguments of `DirectLLMScore`.
    """
    language_model = language_model_from(
        model, tokenizer, url=llm_url, device=device, dtype=dtype, chat=chat, endpoint=llm
    )
    if isinstance(kwargs.get("scale"), list):
        kwargs["scale"] = tuple(kwargs["scale"])
    try:
        return DirectLLMScore(language_model, task, **kwargs)
    except TypeError as error:
        raise RLAIFError(f"reward 'direct-llm': {error}") from error
