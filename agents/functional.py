"""Policy-gradient mathematics as pure functions on tensors (sections 2.2 and A.3, appendices F and G).

Notation: n responses (n = B prompts x K samples, a prompt's samples side by side), T response positions, V vocabulary.
A mask (n, T) is 1 on a response's tokens, its EOS included, and 0 on the padding after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_env.api import RLAIFError


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


def kl_per_token(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The one-sample estimate of KL(policy || reference) at each token, log pi - log pi_SFT: (n, T), no gradient.

    Unbiased for tokens drawn from the policy; single values may be negative.
    """
    return ((logprobs - reference_logprobs) * mask).detach()


def returns_to_go(rewards: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Z_t = (1 - beta) r_T - beta sum_{i >= t} (log pi - log pi_SFT)_i, with gamma = 1 (section A.3).

    The reward arrives with the last token, so every token's return holds it; a token answers only for the KL from it
    on. The objective is E[(1 - beta) r - beta KL].

    Args:
        rewards: (n,), one for each response.
        kl: (n, T), from `kl_per_token`.
        mask: (n, T).
        beta: Weight of the KL.

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
    average: float | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """A_t = Z_t - b_t for each of the baselines: (n, T), 0 outside the mask, no gradient.

    The baseline of a response never depends on that response's own later tokens, except for "batch-mean", which
    includes its own return, as is usual, and so shrinks the expected gradient by (n - 1) / n.

    For "leave-one-out" it is the mean, over the *other* samples of the prompt, of the whole response's return Z_0. For
    "moving-average" it is the average of the batches before; the first batch has none, so there it is the mean Z_0 of
    the batch's other responses, 0 where there is one alone.

    Args:
        returns: Z, (n, T).
        mask: (n, T).
        baseline: "value", "leave-one-out", "batch-mean", "moving-average" or "none".
        group_size: K, for "leave-one-out".
        average: The running mean of Z_0 before this batch, for "moving-average"; None at the first.
        values: V(x_t), (n, T), for "value".

    Raises:
        RLAIFError: If the baseline is unknown or lacks what it needs.
    """
    returns = returns.detach()
    whole = returns[:, :1]
    if baseline == "none":
        base = torch.zeros_like(whole)
    elif baseline == "moving-average":
        first = average is None and len(whole) > 1
        base = whole - leave_one_out_advantages(whole, len(whole)) if first else torch.full_like(whole, average or 0.0)
    elif baseline == "batch-mean":
        base = whole.mean().expand_as(whole)
    elif baseline == "leave-one-out":
        base = whole - leave_one_out_advantages(whole, group_size)
    elif baseline == "value":
        if values is None:
            raise RLAIFError("expected values for baseline='value', found none")
        base = values.detach()
    else:
        known = "'value', 'leave-one-out', 'batch-mean', 'moving-average' or 'none'"
        raise RLAIFError(f"expected baseline {known}, found {baseline!r}")
    return (returns - base) * mask


def importance_weights(log_ratio: Tensor, mask: Tensor, cap: float, level: str = "token") -> Tensor:
    """min(pi / q, cap) of responses drawn from another distribution q: truncated importance sampling (Ionides 2008).

    At level "sequence" each of a response's tokens has the weight of the whole, min(prod_t pi_t / q_t, cap). Without a
    cap the expected gradient is then the policy's own; its variance grows exponentially with T.

    At level "token" it has the ratio of its own choice alone, as rollouts of inference engines are corrected (Yao et
    al. 2025). Without a cap the expected gradient is sum_t E_{x_t ~ q} sum_a grad pi(a | x_t) Q_t(x_t, a), Q_t being
    the expected return where what follows is drawn from q too: the gradient, at pi, of the surrogate of conservative
    policy iteration (Kakade & Langford 2002). What it neglects is of first order in pi - q: by how much pi would come
    to other prefixes, and go on from them otherwise.

    A cap trades variance for bias: choices that pi makes more than cap times as often as q are learned from too little.

    Args:
        log_ratio: log pi - log q of each token, (n, T).
        mask: (n, T).
        cap: `math.inf` is none, and 0 no weighing at all: 1 for every token.
        level: "token" or "sequence".

    Returns:
        (n, T), 0 outside the mask, no gradient.
    """
    if cap == 0:
        return mask
    ratio = log_ratio.detach() * mask
    whole = ratio.sum(-1, keepdim=True).expand_as(ratio) if level == "sequence" else ratio
    return whole.exp().clamp(max=cap) * mask


def policy_gradient_loss(logprobs: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE: - sum_t log pi(a_t | x_t) sg(A_t), summed over tokens, averaged over the n responses. Scalar."""
    return -(logprobs * advantage.detach() * mask).sum() / len(mask)


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """sum_t (Z_t - V(x_t))^2, summed over tokens, averaged over the n responses. Scalar."""
    return (((returns.detach() - values) * mask) ** 2).sum() / len(mask)
