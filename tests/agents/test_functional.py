"""Policy-gradient formulas, by numbers worked by hand and by properties."""

from __future__ import annotations

import pytest
import torch

from agents import functional as F
from rlaif_env.api import RLAIFError

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


def test_token_logprobs_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [torch.log(torch.tensor(3.0)), 0.0]]])
    logprobs, entropy = F.token_logprobs(logits, torch.tensor([[1, 0]]))
    assert torch.allclose(logprobs.exp(), torch.tensor([[0.5, 0.75]]))
    by_hand = -(0.75 * torch.log(torch.tensor(0.75)) + 0.25 * torch.log(torch.tensor(0.25)))
    assert torch.allclose(entropy, torch.tensor([[torch.log(torch.tensor(2.0)), by_hand]]))


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[[torch.log(torch.tensor(9.0)), 0.0]]])
    logprobs, _ = F.token_logprobs(logits, torch.tensor([[0]]), temperature=2.0)  # 9 -> 3
    assert logprobs.exp().item() == pytest.approx(0.75)


def test_returns_to_go_by_hand() -> None:
    rewards = torch.tensor([1.0, -1.0])
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.5, 9.0, 9.0]])
    returns = F.returns_to_go(rewards, kl, MASK, beta=0.5)
    expected = torch.tensor([[0.5 - 0.30, 0.5 - 0.25, 0.5 - 0.15], [-0.5 - 0.25, 0.0, 0.0]])
    assert torch.allclose(returns, expected)


def test_without_kl_weight_the_return_is_the_reward() -> None:
    returns = F.returns_to_go(torch.tensor([2.0, 3.0]), torch.randn(2, 3), MASK, beta=0.0)
    assert torch.equal(returns, torch.tensor([[2.0, 2.0, 2.0], [3.0, 0.0, 0.0]]))


def test_leave_one_out_by_hand() -> None:
    returns = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    found = F.leave_one_out_advantages(returns, 3)
    assert torch.allclose(found, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0.0, 0.0, 0.0]))
    per_token = F.leave_one_out_advantages(returns[:, None].expand(6, 2), 3)
    assert torch.allclose(per_token, found[:, None].expand(6, 2))


@pytest.mark.parametrize(("rows", "group"), [(4, 1), (5, 2)])
def test_leave_one_out_needs_whole_groups(rows: int, group: int) -> None:
    with pytest.raises(
        RLAIFError, match=f"expected groups of at least 2 that divide {rows} rows, found group_size={group}"
    ):
        F.leave_one_out_advantages(torch.zeros(rows), group)


def test_each_baseline_by_hand() -> None:
    returns = torch.tensor([[4.0, 3.0, 2.0], [2.0, 0.0, 0.0]])
    cases = {
        "none": [[4.0, 3.0, 2.0], [2.0, 0, 0]],
        "moving-average": [[3.5, 2.5, 1.5], [1.5, 0, 0]],
        "batch-mean": [[1.0, 0.0, -1.0], [-1.0, 0, 0]],
        "leave-one-out": [[2.0, 1.0, 0.0], [-2.0, 0, 0]],
        "value": [[3.0, 1.0, -1.0], [1.0, 0, 0]],
    }
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 7.0, 7.0]])
    for baseline, expected in cases.items():
        found = F.advantages(returns, MASK, baseline, group_size=2, average=0.5, values=values)
        assert torch.allclose(found, torch.tensor(expected)), baseline


def test_the_first_moving_average_leaves_out_the_response_it_is_taken_from() -> None:
    returns = torch.tensor([[4.0, 3.0, 2.0], [2.0, 0.0, 0.0]])
    found = F.advantages(returns, MASK, "moving-average")
    assert torch.allclose(found, torch.tensor([[2.0, 1.0, 0.0], [-2.0, 0, 0]]))
    assert torch.equal(F.advantages(returns[:1], MASK[:1], "moving-average"), returns[:1])  # nothing to go by


def test_the_gradient_of_every_first_batch_is_the_policy_s_but_for_the_batch_mean() -> None:
    """Exactly, over all pairs of actions of one softmax: E[grad] is -grad J, halved where a mean holds its own row."""
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    rewards, mask = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    x = logits.clone().requires_grad_()
    (x.softmax(-1) @ rewards).backward()
    for baseline, share in (("moving-average", 1.0), ("none", 1.0), ("batch-mean", 0.5)):
        y = logits.clone().requires_grad_()
        logp = y.log_softmax(-1)
        for i in range(3):
            for j in range(3):
                advantage = F.advantages(rewards[[i, j]][:, None], mask, baseline)
                chance = float((logp[i] + logp[j]).detach().exp())
                (chance * F.policy_gradient_loss(logp[[i, j]][:, None], advantage, mask)).backward(retain_graph=True)
        assert torch.allclose(y.grad, -share * x.grad, atol=1e-12), baseline  # type: ignore[arg-type,operator]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("value", "expected values for baseline='value', found none"),
        ("mean", "expected baseline 'value', 'leave-one-out'"),
    ],
)
def test_baseline_errors(baseline: str, message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        F.advantages(torch.zeros(2, 3), MASK, baseline)


def test_policy_gradient_equals_the_sum_over_tokens() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], requires_grad=True)
    advantage = torch.tensor([[1.0, 2.0, -1.0], [0.5, 9.0, 9.0]], requires_grad=True)
    loss = F.policy_gradient_loss(logprobs, advantage, MASK)
    assert loss.item() == pytest.approx((1 + 4 - 3 + 2) / 2)
    loss.backward()
    assert torch.equal(logprobs.grad, torch.tensor([[-0.5, -1.0, 0.5], [-0.25, 0.0, 0.0]]))  # type: ignore[arg-type]
    assert advantage.grad is None


def test_value_loss_and_moving_average_by_hand() -> None:
    loss = F.value_loss(
        torch.tensor([[1.0, 1.0, 1.0], [0.0, 5.0, 5.0]]), torch.tensor([[2.0, 1.0, 3.0], [2.0, 0, 0]]), MASK
    )
    assert loss.item() == pytest.approx((1 + 0 + 4 + 4) / 2)
    assert F.moving_average(None, 3.0, 0.9) == 3.0
    assert F.moving_average(1.0, 3.0, 0.75) == pytest.approx(1.5)


def test_running_moments_are_those_of_all_values() -> None:
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0])
    moments = (0, 0.0, 0.0)
    for part in values.split([1, 3, 2]):
        moments = F.running_moments(moments, part)
    assert moments[0] == 6
    assert moments[1] == pytest.approx(values.double().mean().item())
    assert (moments[2] / 6) ** 0.5 == pytest.approx(values.double().std(unbiased=False).item())


def test_the_gradient_is_the_gradient_of_the_expected_return() -> None:
    """Over all actions of a softmax, E[grad of the loss] is -grad of J = E[(1-b) r] - b KL, by differences."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64)
    reference = torch.randn(5, dtype=torch.float64).log_softmax(-1)
    rewards, beta = torch.randn(5, dtype=torch.float64), 0.3

    def objective(x: torch.Tensor) -> float:
        logp = x.log_softmax(-1)
        return float((logp.exp() * ((1 - beta) * rewards - beta * (logp - reference))).sum())

    x = logits.clone().requires_grad_()
    logp = x.log_softmax(-1)
    mask = torch.ones(5, 1, dtype=torch.float64)
    kl = F.kl_per_token(logp.detach()[:, None], reference[:, None], mask)
    returns = F.returns_to_go(rewards, kl, mask, beta)
    # one row for each action, weighted by its probability: the exact expectation over samples
    weighted = F.advantages(returns, mask, "moving-average", average=0.7) * logp.detach().exp()[:, None] * 5
    F.policy_gradient_loss(logp[:, None], weighted, mask).backward()
    step = 1e-6
    for i in range(5):
        up, down = logits.clone(), logits.clone()
        up[i] += step
        down[i] -= step
        slope = (objective(up) - objective(down)) / (2 * step)
        assert -x.grad[i].item() == pytest.approx(slope, abs=1e-8)  # type: ignore[index]


# --- responses drawn from another distribution, summed over all there are: token 0 ends, three tokens at most ---------

PREFIXES = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
RESPONSES = [(*p, 0) for p in PREFIXES] + [(*p, a) for p in PREFIXES[3:] for a in (1, 2)]
TREE_MASK = torch.tensor([[float(t < len(y)) for t in range(3)] for y in RESPONSES], dtype=torch.float64)
BETA = 0.3


def tree(seed: int) -> torch.Tensor:
    """The logits of a policy after each prefix, (7, 3)."""
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tree_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Of each response's tokens, (15, 3)."""
    nodes = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(3)] for y in RESPONSES])
    tokens = torch.tensor([[y[t] if t < len(y) else 0 for t in range(3)] for y in RESPONSES])
    return logits.log_softmax(-1)[nodes, tokens] * TREE_MASK


POLICY, SAMPLER, REFERENCE = tree(1), tree(2), tree_logprobs(tree(3))
REWARDS = torch.randn(15, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def expected_gradient(cap: float, level: str, sampler: torch.Tensor = SAMPLER) -> torch.Tensor:
    """Of one response drawn from a sampler, over all there are: (7, 3)."""
    x = POLICY.clone().requires_grad_()
    ours, theirs = tree_logprobs(x), tree_logprobs(sampler)
    returns = F.returns_to_go(REWARDS, F.kl_per_token(ours, REFERENCE, TREE_MASK), TREE_MASK, BETA)
    advantage = F.advantages(returns, TREE_MASK, "moving-average", average=0.4)  # any number changes nothing
    weights = F.importance_weights(ours - theirs, TREE_MASK, cap, level)
    chance = theirs.sum(1, keepdim=True).exp() * len(RESPONSES)
    F.policy_gradient_loss(ours, advantage * weights * chance, TREE_MASK).backward()
    assert x.grad is not None
    return -x.grad


def objective_gradient() -> torch.Tensor:
    """Of E_pi[(1 - beta) r - beta KL], exactly."""
    x = POLICY.clone().requires_grad_()
    logprobs = tree_logprobs(x).sum(1)
    (logprobs.exp() * ((1 - BETA) * REWARDS - BETA * (logprobs - REFERENCE.sum(1)))).sum().backward()
    assert x.grad is not None
    return x.grad


def test_the_weights_of_whole_responses_make_another_sampler_s_gradient_the_policy_s() -> None:
    assert torch.allclose(expected_gradient(float("inf"), "sequence"), objective_gradient(), atol=1e-12)
    capped = expected_gradient(1.5, "sequence") - objective_gradient()
    assert capped.abs().max() > 1e-3  # the cap's bias


def test_the_weights_of_tokens_give_the_gradient_of_the_surrogate() -> None:
    """sum_x d_q(x) sum_a grad pi(a | x) Q(x, a), what follows being drawn from q too, by recursion over the tree."""
    x = POLICY.clone().requires_grad_()
    pi, q = x.softmax(-1), SAMPLER.softmax(-1)
    reference = tree(3).log_softmax(-1)

    def total(prefix: tuple[int, ...], reached: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum from a prefix on, and the expected return from it on under q."""
        node = PREFIXES.index(prefix)
        summed, value = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for a in range(3):
            gain = -BETA * (pi[node, a].log() - reference[node, a]).detach()
            y = (*prefix, a)
            if y in RESPONSES:
                gain = gain + (1 - BETA) * REWARDS[RESPONSES.index(y)]
            else:
                more, onwards = total(y, reached * float(q[node, a]))
                summed, gain = summed + more, gain + onwards
            summed, value = summed + reached * pi[node, a] * gain, value + q[node, a] * gain
        return summed, value

    total((), 1.0)[0].backward()
    assert x.grad is not None
    found = expected_gradient(float("inf"), "token")
    assert torch.allclose(found, x.grad, atol=1e-12)
    assert (found - objective_gradient()).abs().max() > 1e-2  # it is not the policy's


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_gradient_comes_to_the_policy_s_as_the_sampler_does(level: str) -> None:
    assert torch.allclose(expected_gradient(1.0, level, POLICY), objective_gradient(), atol=1e-12)
    near = []
    for share in (0.1, 0.01):
        sampler = POLICY + share * (SAMPLER - POLICY)
        near.append((expected_gradient(2.0, level, sampler) - objective_gradient()).abs().max())
    assert near[1] < (0.15 * near[0] if level == "token" else 1e-9), near


def test_importance_weights_by_hand() -> None:
    log_ratio = torch.tensor([[2.0, 0.5, 4.0], [0.25, 100.0, 100.0]]).log().requires_grad_()
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    cases: dict[tuple[str, float], list[list[float]]] = {
        ("token", float("inf")): [[2, 0.5, 4], [0.25, 0, 0]],
        ("token", 3.0): [[2, 0.5, 3], [0.25, 0, 0]],
        ("sequence", float("inf")): [[4, 4, 4], [0.25, 0, 0]],
        ("sequence", 3.0): [[3, 3, 3], [0.25, 0, 0]],
    }
    for (level, cap), expected in cases.items():
        found = F.importance_weights(log_ratio, mask, cap, level)
        assert torch.allclose(found, torch.tensor(expected)) and not found.requires_grad, (level, cap)
    far = F.importance_weights(torch.tensor([[1e4, -1e4]]), torch.ones(1, 2), 2.0)
    assert far.tolist() == [[2.0, 0.0]]
