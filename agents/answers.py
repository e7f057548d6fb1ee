"""A policy's answers to given prompts, the same each time, and how far they are from what another model would say.

Notation: n left-padded prompts, ids and mask (n, P); responses of at most T tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agents.functional import response_mask
from agents.policy import Policy
from agents.sampler import Sampler
from rlaif_env.batches import PROMPTS_AT_ONCE
from rlaif_env.models import Samples

_ROWS = 16  # in one forward pass
_BLOCK = 64  # rows whose random numbers come from one generator, however many are sampled at once


def answer(
    sampler: Sampler,
    ids: NDArray[np.int64],
    mask: NDArray[Any],
    *,
    max_new_tokens: int,
    seed: int,
    batch: int = PROMPTS_AT_ONCE,
) -> Samples:
    """Sample one response to each prompt, ``batch`` at once.

    A row draws by numbers of its own, which its place among the prompts, the seed and T alone decide: neither ``batch``
    nor how many prompts follow changes a response. What is left is float rounding: other neighbours are other padding,
    which moves the cumulative probabilities by some 3e-7 (float32), and a token differs where its number falls that
    close to a boundary between two of them: of the built-in model's 49,152 tokens in one of 64 responses (12 tokens).
    """
    blocks = [(np.random.default_rng([seed, at, 0xE7A1]), len(ids) - at) for at in range(0, len(ids), _BLOCK)]
    uniform = np.concatenate([rng.random((min(_BLOCK, left), max_new_tokens)) for rng, left in blocks])
    parts = []
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        parts.append(sampler.sample(ids[rows], mask[rows], uniform=uniform[rows]))
    return Samples.joined(parts)


def response_kl(
    policy: Policy, ids: NDArray[np.int64], mask: NDArray[Any], samples: Samples, reference: Policy | None = None
) -> NDArray[np.float64]:
    """One sample's estimate of KL(policy || reference) for each response, log pi - log pi_ref in nats: (n,).

    The reference is the policy's own, or another policy's: log pi is then computed as log pi_ref is and not taken from
    the sampling, so that equal weights give exactly 0. The policy itself as the reference is its own reference, with
    log pi computed: for responses of a sampler that is not exact.
    """
    kl, device = np.zeros(len(ids)), policy.backbone.device
    for start in range(0, len(ids), _ROWS):
        rows = slice(start, start + _ROWS)
        x, m, y = (torch.from_numpy(array[rows]).to(device) for array in (ids, mask, samples.ids))
        seen = response_mask(torch.from_numpy(samples.lengths[rows]), y.shape[1]).to(device)
        theirs = (reference or policy).evaluate_alone(x, m, y, seen, reference=True).logprobs
        if reference is None:
            kl[rows] = samples.logprobs[rows].sum(1) - theirs.sum(1).cpu().numpy()
        else:
            ours = policy.evaluate_alone(x, m, y, seen).logprobs
            kl[rows] = (ours.double() - theirs.double()).sum(1).cpu().numpy()
    return kl
