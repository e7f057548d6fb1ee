"""A reward whose parts are standardised over samples of the policy as it is before training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.training.command import train
from agents.training.config import TrainConfig
from agents.training.rescore import rescore
from rlaif_env.api import RLAIFError
from rlaif_env.records import read_metrics
from rlaif_env.references import load_reference
from tests.stress.survival import differences, paid_by, samples

PARTS = """
import os, signal
import numpy as np
from rlaif_env.api import BackendError, Scores

class Letters:
    name = "letters"
    asked, calls, stop_at, lost = [], 0, 0, ""

    def score(self, prompts, responses):
        cls = type(self)
        cls.asked.append((list(prompts), list(responses)))
        cls.calls += 1
        if cls.calls == cls.stop_at:
            signal.raise_signal(signal.SIGINT)
        if rows := [i for i, text in enumerate(responses) if cls.lost and cls.lost in text]:
            raise BackendError("cannot read it", rows)
        return Scores(np.array([sum(i * ord(c) for i, c in enumerate(r, 1)) for r in responses], np.float32))

def letters():
    return Letters()

def first(prompts, responses):
    return [1e-3 * ord(r[0]) if r else 0.0 for r in responses]

def same(prompts, responses):
    return [3.0] * len(responses)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TrainConfig]]:
    """Configurations of six updates of a tiny model by a sum of two parts of very different scales."""
    folder = tmp_path_factory.mktemp("job")
    code = folder / "judge.py"
    parts = {"letters": {"weight": 1.0, "reward": f"{code}:letters"}, "first": [2.0, f"{code}:first"]}
    usual = {"reward": "compose", "reward_options": {"parts": parts, "calibration_samples": 7}, "eval_prompts": 2}
    config = paid_by(PARTS, folder, **usual)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLAIF_DEVICE", "cpu")
        yield config


def letters(config: TrainConfig) -> Any:
    """The class of the part that counts its calls."""
    return type(load_reference(config.reward_options["parts"]["letters"]["reward"])())


def scale(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "calibration.json").read_text())
    return found


def test_parts_weigh_alike_from_the_first_update_on(job: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = job(tmp_path / "run", validate_every=3, validation_prompts=2)
    judge = letters(config)
    judge.asked = []
    run = train(config).folder
    drawn, others = judge.asked[0], judge.asked[1:]
    assert len(drawn[0]) == 8 and drawn[0][::2] == drawn[0][1::2]  # seven, in whole groups of two to a prompt
    assert drawn not in others  # each part was asked once for them, though there are three environments
    kept = scale(run)
    assert [(row["prompt"], row["response"]) for row in kept["samples"]] == [*zip(*drawn, strict=True)]
    values = judge().score(*drawn).values
    assert kept["moments"]["letters"] == pytest.approx([values.mean(), values.std()])
    for row in samples(run):
        z = {name: (row[f"part/{name}"] - mean) / std for name, (mean, std) in kept["moments"].items()}
        assert row["reward"] == pytest.approx(z["letters"] + 2 * z["first"], abs=1e-4)
    first = [row for row in samples(run) if row["step"] == 1]
    assert 0.2 < np.std([row["scaled/letters"] for row in first]) < 5
    before = json.loads((run / "before.json").read_text())["measures"]
    assert np.allclose(before["reward"], np.add(before["scaled/letters"], 2 * np.array(before["scaled/first"])))


def test_a_run_that_is_gone_on_with_has_the_scale_it_began_with(
    job: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(job(tmp_path / "whole", checkpoint_every=1)).folder
    cut = job(tmp_path / "cut", checkpoint_every=1)
    judge = letters(cut)
    monkeypatch.setattr(judge, "calls", 0)
    monkeypatch.setattr(judge, "stop_at", 5)  # the samples, the evaluation before, three updates
    assert train(cut).interrupted and len(read_metrics(tmp_path / "cut")) == 3
    monkeypatch.setattr(judge, "stop_at", 0)
    judge.asked = []
    train(cut)
    drawn = [row["response"] for row in scale(whole)["samples"]]
    assert all(responses != drawn for _, responses in judge.asked)  # nothing was drawn or asked again
    assert differences(whole, tmp_path / "cut") == [] and scale(whole) == scale(tmp_path / "cut")


def test_another_reward_has_another_scale_from_the_same_samples(
    job: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(tmp_path / "run", checkpoint_every=1)
    judge = letters(config)
    monkeypatch.setattr(judge, "calls", 0)
    monkeypatch.setattr(judge, "stop_at", 5)
    assert train(config).interrupted
    monkeypatch.setattr(judge, "stop_at", 0)
    old, parts = scale(tmp_path / "run"), {"letters": config.reward_options["parts"]["letters"]}
    options = {"parts": parts, "calibration_samples": 7}
    run = train(job(tmp_path / "run", checkpoint_every=1, reward_options=options, change_reward=True)).folder
    assert scale(run)["samples"] == old["samples"]
    assert scale(run)["moments"] == {"letters": old["moments"]["letters"]}


def test_what_was_not_scored_is_scored_on_the_same_scale_later(
    job: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = samples(train(job(tmp_path / "plain", eval_prompts=0)).folder)
    config = job(tmp_path / "run", eval_prompts=0, on_judge_failure="drop-group", max_dropped=1.0)
    drawn = "".join(row["response"] for row in scale(tmp_path / "plain")["samples"])
    rare = next(c for row in plain if row["step"] == 1 for c in row["response"] if c not in drawn)
    monkeypatch.setattr(letters(config), "lost", rare)
    run = train(config).folder
    assert any(row["reward"] is None for row in samples(run))
    monkeypatch.setattr(letters(config), "lost", "")
    assert rescore(config) == 0
    assert [r["reward"] for r in samples(run) if r["step"] == 1] == [r["reward"] for r in plain if r["step"] == 1]


def test_a_part_without_a_scale_is_an_error_before_the_first_update(
    job: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = job(tmp_path / "run")
    same = config.reward_options["parts"]["first"][1].replace("first", "same")
    options = {"parts": {"flat": [1.0, same]}, "calibration_samples": 4}
    with pytest.raises(RLAIFError, match="rewards of the part 'flat' that differ, found 3 for all 4 samples"):
        train(job(tmp_path / "run", reward_options=options))
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "calibration.json").exists()
