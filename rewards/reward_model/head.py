"""The soft-label preference loss and the linear head that minimises it: pure functions on tensors (section 2.2.1).

Notation: n texts, m pairs of them, H features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES: Sequence[float] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Weights of the L2 penalty that `fit_head` tries, the strongest first."""

_PATIENCE = 2


@dataclass(frozen=True)
class Pairs:
    """m judged pairs of texts."""

    first: Tensor  # which text is the first of each pair, int64 (m,)
    second: Tensor  # which is the second, int64 (m,)
    p_first: Tensor  # probability that the first is preferred, float32 (m,)

    def __len__(self) -> int:
        return len(self.p_first)

    def take(self, rows: Tensor | slice) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.first[rows], self.second[rows], self.p_first[rows])

    def margins(self, scores: Tensor) -> Tensor:
        """r1 - r2 of each pair from the scores of the texts: (n,) -> (m,)."""
        return scores[self.first] - scores[self.second]

    def loss(self, scores: Tensor) -> Tensor:
        """`preference_loss` of the scores of the texts, (n,)."""
        return preference_loss(self.margins(scores), self.p_first.to(scores.dtype))

    def entropy(self) -> float:
        """Mean entropy of the labels, nats: the least that the loss can be."""
        p = self.p_first.double()
        return float((torch.special.entr(p) + torch.special.entr(1 - p)).mean())


def preference_loss(margin: Tensor, p_first: Tensor) -> Tensor:
    """Cross-entropy between soft labels and softmax(r1, r2): mean of -p log s(r1 - r2) - (1 - p) log s(r2 - r1).

    s is the logistic function, the margin r1 - r2; (m,), (m,) -> a scalar, nats. At p in {0, 1} this is the
    Bradley-Terry loss.
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(p_first * log_sigmoid(margin) + (1 - p_first) * log_sigmoid(-margin)).mean()


@dataclass(frozen=True)
class HeadFit:
    """A fitted head, (H,) float32 for features as they are, with the penalty that did best and the validation loss."""

    weight: Tensor
    penalty: float
    validation_loss: float


def fit_head(
    features: Tensor,
    pairs: Pairs,
    validation_features: Tensor,
    validation: Pairs,
    penalties: Sequence[float] = PENALTIES,
) -> HeadFit:
    """Fit score = weight . features by the preference loss, from the strongest penalty to the weakest.

    The problem is convex; each penalty starts where the one before ended. The path stops early, when the validation
    loss has not fallen for two penalties. Features are standardised within the fit, so that the penalty means the same
    for all of them.

    Args:
        features: (n, H), of the training texts.
        pairs: At least one pair of training texts.
        validation_features: (n', H).
        validation: Pairs of validation texts.
        penalties: Weights of half the squared norm, falling.
    """
    used = 1 + int(torch.cat([pairs.first, pairs.second]).max())
    x = features[:used].double()
    scale = x.std(0, correction=0).clamp_min(1e-6)
    x = (x - x.mean(0)) / scale
    held_out = validation_features.double() / scale
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    fits: list[HeadFit] = []
    for penalty in penalties:
        _minimise(weight, x, pairs, penalty)
        with torch.no_grad():
            loss = float(validation.loss(held_out @ weight))
        fits.append(HeadFit((weight.detach() / scale).float(), penalty, loss))
        best = min(range(len(fits)), key=lambda i: fits[i].validation_loss)
        if len(fits) - 1 - best == _PATIENCE:
            break
    return fits[best]


def _minimise(weight: Tensor, x: Tensor, pairs: Pairs, penalty: float) -> None:
    """Change ``weight`` to the minimum of loss + penalty |weight|^2 / 2."""
    optimizer = torch.optim.LBFGS([weight], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = pairs.loss(x @ weight) + 0.5 * penalty * weight @ weight
        loss.backward()
        return loss

    optimizer.step(closure)


def centred(weight: Tensor, features: Tensor) -> Tensor:
    """The head whose scores have mean 0 on these features and the same differences between texts: (H,), (n, H) -> (H,).

    A linear head has no constant to subtract. But states after a norm have a direction u in which all texts are alike,
    u . h = 1, found by least squares; the mean score times u is taken off the weight.
    """
    x = features.double()
    mean = x.mean(0)
    gram = x.T @ x / len(x)
    ridge = 1e-5 * gram.diagonal().mean()
    u = torch.linalg.solve(gram + ridge * torch.eye(len(mean), dtype=x.dtype), mean)
    shifted: Tensor = weight.double() - (weight.double() @ mean) / (u @ mean) * u
    return shifted.float()
