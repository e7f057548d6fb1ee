"""What makes the update and the scores fast changes neither: equalities, and counts of what is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents import functional as F
from agents.logprobs import chunked_logprobs
from agents.policy import Policy
from agents.rollout import Rollout
from benchmarks.speed.model_speed import PlainLM
from rewards.direct_score import DirectLLMScore
from rewards.language_model.local import LocalLM
from rewards.reward_model.model import RewardModel
from rlaif_env.batches import length_buckets
from rlaif_env.models import LoraConfig, plain_head
from tests.tiny import tiny_backbone, tiny_model

# --- log-probabilities in chunks ---


def a_head(trained: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((23, 8), (50, 8)))
    tokens = torch.randint(50, (23,), generator=generator)
    upstream = torch.randn(23, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(trained), tokens, upstream


@pytest.mark.parametrize("rows", [1, 10, 23, 100])
@pytest.mark.parametrize("kind", ["frozen matrix", "trained matrix", "any head"])
def test_chunks_equal_the_whole_formula_and_its_gradient(kind: str, rows: int) -> None:
    hidden, weight, tokens, upstream = a_head(trained=kind == "trained matrix")

    def head(states: Tensor) -> Tensor:
        logits = states @ weight.t()
        return 3 * torch.tanh(logits / 3) if kind == "any head" else logits

    learned = [x for x in (hidden, weight) if x.requires_grad]
    whole, entropy = F.token_logprobs(head(hidden)[None], tokens[None], 0.7)
    expected = torch.autograd.grad((whole[0] * upstream).sum(), learned)
    given = None if kind == "any head" else weight
    logprobs, found = chunked_logprobs(hidden, tokens, head, 0.7, weight=given, rows=rows)
    gradients = torch.autograd.grad((logprobs * upstream).sum(), learned)
    assert torch.allclose(logprobs, whole[0], atol=1e-12) and torch.allclose(found, entropy[0], atol=1e-12)
    assert not found.requires_grad
    for gradient, right in zip(gradients, expected, strict=True):
        assert right.abs().max() > 0.1 and torch.allclose(gradient, right, atol=1e-12)


def test_a_hundred_thousand_logits_are_summed_as_exactly_as_a_few() -> None:
    hidden = torch.zeros(2, 4, requires_grad=True)
    weight = torch.zeros(100_000, 4)
    logprobs, entropy = chunked_logprobs(hidden, torch.tensor([0, 99_999]), lambda h: h @ weight.t(), weight=weight)
    assert logprobs.tolist() == pytest.approx([-np.log(100_000)] * 2, abs=1e-5)
    assert entropy.tolist() == pytest.approx([np.log(100_000)] * 2, abs=1e-5)


@pytest.mark.parametrize("given", [True, False])
def test_the_logits_are_never_held_whole(given: bool) -> None:
    hidden, weight, tokens, _ = a_head()
    seen: list[int] = []

    def head(states: Tensor) -> Tensor:
        seen.append(len(states))
        return states @ weight.t()

    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = chunked_logprobs(hidden, tokens, head, weight=weight if given else None, rows=5)
    assert max(seen, default=0) <= 5
    assert not [shape for shape in kept if len(shape) == 2 and shape[-1] == 50 and shape[0] > 5]
    if given:
        assert kept and all(shape == (5, 8) or shape == (3, 8) for shape in kept), "only the slope is kept"
    logprobs.sum().backward()
    assert max(seen, default=0) <= 5


def test_nothing_is_asked_of_no_rows() -> None:
    logprobs, entropy = chunked_logprobs(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), lambda h: h)
    assert len(logprobs) == len(entropy) == 0


def test_only_a_bare_matrix_counts_as_one() -> None:
    model = tiny_model(90)
    assert plain_head(model) is model.lm_head.weight
    model.config.final_logit_softcapping = 30.0
    assert plain_head(model) is None
    del model.config.final_logit_softcapping
    model.lm_head = torch.nn.Linear(32, 90, bias=True)
    assert plain_head(model) is None


# --- prompts read once ---


def a_policy() -> tuple[Policy, tuple[Tensor, Tensor, Tensor, Tensor]]:
    base = tiny_backbone(0)
    base.model.double()
    policy = Policy(base, lora=LoraConfig(4))
    generator = torch.Generator().manual_seed(1)
    for p in policy.parameters:
        p.data = p.data.double() + 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(5, 60, (3, 7), generator=generator).repeat_interleave(4, 0)
    mask = torch.ones_like(ids)
    mask[4:8, :3] = 0
    responses = torch.randint(5, 60, (12, 6), generator=generator)
    lengths = torch.tensor([6, 3, 1, 6, 2, 2, 5, 6, 4, 1, 6, 6])
    return policy, (ids, mask, responses, F.response_mask(lengths, 6).double())


def evaluated(policy: Policy, inputs: tuple[Tensor, ...], order: Tensor) -> tuple[list[Tensor], Tensor, int]:
    """Log-probabilities, entropies and features in the rows' own order, the gradient, and tokens that were read."""
    read: list[int] = []
    embedding = policy.backbone.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    with policy.training():
        out = policy.evaluate(*(x[order] for x in inputs), features=True)
        weights = torch.arange(1, 13)[order, None]
        (out.logprobs * weights).sum().backward()
    hook.remove()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None])
    for p in policy.parameters:
        p.grad = None
    back = torch.argsort(order)
    assert out.features is not None
    return [x[back].detach() for x in (out.logprobs, out.entropy, out.features.double())], gradient, sum(read)


def test_rows_that_share_a_prompt_read_it_once_and_say_the_same() -> None:
    policy, inputs = a_policy()
    apart = torch.tensor([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])  # no neighbours with the same prompt
    together, gradient, few = evaluated(policy, inputs, torch.arange(12))
    alone, right, many = evaluated(policy, inputs, apart)
    real = inputs[3].bool()
    for found, expected in zip(together, alone, strict=True):
        assert torch.allclose(found[real], expected[real], atol=1e-5)
    assert (together[0] - alone[0]).abs().max() < 1e-6 and (together[0][~real] == 0).all()
    assert right.abs().max() > 0.1 and (gradient - right).abs().max() < 1e-6 * right.abs().max()
    assert (few, many) == (3 * 7 + 12 * 5, 12 * (7 + 5))


def test_the_reference_shares_prompts_too() -> None:
    policy, inputs = a_policy()
    apart = torch.tensor([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    together = policy.evaluate(*inputs, reference=True).logprobs
    alone = policy.evaluate(*(x[apart] for x in inputs), reference=True).logprobs
    assert torch.allclose(together[apart], alone, atol=1e-6) and not together.requires_grad


def test_the_policy_and_its_reference_are_never_taken_for_each_other() -> None:
    """Outside `training` the adapter is off; the policy's own log-probabilities are given all the same."""
    policy, inputs = a_policy()
    with policy.training():
        inside = policy.evaluate(*inputs)
        reference = policy.evaluate(*inputs, reference=True).logprobs
    outside = policy.evaluate(*inputs)
    assert torch.equal(outside.logprobs, inside.logprobs) and not torch.allclose(outside.logprobs, reference)
    assert torch.equal(policy.evaluate(*inputs, reference=True).logprobs, reference)
    assert inside.logprobs.requires_grad and not outside.logprobs.requires_grad and not reference.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):  # not a gradient that would be lost
        outside.logprobs.sum().backward()
    assert not any(p.requires_grad for p in policy.parameters), "the adapter is off again"


def a_rollout(lengths: list[int], prompt: int) -> Rollout:
    n = len(lengths)
    mask = F.response_mask(torch.tensor(lengths), max(lengths))
    ids = torch.ones(n, prompt, dtype=torch.int64)
    return Rollout(ids, ids, torch.ones_like(mask).long(), mask, mask, torch.ones(n, dtype=torch.bool))


@pytest.mark.parametrize("size", [1, 3, 4, 6, 8, 100])
@pytest.mark.parametrize("prompt", [1, 300])
@pytest.mark.parametrize("budget", [1, 500, 10**6])
def test_every_row_is_in_one_gradient_pass(prompt: int, size: int, budget: int) -> None:
    lengths = np.random.default_rng(size).integers(1, 40, size=24)
    batches = a_rollout(lengths.tolist(), prompt).micro_batches(4, size, budget)
    assert sorted(torch.cat(batches).tolist()) == list(range(24)) and max(map(len, batches)) <= size
    for rows in map(np.asarray, batches):
        tokens = len(set(rows // 4)) * prompt + len(rows) * lengths[rows].max()  # a shared prompt is read once
        assert tokens <= budget or len(rows) == 1


def test_a_budget_cuts_between_groups_before_it_cuts_a_group() -> None:
    cut = [rows.tolist() for rows in a_rollout([30] * 8, 300).micro_batches(4, 8, 450)]
    assert cut == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(len(rows) == 1 for rows in a_rollout([30] * 8, 300).micro_batches(4, 8, 340))


def test_long_prompts_keep_groups_together_and_short_ones_sort_by_length() -> None:
    lengths = [2, 30, 2, 30] * 4
    groups = [set((rows // 4).tolist()) for rows in a_rollout(lengths, 300).micro_batches(4, 4, 10**6)]
    assert all(len(group) == 1 for group in groups)
    wide = [{lengths[i] for i in rows.tolist()} for rows in a_rollout(lengths, 1).micro_batches(4, 4, 10**6)]
    assert all(len(width) == 1 for width in wide)


# --- scores ---


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 2000))
def test_buckets_hold_every_row_once_and_little_padding(lengths: list[int], tokens: int) -> None:
    made = length_buckets(lengths, tokens)
    assert sorted(i for bucket in made for i in bucket) == list(range(len(lengths)))
    for bucket in made:
        inside = [lengths[i] for i in bucket]
        assert len(bucket) == 1 or max(inside) * len(inside) <= tokens
        assert min(inside) >= 0.7 * max(inside) or len(inside) <= 4


@pytest.mark.parametrize("shots", [0, 2])
def test_scores_are_those_of_a_plain_padded_batch_in_the_callers_order(shots: int) -> None:
    base = tiny_backbone(3)
    base.model.config.max_position_embeddings = 2048
    texts = ["Good.", "A very long and winding review of it", "no", "Good.", "bad, " * 9, "ok"]
    empty = [""] * len(texts)
    ours, plain = (
        DirectLLMScore(lm, shots=shots, minimum_mass=0.0) for lm in (LocalLM(base, tokens_per_batch=600), PlainLM(base))
    )
    found, expected = (np.asarray(side.score(empty, texts).info["score"]) for side in (ours, plain))
    assert np.allclose(found, expected, atol=1e-4) and len(set(np.round(found, 3))) == len(set(texts))


def test_a_reward_model_scores_a_mixed_batch_as_one_by_one() -> None:
    base = tiny_backbone(2)
    model = RewardModel(base, torch.linspace(-1, 1, 32), tokens_per_batch=64)
    texts = ["a", "b" * 40, "cc", "d" * 41, "", "e" * 9]
    together = model.score([""] * 6, texts).values
    one_by_one = [float(model.score([""], [text]).values[0]) for text in texts]
    assert np.allclose(together, one_by_one, atol=1e-5) and len(set(np.round(one_by_one, 4))) == 6


# --- the cost model ---


def products(call: Any) -> int:
    """Floating-point operations of the matrix products in a call, attention not among them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


def test_the_cost_model_counts_what_torch_counts() -> None:
    from benchmarks.speed import costs

    base = tiny_backbone(0)
    policy = Policy(base, lora=LoraConfig(4))
    adapter = sum(p.numel() for p in policy.parameters)
    sizes = costs.Sizes.of(base.model, adapter)
    assert sizes.body == sum(
        p.numel() for name, p in base.model.named_parameters() if "proj" in name and "lora_" not in name
    )
    assert sizes.head == base.logit_width * 32 and sizes.attention == 2 * 32
    ids = torch.arange(5, 12).repeat(3, 1).repeat_interleave(4, 0) + torch.arange(3).repeat_interleave(4)[:, None]
    inputs = (ids, torch.ones_like(ids), torch.randint(5, 60, (12, 6)), torch.ones(12, 6))
    shape = {"rows": 12, "group": 4, "prompt": 7, "response": 6}
    bare = costs.Sizes(sizes.body, sizes.head, 0, adapter)

    assert products(lambda: policy.evaluate(*inputs, reference=True)) == costs.reference(bare, **shape).total

    def learn() -> None:
        with policy.training():
            policy.evaluate(*inputs).logprobs.sum().backward()

    counted, floor = products(learn), costs.gradient(bare, **shape).total
    assert floor * 0.9 < counted <= floor, "the first layers need no gradient of their inputs"


def test_costs_worked_by_hand() -> None:
    from benchmarks.speed import costs
    from benchmarks.speed.timing import Machine

    sizes = costs.Sizes(body=100, head=50, attention=0)
    drawn = costs.sampling(sizes, rows=4, group=2, prompt=3, response=2)
    # 2 prompts of 3 tokens and their 2 heads, then one step of 4 rows
    assert (drawn.flops, drawn.steps) == (2 * 100 * 6 + 2 * 50 * 2, ((2 * 150 * 4, 600.0),))
    assert drawn.total == 1400 + 1200
    assert drawn.seconds(Machine(flops=100, bytes=1e9)) == pytest.approx(26)
    assert drawn.seconds(Machine(flops=1e9, bytes=100)) == pytest.approx(6, rel=1e-3)  # the weights, read once a step
    scored = costs.scoring(costs.Sizes(100, 50, 10), prefix=2, suffixes=[3], nodes=1)
    # pairs: prefix 1 + 2, suffix 3 + 4 + 5, node 6
    assert scored.total == 2 * 100 * 6 + 4 * 10 * (3 + 12 + 6) + 2 * 50 * 2


def test_an_update_on_several_devices_worked_by_hand() -> None:
    from benchmarks.speed import costs
    from benchmarks.speed.one_update import Setting
    from benchmarks.speed.scaling import Cluster, update_seconds
    from benchmarks.speed.timing import Machine

    sizes = costs.Sizes(body=100, head=50, attention=0, adapter=10)
    setting = Setting(0.05, 3, 2, rows=6, group=2)
    alone = Cluster(Machine(flops=1000, bytes=1e12))
    one = update_seconds(sizes, setting, alone)
    # 3 prompts of 3 tokens, 6 rows of one token read: 15 tokens; the head on 12 response tokens
    assert one["reference"] == pytest.approx((2 * 100 * 15 + 2 * 50 * 12) / 1000)
    assert one["gradient"] == pytest.approx(((4 * 100 + 6 * 10) * 15 + 4 * 50 * 12) / 1000)
    assert (one["exchange"], one["adapter"]) == (0, 0)
    assert one["update"] == pytest.approx(sum(v for name, v in one.items() if name != "update"))

    two = update_seconds(sizes, setting, Cluster(alone.machine, trainers=2, link=100.0, exchange_overhead=0.5))
    assert two["gradient"] == pytest.approx(one["gradient"] * 2 / 3), "one of the two has two of the three groups"
    assert two["exchange"] == pytest.approx(0.5 + 4 * 10 / 100)

    served = Cluster(alone.machine, trainers=1, samplers=3, adapter_overhead=0.25)
    apart, together = (update_seconds(sizes, setting, served, overlap=overlap) for overlap in (False, True))
    assert apart["sample"] == pytest.approx(one["sample"] / 3)
    assert apart["update"] == pytest.approx(one["update"] - one["sample"] * 2 / 3 + 0.25)
    assert together["update"] == pytest.approx(one["reference"] + one["gradient"] + one["optimizer"])
