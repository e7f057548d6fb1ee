"""Sampling from a causal LM with a key-value cache, for policies and labelers alike.

Each row draws by its own uniform numbers, handed in, so a row's text depends neither on its neighbours nor on when
finished rows leave the batch. Prompts are prefilled once, however many samples are taken of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import ContextError, RLAIFError
from rlaif_env.models.architecture import context_of, keeps_keys_only
from rlaif_env.models.encoding import pad_rows

if TYPE_CHECKING:
    import torch

TEMPERATURE = 0.9
"""Of a policy that is asked for none (section A.3)."""


@dataclass(frozen=True)
class Samples:
    """n sampled responses."""

    ids: NDArray[np.int64]  # tokens, (n, T) int64, padded after the end
    lengths: NDArray[np.int64]  # tokens in each, (n,) int64, the ending one counted
    # log-probability of each token under the distribution it was drawn from, (n, T) float32, 0 on padding
    logprobs: NDArray[np.float32]

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Samples one after the other."""
        columns = ([getattr(part, name) for part in parts] for name in ("ids", "lengths", "logprobs"))
        return parts[0] if len(parts) == 1 else cls(*map(np.concatenate, columns))


def sample(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    uniform: NDArray[np.float64],
    temperature: float = 1.0,
    top_k: int = 0,
    samples_per_prompt: int = 1,
    compact: bool = True,
) -> Samples:
    """Sample continuations of B prompts, K of each.

    Args:
        model: A Hugging Face causal LM.
        rows: B prompts as token ids, each with at least one token.
        max_new_tokens: T.
        stop_ids: Token ids that end a response; the one drawn is kept.
        pad_id: Fills the positions after the end.
        uniform: The randomness, n rows of at least T numbers in [0, 1): `rng.random((n, T))`.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Only the k most likely tokens can be drawn; 0 is no limit.
        samples_per_prompt: K; the n = B * K results come with a prompt's samples side by side.
        compact: Whether finished rows leave the batch. The result is the same.

    Raises:
        ContextError: If a prompt and T tokens more are longer than the model's context.
        RLAIFError: If a prompt is empty or the numbers make no sense.
    """
    import torch

    if not rows or any(len(row) == 0 for row in rows):
        raise RLAIFError("expected prompts of at least one token, found none or an empty one")
    if max_new_tokens < 1 or samples_per_prompt < 1 or temperature < 0:
        raise RLAIFError(
            "expected max_new_tokens >= 1, samples_per_prompt >= 1 and temperature >= 0, found "
            f"{max_new_tokens}, {samples_per_prompt} and {temperature}"
        )
    longest, context = max(map(len, rows)), context_of(model)
    if context is not None and longest + max_new_tokens > context:
        raise ContextError(
            f"expected prompts of at most {context - max_new_tokens} tokens beside {max_new_tokens} new ones in the "
            f"model's context of {context}, found {longest}; shorten the prompt or ask for fewer tokens"
        )
    device = model.device
    n = len(rows) * samples_per_prompt
    if uniform.shape[0] != n or uniform.shape[1] < max_new_tokens:
        raise RLAIFError(f"expected uniform numbers of shape ({n}, {max_new_tokens}), found {uniform.shape}")
    numbers = torch.from_numpy(uniform).to(device)
    out = torch.full((n, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    logprobs = torch.zeros((n, max_new_tokens), device=device)
    lengths = torch.full((n,), max_new_tokens, dtype=torch.int64, device=device)
    stops = torch.as_tensor(list(stop_ids), dtype=torch.int64, device=device)
    ids, mask = (torch.from_numpy(a).to(device) for a in pad_rows(rows, pad_id, side="left"))
    with torch.inference_mode():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        # a recurrent state can neither be repeated nor be cut out of the batch
        plain_cache, repeats = keeps_keys_only(model), samples_per_prompt
        if not plain_cache:
            ids, mask, positions = (x.repeat_interleave(repeats, 0) for x in (ids, mask, positions))
            repeats = 1
        state = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache, logits = state.past_key_values, state.logits[:, -1]
        position = positions[:, -1]
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
            logits, mask, position = (x.repeat_interleave(repeats, 0) for x in (logits, mask, position))
        alive = torch.arange(n, device=device)  # the rows in the cache, finished ones not yet compacted included
        done = torch.zeros(n, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            token, logprob = _draw(logits, numbers[alive, t], temperature, top_k)
            token = torch.where(done, pad_id, token)
            out[alive, t] = token
            logprobs[alive, t] = torch.where(done, 0.0, logprob)
            ended = torch.isin(token, stops) & ~done
            lengths[alive[ended]] = t + 1
            done = done | ended
            left = int((~done).sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if compact and plain_cache and left <= 0.875 * len(alive):
                keep = (~done).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, mask, position, token, done = (x[keep] for x in (alive, mask, position, token, done))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position + 1
            logits = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
    return Samples(out.cpu().numpy(), lengths.cpu().numpy(), logprobs.cpu().numpy())


def _draw(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, by inverting the cumulative distribution at a uniform number, and its log-probability.

    (n, V), (n,) -> (n,), (n,). At temperature 0 the token is certain.
    """
    import torch

    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits), dtype=torch.float32)
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    logprobs = scaled.log_softmax(-1)
    cumulative = logprobs.exp().double().cumsum(-1)
    # the rounded total may differ from 1; scaling u by it keeps the draw inside the vocabulary
    draws = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    draws = draws.clamp(max=logits.shape[-1] - 1)
    return draws[:, 0], logprobs.gather(-1, draws)[:, 0]
