"""REINFORCE for language models (sections 2.2 and A.3). The agent sees rewards, never where they come from.

How this differs from the paper:

1. The default baseline is leave-one-out over K samples of a prompt, not a learned value: with a small batch a value
   head has not learned anything by the time the policy has. ``baseline="value"`` is the paper's.
2. The learned value is a linear head on the frozen SFT model's hidden states, not a second fine-tuned model.
3. The paper folds the KL into the policy-gradient loss without giving the form. Here it is in each token's return, one
   sample's log pi - log pi_SFT from that token on.
4. Rewards are divided by the standard deviation of all rewards seen so far, so that beta weighs the KL alike whatever
   the reward's scale: a direct score spreads over a tenth of [-1, 1], a reward model's logits over several units.
   ``reward_normalisation="none"`` is the paper's.
5. The default trains a LoRA adapter with AdamW; ``trainable="full"`` and ``optimizer="adafactor"`` are the paper's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents import functional as F
from agents.guards import NonFiniteError, is_out_of_memory, nonfinite_rows, plain
from agents.policy import Policy
from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL, Backbone

__all__ = ["ReinforceAgent", "ReinforceConfig"]

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class ReinforceConfig:
    """Settings of the agent.

    Attributes:
        group_size: K, samples of each prompt in a batch.
        baseline: What is subtracted from the return.
        beta: Weight of the KL to the reference, in [0, 1): the objective is E[(1 - beta) r - beta KL].
        reward_normalisation: "std" divides rewards by their running standard deviation; "none" takes them as they are.
        learning_rate: Of the policy.
        warmup_updates: The learning rate rises linearly over so many updates.
        decay_updates: It then falls linearly, to reach 0 after this update; 0 keeps it where it is.
        max_grad_norm: Gradients are scaled down to this norm.
        optimizer: "adamw" or "adafactor".
        weight_decay: Of the optimiser.
        temperature: Of sampling.
        missing_eos_penalty: Subtracted from the reward of a response that does not end.
        trainable: "lora" or "full".
        lora_rank: Rank of the adapter.
        lora_alpha: The adapter is scaled by lora_alpha / lora_rank.
        value_learning_rate: Of the value head, for baseline "value".
        average_decay: Of the moving-average baseline.
        micro_batch: Rows in one gradient pass; the update is the same for any value.
    """

    group_size: int = 6
    baseline: Literal["leave-one-out", "value", "batch-mean", "moving-average", "none"] = "leave-one-out"
    beta: float = 0.05
    reward_normalisation: Literal["std", "none"] = "std"
    learning_rate: float = 1.2e-3
    warmup_updates: int = 5
    decay_updates: int = 0
    max_grad_norm: float = 1.0
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = 0.0
    temperature: float = 0.9
    missing_eos_penalty: float = 0.0
    trainable: Literal["lora", "full"] = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    value_learning_rate: float = 1e-3
    average_decay: float = 0.9
    micro_batch: int = 16

    def __post_init__(self) -> None:
        limits: dict[str, tuple[bool, str]] = {
            "group_size": (self.group_size >= 1, "at least 1"),
            "beta": (0 <= self.beta < 1, "in [0, 1)"),
            "learning_rate": (self.learning_rate >= 0, "at least 0"),
            "warmup_updates": (self.warmup_updates >= 0, "at least 0"),
            "decay_updates": (self.decay_updates >= 0, "at least 0"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "temperature": (self.temperature > 0, "above 0"),
            "lora_rank": (self.lora_rank >= 1, "at least 1"),
            "average_decay": (0 <= self.average_decay < 1, "in [0, 1)"),
            "micro_batch": (self.micro_batch >= 1, "at least 1"),
        }
        for name, (fine, expected) in limits.items():
            if not fine:
                raise RLAIFError(f"expected {name} {expected}, found {getattr(self, name)}")
        if self.baseline == "leave-one-out" and self.group_size < 2:
            raise RLAIFError(
                "expected group_size of at least 2 for baseline='leave-one-out', found 1; "
                "set group_size or another baseline"
            )


@dataclass(frozen=True)
class _Rollout:
    """What the agent keeps of its last action: n rows, P prompt and T response positions."""

    ids: Tensor  # (n, P)
    mask: Tensor  # (n, P)
    responses: Tensor  # (n, T)
    response_mask: Tensor  # (n, T)
    logprobs: Tensor  # (n, T), when sampled
    ended: Tensor  # (n,), whether the response has its EOS


class ReinforceAgent:
    """Learns from whatever reward the environment hands it.

    Example:
        ``responses = agent.act(prompts)``, then ``envs.step(responses)``, then ``agent.update(rewards)``.

    Args:
        model: The initial (SFT) policy: a name, a folder, or a `Backbone`.
        config: Settings.
        max_new_tokens: T, the width of the environment's action.
        seed: Of sampling and of initial weights.
        device: As in `rlaif_env.models.backbone`.
        dtype: As in `rlaif_env.models.backbone`.
    """

    def __init__(
        self,
        model: str | Path | Backbone = BUILTIN_MODEL,
        config: ReinforceConfig | None = None,
        *,
        max_new_tokens: int,
        seed: int = 0,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.config = c = config or ReinforceConfig()
        self.policy = Policy(
            model,
            trainable=c.trainable,
            rank=c.lora_rank,
            alpha=c.lora_alpha,
            temperature=c.temperature,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        self.max_new_tokens = max_new_tokens
        self.rng = np.random.default_rng([seed, 0xAC7])
        self.value_head: torch.nn.Linear | None = None
        groups: list[dict[str, Any]] = [{"params": self.policy.parameters, "lr": c.learning_rate}]
        if c.baseline == "value":
            self.value_head = torch.nn.utils.skip_init(torch.nn.Linear, self.policy.hidden_size, 1)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)
            self.value_head.to(self.policy.backbone.device)
            groups.append({"params": list(self.value_head.parameters()), "lr": c.value_learning_rate})
        if c.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=c.weight_decay)
        else:
            from transformers import Adafactor

            self.optimizer = Adafactor(groups, scale_parameter=False, relative_step=False, weight_decay=c.weight_decay)
        self._rates = [float(group["lr"]) for group in groups]
        self.updates = 0
        self.micro_batch = c.micro_batch  # halved where memory does not suffice
        self.average: float | None = None
        self.moments = (0, 0.0, 0.0)
        self._rollout: _Rollout | None = None

    def act(self, observations: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Sample a response to each prompt and remember it for `update`.

        Args:
            observations: "input_ids" (n, P), left-padded, and "attention_mask" (n, P).

        Returns:
            Actions (n, T), padded after EOS.

        Raises:
            NonFiniteError: If the policy's probabilities are not finite.
        """
        ids, mask = np.asarray(observations["input_ids"]), np.asarray(observations["attention_mask"])
        drawn = self.policy.sample(
            ids, mask, max_new_tokens=self.max_new_tokens, rng=self.rng, group_size=self.config.group_size
        )
        device = self.policy.backbone.device
        width = int(mask.sum(1).max())  # columns that are padding in every row are not worth computing
        lengths = torch.from_numpy(drawn.lengths)
        responses = torch.from_numpy(drawn.ids)
        last = responses.gather(1, (lengths - 1)[:, None])[:, 0]
        self._rollout = _Rollout(
            torch.from_numpy(ids[:, -width:]).to(device),
            torch.from_numpy(mask[:, -width:].astype(np.int64)).to(device),
            responses.to(device),
            F.response_mask(lengths, self.max_new_tokens).to(device),
            torch.from_numpy(drawn.logprobs).to(device),
            (last == self.policy.tokenizer.eos_token_id).to(device),
        )
        if rows := nonfinite_rows(self._rollout.logprobs):
            raise NonFiniteError(
                f"expected finite log-probabilities of the sampled tokens, found others in rows {_listed(rows)}: the "
                "policy's weights or logits are broken; go back to an earlier checkpoint, use float32, or lower "
                "learning_rate",
                rows,
            )
        return drawn.ids

    def update(self, rewards: NDArray[Any]) -> dict[str, float]:
        """One REINFORCE step on the responses of the last `act`.

        Args:
            rewards: (n,), from the environment.

        Returns:
            Metrics by name; each is defined in docs/metrics.md.

        Raises:
            NonFiniteError: If a reward, log-probability, loss or gradient is not finite; the weights are then as
                before, and `batch` tells what was to be learned from.
            RLAIFError: If there is nothing to learn from, or not even one row fits into memory.
        """
        rollout, c = self._rollout, self.config
        if rollout is None:
            raise RLAIFError("expected act() before update(), found no responses to learn from")
        device = rollout.ids.device
        given = torch.as_tensor(np.asarray(rewards, dtype=np.float32), device=device)
        if given.shape != (len(rollout.ids),) or not torch.isfinite(given).all():
            bad = nonfinite_rows(given) if given.shape == (len(rollout.ids),) else []
            raise NonFiniteError(
                f"expected {len(rollout.ids)} finite rewards, found shape {tuple(given.shape)}: {rewards!r}", bad
            )
        adjusted = given - c.missing_eos_penalty * (~rollout.ended).float()
        moments = F.running_moments(self.moments, adjusted)
        scale = (moments[2] / moments[0]) ** 0.5 if c.reward_normalisation == "std" else 1.0
        if scale > 1e-8:  # rewards that are all alike have nothing to be divided by, and nothing to teach
            adjusted = adjusted / scale
        mask = rollout.response_mask
        kl, values = self._fitting(lambda: self._reference_pass(rollout))
        if bad := nonfinite_rows(kl):
            raise NonFiniteError(
                f"expected finite log-probabilities of the reference, found others in rows {_listed(bad)}; the weights "
                "are as before. Use float32, or another model",
                bad,
            )
        returns = F.returns_to_go(adjusted, kl, mask, c.beta)
        whole = float(returns[:, 0].mean())
        if c.baseline == "moving-average" and self.average is None:
            self.average = whole
        average = 0.0 if self.average is None else self.average
        advantage = F.advantages(returns, mask, c.baseline, group_size=c.group_size, average=average, values=values)
        metrics = self._fitting(lambda: self._step(rollout, advantage, returns, values))
        self.average = F.moving_average(self.average, whole, c.average_decay)
        self.moments = moments
        self._rollout = None
        tokens = mask.sum()
        metrics |= {
            "reward": float(given.mean()),
            "reward_std": float(given.std(unbiased=False)),
            "reward_scale": scale,
            "return": whole,
            "advantage_std": float((advantage[mask > 0]).std(unbiased=False)),
            "length": float(mask.sum(1).mean()),
            "ended": float(rollout.ended.float().mean()),
            "tokens": float(tokens),
        }
        if self._needs_reference:
            metrics["kl"] = float(kl.sum(1).mean())
        return metrics

    @property
    def _needs_reference(self) -> bool:
        return self.config.beta > 0 or self.config.baseline == "value"

    def _rate_share(self) -> float:
        """The part of the learning rate that the next update uses."""
        c, done = self.config, self.updates
        share = min(1.0, (done + 1) / (c.warmup_updates + 1))
        if c.decay_updates:
            share = min(share, max(0.0, (c.decay_updates - done) / c.decay_updates))
        return share

    def _fitting(self, passes: Callable[[], _Found]) -> _Found:
        """Run passes over the micro-batches, with smaller ones where memory does not suffice; the result is the same.

        Raises:
            RLAIFError: If not even one row fits.
        """
        before = self.updates
        while True:
            try:
                return passes()
            except Exception as error:
                # once the optimiser has begun to write, going back would take the step twice
                if not is_out_of_memory(error) or self.updates != before:
                    raise
                if self.micro_batch == 1:
                    raise RLAIFError(
                        f"expected memory for an update of one row at a time, found too little ({error}); use a "
                        "smaller model, shorter responses or trainable='lora'"
                    ) from error
            # out here the error, and with it what the failed passes still held, is gone
            self.optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.micro_batch = (self.micro_batch + 1) // 2
            warnings.warn(
                f"out of memory: going on with {self.micro_batch} rows in a gradient pass, same gradient; set "
                "agent.micro_batch so from the start",
                stacklevel=3,
            )

    def _micro_batches(self, rollout: _Rollout) -> list[Tensor]:
        """Row indices of each pass, so that little is computed twice or for nothing.

        Rows of like length side by side save padding; rows of one prompt side by side share the reading of it. Of the
        two orders, the one with fewer tokens to compute.
        """
        lengths, prompts = rollout.response_mask.sum(1), rollout.mask.sum(1)
        k, size = self.config.group_size, self.micro_batch
        groups = torch.arange(len(lengths), device=lengths.device).reshape(-1, k)
        longest = torch.argsort(lengths[groups].amax(1), stable=True)
        within = torch.argsort(lengths[groups], dim=1, stable=True)
        by_group = groups.gather(1, within)[longest].flatten()
        by_length = torch.argsort(lengths, stable=True)
        orders = [
            list(by_group.split(size - size % k if size > k else size)),
            [rows.sort().values for rows in by_length.split(size)],
        ]

        def tokens(batches: list[Tensor]) -> float:
            return sum(
                float(len(torch.unique(rows // k)) * prompts[rows].max() + len(rows) * lengths[rows].max())
                for rows in batches
            )

        return min(orders, key=tokens)

    def _cut(self, rollout: _Rollout, rows: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int]:
        """The inputs of some rows, without the columns that are padding in all of them, and the width that is left."""
        steps = int(rollout.response_mask[rows].sum(1).max())
        start = int(rollout.ids.shape[1] - rollout.mask[rows].sum(1).max())
        inputs = (
            rollout.ids[rows, start:],
            rollout.mask[rows, start:],
            rollout.responses[rows, :steps],
            rollout.response_mask[rows, :steps],
        )
        return inputs, steps

    def _reference_pass(self, rollout: _Rollout) -> tuple[Tensor, Tensor | None]:
        """KL at each token and, where there is a value head, V(x_t): both (n, T), without gradient."""
        kl = torch.zeros_like(rollout.response_mask)
        if not self._needs_reference:
            return kl, None
        values = torch.zeros_like(kl) if self.value_head is not None else None
        features = []
        for rows in self._micro_batches(rollout):
            inputs, steps = self._cut(rollout, rows)
            said = self.policy.evaluate(*inputs, reference=True, features=values is not None)
            kl[rows, :steps] = F.kl_per_token(rollout.logprobs[rows, :steps], said.logprobs, inputs[3]).to(kl.dtype)
            if values is not None and said.features is not None and self.value_head is not None:
                features.append((rows, steps, said.features))
                with torch.no_grad():
                    values[rows, :steps] = self.value_head(said.features)[..., 0] * inputs[3]
        self._features = features
        return kl, values

    def _step(self, rollout: _Rollout, advantage: Tensor, returns: Tensor, values: Tensor | None) -> dict[str, float]:
        """Gradient passes over the micro-batches, one optimiser step; returns its metrics."""
        n, c = len(rollout.ids), self.config
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, entropy_sum, value_sum, drift = 0.0, 0.0, 0.0, 0.0
        with self.policy.training():
            for rows in self._micro_batches(rollout):
                inputs, steps = self._cut(rollout, rows)
                said = self.policy.evaluate(*inputs)
                share = len(rows) / n
                loss = F.policy_gradient_loss(said.logprobs, advantage[rows, :steps], inputs[3]) * share
                loss.backward()
                loss_sum += float(loss.detach())
                entropy_sum += float(said.entropy.sum())
                apart = (said.logprobs.detach() - rollout.logprobs[rows, :steps]).abs().max()
                drift = max(drift, float(apart))
        if self.value_head is not None and values is not None:
            for rows, steps, features in self._features:
                v = self.value_head(features)[..., 0]
                loss = F.value_loss(v, returns[rows, :steps], rollout.response_mask[rows, :steps]) * (len(rows) / n)
                loss.backward()
                value_sum += float(loss.detach())
            self._features = []
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters, c.max_grad_norm)
        if not np.isfinite(loss_sum + value_sum) or not torch.isfinite(norm):
            bad = self._nonfinite_gradients(rollout, advantage)
            where = f"in rows {_listed(bad)}" if bad else "though every row alone is finite"
            raise NonFiniteError(
                f"expected a finite loss and gradient, found loss {loss_sum + value_sum} and gradient norm "
                f"{float(norm)} {where} at update {self.updates + 1}; the weights are as before it. Lower "
                "learning_rate, or use float32",
                bad,
            )
        share = self._rate_share()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self.updates += 1  # first: from here on the weights are no longer those of the update before
        self.optimizer.step()
        metrics = {
            "loss": loss_sum,
            "grad_norm": float(norm),
            "learning_rate": self._rates[0] * share,
            "entropy": entropy_sum / float(rollout.response_mask.sum()),
            "sampler_drift": drift,
        }
        if self.value_head is not None:
            metrics["value_loss"] = value_sum
        return metrics

    def _nonfinite_gradients(self, rollout: _Rollout, advantage: Tensor) -> list[int]:
        """The rows whose loss or gradient alone is not finite; leaves no gradient behind."""
        bad = []
        with self.policy.training():
            for row in torch.arange(len(rollout.ids)).split(1):
                self.optimizer.zero_grad(set_to_none=True)
                inputs, steps = self._cut(rollout, row)
                loss = F.policy_gradient_loss(self.policy.evaluate(*inputs).logprobs, advantage[row, :steps], inputs[3])
                loss.backward()
                gradients = [p.grad for p in self.policy.parameters if p.grad is not None]
                if not all(bool(torch.isfinite(x).all()) for x in [loss.detach(), *gradients]):
                    bad.append(int(row))
        self.optimizer.zero_grad(set_to_none=True)
        return bad

    def batch(self) -> list[dict[str, Any]]:
        """What the last `act` did and `update` has not used up, row by row, as JSON can hold it."""
        if self._rollout is None:
            return []
        r, decode = self._rollout, self.policy.tokenizer.decode
        rows = []
        for i, length in enumerate(r.response_mask.sum(1).int().tolist()):
            ids = r.responses[i, :length].tolist()
            rows.append(
                {
                    "row": i,
                    "prompt": decode(r.ids[i][r.mask[i].bool()].tolist()),
                    "response": decode(ids),
                    "ids": ids,
                    "logprobs": plain(r.logprobs[i, :length].cpu().numpy()),
                }
            )
        return rows

    def describe(self) -> dict[str, Any]:
        """The settings, JSON-able."""
        return asdict(self.config)


def _listed(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
