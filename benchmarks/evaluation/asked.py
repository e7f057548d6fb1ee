"""What a reward asks of its language model: counted without the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.evaluation.systems import System
from rewards import make_reward
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.data.tasks import TaskLike
from rlaif_env.models import encode, load_tokenizer


@dataclass(frozen=True)
class Tokens:
    """What a language model read and wrote."""

    input: float
    output: float
    exact: bool  # counted, and not guessed from the characters
    price: float | None = None  # None where the model has no prices

    def __str__(self) -> str:
        return f"{'' if self.exact else 'about '}{self.input:,.0f} + {self.output:,.0f}"


class _Counting:
    """A language model that counts the tokens of its questions and finds all answers equally likely."""

    name = "counting"

    def __init__(self, model: LanguageModelConfig) -> None:
        self.chat = model.chat
        self.tokenizer = load_tokenizer(model.model) if model.url is None else None
        self.read = self.asked = 0

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        self.asked += len(prompts)
        self.read += sum(self._sizes(prompts))
        return np.full((len(prompts), len(labels)), -math.log(len(labels)))

    def _sizes(self, prompts: Sequence[str]) -> Iterable[int]:
        if self.tokenizer is None:
            return (max(1, round(len(prompt) / 4)) for prompt in prompts)
        if not self.chat:
            return map(len, encode(self.tokenizer, prompts))
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        raise NotImplementedError("no reward of a comparison has texts written")


def asked_in_training(
    reward: str, options: Mapping[str, Any], model: LanguageModelConfig, task: TaskLike, samples: System
) -> Tokens:
    """What a language model read and wrote as the reward of a training.

    The reward is asked for every update's samples once more, with a model that only counts. So all questions are
    counted, those too that a cache answered; an answer is one token.

    Args:
        reward: The backend's name.
        options: Its settings.
        model: Its language model. A server's tokenizer is not known: 4 characters are taken for a token.
        task: What is judged.
        samples: All that was sampled, with the measure "step".
    """
    counting = _Counting(model)
    named = {entry.name for entry in fields(model)}
    backend = make_reward(reward, task=task, model=counting, **{k: v for k, v in options.items() if k not in named})
    steps = samples.measures["step"]
    for step in np.unique(steps):
        rows = np.flatnonzero(steps == step).tolist()
        backend.score([samples.prompts[i] for i in rows], [samples.responses[i] for i in rows])
    return priced(counting.read, counting.asked, model, exact=model.url is None)


def priced(read: int, written: int, model: LanguageModelConfig, *, exact: bool) -> Tokens:
    """Tokens with what they cost at a model's prices."""
    limits = model.server.limits
    price = limits.cost(read, written) if limits.price_in or limits.price_out else None
    return Tokens(read, written, exact, price)
