"""Direct RLAIF: the language model's own score of a response is the reward (section 2.2.2).

s(y|x) = sum_i i P(i | y, x) over the scores i = 1 ... 10, with P the exact likelihoods of the ten answers normalised
over them, then mapped affinely to [-1, 1]: 2 (s - 1) / 9 - 1.

How this differs from the paper: the likelihood of "1" does not hold that of "10" (see
`rewards.language_model.answer_tree`); the mass that the model puts on the ten answers together is reported with every
score; other ranges than 1 ... 10 are possible.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from rewards.api import MINIMUM_MASS, BoundedModel, LanguageModel, Live, configured, seen_logprobs, usable_scale
from rewards.endpoint.config import ServerConfig
from rewards.language_model.choice import language_model_from
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM
from rewards.prompts import score_prompt
from rlaif_env.api import BackendError, ContextError, RLAIFError, Scores
from rlaif_env.data.tasks import DEFAULT_TASK, SCALE, TaskLike, checked_scale, load_task
from rlaif_env.tables import is_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score_distribution(logprobs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Normalise log-likelihoods of k answers, (n, k), over them: probabilities (n, k) and the label mass (n,)."""
    top = logprobs.max(axis=1, keepdims=True)
    weights = np.exp(logprobs - top)
    total = weights.sum(axis=1)
    return weights / total[:, None], np.exp(top[:, 0]) * total


def expected_scores(probabilities: NDArray[np.float64], scale: tuple[int, int] = SCALE) -> NDArray[np.float64]:
    """Mean score of each distribution over the scores of a scale: (n, k) -> (n,)."""
    low, high = scale
    scores: NDArray[np.float64] = probabilities @ np.arange(low, high + 1, dtype=np.float64)
    return scores


def rescaled(scores: NDArray[np.float64], scale: tuple[int, int]) -> NDArray[np.float64]:
    """Scores (n,) mapped affinely so that the lowest of the scale is -1 and the highest 1 (section 2.2.2)."""
    low, high = scale
    return 2 * (scores - low) / (high - low) - 1


@dataclass(frozen=True)
class ScoreConfig:
    """How a score is asked for.

    Attributes:
        scale: Lowest and highest score; None is the task's.
        shots: How many of the task's scored exemplars go before the sample.
        template: A prompt of your own with {prompt} and {response} or {text}; it should end where the score is to
            follow.
        minimum_mass: A row on whose scores the model puts less probability than this cannot be scored: it raises.

    Raises:
        RLAIFError: If the scale is none, or a value is of the wrong kind.
    """

    scale: tuple[int, int] | None = None
    shots: int = 0
    template: str | None = None
    minimum_mass: float = MINIMUM_MASS

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", checked_scale(self.scale))
        given: tuple[Any, ...] = (self.shots, self.template, self.minimum_mass)
        if type(given[0]) is not int or not isinstance(given[1], str | None) or not is_number(given[2]):
            raise RLAIFError(
                f"expected a number of shots, a template's text and a number as minimum_mass, found {given}"
            )


class DirectLLMScore(Live):
    """A language model that scores each response; a reward backend.

    ``score`` returns values in [-1, 1] and info "score" (on the scale), "label_mass" and "score_std"; with a model
    behind a server also "labels_bounded" (how many scores' likelihoods are only upper bounds), "scale" (a narrower one
    where the server cannot tell the scores apart; ``fallback`` says why) and "server" (what it can do, as JSON).

    Args:
        language_model: The scorer.
        task: What is judged: a task or its name.
        settings: Fields of `ScoreConfig` by name.

    Attributes:
        config: The settings as they were given.
        scale: Lowest and highest score that are asked for.
        fallback: Why the scale is not the one of the settings; "" if it is.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        task: TaskLike = DEFAULT_TASK,
        **settings: Any,
    ) -> None:
        config = self.config = configured(ScoreConfig(), settings, "DirectLLMScore")
        self.language_model = language_model
        self.task = load_task(task)
        self.scale, self.fallback = usable_scale(language_model, config.scale or self.task.scale, config.template)
        self.answers = [str(i) for i in range(self.scale[0], self.scale[1] + 1)]
        self.name = f"direct-llm:{language_model.name}"
        self.render("", "")  # a bad template or number of shots is an error now, not in the first batch

    def render(self, prompt: str, response: str) -> str:
        """The scoring prompt for one response."""
        shots, template = self.config.shots, self.config.template
        return score_prompt(self.task, prompt, response, scale=self.scale, shots=shots, template=template)

    def check_room(self, prompts: Sequence[str], response_tokens: int) -> None:
        """Raise `RLAIFError` if a model in this process does not read the longest prompt and so long a response whole.

        The longest is told by its characters; a server's model is not asked.
        """
        if not isinstance(model := self.language_model, LocalLM):
            return
        tokenizer, longest = model.backbone.tokenizer, max(prompts, key=len)
        answer = max(len(tokenizer.encode(answer, add_special_tokens=False)) for answer in self.answers)
        limit = model.max_tokens if model.context is None else min(model.max_tokens, model.context - answer)
        with suppress(ContextError):
            if model.count_tokens([self.render(longest, "")])[0] + response_tokens <= limit:
                return
        raise RLAIFError(
            f"expected {self.name} to read every prompt whole beside a response of {response_tokens} tokens, found one "
            f"whose question is longer than the {max(limit - response_tokens, 0)} tokens that this leaves "
            f"({longest[-60:]!r}); take a model that reads more, or shorter prompts (`rlaif task check` lists them)"
        )

    def distributions(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """P(score | response) normalised over the scale.

        Returns:
            The probabilities, (n, k), the label mass, (n,), and which likelihoods are only upper bounds, (n, k).

        Raises:
            BackendError: If the mass of a row is under ``minimum_mass`` or is not a number.
        """
        rendered = [self.render(p, r) for p, r in zip(prompts, responses, strict=True)]
        logprobs, bounded = seen_logprobs(self.language_model, rendered, self.answers)
        if logprobs.shape != (expected := (len(rendered), len(self.answers))):
            raise BackendError(
                f"expected label log-likelihoods of shape {expected} from {self.language_model.name}, found "
                f"{logprobs.shape}"
            )
        probabilities, mass = score_distribution(logprobs) if rendered else (logprobs, np.zeros(0))
        if bad := [int(i) for i in np.flatnonzero(~(mass >= self.config.minimum_mass))]:
            raise BackendError(
                f"expected {self.name} to put at least {self.config.minimum_mass:g} of its probability on the scores "
                f"{self.scale[0]} to {self.scale[1]}, found {mass[bad[0]]:.2g} in row {bad[0]} (and {len(bad) - 1} "
                f"more) for response {responses[bad[0]][:60]!r}; use another template, exemplars (shots), model or "
                "minimum_mass",
                bad,
            )
        return probabilities, mass, bounded

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Rewards in [-1, 1]; see `rlaif_env.api.RewardBackend`."""
        probabilities, mass, bounded = self.distributions(prompts, responses)
        scores = expected_scores(probabilities, self.scale)
        low, high = self.scale
        grid = np.arange(low, high + 1, dtype=np.float64)
        spread = np.sqrt((probabilities * (grid[None] - scores[:, None]) ** 2).sum(axis=1))
        info: dict[str, NDArray[Any]] = {"score": scores, "label_mass": mass, "score_std": spread}
        if isinstance(self.language_model, BoundedModel):
            facts = {**self.language_model.label_facts(), **({"fallback": self.fallback} if self.fallback else {})}
            info["labels_bounded"] = bounded.sum(axis=1).astype(np.float64)
            info["scale"] = np.full(len(scores), f"{low} to {high}")
            info["server"] = np.full(len(scores), json.dumps(facts))
        return Scores(rescaled(scores, self.scale).astype(np.float32), info)


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
    scale: tuple[int, int] | None = ScoreConfig.scale,
    shots: int = ScoreConfig.shots,
    template: str | None = ScoreConfig.template,
    minimum_mass: float = ScoreConfig.minimum_mass,
) -> DirectLLMScore:
    """Build the reward "direct-llm", in which a language model scores each response, from JSON-able settings.

    Args:
        task: What is judged: a task or its name.
        model: The scorer: its name, a folder, what the server calls it; or a live one: a Backbone, a Hugging Face
            model (with its tokenizer) or any LanguageModel.
        tokenizer: A live Hugging Face model's tokenizer.
        url: Base URL of an OpenAI-compatible server that has the model; None runs it here.
        chat: Put prompts through the model's chat template; on a server, use its chat route.
        device: Where a model in this process runs; by default the GPU where there is one.
        dtype: Of its weights; by default bfloat16 on a GPU that has it and float32 elsewhere.
        server: How the server is asked: fields of a ServerConfig by name.
        scale: Lowest and highest score; None is the task's.
        shots: How many of the task's scored exemplars go before the sample.
        template: A prompt of your own with {prompt} and {response} or {text}.
        minimum_mass: A row on whose scores the model puts less probability than this raises.
    """
    named: dict[str, Any] = {"url": url, "server": server, "device": device, "dtype": dtype, "chat": chat}
    language_model = opened("direct-llm", model, tokenizer, **named)
    return DirectLLMScore(language_model, task, scale=scale, shots=shots, template=template, minimum_mass=minimum_mass)


def opened(
    reward: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    chat: bool,
    **settings: Any,
) -> LanguageModel:
    """The language model of a reward's keywords: one by name, or the live one.

    Args:
        reward: The reward's name, for errors.
        model: A name or folder, a Backbone, a Hugging Face model (with its tokenizer) or any LanguageModel.
        tokenizer: A live Hugging Face model's.
        chat: Whether prompts go through the model's chat template.
        settings: The other fields of `LanguageModelConfig`.

    Raises:
        RLAIFError: If a live model comes with settings that only one by name can have.
    """
    if isinstance(model, str | Path):
        server = cast(ServerConfig, settings.pop("server") or {})
        return language_model_from(LanguageModelConfig(str(model), chat=chat, server=server, **settings))
    ready = isinstance(model, LanguageModel)
    others = settings | ({"tokenizer": tokenizer, "chat": chat} if ready else {})
    if given := ", ".join(name for name, value in others.items() if value):
        raise RLAIFError(f"reward {reward!r}: expected no other settings with a live model, found {given}")
    return model if ready else LocalLM(model, tokenizer, chat=chat)
