"""Policy-gradient mathematics as pure functions on tensors (sections 2.2 and A.3, appendices F and G).

Notation: n responses (n = B prompts x K samples, a prompt's samples side by side), T response positions, V vocabulary.
A mask (n, T) is 1 on a response's tokens, its EOS included, and 0 on the padding after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlaif_env.api import RLAIFError

__all__ = [
    "advantages",
    "chunked_logprobs",
    "kl_per_token",
    "leave_one_out_advantages",
    "moving_average",
    "policy_gradient_loss",
    "response_mask",
    "returns_to_go",
    "running_moments",
    "token_logprobs",
    "value_loss",
]


def response_mask(lengths: Tensor, width: int) -> Tensor:
    """Mask of the first ``lengths`` positions: (n,) -> (n, T) float32."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).float()


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token under the tempered softmax, and its entropy.

    Args:
        logits: (n, T, V), at the positions that predict ``tokens``.
        tokens: (n, T) int64.
        temperature: The policy samples from softmax(logits / temperature), so that is its distribution here too.

    Returns:
        Log-probabilities (n, T), with gradient, and entropies (n, T) in nats, without.
    """
    scaled = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    normaliser = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, tokens[..., None])[..., 0] - normaliser
    with torch.no_grad():
        entropy = normaliser - (torch.softmax(scaled, -1) * scaled).sum(-1)
    return logprobs, entropy


def chunked_logprobs(
    hidden: Tensor,
    tokens: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    *,
    weight: Tensor | None = None,
    rows: int = 128,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of hidden states, some rows at a time, so that the logits (m, V) are never held whole.

    Where the head is a frozen matrix, what a log-probability's gradient with respect to its hidden state will be,
    (W_token - sum_v p_v W_v) / temperature, is found in the forward pass, where the probabilities are at hand: no
    logits are kept or computed again. Any other head is run again in the backward pass.

    Args:
        hidden: Last hidden states, (m, H).
        tokens: What each of them is to predict, (m,) int64.
        head: From hidden states to logits, (r, H) -> (r, V).
        temperature: As in `token_logprobs`.
        weight: The head's matrix (V, H), where ``head`` is nothing but the product with it and it is not trained.
        rows: m at a time.

    Returns:
        Log-probabilities (m,), with gradient, and entropies (m,) in nats, without.
    """
    frozen = weight is not None and not weight.requires_grad
    learns = torch.is_grad_enabled() and (hidden.requires_grad or not frozen)
    found: list[tuple[Tensor, Tensor]] = []
    for h, t in zip(hidden.split(rows), tokens.split(rows), strict=True):
        if frozen and learns:
            found.append(_FrozenHead.apply(h, weight, t, temperature))  # type: ignore[no-untyped-call]
        elif learns:
            found.append(checkpoint(_head_logprobs, h, t, head, temperature, use_reentrant=False))
        else:
            found.append(_head_logprobs(h, t, head, temperature))
    if not found:
        return hidden.new_zeros(0), hidden.new_zeros(0)
    logprobs, entropy = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _head_logprobs(
    hidden: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs, entropy = token_logprobs(head(hidden)[:, None], tokens[:, None], temperature)
    return logprobs[:, 0], entropy[:, 0]


class _FrozenHead(torch.autograd.Function):
    """log softmax(h W^T / temperature)[token] for a matrix W that is not trained; see `chunked_logprobs`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(m, H), (V, H), (m,) -> log-probabilities (m,) and entropies (m,)."""
        scaled = hidden @ weight.t()
        scaled = scaled.div_(temperature) if scaled.dtype == torch.float64 else scaled.float().div_(temperature)
        chosen = scaled.gather(1, tokens[:, None])
        top = scaled.amax(1, keepdim=True)
        weights = scaled.sub_(top).exp_()  # in place: one (m, V) is all that is ever held
        total = weights.sum(1, keepdim=True)
        mean = (weights.to(weight.dtype) @ weight).to(total.dtype) / total  # sum_v p_v W_v, (m, H)
        normaliser = top + total.log()
        # sum_v p_v z_v is the product of the mean row with the hidden state
        entropy = normaliser[:, 0] - (mean * hidden).sum(1) / temperature
        ctx.save_for_backward((weight[tokens] - mean) / temperature)
        ctx.mark_non_differentiable(entropy)
        return (chosen - normaliser)[:, 0], entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        """The chain rule with what the forward pass has found."""
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None, None, None


def kl_per_token(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The one-sample estimate of KL(policy || reference) at each token, log pi - log pi_SFT: (n, T), no gradient.

    Unbiased for tokens drawn from the policy; single values may be negative.
    """
    return ((logprobs - reference_logprobs) * mask).detach()


def returns_to_go(rewards: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Z_t = (1 - beta) r_T - beta sum_{i >= t} (log pi - log pi_SFT)_i, with gamma = 1 (section A.3).

    The reward arrives with the last token, so every token's return holds it; a token answers only for the KL from it
    on.

    Args:
        rewards: (n,), one for each response.
        kl: (n, T), from `kl_per_token`.
        mask: (n, T).
        beta: Weight of the KL; the objective is E[(1 - beta) r - beta KL].

    Returns:
        (n, T), 0 outside the mask.
    """
    kl = kl * mask
    onwards = kl.flip(-1).cumsum(-1).flip(-1)
    return ((1 - beta) * rewards[:, None] - beta * onwards) * mask


def leave_one_out_advantages(returns: Tensor, group_size: int) -> Tensor:
    """Each return minus the mean of the other K - 1 of its group: (n,) or (n, T) -> the same shape.

    Args:
        returns: One return a response, (n,); or one for each token, (n, T), the baseline then being taken position by
            position.
        group_size: K, the number of samples of each prompt, side by side.

    Raises:
        RLAIFError: If K < 2 or n is not a multiple of K.
    """
    n = len(returns)
    if group_size < 2 or n % group_size:
        raise RLAIFError(f"expected groups of at least 2 that divide {n} rows, found group_size={group_size}")
    groups = returns.reshape(n // group_size, group_size, *returns.shape[1:])
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).reshape(returns.shape)


def moving_average(previous: float | None, batch_mean: float, decay: float) -> float:
    """Exponential moving average of batch means; the first batch starts it."""
    return batch_mean if previous is None else decay * previous + (1 - decay) * batch_mean


def running_moments(moments: tuple[int, float, float], batch: Tensor) -> tuple[int, float, float]:
    """Count, mean and sum of squared deviations of all rewards seen, with one more batch (Chan et al. 1983).

    The standard deviation so far is (m2 / count) ** 0.5. Start from (0, 0.0, 0.0).
    """
    count, mean, m2 = moments
    n, values = len(batch), batch.double()
    batch_mean = float(values.mean())
    delta, total = batch_mean - mean, count + n
    m2 += float(((values - batch_mean) ** 2).sum()) + delta**2 * count * n / total
    return total, mean + delta * n / total, m2


def advantages(
    returns: Tensor,
    mask: Tensor,
    baseline: str,
    *,
    group_size: int = 1,
    average: float = 0.0,
    values: Tensor | None = None,
) -> Tensor:
    """A_t = Z_t - b_t for each of the baselines: (n, T), 0 outside the mask, no gradient.

    The baseline of a response never depends on that response's own later tokens, except for "batch-mean", which
    includes its own return, as is usual, and so shrinks the expected gradient by (n - 1) / n.

    For "leave-one-out" it is the mean, over the *other* samples of the prompt, of the whole response's return Z_0.

    Args:
        returns: Z, (n, T).
        mask: (n, T).
        baseline: "value", "leave-one-out", "batch-mean", "moving-average" or "none".
        group_size: K, for "leave-one-out".
        average: The running mean of Z_0, for "moving-average".
        values: V(x_t), (n, T), for "value".

    Raises:
        RLAIFError: If the baseline is unknown or lacks what it needs.
    """
    returns = returns.detach()
    whole = returns[:, :1]
    if baseline == "none":
        base = torch.zeros_like(whole)
    elif baseline == "moving-average":
        base = torch.full_like(whole, average)
    elif baseline == "batch-mean":
        base = whole.mean().expand_as(whole)
    elif baseline == "leave-one-out":
        base = whole - leave_one_out_advantages(whole, group_size)
    elif baseline == "value":
        if values is None:
            raise RLAIFError("expected values for baseline='value', found none")
        base = values.detach()
    else:
        raise RLAIFError(
            "expected baseline 'value', 'leave-one-out', 'batch-mean', 'moving-average' or 'none', found "
            + repr(baseline)
        )
    return (returns - base) * mask


def policy_gradient_loss(logprobs: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE: - sum_t log pi(a_t | x_t) sg(A_t), summed over tokens, averaged over the n responses. Scalar."""
    return -(logprobs * advantage.detach() * mask).sum() / len(mask)


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """sum_t (Z_t - V(x_t))^2, summed over tokens, averaged over the n responses. Scalar."""
    return (((returns.detach() - values) * mask) ** 2).sum() / len(mask)
