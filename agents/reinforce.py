"""REINFORCE for language models (sections 2.2 and A.3). The agent sees rewards, never where they come from.

How this differs from the paper:

1. The default baseline is leave-one-out over K samples of a prompt, where there are several, not a learned value: with
   a small batch a value head has not learned anything by the time the policy has. ``baseline="value"`` is the paper's.
2. The learned value is a linear head on the frozen SFT model's hidden states, not a second fine-tuned model.
3. The paper folds the KL into the policy-gradient loss without giving the form. Here it is in each token's return, one
   sample's log pi - log pi_SFT from that token on.
4. Rewards are divided by the standard deviation of all rewards seen so far, so that beta weighs the KL alike whatever
   the reward's scale: a direct score spreads over a tenth of [-1, 1], a reward model's logits over several units.
   ``reward_normalisation="none"`` is the paper's.
5. The default trains a LoRA adapter with AdamW; ``trainable="full"`` and the optimizer "adafactor" are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from agents import functional as F
from agents.passes import Passes, Reference
from agents.policy import Policy
from agents.rollout import Rollout
from agents.sampler import Sampler
from agents.served import ServedSampler
from agents.settings import ReinforceConfig
from agents.targets import Learn, Targets
from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL, Backbone, Samples, linear_schedule, make_optimizer
from rlaif_env.ranks import Ranks


class Environments(Protocol):
    """What the agent reads of a vector environment, or of the one inside its wrappers (``unwrapped``)."""

    group_size: int
    """K: so many rows side by side answer one prompt. One that does not say has K = 1."""
    single_action_space: Any
    """``nvec``, (T,): the V token ids that each of T positions can have."""


class ReinforceAgent:
    """Learns from whatever reward the environment hands it: `act`, then ``envs.step(responses)``, then `update`.

    Args:
        model: The initial (SFT) policy: a name, a folder, or a `Backbone`.
        config: Settings.
        envs: What it acts in: a Gymnasium vector environment, or anything with the attributes of `Environments`. The
            group size K, the response length T and the vocabulary V are the environment's.
        total_updates: The learning rate falls linearly, to reach 0 after so many; 0 keeps it where the warmup ends.
        seed: Of sampling and of initial weights.
        device: As in `rlaif_env.models.backbone`.
        dtype: As in `rlaif_env.models.backbone`.
        sampler: Makes what writes the responses from the policy; the policy itself where not given.
        ranks: The processes that compute an update together; this one alone where not given.

    Raises:
        RLAIFError: If the environment's actions are no responses in the policy's vocabulary, or its group size does not
            suffice for the baseline.
    """

    def __init__(
        self,
        model: str | Path | Backbone = BUILTIN_MODEL,
        config: ReinforceConfig | None = None,
        *,
        envs: Environments | VectorEnv[Any, Any, Any],
        total_updates: int = 0,
        seed: int = 0,
        device: str | None = None,
        dtype: str | None = None,
        sampler: Callable[[Policy], Sampler] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = c = config or ReinforceConfig()
        self.group_size, self.max_new_tokens, width = _shape_of(envs)
        self.baseline: str = c.baseline
        if c.baseline == "auto":
            self.baseline = "leave-one-out" if self.group_size > 1 else "value"
        if self.baseline == "leave-one-out" and self.group_size < 2:
            raise RLAIFError(
                "expected group_size of at least 2 for baseline='leave-one-out', found 1; raise it (--group-size 6, in "
                "Python: of the environment), or set another baseline"
            )
        settings: dict[str, Any] = {"trainable": c.trainable, "lora": c.lora, "temperature": c.temperature}
        self.policy = Policy(model, **settings, seed=seed, device=device, dtype=dtype)
        self.sampler = sampler(self.policy) if sampler else self.policy
        self.exact = self.sampler.exact  # what is learned from is drawn from the policy as it is then
        if width != (expected := self.policy.backbone.logit_width):
            raise RLAIFError(
                f"expected an environment of {expected} token ids, the policy's logit width, found {width}; make it "
                "with the policy's tokenizer and vocab_size"
            )
        groups: list[dict[str, Any]] = [{"params": self.policy.parameters, "lr": c.learning_rate}]
        self.value_head: torch.nn.Linear | None = None
        if self.baseline == "value":
            self.value_head = torch.nn.utils.skip_init(torch.nn.Linear, self.policy.hidden_size, 1)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)
            self.value_head.to(self.policy.backbone.device)
            groups.append({"params": list(self.value_head.parameters()), "lr": c.value_learning_rate})
        self.optimizer = make_optimizer(c.optimizer, groups, c.learning_rate)
        self.rates = [float(group["lr"]) for group in groups]
        self.passes = Passes(self.policy, self.value_head, self.group_size, c.micro_batch, c.pass_tokens, ranks)
        self.before_step: Callable[[], None] = lambda: None  # all is computed; the weights are as before
        self.rng = np.random.default_rng([seed, 0xAC7])
        self.total_updates, self.updates = total_updates, 0
        self.average: float | None = None
        self.moments = (0, 0.0, 0.0)
        self._rollout: Rollout | None = None

    def act(self, observations: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Sample a response to each prompt and remember it for `update`.

        Args:
            observations: "input_ids" (n, P), left-padded, and "attention_mask" (n, P).

        Returns:
            Actions (n, T), padded after EOS; NonFiniteError if the policy's probabilities are not finite.
        """
        actions, rollout = self.drawing(observations)()
        self.learn_from(rollout)
        return actions

    def drawing(
        self, observations: Mapping[str, NDArray[Any]], *, beside: bool = False
    ) -> Callable[[], tuple[NDArray[np.int64], Rollout]]:
        """What samples when it is called, by random numbers drawn now: `act`'s actions, and what to learn from them.

        With ``beside`` servers sample, from the policy as it is now: it can be called while that is trained.
        """
        ids, mask = np.asarray(observations["input_ids"]), np.asarray(observations["attention_mask"])
        uniform = self.rng.random((len(ids), self.max_new_tokens))
        sampling: Callable[[], Samples] = partial(
            self.sampler.sample, ids, mask, uniform=uniform, group_size=self.group_size
        )
        if beside and isinstance(self.sampler, ServedSampler):
            sampling = self.sampler.begin(ids, mask, uniform)

        def draw() -> tuple[NDArray[np.int64], Rollout]:
            samples = sampling()
            return samples.ids, Rollout.of(ids, mask, samples, self.policy)

        return draw

    def learn_from(self, rollout: Rollout) -> None:
        """Have `update` learn from these responses; NonFiniteError if the policy's probabilities are not finite."""
        self._rollout = rollout
        rollout.check()

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Learn from some rows (n,) of the last `act` alone, whole groups: `update` then takes their rewards only."""
        if self._rollout is not None and not rows.all():
            self._rollout = self._rollout.of_rows(rows)

    def update(self, rewards: NDArray[Any]) -> dict[str, float]:
        """One REINFORCE step on the responses of the last `act`, with the environment's rewards (n,).

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
        mask, paid = rollout.response_mask, rollout.checked_rewards(rewards)
        self.passes.ranks.tell("update", rollout, rewards)
        scaled, scale, moments = self._normalised(paid - c.missing_eos_penalty * (~rollout.ended).float())
        needed = c.beta > 0 or self.baseline == "value"
        reference = self.passes.reference(rollout) if needed else Reference(rollout.logprobs, None, ())

        def learn(rows: Tensor, logprobs: Tensor) -> Targets:
            cut = (rows, slice(logprobs.shape[1]))
            seen, values = mask[cut], None if reference.values is None else reference.values[cut]
            kl = F.kl_per_token(logprobs, reference.logprobs[cut], seen)
            returns = F.returns_to_go(scaled[rows], kl, seen, c.beta)
            advantage = F.advantages(
                returns, seen, self.baseline, group_size=self.group_size, average=self.average, values=values
            )
            if self.exact:
                return Targets(kl, returns, advantage)
            log_ratio = (logprobs - rollout.logprobs[cut]) * seen
            weights = F.importance_weights(log_ratio, seen, c.importance_cap, c.importance_level)
            return Targets(kl, returns, advantage, log_ratio, weights)

        metrics, targets = self._step(rollout, learn, reference)
        mean = float(targets.returns[:, 0].mean())
        self.moments, self.average, self._rollout = moments, F.moving_average(self.average, mean, c.average_decay), None
        measured: dict[str, Any] = {
            "reward": paid.mean(),
            "reward_std": paid.std(unbiased=False),
            "reward_scale": scale,
            "return": mean,
            "advantage_std": targets.advantage[mask > 0].std(unbiased=False),
            "length": mask.sum(1).mean(),
            "ended": rollout.ended.float().mean(),
            "tokens": mask.sum(),
        } | ({"kl": targets.kl.sum(1).mean()} if needed else {})
        measured |= targets.correction(mask, c.importance_cap)
        return metrics | {name: float(value) for name, value in measured.items()}

    def _normalised(self, rewards: Tensor) -> tuple[Tensor, float, tuple[int, float, float]]:
        """Rewards over their running standard deviation, that, and the moments with them."""
        moments = F.running_moments(self.moments, rewards)
        scale = (moments[2] / moments[0]) ** 0.5 if self.config.reward_normalisation == "std" else 1.0
        # rewards that are all alike have nothing to be divided by, and nothing to teach
        return rewards / scale if scale > 1e-8 else rewards, scale, moments

    def _step(self, rollout: Rollout, learn: Learn, reference: Reference) -> tuple[dict[str, float], Targets]:
        """Compute the gradient and take one step of the optimiser; returns its metrics."""
        metrics, targets = self.passes.gradient(
            rollout,
            learn,
            reference,
            exact=self.exact,
            by_group=self.baseline != "batch-mean" and (self.baseline, self.average) != ("moving-average", None),
            max_norm=self.config.optimizer.max_grad_norm,
            update=self.updates + 1,
        )
        share = linear_schedule(self.updates + 1, warmup=self.config.warmup_updates, total=self.total_updates)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.before_step()
        self.updates += 1  # first: from here on the weights are no longer those of the update before
        self.optimizer.step()
        return metrics | {"learning_rate": self.rates[0] * share}, targets

    def batch(self) -> list[dict[str, Any]]:
        """What the last `act` did and `update` has not used up, row by row, as JSON can hold it."""
        return [] if self._rollout is None else self._rollout.described(self.policy.tokenizer.decode)


def _shape_of(envs: Environments | VectorEnv[Any, Any, Any]) -> tuple[int, int, int]:
    """K, T and V of a vector environment."""
    widths = getattr(envs.single_action_space, "nvec", None)
    if widths is None or np.ndim(widths) != 1 or len(set(np.asarray(widths).tolist())) != 1:
        raise RLAIFError(
            f"expected an environment whose action is a response, MultiDiscrete([V] * T), found "
            f"{envs.single_action_space}; make a vector of RLAIF/TextGeneration-v0"
        )
    return int(getattr(getattr(envs, "unwrapped", envs), "group_size", 1)), len(widths), int(widths[0])
