"""How an update is computed, not what: micro-batches, little padding, memory that does not suffice, odd numbers found.

Notation: n rows of a batch, K rows a prompt, P prompt and T response positions, H hidden width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from agents import functional as F
from agents.policy import Policy
from agents.rollout import NonFiniteError, Rollout, listed, nonfinite_rows
from agents.targets import Learn, Targets
from rlaif_env.api import RLAIFError
from rlaif_env.batches import shares
from rlaif_env.models import give_back, tokens_that_fit
from rlaif_env.ranks import Ranks

_Result = TypeVar("_Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on the CPU."""
    signs = ("can't allocate memory", "out of memory", "bad_alloc", "cannot allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


@dataclass(frozen=True)
class Reference:
    """The frozen SFT model on a rollout."""

    logprobs: Tensor  # log pi_SFT of the sampled tokens, (n, T), 0 outside the mask
    values: Tensor | None  # V(x_t), (n, T), 0 outside the mask; None without a value head
    features: Sequence[tuple[Tensor, Tensor]]  # r row numbers and the last hidden states behind their values, (r, t, H)


class Passes:
    """The passes of a policy and its value head over a rollout, whose rows are divided over the processes.

    Attributes:
        micro_batch: Rows in one pass, at most; halved where memory does not suffice.
        tokens: And tokens, but for a row alone.
    """

    def __init__(
        self,
        policy: Policy,
        value_head: torch.nn.Module | None,
        group_size: int,
        micro_batch: int,
        tokens: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy, self.value_head, self.ranks = policy, value_head, ranks or Ranks()
        self.group_size, self.micro_batch = group_size, micro_batch
        self.tokens = tokens or tokens_that_fit(policy.backbone.model)

    def reference(self, rollout: Rollout) -> Reference:
        """The reference's log-probabilities and, where there is a value head, its values; no gradient.

        Raises:
            NonFiniteError: If a log-probability is not finite.
            RLAIFError: If not even one row fits into memory.
        """
        reference = self._fitting(lambda: self._reference(rollout))
        # each process has filled in its own rows of zeros
        self.ranks.sum_([x for x in (reference.logprobs, reference.values) if x is not None])
        if bad := nonfinite_rows(reference.logprobs):
            raise NonFiniteError(
                f"expected finite log-probabilities of the reference, found others in rows {listed(bad)}; the weights "
                "are as before. Use float32, or another model",
                bad,
            )
        return reference

    def _reference(self, rollout: Rollout) -> Reference:
        logprobs = torch.zeros_like(rollout.logprobs)
        values = None if self.value_head is None else torch.zeros_like(rollout.response_mask)
        features: list[tuple[Tensor, Tensor]] = []
        for rows in self._in_step(self._passes(rollout)):
            inputs = rollout.cut(rows)
            steps = inputs[2].shape[1]
            give_back(inputs[0].numel())
            output = self.policy.evaluate(*inputs, reference=True, features=values is not None)
            logprobs[rows, :steps] = output.logprobs.to(logprobs.dtype)
            if self.value_head is not None and values is not None and output.features is not None:
                features.append((rows, output.features))
                with torch.no_grad():
                    values[rows, :steps] = self.value_head(output.features)[..., 0] * inputs[3]
        return Reference(logprobs, values, features)

    def gradient(
        self,
        rollout: Rollout,
        learn: Learn,
        reference: Reference,
        *,
        exact: bool,
        by_group: bool,
        max_norm: float,
        update: int,
    ) -> tuple[dict[str, float], Targets]:
        """Leave the gradients of the policy's loss, clipped to a norm, and of the value head's loss in the parameters.

        Args:
            rollout: The responses.
            learn: What they teach.
            reference: Its pass over them.
            exact: Whether the trainer's log-probabilities are those the responses were sampled with. Otherwise the
                gradient pass itself gives them where it may, else a pass of their own before it.
            by_group: Whether a group's targets need no other group's responses.
            max_norm: Of the policy's gradient.
            update: Its number, for the message.

        Returns:
            "loss", "grad_norm", "entropy", "sampler_drift" and, with a value head, "value_loss": see docs/metrics.md;
            and the targets of all rows, (n, T).

        Raises:
            NonFiniteError: If the loss or the gradient is not finite; no gradient is left then.
            RLAIFError: If not even one row fits into memory.
        """
        # values are fitted to returns, which other processes have of some of the rows that this one has features of
        one_pass = by_group and not exact and (self.ranks.size == 1 or self.value_head is None)
        if one_pass and self.policy.backbone.sharded:  # the same in all processes
            one_pass = all(self.ranks.gather(lambda: self._holds_groups(self._passes(rollout, whole=True))))
        found = self._fitting(lambda: self._gradient(rollout, learn, reference, None)) if one_pass else None
        if one_pass and all(self.ranks.gather(lambda: found is not None)):
            assert found is not None
            found[1].join([row for rows in self._passes(rollout, whole=True) for row in rows.tolist()], self.ranks)
        else:
            logprobs = rollout.logprobs if exact else self._fitting(lambda: self._logprobs(rollout))
            self.ranks.sum_([] if exact else [logprobs])
            found = self._fitting(lambda: self._gradient(rollout, learn, reference, logprobs))
        assert found is not None
        own, targets = found
        parts, joined = self.ranks.gather(lambda: own), {"sampler_drift": max}
        metrics = {name: float(joined.get(name, sum)(part[name] for part in parts)) for name in own}
        self.ranks.sum_gradients(self._parameters())
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters, max_norm))
        loss = metrics["loss"] + metrics.get("value_loss", 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            broken = self._fitting(lambda: self._broken_rows(rollout, targets.factor))
            bad = sorted(row for part in self.ranks.gather(lambda: broken) for row in part)
            where = f"in rows {listed(bad)}" if bad else "though every row alone is finite"
            raise NonFiniteError(
                f"expected a finite loss and gradient, found loss {loss} and gradient norm {norm} {where} at update "
                f"{update}; the weights are as before it. Lower learning_rate, or use float32",
                bad,
            )
        return metrics | {"grad_norm": norm}, targets

    def _gradient(
        self, rollout: Rollout, learn: Learn, reference: Reference, logprobs: Tensor | None
    ) -> tuple[dict[str, float], Targets] | None:
        """Leave the gradients; None where the log-probabilities are not given and a group is too much for a pass."""
        n, loss_sum, entropy_sum, value_sum, drift = len(rollout.ids), 0.0, 0.0, 0.0, 0.0
        self._drop_gradients()
        batches = self._passes(rollout, whole=logprobs is None)
        if logprobs is None and not self._holds_groups(batches):
            return None
        everything = torch.arange(n, device=rollout.ids.device)
        targets = learn(everything, rollout.logprobs if logprobs is None else logprobs)
        with self.policy.training():
            for rows in self._in_step(batches):
                inputs = rollout.cut(rows)
                steps = inputs[2].shape[1]
                give_back(inputs[0].numel())
                output = self.policy.evaluate(*inputs)
                if logprobs is None:
                    targets.put(rows, learn(rows, output.logprobs.detach().to(rollout.logprobs.dtype)))
                factor = targets.factor[rows, :steps]
                loss = F.policy_gradient_loss(output.logprobs, factor, inputs[3]) * (len(rows) / n)
                loss.backward()
                loss_sum += float(loss.detach())
                entropy_sum += float(output.entropy.sum())
                drift = max(drift, float((output.logprobs.detach() - rollout.logprobs[rows, :steps]).abs().max()))
        for rows, features in reference.features:
            assert self.value_head is not None
            steps, values = features.shape[1], self.value_head(features)[..., 0]
            loss = F.value_loss(values, targets.returns[rows, :steps], rollout.response_mask[rows, :steps]) * (
                len(rows) / n
            )
            loss.backward()
            value_sum += float(loss.detach())
        entropy = entropy_sum / float(rollout.response_mask.sum())
        metrics = {"loss": loss_sum, "entropy": entropy, "sampler_drift": drift}
        return metrics if self.value_head is None else metrics | {"value_loss": value_sum}, targets

    def _logprobs(self, rollout: Rollout) -> Tensor:
        """The trainer's log-probabilities of the sampled tokens, (n, T), without gradient."""
        logprobs = torch.zeros_like(rollout.logprobs)
        for rows in self._in_step(self._passes(rollout)):
            inputs = rollout.cut(rows)
            give_back(inputs[0].numel())
            with self.policy.training(), torch.no_grad():
                logprobs[rows, : inputs[2].shape[1]] = self.policy.evaluate(*inputs).logprobs.to(logprobs.dtype)
        return logprobs

    def _broken_rows(self, rollout: Rollout, factor: Tensor) -> list[int]:
        """The rows whose loss or gradient alone is not finite; leaves no gradient behind."""
        bad = []
        with self.policy.training():
            for row in self._in_step(sorted(row for rows in self._passes(rollout) for row in rows.tolist())):
                self._drop_gradients()
                inputs = rollout.cut([row])
                part = factor[[row], : inputs[2].shape[1]]
                loss = F.policy_gradient_loss(self.policy.evaluate(*inputs).logprobs, part, inputs[3])
                loss.backward()
                gradients = [p.grad for p in self.policy.parameters if p.grad is not None]
                if not all(bool(torch.isfinite(x).all()) for x in [loss.detach(), *gradients]):
                    bad.append(row)
        self._drop_gradients()
        return bad

    def _drop_gradients(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    def _parameters(self) -> list[Tensor]:
        return [*self.policy.parameters, *(self.value_head.parameters() if self.value_head else ())]

    def _passes(self, rollout: Rollout, whole: bool = False) -> list[Tensor]:
        """The passes over this process's rows."""
        rows, k, ranks = None, self.group_size, self.ranks
        if ranks.size > 1:
            read, written = (mask.sum(1).int().tolist() for mask in (rollout.mask, rollout.response_mask))
            rows = shares(read, written, k, ranks.size, whole=whole)[ranks.rank]
        return rollout.micro_batches(k, self.micro_batch, self.tokens, whole=whole, rows=rows)

    def _holds_groups(self, batches: Sequence[Tensor]) -> bool:
        """Whether no group is too much for a pass."""
        return not any(len(rows) % self.group_size for rows in batches)

    def _in_step(self, batches: Sequence[_Result]) -> Iterator[_Result]:
        """The batches; then, where layers are sharded, idle passes until there were as many as in any process."""
        most = max(self.ranks.gather(lambda: len(batches))) if self.policy.backbone.sharded else 0
        yield from batches
        for _ in range(most - len(batches)):
            self.policy.idle()

    def _fitting(self, passes: Callable[[], _Result]) -> _Result:
        """Run passes over the micro-batches, with smaller ones where memory does not suffice; the result is the same.

        Memory that one process lacks makes the passes smaller in all of them; where layers are sharded it ends the run,
        because the others wait amid a layer.

        Raises:
            RLAIFError: If not even one row fits, or layers are sharded.
        """
        sharded = self.policy.backbone.sharded
        while True:
            try:
                return self.ranks.bound(passes) if sharded else self.ranks.agree(passes)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if sharded:
                    raise RLAIFError(
                        f"expected memory for passes of up to {self.micro_batch} rows and {self.tokens} tokens, found "
                        f"too little ({error}); set agent.micro_batch or agent.pass_tokens lower"
                    ) from error
                if self.micro_batch == 1:
                    raise RLAIFError(
                        f"expected memory for an update of one row at a time, found too little ({error}); use a "
                        "smaller model, shorter responses or trainable='lora'"
                    ) from error
            # out here the error, and with it what the failed passes still held, is gone
            self._drop_gradients()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.micro_batch, self.tokens = (self.micro_batch + 1) // 2, max(1, self.tokens // 2)
            warnings.warn(
                f"out of memory: going on with {self.micro_batch} rows in a gradient pass, same gradient; set "
                "agent.micro_batch so from the start",
                stacklevel=3,
            )
