"""Responses from a stand-in for the policy, a copy of its weights in another dtype, and what is learned from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents.policy import Policy
from agents.sampler import SamplerConfig, make_sampler
from rlaif_env.api import RLAIFError
from rlaif_env.models import LoraConfig, pad_rows, private_copy
from tests.tiny import tiny_backbone

IDS, MASK = pad_rows([[5, 6, 7], [5, 6, 7], [9], [9]], 0, side="left")
UNIFORM = np.random.default_rng(0).random((4, 6))


def moved(trainable: str) -> Policy:
    """A policy that is not its reference any more."""
    policy = Policy(tiny_backbone(), trainable=trainable, lora=LoraConfig(4))
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return policy


def plainly(policy: Policy) -> Any:
    """Its samples by weights that were folded and rounded by the book."""
    with policy.backbone.merged(policy.adapter):
        whole = private_copy(policy.backbone)
    for parameter in whole.model.parameters():
        parameter.data = parameter.data.bfloat16()
    return Policy(whole, trainable="none").sample(IDS, MASK, uniform=UNIFORM, group_size=2)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_copy_is_the_policy_of_now_rounded(trainable: str) -> None:
    policy = moved(trainable)
    sampler = make_sampler(SamplerConfig("bfloat16"), policy)
    before = policy.fingerprint()
    assert not sampler.exact
    for _ in range(2):
        drawn, expected = sampler.sample(IDS, MASK, uniform=UNIFORM, group_size=2), plainly(policy)
        np.testing.assert_array_equal(drawn.ids, expected.ids)
        np.testing.assert_array_equal(drawn.logprobs, expected.logprobs)
        assert policy.fingerprint() == before
        with torch.no_grad():
            for parameter in policy.parameters:
                parameter.mul_(1.3)
        before = policy.fingerprint()


def test_the_copy_shares_what_is_tied_and_keeps_its_buffers() -> None:
    tied = tiny_backbone(tie_word_embeddings=True)
    model = private_copy(tied, "bfloat16").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {b.dtype for b in tied.model.buffers()} == {torch.float32}


def test_the_policy_samples_itself_where_nothing_is_asked_for() -> None:
    policy = moved("lora")
    assert make_sampler(SamplerConfig(), policy) is policy and policy.exact


def test_a_dtype_the_policy_has_is_refused() -> None:
    policy = Policy(private_copy(tiny_backbone(), "bfloat16"), trainable="none")
    with pytest.raises(RLAIFError, match=r"expected a sampler.dtype other than bfloat16, which the policy has; leave"):
        make_sampler(SamplerConfig("bfloat16"), policy)


def test_a_processor_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.warns(UserWarning, match="no instructions for bfloat16"):
        make_sampler(SamplerConfig("bfloat16"), moved("none"))
