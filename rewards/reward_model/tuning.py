"""Gradients through the model for a reward model: a LoRA adapter on the shared weights, or all weights of an own copy.

Starts from a fitted head, so that the first steps do not spoil the states for a head that knows nothing yet; stops when
the loss on validation pairs no longer falls, and keeps the best values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rewards.reward_model.data import Judged
from rewards.reward_model.features import extract, last_states, lora_targets
from rewards.reward_model.head import preference_loss
from rlaif_env.api import RLAIFError
from rlaif_env.batches import shares
from rlaif_env.models import (
    Backbone,
    LoraConfig,
    OptimizerConfig,
    linear_schedule,
    make_optimizer,
    private_copy,
    tokens_that_fit,
    within,
)
from rlaif_env.ranks import Ranks

_PATIENCE = 3
_CHECKS_PER_EPOCH = 2
_WARMUP = 0.05  # of all steps


@dataclass(frozen=True)
class TuningConfig:
    """What is trained, and how gradients through the model are used.

    Attributes:
        trainable: "head": a linear head on the frozen model, good on a CPU. "lora": an adapter too. "full": all
            weights.
        epochs: Of "lora" and "full", at most.
        learning_rate: Of "lora" and "full"; rises over the first twentieth of the steps, then falls linearly to 0. The
            paper's for "full" is 1e-5.
        batch_pairs: Pairs in one step of "lora" and "full".
        micro_pairs: Pairs in one gradient pass, at most, and no more tokens than fit into memory; the step is the same.
        lora: The adapter of "lora".
        optimizer: Of "lora" and "full".
        seed: Of the pairs drawn, their order, and the adapter.
    """

    trainable: Literal["head", "lora", "full"] = "head"
    epochs: int = 2
    learning_rate: float = 1e-4
    batch_pairs: int = 32
    micro_pairs: int = 8
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """What tuning made."""

    backbone: Backbone  # the model: the shared one with an adapter, or a copy
    adapter: str | None  # the adapter's name, if any
    weight: Tensor  # the head, (H,)
    steps: int  # steps done
    best_step: int  # the step whose values were kept; 0 is the fitted head
    validation_loss: float  # there, nats


def tune(
    base: Backbone,
    weight: Tensor,
    layers: int,
    train: Judged,
    validation: Judged,
    config: TuningConfig,
    *,
    ranks: Ranks | None = None,
    log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    advance: Callable[[int], object] = lambda pairs: None,
) -> Tuned:
    """Minimise the preference loss over adapter or weights and head together, stopping by the validation pairs.

    ``weight`` is the fitted head, (H,), on the state after so many layers; ``log`` is called with the step and its
    metrics, ``advance`` with the number of pairs done.

    Raises:
        RLAIFError: If a loss is not finite.
    """
    ranks = ranks or Ranks()
    model, adapter, parameters = ranks.agree(lambda: _trainable(base, layers, config))
    head = torch.nn.Parameter(weight.to(model.device).clone())
    parameters.append(head)
    optimizer = make_optimizer(config.optimizer, parameters, config.learning_rate)

    def validation_loss() -> float:
        states = extract(model, validation.rows, [layers], adapter=adapter, ranks=ranks)[:, 0]
        loss = float(validation.pairs.loss(states.double() @ head.detach().cpu().double()))
        return ranks.given(lambda: loss)  # what it decides must be decided alike

    budget, texts = tokens_that_fit(model.model), torch.stack([train.pairs.first, train.pairs.second], 1).tolist()
    per_epoch = -(-len(train.pairs) // config.batch_pairs)
    total, every = config.epochs * per_epoch, max(1, per_epoch // _CHECKS_PER_EPOCH)
    order = torch.Generator().manual_seed(config.seed)
    best = (validation_loss(), 0, [p.detach().clone() for p in parameters])
    log(0, {"validation_loss": best[0]})
    step = 0
    batches = (
        batch
        for _ in range(config.epochs)
        for batch in torch.randperm(len(train.pairs), generator=order).split(config.batch_pairs)
    )
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * linear_schedule(step, warmup=_WARMUP * total, total=total)
        optimizer.zero_grad(set_to_none=True)
        widths = {pair: 2 * max(len(train.rows[text]) for text in texts[pair]) for pair in batch.tolist()}
        own = batch[shares([0] * len(batch), [*widths.values()], 1, ranks.size)[ranks.rank]]

        def passes(own: Tensor = own, widths: Mapping[int, int] = widths, n: int = len(batch)) -> float:
            parts = [
                p for few in own.split(config.micro_pairs) if len(few) for p in within(few.tolist(), widths, budget)
            ]
            return sum(_backward(model, adapter, head, layers, train, torch.tensor(part), n) for part in parts)

        loss = sum(ranks.gather(passes))
        ranks.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        if not torch.isfinite(norm) or loss != loss:
            raise RLAIFError(
                f"expected a finite loss and gradient, found loss {loss} and gradient norm {float(norm)}; lower "
                "learning_rate, or use float32"
            )
        optimizer.step()
        advance(len(batch))
        log(step, {"loss": loss})
        if step % every == 0 or step == total:
            held_out = validation_loss()
            log(step, {"validation_loss": held_out})
            if held_out < best[0]:
                best = (held_out, step, [p.detach().clone() for p in parameters])
            elif step - best[1] >= _PATIENCE * every:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, best[2], strict=True):
            parameter.copy_(value)
    model.model.requires_grad_(False)
    return Tuned(model, adapter, head.detach().cpu(), step, best[1], best[0])


def _trainable(
    base: Backbone, layers: int, config: TuningConfig
) -> tuple[Backbone, str | None, list[torch.nn.Parameter]]:
    """The model that is trained, its adapter, and the parameters."""
    if config.trainable == "lora":
        adapter, targets = base.free_name("reward"), lora_targets(base.model, layers)
        rank, alpha = config.lora.rank, config.lora.alpha
        return base, adapter, base.add_lora(adapter, rank=rank, alpha=alpha, targets=targets, seed=config.seed)
    if config.trainable != "full":
        raise RLAIFError(f"expected trainable 'head', 'lora' or 'full', found {config.trainable!r}")
    own = private_copy(base)
    return own, None, list(own.model.base_model.requires_grad_(True).parameters())


def _backward(
    base: Backbone, adapter: str | None, head: Tensor, layers: int, train: Judged, part: Tensor, batch: int
) -> float:
    """Add the gradient of some pairs of a batch, each text read once. Returns their share of the mean loss."""
    pairs = train.pairs.take(part)
    texts, places = torch.unique(torch.cat([pairs.first, pairs.second]), return_inverse=True)
    rows = [train.rows[int(text)] for text in texts]
    half_precision = adapter is None and base.device.type == "cuda"
    with base.using(adapter) as model:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=half_precision):
            states = last_states(model, rows, [layers])[:, 0]
        scores = states @ head
        first, second = scores[places.to(scores.device)].split(len(part))
        loss = preference_loss(first - second, pairs.p_first.to(scores.device)) * (len(part) / batch)
        loss.backward()
    return float(loss.detach())
