"""The agent learns a bandit whose best answer is known, reproducibly, with the right gradient."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlaif_env  # noqa: F401
from agents import ReinforceAgent, ReinforceConfig
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import PromptSource, Task
from rlaif_env.models import Backbone, LoraConfig, OptimizerConfig, backbone, linear_schedule
from tests.tiny import shape_of, tiny_backbone

TASK = Task(
    "toy", "continuation", "how many vowels it has", 8, 4, PromptSource(prompts={"train": ("ab", "film", "xyz.", "Q")})
)


def vowels(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [sum(c in "aeiou" for c in r) / 4 for r in responses]


def environment(model: Backbone, n: int, k: int) -> Any:
    return gym.make_vec(
        "RLAIF/TextGeneration-v0",
        num_envs=n,
        task=TASK,
        reward=vowels,
        tokenizer=model.tokenizer,
        vocab_size=model.logit_width,
        group_size=k,
    )


def run(
    updates: int, n: int = 32, seed: int = 0, total_updates: int = 0, **settings: Any
) -> tuple[ReinforceAgent, list[dict[str, float]]]:
    config = ReinforceConfig(
        **{
            "learning_rate": 2e-2,
            "beta": 0.0,
            "micro_batch": 16,
            "lora": LoraConfig(4),
            "temperature": 1.0,
            **settings,
        }
    )
    model = tiny_backbone(0)
    envs = environment(model, n, 4)
    agent = ReinforceAgent(model, config, envs=envs, total_updates=total_updates, seed=seed)
    prompts, _ = envs.reset(seed=seed)
    metrics = []
    for _ in range(updates):
        prompts, rewards, *_ = envs.step(agent.act(prompts))
        metrics.append(agent.update(rewards))
    return agent, metrics


@pytest.mark.parametrize("baseline", ["leave-one-out", "value", "batch-mean", "moving-average", "none"])
def test_every_baseline_learns_the_bandit(baseline: str) -> None:
    rate = 1e-2 if baseline == "value" else 2e-2  # at 2e-2 it hangs on rounding whether the learned value keeps up
    _, metrics = run(40, baseline=baseline, learning_rate=rate)
    before = np.mean([m["reward"] for m in metrics[:3]])
    after = np.mean([m["reward"] for m in metrics[-3:]])
    assert before < 0.3 and after > 0.8, (before, after)


def test_the_first_moving_average_is_of_the_other_responses() -> None:
    (_, (own,)), (_, (others,)) = (run(1, baseline=baseline, n=8) for baseline in ("batch-mean", "moving-average"))
    assert others["advantage_std"] == pytest.approx(own["advantage_std"] * 8 / 7)


def test_full_fine_tuning_and_adafactor_learn_it_too(tmp_path: Any) -> None:
    tiny_backbone(0).save_merged(None, tmp_path / "tiny")
    config = ReinforceConfig(trainable="full", optimizer=OptimizerConfig("adafactor"), learning_rate=5e-3, beta=0.01)
    envs = environment(backbone(str(tmp_path / "tiny")), 32, 4)
    agent = ReinforceAgent(str(tmp_path / "tiny"), config, envs=envs)
    prompts, _ = envs.reset(seed=0)
    rewards = []
    for _ in range(40):
        prompts, reward, *_ = envs.step(agent.act(prompts))
        metrics = agent.update(reward)
        rewards.append(metrics["reward"])
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3
    assert metrics["kl"] > 0.5, "the reference must stay where it was"


def test_full_fine_tuning_of_a_live_model_leaves_it_to_the_others() -> None:
    """No file has its weights, and a scorer and an adapter are on it."""
    live, tied = (tiny_backbone(3, **shape) for shape in ({}, {"tie_word_embeddings": True}))
    live.add_lora("scorer", rank=2, alpha=4.0)
    with torch.no_grad():
        for name, parameter in live.lora_parameters("scorer").items():
            parameter.copy_(torch.full_like(parameter, 0.1)) if "lora_B" in name else None
    for model in (live, tied):
        before = {name: value.clone() for name, value in model.model.state_dict().items()}
        config = ReinforceConfig(trainable="full", learning_rate=1e-2, beta=0.1)
        envs = environment(model, 8, 4)
        agent = ReinforceAgent(model, config, envs=envs)
        assert not any("lora" in name or "base_layer" in name for name in agent.policy.state())
        prompts, _ = envs.reset(seed=0)
        _, rewards, *_ = envs.step(agent.act(prompts))
        first = agent.update(rewards)
        assert (
            first["kl"] == pytest.approx(0, abs=1e-5) and first["sampler_drift"] < 1e-4
        )  # it starts as the live model
        agent.act(prompts)
        assert agent.update(rewards)["kl"] != 0
        assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
        assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert tied.model.config.tie_word_embeddings and len(agent.policy.parameters) == len(list(tied.model.parameters()))


def test_same_seed_same_metrics_and_weights() -> None:
    (a, first), (b, second), (_, other) = run(4, beta=0.05), run(4, beta=0.05), run(4, beta=0.05, seed=1)
    assert first == second and first != other
    assert all(torch.equal(x, y) for x, y in zip(a.policy.parameters, b.policy.parameters, strict=True))


def test_global_generators_are_untouched() -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())  # type: ignore[union-attr,index]  # noqa: NPY002
    run(1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002


def test_a_large_beta_keeps_the_policy_at_its_reference() -> None:
    found = {beta: run(60, beta=beta, learning_rate=3e-3)[1][-5:] for beta in (1e-6, 0.8)}
    kl = {beta: np.mean([m["kl"] for m in last]) for beta, last in found.items()}
    reward = {beta: np.mean([m["reward"] for m in last]) for beta, last in found.items()}
    assert kl[0.8] < 0.5 and kl[1e-6] > 5
    assert reward[1e-6] > reward[0.8] + 0.5


def test_the_update_is_the_same_for_any_micro_batch() -> None:
    gradients = []
    for size in (1, 5, 32):
        model = tiny_backbone(0)
        model.model.double()
        config = ReinforceConfig(micro_batch=size, lora=LoraConfig(4), optimizer=OptimizerConfig(max_grad_norm=1e9))
        envs = environment(model, 16, 4)
        agent = ReinforceAgent(model, config, envs=envs)
        for parameter in agent.policy.parameters:
            parameter.data = parameter.data.double()
        _, rewards, *_ = envs.step(agent.act(envs.reset(seed=0)[0]))
        agent.optimizer.step = lambda *a, **k: None  # type: ignore[method-assign,assignment]
        agent.update(rewards)
        gradients.append(torch.cat([p.grad.flatten() for p in agent.policy.parameters if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() < 1e-6


def test_the_gradient_equals_finite_differences() -> None:
    model = tiny_backbone(0)
    model.model.double()
    optimizer = OptimizerConfig(max_grad_norm=1e9)
    config = ReinforceConfig(lora=LoraConfig(2), beta=0.1, optimizer=optimizer, reward_normalisation="none")
    envs = environment(model, 4, 2)
    agent = ReinforceAgent(model, config, envs=envs)
    for parameter in agent.policy.parameters:
        parameter.data = parameter.data.double() + 0.05
    _, rewards, *_ = envs.step(agent.act(envs.reset(seed=1)[0]))
    rollout = agent._rollout
    assert rollout is not None
    agent.optimizer.step = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    agent.update(rewards)
    from agents import functional as F

    kl = F.kl_per_token(rollout.logprobs, agent.passes.reference(rollout).logprobs, rollout.response_mask)
    returns = F.returns_to_go(torch.as_tensor(rewards, dtype=torch.float32), kl, rollout.response_mask, 0.1)
    advantage = F.advantages(returns, rollout.response_mask, "leave-one-out", group_size=2)

    def loss() -> float:
        with agent.policy.training(), torch.no_grad():
            output = agent.policy.evaluate(rollout.ids, rollout.mask, rollout.responses, rollout.response_mask)
            # the logits are taken in float32 on purpose; differences need a coarse step
            return float(
                F.policy_gradient_loss(output.logprobs.double(), advantage.double(), rollout.response_mask.double())
            )

    parameter = agent.policy.parameters[1]
    assert parameter.grad is not None
    direction = parameter.grad / parameter.grad.norm()
    step = 1e-2
    origin = parameter.data.clone()
    parameter.data = origin + step * direction
    up = loss()
    parameter.data = origin - step * direction
    down = loss()
    assert (up - down) / (2 * step) == pytest.approx(float(parameter.grad.norm()), rel=1e-2)


def test_normalised_rewards_make_the_update_blind_to_their_scale() -> None:
    found = []
    for factor in (1.0, 100.0):
        agent, _ = run(1, beta=0.05)
        envs = environment(agent.policy.reference, 32, 4)
        agent.moments = (0, 0.0, 0.0)
        _, rewards, *_ = envs.step(agent.act(envs.reset(seed=0)[0]))
        agent.update(rewards * factor)
        found.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters]))
    assert torch.allclose(found[0], found[1], atol=1e-4)


def test_the_learning_rate_warms_up_and_decays() -> None:
    gentle = OptimizerConfig(max_grad_norm=1e-6)
    _, metrics = run(4, learning_rate=1.0, warmup_updates=1, total_updates=4, optimizer=gentle)
    assert [m["learning_rate"] for m in metrics] == [0.5, 0.75, 0.5, 0.25]


def test_agents_may_share_a_model_and_leave_it_as_it_was() -> None:
    model = tiny_backbone(0)
    ids = torch.tensor([[5, 6, 7]])
    before = model.model(ids).logits
    first, second = (
        ReinforceAgent(model, ReinforceConfig(lora=LoraConfig(2)), envs=shape_of(model), seed=s) for s in (1, 1)
    )
    assert model.adapters == ["policy", "policy-2"]
    assert first.policy.fingerprint() == second.policy.fingerprint()
    second.policy.load_state({name: value + 0.1 for name, value in first.policy.state().items()})
    assert first.policy.fingerprint() != second.policy.fingerprint()
    with first.policy.training():
        assert torch.equal(model.model(ids).logits, before)
    with second.policy.training():
        assert not torch.allclose(model.model(ids).logits, before)
    del first, second
    gc.collect()
    assert model.adapters == [] and torch.equal(model.model(ids).logits, before)
    ReinforceAgent(model, ReinforceConfig(lora=LoraConfig(2)), envs=shape_of(model))


def test_missing_eos_costs() -> None:
    _, plain = run(1, reward_normalisation="none")
    _, dear = run(1, missing_eos_penalty=1.0, reward_normalisation="none")
    assert plain[0]["reward"] == dear[0]["reward"]
    assert dear[0]["return"] == pytest.approx(plain[0]["return"] - (1 - plain[0]["ended"]), abs=1e-5)


def test_bad_rewards_leave_everything_as_it_was() -> None:
    agent, _ = run(1, reward_normalisation="none")
    envs = environment(agent.policy.reference, 32, 4)
    before = [p.detach().clone() for p in agent.policy.parameters]
    agent.act(envs.reset(seed=5)[0])
    with pytest.raises(RLAIFError, match="expected 32 finite rewards, found shape"):
        agent.update(np.full(32, np.nan))
    with pytest.raises(RLAIFError, match=r"expected 32 finite rewards, found shape \(3,\)"):
        agent.update(np.zeros(3))
    with pytest.raises(RLAIFError, match="expected a finite loss and gradient"):
        agent.update(np.full(32, 3e38) * np.resize([1, -1], 32))
    assert all(torch.equal(p, q) for p, q in zip(before, agent.policy.parameters, strict=True))
    agent.update(np.zeros(32))
    with pytest.raises(RLAIFError, match=r"expected act\(\) before update\(\)"):
        agent.update(np.zeros(32))
    with pytest.raises(RLAIFError, match="expected 4 consecutive rows with the same prompt"):
        agent.act(
            {k: np.roll(v, 1, axis=0) for k, v in environment(agent.policy.reference, 32, 4).reset(seed=0)[0].items()}
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.0}, r"expected beta in \[0, 1\), found 1.0"),
        ({"temperature": 0.0}, "expected temperature above 0"),
        ({"micro_batch": 0}, "expected micro_batch at least 1"),
        ({"importance_cap": 0.5}, "expected importance_cap 0, or at least 1 and finite, found 0.5"),
        ({"importance_level": "row"}, "expected importance_level 'token' or 'sequence', found row"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        ReinforceConfig(**settings)
    assert dataclasses.is_dataclass(ReinforceConfig)


def test_the_agent_reads_the_environment() -> None:
    """The sentence of the design, as it stands: no group size given, so the learned value is the baseline."""
    model = tiny_backbone(0)
    envs = gym.make_vec(
        "RLAIF/TextGeneration-v0",
        num_envs=32,
        task=TASK,
        reward=vowels,
        tokenizer=model.tokenizer,
    )
    prompts, _ = envs.reset(seed=0)
    agent = ReinforceAgent(model, envs=envs)
    responses = agent.act(prompts)
    _, rewards, terminated, truncated, _ = envs.step(responses)
    metrics = agent.update(rewards)
    assert (agent.group_size, agent.max_new_tokens, agent.baseline) == (1, 4, "value")
    assert terminated.all() and not truncated.any() and np.isfinite(metrics["value_loss"])
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(environment(model, 8, 4))
    grouped = ReinforceAgent(model, envs=wrapped)
    assert (grouped.group_size, grouped.baseline, grouped.value_head) == (4, "leave-one-out", None)


def test_an_environment_that_does_not_fit_is_refused() -> None:
    model = tiny_backbone(0)
    alone = ReinforceConfig(baseline="leave-one-out")
    with pytest.raises(RLAIFError, match="expected group_size of at least 2 for baseline='leave-one-out', found 1"):
        ReinforceAgent(model, alone, envs=shape_of(model, 1))
    with pytest.raises(RLAIFError, match="expected an environment of 79 token ids, the policy's logit width, found 84"):
        ReinforceAgent(model, envs=shape_of(tiny_backbone(0, tuple("äöüéè"))))
    tokens = gym.make_vec("RLAIF/TokenGeneration-v0", num_envs=2, task=TASK, reward=vowels, tokenizer=model.tokenizer)
    with pytest.raises(RLAIFError, match=r"expected an environment whose action is a response.*found Discrete\(79\)"):
        ReinforceAgent(model, envs=tokens)
    assert model.adapters == []


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("total", [0, 1, 4, 50])
def test_the_shared_schedule_has_the_rates_of_before(warmup: int, total: int) -> None:
    for done in range(total or 10):
        share = min(1.0, (done + 1) / (warmup + 1))
        if total:
            share = min(share, max(0.0, (total - done) / total))
        assert linear_schedule(done + 1, warmup=warmup, total=total) == share
        if total:  # and of rlaif sft, whose warmup is a twentieth of the steps
            step = done + 1
            before = min(step / (0.05 * total + 1), 1.0, (total - step + 1) / total)
            assert 2e-4 * linear_schedule(step, warmup=0.05 * total, total=total) == 2e-4 * before
