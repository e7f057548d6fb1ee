"""What each arm cost from labels to policy: people's judgements, a language model's tokens, time and price."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison.outcomes import Outcome, Tokens, arms_of, cost_of
from benchmarks.evaluation.systems import System
from rewards import make_reward
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.data.tasks import TaskLike
from rlaif_env.models import encode, load_tokenizer
from rlaif_env.tables import Cell, Table

HUMAN_LABEL, AI_LABEL = 0.67, 0.06
"""US dollars for a preference by people, and by PaLM 2 L with a rationale in both orders (the paper's cost section)."""


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


def _mean(several: Sequence[Tokens]) -> Tokens | None:
    if not several:
        return None
    read, written = (sum(values) / len(several) for values in zip(*((t.input, t.output) for t in several), strict=True))
    prices = [t.price for t in several if t.price is not None]
    return Tokens(read, written, all(t.exact for t in several), sum(prices) / len(prices) if prices else None)


def cost_table(outcomes: Sequence[Outcome], price_per_hour: float | None = None) -> Table:
    """People's judgements, tokens, time and price of each arm; of what a training took, the mean over seeds.

    Args:
        outcomes: The policies.
        price_per_hour: Of the machine; None leaves its time without a price.
    """
    rows: list[list[Cell]] = []
    priced_tokens = any(t.price is not None for outcome in outcomes for t in outcome.tokens.values())
    for arm in arms_of(outcomes)[1:]:
        cost, chosen = cost_of(outcomes, arm), [outcome.tokens for outcome in outcomes if outcome.arm == arm]
        tokens = chosen[0].get("labels"), _mean([each["training"] for each in chosen if "training" in each])
        seconds = (cost.labelling, cost.reward_model, cost.training, cost.seconds)
        prices = [cost.people * HUMAN_LABEL]
        if priced_tokens:
            prices.append(sum((each.price or 0.0 for each in tokens if each), 0.0))
        if price_per_hour is not None:
            prices.append(cost.seconds / 3600 * price_per_hour)
        prices += [*([sum(prices)] if len(prices) > 1 else []), cost.labels * AI_LABEL]
        asked_for = ("0" if each is None else str(each) for each in tokens)
        rows.append(
            [arm, cost.people, cost.labels, *asked_for, *map(round, seconds), *(f"{price:,.2f}" for price in prices)]
        )
    asked = ["people's judgements", "AI labels", "tokens for labels, in + out", "tokens in training, in + out"]
    spent = [f"{stage}, s" for stage in ("labelling", "reward model", "training", "sum")]
    prices_of = [f"people at ${HUMAN_LABEL}, $", *(["tokens, $"] if priced_tokens else [])]
    prices_of += [] if price_per_hour is None else [f"machine at ${price_per_hour:g} an hour, $"]
    prices_of += ["price, $"] if len(prices_of) > 1 else []
    return Table(
        "What each arm cost",
        ["arm", *asked, *spent, *prices_of, f"for comparison: AI labels at ${AI_LABEL}, $"],
        rows,
        "From labels to policy; what two arms share is counted in both; of a training, the mean over seeds. Seconds: "
        "wall time on the machine that made it, other work on it included. Tokens: of all questions, those too that a "
        f"cache answered. People's judgements at the paper's ${HUMAN_LABEL}, also where they came with the task; for "
        f"comparison what the labels would have cost by the paper's PaLM 2 L (${AI_LABEL}, with rationales)."
        + ("" if priced_tokens else " The labeler's tokens have no price (--labeler.server.limits.price-in).")
        + ("" if price_per_hour is not None else " The machine has no price (--price-per-hour)."),
    )
