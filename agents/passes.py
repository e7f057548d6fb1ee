"""How an update is computed, not what: micro-batches, little padding, memory that does not suffice, odd numbers found.

Notation: n rows of a batch, K rows a prompt, P prompt and T response positions, H hidden width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from agents import functional as F
from agents.policy import Policy
from agents.targets import Learn, Targets
from rlaif_env.api import RLAIFError
from rlaif_env.models import Samples, give_back, tokens_that_fit

_Result = TypeVar("_Result")


class NonFiniteError(RLAIFError):
    """A number that is not finite, found before the weights changed. ``rows`` are the responses it came from."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


def nonfinite_rows(values: Tensor) -> list[int]:
    """The rows in which a tensor (n,) or (n, T) has a NaN or an infinity."""
    return [int(row) for row in (~torch.isfinite(values.reshape(len(values), -1)).all(1)).nonzero()[:, 0]]


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on the CPU."""
    signs = ("can't allocate memory", "out of memory", "bad_alloc", "cannot allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def plain(values: ArrayLike) -> list[Any]:
    """Numbers as strict JSON can hold them: what is not finite becomes "nan", "inf" or "-inf". Keeps the shape."""
    array = np.asarray(values)
    made: list[Any] = np.where(np.isfinite(array), array.astype(object), array.astype(str)).tolist()
    return made


def by_length(lengths: Sequence[Any], size: int) -> list[list[int]]:
    """Row numbers in passes of at most ``size`` rows, those of like length together, so that there is little padding.

    Rows of the same length keep their order.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class Rollout:
    """What the agent keeps of its last action."""

    ids: Tensor  # (n, P)
    mask: Tensor  # (n, P)
    responses: Tensor  # (n, T)
    response_mask: Tensor  # (n, T)
    logprobs: Tensor  # (n, T), when sampled
    ended: Tensor  # (n,), whether the response has its end

    @classmethod
    def of(cls, ids: NDArray[Any], mask: NDArray[Any], samples: Samples, policy: Policy) -> Rollout:
        """The responses that a policy has sampled to left-padded prompts (n, P)."""
        width = int(mask.sum(1).max())  # columns that are padding in every row are not worth computing
        lengths, responses = torch.from_numpy(samples.lengths), torch.from_numpy(samples.ids)
        columns = (
            torch.from_numpy(ids[:, -width:]),
            torch.from_numpy(mask[:, -width:].astype(np.int64)),
            responses,
            F.response_mask(lengths, responses.shape[1]),
            torch.from_numpy(samples.logprobs),
            torch.isin(responses.gather(1, (lengths - 1)[:, None])[:, 0], torch.tensor(policy.backbone.end_ids)),
        )
        return cls(*(column.to(policy.backbone.device) for column in columns))

    def check(self) -> None:
        """Raise NonFiniteError if the sampled tokens' log-probabilities are not finite."""
        if rows := nonfinite_rows(self.logprobs):
            raise NonFiniteError(
                f"expected finite log-probabilities of the sampled tokens, found others in rows {_listed(rows)}: the "
                "policy's weights or logits are broken; go back to an earlier checkpoint, use float32, or lower "
                "learning_rate",
                rows,
            )

    def checked_rewards(self, rewards: NDArray[Any]) -> Tensor:
        """Rewards as float32 (n,), on the rollout's device; NonFiniteError if they are not finite, or not n."""
        values, n = torch.as_tensor(np.asarray(rewards, dtype=np.float32), device=self.ids.device), len(self.ids)
        bad = nonfinite_rows(values) if values.shape == (n,) else []
        if values.shape != (n,) or bad:
            raise NonFiniteError(f"expected {n} finite rewards, found shape {tuple(values.shape)}: {rewards!r}", bad)
        return values

    def of_rows(self, rows: NDArray[np.bool_]) -> Rollout:
        """The rows that a mask (n,) chooses."""
        chosen = torch.from_numpy(rows).to(self.ids.device)
        return Rollout(*(column[chosen] for column in vars(self).values()))

    def cut(self, rows: Tensor | list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prompts, mask, responses and their mask of some rows, without the columns that are padding in all of them."""
        start = int(self.ids.shape[1] - self.mask[rows].sum(1).max())
        steps = int(self.response_mask[rows].sum(1).max())
        prompts, responses = (self.ids, self.mask), (self.responses, self.response_mask)
        x, m = (column[rows, start:] for column in prompts)
        y, seen = (column[rows, :steps] for column in responses)
        return x, m, y, seen

    def micro_batches(self, group_size: int, size: int, budget: int, *, whole: bool = False) -> list[Tensor]:
        """Row numbers of each pass, so that little is computed twice or for nothing; ``whole`` groups if they fit.

        A pass has at most ``size`` rows and, if it has more than one, at most ``budget`` tokens, a shared prompt's
        counted once. Rows of like length side by side save padding; rows of one prompt side by side share the reading
        of it. Of the two orders, the one with fewer tokens to compute.
        """
        lengths, prompts, k = self.response_mask.sum(1), self.mask.sum(1), group_size
        groups = torch.arange(len(lengths), device=lengths.device).reshape(-1, k)
        longest = torch.argsort(lengths[groups].amax(1), stable=True)
        within = torch.argsort(lengths[groups], dim=1, stable=True)
        by_group = groups.gather(1, within)[longest].flatten()
        alike = [torch.tensor(sorted(rows), device=lengths.device) for rows in by_length(lengths.tolist(), size)]

        def tokens(rows: Tensor) -> float:
            read = len(torch.unique(rows // k)) * prompts[rows].max()
            return float(read + len(rows) * lengths[rows].max())

        def fitting(rows: Tensor) -> list[Tensor]:
            if len(rows) == 1 or tokens(rows) <= budget:
                return [rows]
            half = len(rows) // 2
            half -= half % k if half > k else 0
            return [*fitting(rows[:half]), *fitting(rows[half:])]

        orders = (by_group.split(size - size % k if size > k else size), *([] if whole else [alike]))
        passes = [[part for rows in order for part in fitting(rows)] for order in orders]
        return min(passes, key=lambda order: sum(map(tokens, order)))

    def described(self, decode: Callable[[list[int]], Any]) -> list[dict[str, Any]]:
        """Each row's prompt, response, token ids and log-probabilities, as JSON can hold them."""
        rows = []
        for i, length in enumerate(self.response_mask.sum(1).int().tolist()):
            ids, logprobs = self.responses[i, :length].tolist(), plain(self.logprobs[i, :length].cpu().numpy())
            texts = {"prompt": decode(self.ids[i][self.mask[i].bool()].tolist()), "response": decode(ids)}
            rows.append({"row": i, **texts, "ids": ids, "logprobs": logprobs})
        return rows


@dataclass(frozen=True)
class Reference:
    """The frozen SFT model on a rollout."""

    logprobs: Tensor  # log pi_SFT of the sampled tokens, (n, T), 0 outside the mask
    values: Tensor | None  # V(x_t), (n, T), 0 outside the mask; None without a value head
    features: Sequence[tuple[Tensor, Tensor]]  # r row numbers and the last hidden states behind their values, (r, t, H)


class Passes:
    """The passes of a policy and its value head over a rollout.

    Attributes:
        micro_batch: Rows in one pass, at most; halved where memory does not suffice.
        tokens: And tokens, but for a row alone.
    """

    def __init__(
        self, policy: Policy, value_head: torch.nn.Module | None, group_size: int, micro_batch: int, tokens: int = 0
    ) -> None:
        self.policy, self.value_head = policy, value_head
        self.group_size, self.micro_batch = group_size, micro_batch
        self.tokens = tokens or tokens_that_fit(policy.backbone.model)

    def reference(self, rollout: Rollout) -> Reference:
        """The reference's log-probabilities and, where there is a value head, its values; no gradient.

        Raises:
            NonFiniteError: If a log-probability is not finite.
            RLAIFError: If not even one row fits into memory.
        """
        reference = self._fitting(lambda: self._reference(rollout))
        if bad := nonfinite_rows(reference.logprobs):
            raise NonFiniteError(
                f"expected finite log-probabilities of the reference, found others in rows {_listed(bad)}; the weights "
                "are as before. Use float32, or another model",
                bad,
            )
        return reference

    def _reference(self, rollout: Rollout) -> Reference:
        logprobs = torch.zeros_like(rollout.logprobs)
        values = None if self.value_head is None else torch.zeros_like(rollout.response_mask)
        features: list[tuple[Tensor, Tensor]] = []
        for rows in rollout.micro_batches(self.group_size, self.micro_batch, self.tokens):
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
        found = (
            self._fitting(lambda: self._gradient(rollout, learn, reference, None)) if by_group and not exact else None
        )
        if found is None:
            logprobs = rollout.logprobs if exact else self._fitting(lambda: self._logprobs(rollout))
            found = self._fitting(lambda: self._gradient(rollout, learn, reference, logprobs))
        assert found is not None
        metrics, targets = found
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters, max_norm))
        loss = metrics["loss"] + metrics.get("value_loss", 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            bad = self._fitting(lambda: self._broken_rows(rollout, targets.factor))
            where = f"in rows {_listed(bad)}" if bad else "though every row alone is finite"
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
        batches = rollout.micro_batches(self.group_size, self.micro_batch, self.tokens, whole=logprobs is None)
        if logprobs is None and any(len(rows) % self.group_size for rows in batches):
            return None
        everything = torch.arange(n, device=rollout.ids.device)
        targets = learn(everything, rollout.logprobs if logprobs is None else logprobs)
        with self.policy.training():
            for rows in batches:
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
        for rows in rollout.micro_batches(self.group_size, self.micro_batch, self.tokens):
            inputs = rollout.cut(rows)
            give_back(inputs[0].numel())
            with self.policy.training(), torch.no_grad():
                logprobs[rows, : inputs[2].shape[1]] = self.policy.evaluate(*inputs).logprobs.to(logprobs.dtype)
        return logprobs

    def _broken_rows(self, rollout: Rollout, factor: Tensor) -> list[int]:
        """The rows whose loss or gradient alone is not finite; leaves no gradient behind."""
        bad = []
        with self.policy.training():
            for row in range(len(rollout.ids)):
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
        for parameter in [*self.policy.parameters, *(self.value_head.parameters() if self.value_head else ())]:
            parameter.grad = None

    def _fitting(self, passes: Callable[[], _Result]) -> _Result:
        """Run passes over the micro-batches, with smaller ones where memory does not suffice; the result is the same.

        Raises:
            RLAIFError: If not even one row fits.
        """
        while True:
            try:
                return passes()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
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
