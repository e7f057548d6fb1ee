"""Log-probabilities of given responses, computed with little: a shared prompt is read once, logits come in chunks.

Notation: n rows, P prompt and T response positions, H hidden width, V vocabulary, m states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from agents.functional import token_logprobs
from rlaif_env.models import keeps_keys_only, trunk_of


def response_states(
    model: Any, ids: Tensor, mask: Tensor, responses: Tensor, response_mask: Tensor, *, split: bool = True
) -> Tensor:
    """Last hidden states at the positions that predict each response token: (n, T, H).

    Neighbouring rows with the same prompt share its keys and values: the prompt is read once, with its gradient, and
    the responses after it (not where there is a recurrent state: it would have no gradient; nor without ``split``). The
    last response token is predicted, never read, so it does not go in. Prompts and their mask are (n, P), left-padded;
    responses and theirs (n, T) int64, right-padded.
    """
    trunk = trunk_of(model)
    read, read_mask, steps = responses[:, :-1], response_mask[:, :-1], responses.shape[1]
    new = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    new[1:] = ((ids[1:] != ids[:-1]) | (mask[1:] != mask[:-1])).any(1)
    first, owner = new.nonzero()[:, 0], new.cumsum(0) - 1
    seen = torch.cat([mask, read_mask], dim=1)
    if not split or len(first) == len(ids) or steps == 1 or not keeps_keys_only(model):
        whole, positions = torch.cat([ids, read], dim=1), (seen.cumsum(-1) - 1).clamp(min=0)
        alone = trunk(input_ids=whole, attention_mask=seen, position_ids=positions, use_cache=False)
        return cast(Tensor, alone.last_hidden_state[:, -steps:])
    positions = (mask[first].cumsum(-1) - 1).clamp(min=0)
    prompts = trunk(input_ids=ids[first], attention_mask=mask[first], position_ids=positions, use_cache=True)
    cache = prompts.past_key_values
    cache.batch_select_indices(owner)
    after = positions[owner, -1:] + torch.arange(1, steps, device=ids.device)
    answers = trunk(input_ids=read, attention_mask=seen, position_ids=after, past_key_values=cache, use_cache=True)
    return torch.cat([prompts.last_hidden_state[owner, -1:], answers.last_hidden_state], dim=1)


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
    parts: list[tuple[Tensor, Tensor]] = []
    for h, t in zip(hidden.split(rows), tokens.split(rows), strict=True):
        if frozen and learns:
            parts.append(_FrozenHead.apply(h, weight, t, temperature))  # type: ignore[no-untyped-call]
        elif learns:
            parts.append(checkpoint(_head_logprobs, h, t, head, temperature, use_reentrant=False))
        else:
            parts.append(_head_logprobs(h, t, head, temperature))
    if not parts:
        return hidden.new_zeros(0), hidden.new_zeros(0)
    logprobs, entropy = zip(*parts, strict=True)
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
