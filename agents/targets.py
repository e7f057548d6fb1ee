"""What each token of a batch is to learn, and by how much it weighs where another distribution has chosen it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlaif_env.ranks import Ranks


@dataclass(frozen=True)
class Targets:
    """What the first t tokens of r rows are to learn, (r, t) each, 0 outside the mask, without gradient."""

    kl: Tensor  # log pi - log pi_SFT
    returns: Tensor  # Z_t
    advantage: Tensor  # A_t
    log_ratio: Tensor | None = None  # log pi - log q, where the sampler q is not exact
    weights: Tensor | None = None  # of the advantages then

    def put(self, rows: Tensor, part: Targets) -> None:
        """Replace those of some rows."""
        for mine, theirs in zip(vars(self).values(), vars(part).values(), strict=True):
            if theirs is not None:
                mine[rows, : theirs.shape[1]] = theirs

    def join(self, rows: Sequence[int], ranks: Ranks) -> None:
        """Take those of the other processes' rows from them; ``rows`` are this one's."""
        if ranks.size > 1:
            tensors = [mine for mine in vars(self).values() if mine is not None]
            for mine in tensors:
                own = torch.zeros_like(mine)
                own[rows] = mine[rows]
                mine.copy_(own)
            ranks.sum_(tensors)

    @property
    def factor(self) -> Tensor:
        """What the gradient of each log-probability is multiplied by."""
        return self.advantage if self.weights is None else self.advantage * self.weights

    def correction(self, mask: Tensor, cap: float) -> dict[str, Tensor]:
        """Mean and capped share of the weights, and the tail of what they correct; none where nothing is."""
        if self.log_ratio is None or self.weights is None:
            return {}
        weights, gap = self.weights[mask > 0], self.log_ratio[mask > 0].abs()
        capped = (weights >= cap).float() if cap else torch.zeros_like(weights)
        return {
            "importance_weight": weights.mean(),
            "importance_capped": capped.mean(),
            "importance_gap": torch.quantile(gap, 0.99),
        }


Learn = Callable[[Tensor, Tensor], Targets]
"""The targets of r rows (r,), whole groups, from the trainer's log-probabilities of their first t tokens (r, t)."""
