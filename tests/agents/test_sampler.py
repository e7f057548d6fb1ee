"""Responses from a stand-in for the policy, a copy of its weights in another dtype, and what is learned from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents import ReinforceAgent, ReinforceConfig
from agents import functional as F
from agents.answers import answer, response_kl
from agents.policy import Policy
from agents.sampler import SamplerConfig, make_sampler
from rlaif_env.api import RLAIFError
from rlaif_env.models import LoraConfig, OptimizerConfig, Samples, decode_fast_on_cpu, pad_rows, private_copy
from tests.agents.test_reinforce import environment
from tests.conformance import made
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
    decode_fast_on_cpu(whole.model)
    return Policy(whole, trainable="none").sample(IDS, MASK, uniform=UNIFORM, group_size=2)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_copy_is_the_policy_of_now_rounded(trainable: str) -> None:
    policy = moved(trainable)
    sampler = make_sampler(SamplerConfig(dtype="bfloat16"), policy)
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


def test_what_decodes_fast_is_the_same_model() -> None:
    """To the bit in float32, where there is nothing to convert: masks and heads that share keys are as they were."""
    plain, fast = tiny_backbone(), private_copy(tiny_backbone())
    decode_fast_on_cpu(fast.model)
    assert fast.model.config._attn_implementation != plain.model.config._attn_implementation == "sdpa"
    drawn = [Policy(base, trainable="none").sample(IDS, MASK, uniform=UNIFORM, group_size=2) for base in (plain, fast)]
    np.testing.assert_array_equal(drawn[0].ids, drawn[1].ids)
    np.testing.assert_allclose(drawn[0].logprobs, drawn[1].logprobs, atol=1e-6)


def test_the_policy_samples_itself_where_nothing_is_asked_for() -> None:
    policy = moved("lora")
    assert make_sampler(SamplerConfig(), policy) is policy and policy.exact
    assert not Policy(private_copy(tiny_backbone(), "bfloat16")).exact  # its adapter is folded in to sample only


def test_a_dtype_the_policy_has_is_refused() -> None:
    policy = Policy(private_copy(tiny_backbone(), "bfloat16"), trainable="none")
    with pytest.raises(RLAIFError, match=r"expected a sampler.dtype other than bfloat16, which the policy has; leave"):
        make_sampler(SamplerConfig(dtype="bfloat16"), policy)
    with pytest.raises(RLAIFError, match=r"expected sampler.dtype 'bfloat16', or none, found 'int8'"):
        SamplerConfig(dtype="int8")  # type: ignore[arg-type]


def test_a_processor_without_the_instructions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.warns(UserWarning, match="no instructions for bfloat16"):
        make_sampler(SamplerConfig(dtype="bfloat16"), moved("none"))


# --- what the agent makes of responses that another distribution has drawn --------------------------------------------


class Other:
    """Another model as the sampler of a policy."""

    exact = False

    def __init__(self, policy: Policy) -> None:
        other = tiny_backbone(0)
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)), alpha=0.05)
        self.sampler = Policy(other, trainable="none", temperature=policy.temperature)

    def sample(self, *arguments: Any, **named: Any) -> Samples:
        return self.sampler.sample(*arguments, **named)


def updated(sampler: Any = Other, n: int = 16, **settings: Any) -> tuple[ReinforceAgent, Any, Any, dict[str, float]]:
    """An agent in float64 after its first update, without a step; its rollout, its rewards and the metrics."""
    model = tiny_backbone(0)
    model.model.double()
    plain: dict[str, Any] = {"optimizer": OptimizerConfig(max_grad_norm=1e9), "reward_normalisation": "none"}
    envs = environment(model, n, 4)
    agent = ReinforceAgent(model, ReinforceConfig(lora=LoraConfig(4), **plain | settings), envs=envs, sampler=sampler)
    for i, parameter in enumerate(agent.policy.parameters):
        shift = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.data = parameter.data.double() + 0.02 * shift
    _, rewards, *_ = envs.step(agent.act(envs.reset(seed=0)[0]))
    rollout = agent._rollout
    agent.optimizer.step = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    return agent, rollout, torch.as_tensor(rewards, dtype=torch.float64), agent.update(rewards)


def gradient(agent: ReinforceAgent) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters if p.grad is not None])


@pytest.mark.parametrize(("level", "cap"), [("token", 1.5), ("sequence", 3.0), ("token", 0.0)])
def test_the_gradient_is_the_weighted_one_with_the_trainer_s_kl(level: Any, cap: float) -> None:
    agent, rollout, rewards, metrics = updated(beta=0.3, importance_level=level, importance_cap=cap)
    inputs, mask = (rollout.ids, rollout.mask, rollout.responses, rollout.response_mask), rollout.response_mask.double()
    found = gradient(agent).clone()
    for parameter in agent.policy.parameters:
        parameter.grad = None
    reference = agent.policy.evaluate(*inputs, reference=True).logprobs.double()
    with agent.policy.training():
        logprobs = agent.policy.evaluate(*inputs).logprobs.double()
        kl = (logprobs.detach() - reference) * mask
        gap = (logprobs.detach() - rollout.logprobs) * mask
        whole = gap.sum(1, keepdim=True).expand_as(gap) if level == "sequence" else gap
        weights = torch.minimum(whole.exp(), torch.tensor(cap or 1.0)) if cap else torch.ones_like(gap)
        onwards = torch.stack([kl[:, t:].sum(1) for t in range(4)], 1)
        returns = (0.7 * rewards[:, None] - 0.3 * onwards) * mask
        groups = returns[:, 0].reshape(4, 4)
        others = ((groups.sum(1, keepdim=True) - groups) / 3).reshape(16, 1)
        (-(weights * (returns - others) * logprobs * mask).sum() / 16).backward()
    assert torch.allclose(found, gradient(agent), atol=1e-6) and found.abs().max() > 0.01
    real = mask > 0
    assert metrics["kl"] == pytest.approx(float(kl.sum(1).mean()), abs=1e-5)
    assert metrics["importance_weight"] == pytest.approx(float(weights[real].mean()), abs=1e-5)
    capped = float((whole[real] >= np.log(cap)).double().mean()) if cap else 0.0
    assert metrics["importance_capped"] == pytest.approx(capped) and (not cap or 0 < capped < 1)
    assert metrics["importance_gap"] == pytest.approx(np.quantile(gap[real].abs(), 0.99), abs=1e-5)
    assert metrics["sampler_drift"] == pytest.approx(float(gap.abs().max()), abs=1e-5)


@pytest.mark.parametrize("baseline", ["leave-one-out", "value", "batch-mean", "moving-average", "none"])
def test_the_gradient_is_one_however_the_trainer_s_log_probabilities_are_come_by(baseline: Any) -> None:
    """Out of the gradient pass, where it has whole groups; from a pass of their own, where a row is alone."""
    (whole, *_, told), (alone, *_, same) = (updated(beta=0.3, baseline=baseline, micro_batch=m) for m in (16, 1))
    assert torch.allclose(gradient(whole), gradient(alone), atol=1e-6) and gradient(whole).abs().max() > 0.01
    assert told == pytest.approx(same, abs=1e-5)


def test_no_pass_is_added_where_a_group_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    inner = Policy.evaluate

    def counted(self: Policy, ids: Any, *arguments: Any, **named: Any) -> Any:
        rows.append(len(ids))
        return inner(self, ids, *arguments, **named)

    monkeypatch.setattr(Policy, "evaluate", counted)
    totals = {}
    for name, sampler, size in (("policy", None, 8), ("other", Other, 8), ("alone", Other, 1)):
        rows.clear()
        *_, metrics = updated(sampler, micro_batch=size)
        totals[name] = sum(rows)
        assert ("importance_weight" in metrics) == (sampler is not None)
    assert totals == {"policy": 32, "other": 32, "alone": 48}  # reference and gradient, of 16 rows each


def test_the_held_out_kl_is_the_trainer_s() -> None:
    policy = moved("lora")
    sampler = make_sampler(SamplerConfig(dtype="bfloat16"), policy)
    samples = answer(sampler, IDS, MASK, max_new_tokens=6, seed=3)
    x, m, y = (torch.from_numpy(array) for array in (IDS, MASK, samples.ids))
    seen = F.response_mask(torch.from_numpy(samples.lengths), 6)
    ours, theirs = (policy.evaluate(x, m, y, seen, reference=reference).logprobs for reference in (False, True))
    kl = response_kl(policy, IDS, MASK, samples, policy)
    np.testing.assert_allclose(kl, (ours - theirs).sum(1), atol=1e-5)
    assert np.abs(kl - response_kl(policy, IDS, MASK, samples)).max() > 1e-4  # the sampler's


def test_it_learns_from_responses_drawn_in_bfloat16() -> None:
    model = tiny_backbone(0)
    config = ReinforceConfig(learning_rate=2e-2, beta=0.0, lora=LoraConfig(4), temperature=1.0)
    envs = environment(model, 32, 4)
    agent = ReinforceAgent(model, config, envs=envs, sampler=lambda p: make_sampler(SamplerConfig(dtype="bfloat16"), p))
    prompts, _ = envs.reset(seed=0)
    rewards = []
    for _ in range(40):
        prompts, paid, *_ = envs.step(agent.act(prompts))
        metrics = agent.update(paid)
        rewards.append(metrics["reward"])
        assert 0.9 < metrics["importance_weight"] < 1.1 and metrics["sampler_drift"] > 0
    assert np.mean(rewards[:3]) < 0.3 and np.mean(rewards[-3:]) > 0.8


def test_the_prefill_does_not_copy_the_head_for_every_row() -> None:
    """bfloat16 products of states that are a view do, on a CPU: 57 MB a row with the built-in model."""
    from torch.profiler import ProfilerActivity, profile

    policy = moved("lora")
    sampler = make_sampler(SamplerConfig(dtype="bfloat16"), policy)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        sampler.sample(IDS, MASK, uniform=UNIFORM)
    products = [event.input_shapes for event in seen.events() if event.name == "aten::bmm"]
    assert not [shapes for shapes in products if policy.backbone.logit_width in shapes[1]], products


@pytest.mark.parametrize("name", ["gpt2", "gemma4_text", "gpt_oss", "lfm2"])
def test_other_architectures_have_such_a_copy_too(name: str) -> None:
    policy = Policy(made(name), lora=LoraConfig(2))
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.05)
    drawn = make_sampler(SamplerConfig(dtype="bfloat16"), policy).sample(IDS, MASK, uniform=UNIFORM, group_size=2)
    x, m, y = (torch.from_numpy(array) for array in (IDS, MASK, drawn.ids))
    seen = F.response_mask(torch.from_numpy(drawn.lengths), 6)
    gap = (policy.evaluate(x, m, y, seen).logprobs - torch.from_numpy(drawn.logprobs)).abs()[seen > 0]
    assert 0 < gap.mean() < 0.1, gap
