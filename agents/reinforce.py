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

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents import functional as F
from agents.policy import Policy
from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL, Backbone

__all__ = ["ReinforceAgent", "ReinforceConfig"]


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
        self.average: float | None = None
        self.moments = (0, 0.0, 0.0)
        self._rollout: _Rollout | None = None

    def act(self, observations: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Sample a response to each prompt and remember it for `update`.

        Args:
            observations: "input_ids" (n, P), left-padded, and "attention_mask" (n, P).

        Returns:
            Actions (n, T), padded after EOS.
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
        return drawn.ids

    def update(self, rewards: NDArray[Any]) -> dict[str, float]:
        """One REINFORCE step on the responses of the last `act`.

        Args:
            rewards: (n,), from the environment.

        Returns:
            Metrics by name; each is defined in docs/metrics.md.

        Raises:
            RLAIFError: If there is nothing to learn from, or a reward, loss or gradient is not finite; the weights are
                then as before.
        """
        rollout, c = self._rollout, self.config
        if rollout is None:
            raise RLAIFError("expected act() before update(), found no responses to learn from")
        device = rollout.ids.device
        given = torch.as_tensor(np.asarray(rewards, dtype=np.float32), device=device)
        if given.shape != (len(rollout.ids),) or not torch.isfinite(given).all():
            raise RLAIFError(
                f"expected {len(rollout.ids)} finite rewards, found shape {tuple(given.shape)}: {rewards!r}"
            )
        adjusted = given - c.missing_eos_penalty * (~rollout.ended).float()
        moments = F.running_moments(self.moments, adjusted)
        scale = (moments[2] / moments[0]) ** 0.5 if c.reward_normalisation == "std" else 1.0
        if scale > 1e-8:  # rewards that are all alike have nothing to be divided by, and nothing to teach
            adjusted = adjusted / scale
        mask = rollout.response_mask
        kl, values = self._reference_pass(rollout)
        returns = F.returns_to_go(adjusted, kl, mask, c.beta)
        whole = float(returns[:, 0].mean())
        if c.baseline == "moving-average" and self.average is None:
            self.average = whole
        average = 0.0 if self.average is None else self.average
        advantage = F.advantages(returns, mask, c.baseline, group_size=c.group_size, average=average, values=values)
        metrics = self._step(rollout, advantage, returns, values)
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

    def _micro_batches(self, rollout: _Rollout) -> list[Tensor]:
        """Row indices, rows of like length together, so that little padding is computed."""
        order = torch.argsort(rollout.response_mask.sum(1), stable=True)
        return list(order.split(self.config.micro_batch))

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
        if not np.isfinite(loss_sum) or not torch.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise RLAIFError(
                f"expected a finite loss and gradient, found loss {loss_sum} and gradient norm {float(norm)} at update "
                f"{self.updates + 1}; the weights are as before it. Lower learning_rate, or use float32"
            )
        share = self._rate_share()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        self.updates += 1
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

    def describe(self) -> dict[str, Any]:
        """The settings, JSON-able."""
        return asdict(self.config)

    def save_state(self, folder: Path) -> None:
        """Write what the agent has learned: the trained weights and the value head, if any (safetensors)."""
        from safetensors.torch import save_file

        state = {f"policy/{name}": tensor.contiguous() for name, tensor in self.policy.state().items()}
        if self.value_head is not None:
            state |= {f"value/{n}": p.detach().cpu().clone() for n, p in self.value_head.named_parameters()}
        save_file(state, folder / "agent.safetensors", metadata={"updates": str(self.updates)})
