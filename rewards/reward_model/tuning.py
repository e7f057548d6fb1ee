"""Gradients through the model for a reward model: a LoRA adapter on the shared weights, or all weights of an own copy.

Starts from a fitted head, so that the first steps do not spoil the states for a head that knows nothing yet; stops when
the loss on validation pairs no longer falls, and keeps the best values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.reward_model.data import Judged
from rewards.reward_model.features import extract, last_states, lora_targets
from rewards.reward_model.head import preference_loss
from rlaif_env.api import RLAIFError
from rlaif_env.models import Backbone, backbone

__all__ = ["Tuned", "Tuning", "tune"]

_PATIENCE = 3
_CHECKS_PER_EPOCH = 2
_WARMUP = 0.05  # of all steps
_MAX_NORM = 1.0


@dataclass(frozen=True)
class Tuning:
    """Settings of `tune`.

    Attributes:
        trainable: "lora" or "full".
        epochs: At most.
        learning_rate: Of AdamW; rises over the first twentieth of the steps, then falls linearly to 0.
        batch_pairs: Pairs in one step.
        micro_pairs: Pairs in one gradient pass.
        lora_rank: Rank of the adapter.
        lora_alpha: The adapter is scaled by lora_alpha / lora_rank.
        seed: Of the order of the pairs and of the adapter.
    """

    trainable: str
    epochs: int
    learning_rate: float
    batch_pairs: int
    micro_pairs: int
    lora_rank: int
    lora_alpha: float
    seed: int


@dataclass(frozen=True)
class Tuned:
    """What tuning made.

    Attributes:
        backbone: The model: the shared one with an adapter, or a copy.
        adapter: The adapter's name, if any.
        weight: The head, (H,).
        steps: Steps done.
        best_step: The step whose values were kept; 0 is the fitted head.
        validation_loss: There, nats.
    """

    backbone: Backbone
    adapter: str | None
    weight: Tensor
    steps: int
    best_step: int
    validation_loss: float


def tune(
    base: Backbone,
    weight: Tensor,
    depth: int,
    train: Judged,
    validation: Judged,
    settings: Tuning,
    *,
    log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    advance: Callable[[int], object] = lambda pairs: None,
) -> Tuned:
    """Minimise the preference loss over adapter or weights and head together.

    Args:
        base: The model to start from.
        weight: The fitted head, (H,).
        depth: How many layers the head's state has passed.
        train: To train on.
        validation: To stop by.
        settings: See `Tuning`.
        log: Called with the step and its metrics.
        advance: Called with the number of pairs done.

    Raises:
        RLAIFError: If a loss is not finite.
    """
    model, adapter, parameters = _trainable(base, depth, settings)
    head = torch.nn.Parameter(weight.to(model.device).clone())
    parameters = [*parameters, head]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    m = len(train.pairs)
    per_epoch = -(-m // settings.batch_pairs)
    total = max(1, settings.epochs * per_epoch)
    every = max(1, per_epoch // _CHECKS_PER_EPOCH)
    generator = torch.Generator().manual_seed(settings.seed)
    best = (_loss(model, adapter, head, depth, validation), 0, [p.detach().clone() for p in parameters])
    log(0, {"validation_loss": best[0]})
    step = 0
    for batch in itertools.chain.from_iterable(
        torch.randperm(m, generator=generator).split(settings.batch_pairs) for _ in range(settings.epochs)
    ):
        step += 1
        rate = min(step / (_WARMUP * total + 1), 1.0, (total - step + 1) / total)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        loss = _step(model, adapter, head, depth, train, batch, settings.micro_pairs, optimizer, parameters)
        advance(len(batch))
        log(step, {"loss": loss})
        if step % every == 0 or step == total:
            held_out = _loss(model, adapter, head, depth, validation)
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


def _trainable(base: Backbone, depth: int, settings: Tuning) -> tuple[Backbone, str | None, list[torch.nn.Parameter]]:
    """The model that is trained, its adapter, and the parameters."""
    if settings.trainable == "lora":
        adapter = next(name for name in map("reward{}".format, itertools.count(1)) if name not in base.adapters)
        parameters = base.add_lora(
            adapter,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            targets=lora_targets(base.model, depth),
            seed=settings.seed,
        )
        return base, adapter, parameters
    if settings.trainable != "full":
        raise RLAIFError(f"expected trainable 'head', 'lora' or 'full', found {settings.trainable!r}")
    own = backbone(base.name, device=str(base.device), dtype="float32", shared=False)
    trunk = own.model.base_model.requires_grad_(True)
    return own, None, list(trunk.parameters())


def _step(
    base: Backbone,
    adapter: str | None,
    head: torch.nn.Parameter,
    depth: int,
    train: Judged,
    batch: Tensor,
    micro_pairs: int,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
) -> float:
    """One optimiser step on some pairs; each text of a gradient pass is read once. Returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    half_precision = adapter is None and base.device.type == "cuda"
    for part in batch.split(micro_pairs):
        pairs = train.pairs.take(part)
        texts, places = torch.unique(torch.cat([pairs.first, pairs.second]), return_inverse=True)
        rows = [train.rows[int(text)] for text in texts]
        with base.using(adapter) as model:
            with torch.autocast(base.device.type, torch.bfloat16, enabled=half_precision):
                states = last_states(model, rows, [depth])[:, 0]
            scores = states @ head
            first, second = scores[places.to(scores.device)].split(len(part))
            loss = preference_loss(first - second, pairs.p_first.to(scores.device)) * (len(part) / len(batch))
            loss.backward()
        total += float(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], _MAX_NORM)
    if not torch.isfinite(norm) or total != total:
        raise RLAIFError(
            f"expected a finite loss and gradient, found loss {total} and gradient norm {float(norm)}; lower "
            "learning_rate, "
            "or use float32"
        )
    optimizer.step()
    return total


def _loss(base: Backbone, adapter: str | None, head: Tensor, depth: int, judged: Judged) -> float:
    """The preference loss on all pairs, nats."""
    states = extract(base, judged.rows, [depth], adapter=adapter)[:, 0]
    return float(judged.pairs.loss(states.double() @ head.detach().cpu().double()))
