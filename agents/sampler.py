"""Where responses come from: the policy itself, or a stand-in whose log-probabilities are not quite the trainer's.

Notation: n left-padded prompts, ids and mask (n, P); responses of at most T tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from agents.policy import Policy
from agents.served import ServedSampler
from rlaif_env.api import RLAIFError
from rlaif_env.models import Samples, decode_fast_on_cpu, private_copy, refresh_copy
from rlaif_env.servers.vllm import VLLMConfig, VLLMServers


@dataclass(frozen=True)
class SamplerConfig(VLLMConfig):
    """Where responses are sampled: in this process, or by vLLM servers (url).

    Attributes:
        dtype: Of the weights that responses are sampled with: as they are trained where not given.
    """

    dtype: Literal["", "bfloat16"] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype and self.url:
            raise RLAIFError("expected sampler.dtype or sampler.url, found both; a server has its own --dtype")
        if self.dtype not in ("", "bfloat16"):
            raise RLAIFError(f"expected sampler.dtype 'bfloat16', or none, found {self.dtype!r}")


class Sampler(Protocol):
    """What writes a policy's responses: as the policy is when it is asked, training steps included."""

    @property
    def exact(self) -> bool:
        """Whether its log-probabilities are the trainer's own, so that nothing has to be corrected."""

    def sample(
        self, ids: NDArray[np.int64], mask: NDArray[Any], *, uniform: NDArray[np.float64], group_size: int = 1
    ) -> Samples:
        """Sample a response of at most T tokens to each prompt by uniform numbers (n, T) in [0, 1), a row for each.

        A sampler that cannot use them draws by a seed from its row's first number: the same numbers are the same
        request. K = ``group_size`` consecutive rows hold the same prompt; RLAIFError if they differ.

        Returns:
            Responses, with each token's log-probability in the distribution that it was drawn from, at the policy's
            temperature.
        """


class CastSampler:
    """Samples from a copy of the policy's weights in another dtype, made again from the policy's before each batch.

    The adapter is folded in before the weights are rounded; those it does not touch are rounded once.
    """

    exact = False

    def __init__(self, policy: Policy, dtype: str) -> None:
        self._policy = policy
        cast = private_copy(policy.backbone, dtype)
        if cast.device.type == "cpu":
            decode_fast_on_cpu(cast.model)
        self._cast = Policy(cast, trainable="none", temperature=policy.temperature)

    def sample(
        self, ids: NDArray[np.int64], mask: NDArray[Any], *, uniform: NDArray[np.float64], group_size: int = 1
    ) -> Samples:
        """As `Sampler.sample`; the log-probabilities are those of the rounded weights."""
        refresh_copy(self._cast.backbone, self._policy.backbone, self._policy.adapter)
        return self._cast.sample(ids, mask, uniform=uniform, group_size=group_size)


def make_sampler(config: SamplerConfig, policy: Policy) -> Sampler:
    """The sampler of a policy that settings ask for.

    Raises:
        RLAIFError: If the policy cannot be sampled so.
    """
    if config.url:
        return ServedSampler(policy, VLLMServers(config))
    if not config.dtype:
        return policy
    trained = str(policy.backbone.model.dtype).removeprefix("torch.")
    if config.dtype == trained:
        raise RLAIFError(f"expected a sampler.dtype other than {trained}, which the policy has; leave it away")
    if policy.backbone.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        warnings.warn(
            f"this processor has no instructions for {config.dtype} (AVX512_BF16): sampling in it may be slower than "
            f"in {trained}",
            stacklevel=2,
        )
    return CastSampler(policy, config.dtype)
