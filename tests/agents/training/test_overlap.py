"""The next batch in the making beside the gradient: what runs at once, what is refused, and what staleness costs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import ReinforceAgent
from agents import functional as F
from agents.rollout import Rollout
from agents.settings import ReinforceConfig
from agents.training.command import train
from agents.training.config import TrainConfig
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.models import LoraConfig, Samples
from rlaif_env.records import read_metrics
from tests.stress.endpoint_server import FaultServer
from tests.stress.survival import paid_by, samples
from tests.tiny import shape_of, tiny_backbone

SLOW = """
import os
import time
import numpy as np
from rlaif_env.api import BackendError, Scores

class Slow:
    name = "slow"
    calls = 0
    def score(self, prompts, responses):
        Slow.calls += 1
        if Slow.calls == int(os.environ.get("FAILS_AT", "0")):
            raise BackendError("the judge is out")
        time.sleep(float(os.environ.get("SECONDS", "0")))
        return Scores(np.array([sum(i * ord(c) for i, c in enumerate(r, 1)) / 1024 for r in responses], np.float32))

def make(task):
    Slow.calls = 0
    return Slow()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TrainConfig]]:
    """Configurations of six updates of a tiny model."""
    config = paid_by(SLOW, tmp_path_factory.mktemp("job"), eval_prompts=0, overlap=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLAIF_DEVICE", "cpu")
        yield config


def test_a_slow_judge_is_waited_for_while_the_gradient_is_computed(
    job: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS", "0.3")
    run = train(job(tmp_path / "run", validate_every=3, validation_prompts=2)).folder
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and len(samples(run)) == 36
    assert all(row["time/score"] >= 0.3 for row in rows)
    saved = sum(row["time/score"] - row["time/wait"] for row in rows[1:])
    assert saved >= 0.5 * sum(min(row["time/update"], row["time/score"]) for row in rows[:-1])
    # the first batch is the policy's own, the others are an update old; what they weigh says so
    gaps = [row["importance_gap"] for row in rows]
    assert gaps[0] < 1e-4 < min(gaps[1:]) and all(abs(row["importance_weight"] - 1) < 0.5 for row in rows)
    plain = train(job(tmp_path / "plain", overlap=False)).folder
    assert samples(plain)[:12] == samples(run)[:6] + samples(plain)[6:12] and samples(plain)[6:] != samples(run)[6:]
    assert "importance_gap" not in read_metrics(plain)[0]


def test_the_same_seed_is_the_same_run_and_one_that_is_gone_on_with_counts_nothing_twice(
    job: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (train(job(tmp_path / name)).folder for name in "ab")
    assert samples(one) == samples(two)
    monkeypatch.setenv("FAILS_AT", "5")
    config = job(tmp_path / "cut")
    with pytest.raises(BackendError, match=r"the judge is out .* are in .*failed-update-000005\.json"):
        train(config)
    assert len(json.loads((tmp_path / "cut" / "failed-update-000005.json").read_text())["batch"]) == 6
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()].count("000004") == 1
    monkeypatch.delenv("FAILS_AT")
    run = train(config).folder
    assert samples(run)[:24] == samples(one)[:24]
    prompts = [[row["prompt_index"] for row in samples(folder)] for folder in (run, one)]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 36
    (warning,) = [json.loads(line) for line in (run / "warnings.jsonl").read_text().splitlines()]
    assert warning["kind"] == "not-identical" and "the batch in the making is drawn anew (overlap)" in warning["text"]
    assert read_metrics(run)[4]["importance_gap"] < 1e-4 < read_metrics(run)[5]["importance_gap"]


def test_a_server_judges_beside_the_gradient_and_may_fail(job: Callable[..., TrainConfig], tmp_path: Path) -> None:
    def refuses(path: str, request: Any) -> tuple[int, Any] | None:
        text = str(request.get("prompt", ""))
        return (400, {"error": {"message": "no"}}) if "capital of" not in text and len(text) % 11 == 0 else None

    with FaultServer(answer=refuses, seconds=0.01) as server:
        options = {"model": "scorer", "url": server.url, "scale": (0, 9)}
        changed = {"reward": "direct-llm", "reward_options": options, "on_judge_failure": "drop-group"}
        result = train(job(tmp_path / "run", **changed, max_dropped=1.0))
    rows = samples(result.folder)
    groups = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    lost = sum(any(row["reward"] is None for row in group) for group in groups)
    assert result.dropped == lost > 0 and len(read_metrics(result.folder)) == 6


def test_a_judge_on_the_policy_s_weights_is_refused(job: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = job(tmp_path / "x")
    shared: dict[str, Any] = {"reward": "direct-llm", "reward_options": {"model": config.model, "minimum_mass": 0.0}}
    with pytest.raises(
        RLAIFError, match=r"that does not need the policy's base model .*, found 'direct-llm:.*leave --ov"
    ):
        train(job(tmp_path / "x", **shared))
    parts = {"direct-llm": {"weight": 1.0, **shared["reward_options"]}}
    with pytest.raises(RLAIFError, match=r"that does not need the policy's base model"):
        train(job(tmp_path / "y", reward="compose", reward_options={"parts": parts}))
    with pytest.raises(RLAIFError, match=r"expected agent.importance_cap above 0 with overlap"):
        train(job(tmp_path / "z", agent=ReinforceConfig(lora=LoraConfig(2), importance_cap=0.0)))
    assert threading.active_count() < 20


def enumerated(agent: ReinforceAgent, ids: np.ndarray) -> tuple[Rollout, torch.Tensor]:
    """Every response of two characters, or one that is the end, to a prompt; and the policy's log-probabilities."""
    width = agent.policy.backbone.logit_width
    rows = [[1]] + [[a, b] for a in range(width) if a != 1 for b in range(width)]
    samples = Samples(
        np.array([row + [0] * (2 - len(row)) for row in rows]),
        np.array([len(row) for row in rows]),
        np.zeros((len(rows), 2), dtype=np.float32),
    )
    prompts = np.repeat(ids[None], len(rows), 0)
    rollout = Rollout.of(prompts, np.ones_like(prompts), samples, agent.policy)
    with torch.no_grad():
        columns = (rollout.ids, rollout.mask, rollout.responses, rollout.response_mask)
        parts = [agent.policy.evaluate(*(c[i : i + 512] for c in columns)).logprobs for i in range(0, len(rows), 512)]
    return rollout, torch.cat(parts)


def test_what_a_batch_that_is_one_update_old_costs_the_gradient_exactly() -> None:
    """The expected gradient over all 6,000 responses of two tokens, before and after a step at the default rate."""
    model = tiny_backbone(0)
    agent = ReinforceAgent(model, ReinforceConfig(warmup_updates=0, beta=0.0), envs=shape_of(model, 2, 2))
    ids = np.array([5, 9, 20])
    for _ in range(3):  # a policy that has moved, and one more step from it
        agent.act({"input_ids": np.repeat(ids[None], 2, 0), "attention_mask": np.ones((2, 3), dtype=np.int64)})
        rollout, old = enumerated(agent, ids)
        agent.update(np.array([0.0, 1.0]))
    now = enumerated(agent, ids)[1]
    mask = rollout.response_mask
    rewards = ((rollout.responses * torch.tensor([3, 7])).sum(1) % 11).double() / 11
    theirs, ours = ((logprobs * mask).sum(1).double().exp() for logprobs in (old, now))
    assert abs(float(theirs.sum()) - 1) < 1e-4 and abs(float(ours.sum()) - 1) < 1e-4

    def gradient(chances: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        centred = rewards - (theirs * rewards).sum()
        factor = (chances * centred)[:, None].float() * weights * mask
        for parameter in agent.policy.parameters:
            parameter.grad = None
        with agent.policy.training():
            for rows in torch.arange(len(mask)).split(512):
                logprobs = agent.policy.evaluate(*rollout.cut(rows)).logprobs
                (logprobs * factor[rows, : logprobs.shape[1]]).sum().backward()
        return torch.cat([p.grad.flatten() for p in agent.policy.parameters if p.grad is not None]).double()

    true = gradient(ours, mask)
    ratio = (now - old) * mask
    error = {
        name: float((gradient(theirs, weights) - true).norm() / true.norm())
        for name, weights in {
            "none": mask,
            "token": F.importance_weights(ratio, mask, 2.0),
            "sequence": F.importance_weights(ratio, mask, float("inf"), "sequence"),
        }.items()
    }
    # tokens are weighed by their own ratio alone: how often their prefixes come is not corrected
    assert error["sequence"] < 1e-5 and error["token"] < 0.8 * error["none"] < 0.2, error
