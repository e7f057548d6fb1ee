"""What an agent has done and is to learn from: prompts, responses, and how they are put into passes.

Notation: n rows of a batch, K rows a prompt, P prompt and T response positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from agents import functional as F
from agents.policy import Policy
from rlaif_env.api import RLAIFError
from rlaif_env.models import Samples


class NonFiniteError(RLAIFError):
    """A number that is not finite, found before the weights changed. ``rows`` are the responses it came from."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


def nonfinite_rows(values: Tensor) -> list[int]:
    """The rows in which a tensor (n,) or (n, T) has a NaN or an infinity."""
    return [int(row) for row in (~torch.isfinite(values.reshape(len(values), -1)).all(1)).nonzero()[:, 0]]


def listed(rows: Sequence[int]) -> str:
    """The first row numbers, in words."""
    return ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")


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

    def on(self, device: torch.device | str) -> Rollout:
        """The same on a device."""
        return Rollout(*(getattr(self, column.name).to(device) for column in fields(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process is sent has no device."""
        return Rollout, tuple(getattr(self, column.name).cpu() for column in fields(self))

    def check(self) -> None:
        """Raise NonFiniteError if the sampled tokens' log-probabilities are not finite."""
        if rows := nonfinite_rows(self.logprobs):
            raise NonFiniteError(
                f"expected finite log-probabilities of the sampled tokens, found others in rows {listed(rows)}: the "
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

    def micro_batches(
        self, group_size: int, size: int, budget: int, *, whole: bool = False, rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Row numbers of each pass, so that little is computed twice or for nothing; ``whole`` groups if they fit.

        Of all rows, or of those given, whole groups if the passes are to be.


        A pass has at most ``size`` rows and, if it has more than one, at most ``budget`` tokens, a shared prompt's
        counted once. Rows of like length side by side save padding; rows of one prompt side by side share the reading
        of it. Of the two orders, the one with fewer tokens to compute.
        """
        lengths, prompts, k = self.response_mask.sum(1), self.mask.sum(1), group_size
        groups = torch.arange(len(lengths), device=lengths.device).reshape(-1, k)
        longest = torch.argsort(lengths[groups].amax(1), stable=True)
        within = torch.argsort(lengths[groups], dim=1, stable=True)
        by_group = groups.gather(1, within)[longest].flatten()
        own = torch.arange(len(lengths), device=lengths.device)
        if rows is not None:
            own = own[list(rows)]
            by_group = by_group[torch.isin(by_group, own)]
        if not len(own):
            return []
        alike = [own[sorted(rows)] for rows in by_length(lengths[own].tolist(), size)]

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
