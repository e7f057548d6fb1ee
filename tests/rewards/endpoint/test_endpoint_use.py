"""Training, labelling and judging by a language model behind a server, and what is recorded of it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.training.command import train
from agents.training.config import TrainConfig
from benchmarks.evaluation.judge_panel import JudgePanel
from rewards import make_reward
from rewards.direct_score import DirectLLMScore
from rewards.endpoint.config import ServerConfig
from rewards.endpoint.model import EndpointLM
from rewards.labeling.command import LabelConfig, label
from rewards.labeling.command import main as label_main
from rewards.labeling.labeler import LabelingConfig, PreferenceLabeler
from rewards.language_model.config import LanguageModelConfig
from rewards.prompts import score_prompt
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.data.preferences import read_preferences
from rlaif_env.data.tasks import load_task
from rlaif_env.servers.limits import Limits
from tests import ROOT
from tests.rewards.labeling.labelling import pair_rows, quiet, write_rows
from tests.stress.endpoint_server import FaultServer, scores_of
from tests.stress.endpoints import LABELLINGS, cost_run
from tests.tiny import tiny_backbone

KEY = "sk-planted-9876543210"
TASK = """
name = "toy"
kind = "continuation"
criterion = "how good it is"
max_prompt_tokens = 8
max_response_tokens = 6
[source]
prompts = { train = ["ab", "film", "xyz.", "Q"], test = ["ab", "film"] }
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif_env.servers.client._FIRST_PAUSE", 0.01)
    monkeypatch.delenv("RLAIF_LLM_API_KEY", raising=False)
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    tiny_backbone(0).save_merged(None, tmp_path / "policy")
    (tmp_path / "toy.toml").write_text(TASK)
    return tmp_path / "policy"


def connect(server: FaultServer, **settings: Any) -> EndpointLM:
    return EndpointLM(server.url, server.model, **{"cache": None, "limits": {"retries": 2}, **settings})


def served(server: FaultServer, **settings: Any) -> LanguageModelConfig:
    return LanguageModelConfig("scorer", server.url, server=ServerConfig(cache=False, **settings))


def at_most_five(path: str, request: Mapping[str, Any]) -> tuple[int, Any] | None:
    return (400, {"error": {"message": "logprobs: at most 5"}}) if (request.get("logprobs") or 0) > 5 else None


def train_config(policy: Path, server: FaultServer, **settings: Any) -> TrainConfig:
    folder = policy.parent
    llm = {"cache": str(folder / "answers.sqlite"), "limits": {"retries": 1}}
    return TrainConfig(
        **{
            "task": str(folder / "toy.toml"),
            "reward": "direct-llm",
            "reward_options": {"model": "scorer", "url": server.url, "server": llm},
            "model": str(policy),
            "updates": 3,
            "prompts_per_update": 2,
            "eval_prompts": 2,
            "out": folder / "run",
            "group_size": 2,
            **settings,
        }
    )


# --- training


def test_a_policy_is_trained_on_the_scores_of_a_server(server: FaultServer, policy: Path) -> None:
    train(train_config(policy, server))
    task = load_task(policy.parent / "toy.toml")
    rows = [json.loads(line) for line in (policy.parent / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 4
    for row in rows:
        p = np.array(scores_of(score_prompt(task, row["prompt"], row["response"])))
        score = p @ np.arange(1, 11) / p.sum()
        assert row["score"] == pytest.approx(score, abs=1e-6)
        assert row["reward"] == pytest.approx(2 * (score - 1) / 9 - 1, abs=1e-6)
        assert (row["label_mass"], row["labels_bounded"]) == (pytest.approx(0.9), 0)
        facts = json.loads(row["server"])
        assert (row["scale"], facts["url"], facts["model"], facts["top"]) == ("1 to 10", server.url, "scorer", 20)
    assert max(server.answered.values()) == 1  # what was asked before is in the cache, evaluations included


# --- labelling


LABEL = """
import sys
from rewards.labeling.command import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_labelling_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    n, concurrency = 60, 8
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(n))
    with FaultServer(seconds=0.02) as server:
        options = ["--task", "helpful", "--input", str(source), "--out", str(tmp_path / "out"), "--batch", "10"]
        options += ["--labeler.url", server.url, "--labeler.model", "scorer", "--mode", "score"]
        options += ["--labeler.server.cache", str(tmp_path / "answers.sqlite"), "--labeler.server.boundaries", "prefix"]
        options += ["--labeler.server.limits.concurrency", str(concurrency)]
        child = subprocess.Popen([sys.executable, "-c", LABEL, *options], cwd=ROOT, stdout=subprocess.DEVNULL)
        while sum(server.answered.values()) < n and child.poll() is None:
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        time.sleep(0.3)
        first = server.answered.copy()
        journal = (tmp_path / "out" / "journal.jsonl").read_bytes().count(b"\n")
        assert 0 < journal < 2 * n and not (tmp_path / "out" / "preferences.jsonl").exists()
        assert label_main(options) == 0
        twice = [question for question, times in server.answered.items() if times > 1]
        assert max(server.answered.values()) <= 2
        assert len(twice) <= concurrency  # no more than were on their way when it was killed
        assert set(twice) <= set(first)
        total = sum(server.answered.values())
        assert label_main(options) == 0  # a third run asks nothing
        assert sum(server.answered.values()) == total
    rows = list(read_preferences(tmp_path / "out" / "preferences.jsonl"))
    assert [row.prompt for row in rows] == [f"question {i}" for i in range(n)]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["server"]["served"] == "scorer"


def test_every_label_says_what_its_server_could_do(server: FaultServer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(3))
    options: dict[str, Any] = {"task": "helpful", "input": source, "labeler": served(server, revision="r1")}
    label(LabelConfig(**options, out=tmp_path / "pairwise"), quiet())
    server.answer = at_most_five
    label(LabelConfig(**options, mode="score", out=tmp_path / "score"), quiet())
    for row in read_preferences(tmp_path / "pairwise" / "preferences.jsonl"):
        for answer in row.meta["label"]["answers"]:
            facts = answer["server"]
            assert (facts["url"], facts["model"], facts["revision"]) == (server.url, "scorer", "r1")
            assert (facts["route"], facts["top"], facts["served"]) == ("completion", 20, "scorer")
            assert "fallback" not in facts
    scored = list(read_preferences(tmp_path / "score" / "preferences.jsonl"))
    assert len(scored) == 3
    bounded = []
    for row in scored:
        record = row.meta["label"]
        assert record["parameters"]["labels"] == ["1", "2", "3", "4", "5"]
        for answer in record["answers"]:
            assert answer["server"]["fallback"] == "the server shows 5 tokens and the scale has 10 scores"
            bounded += [len(labels) for labels in answer.get("bounded", [])]
    assert bounded and max(bounded) < 5  # five tokens, some of them 6 to 9, never show all five scores


def test_what_an_earlier_process_recorded_is_kept(server: FaultServer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(2))
    options: dict[str, Any] = {"task": "helpful", "input": source, "mode": "score", "out": tmp_path / "out"}
    label(LabelConfig(**options, labeler=served(server)), quiet())
    before = (tmp_path / "out" / "preferences.jsonl").read_bytes()
    server.answer = lambda path, request: (503, {"error": {"message": "gone"}})
    report = label(LabelConfig(**options, labeler=served(server, limits=Limits(retries=0))), quiet())
    assert (tmp_path / "out" / "preferences.jsonl").read_bytes() == before
    assert (report["labelled"], report["asked_in_this_run"]) == (2, 0)


def test_the_prices_of_the_command_are_the_servers(server: FaultServer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(2))
    labeler = served(server, limits=Limits(price_in=2.0, price_out=8.0))
    report = label(LabelConfig(task="helpful", input=source, labeler=labeler, out=tmp_path / "out"), quiet())
    used = report["server_usage"]
    assert used["answers"] == used["requests"] > 0
    assert used["cost"] == pytest.approx((used["tokens_in"] * 2 + used["tokens_out"] * 8) / 1e6)


@pytest.mark.parametrize("name", LABELLINGS)
def test_the_cost_is_what_the_server_counted_and_a_dry_run_knows_it_before(name: str) -> None:
    shares = cost_run(name, 30)
    report = {what: share for what, share in shares.items() if what.startswith("report")}
    assert report == pytest.approx(dict.fromkeys(report, 1.0), abs=0.05)
    assert shares == pytest.approx(dict.fromkeys(shares, 1.0), abs=0.2)


def test_what_could_not_be_used_is_counted_too() -> None:
    shares = cost_run("completion, score", 30, faults=0.2)
    assert [shares[f"report {what}"] for what in ("requests", "in", "out", "cost")] == pytest.approx([1] * 4, abs=0.05)


def test_the_cost_is_that_of_all_runs_of_the_job(server: FaultServer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(2))
    options: dict[str, Any] = {"task": "helpful", "input": source, "labeler": served(server), "out": tmp_path / "out"}
    label(LabelConfig(**options), quiet())
    write_rows(source, pair_rows(5))
    report = label(LabelConfig(**options), quiet())
    for _ in range(2):
        assert report["tokens"] == {"input": server.counted["in"], "output": server.counted["out"], "exact": True}
        assert report["server_usage"]["requests"] == server.counted["requests"]
        before = dict(server.counted)
        report = label(LabelConfig(**options), quiet())  # nothing is open: nothing is asked
        assert dict(server.counted) == before


def test_a_dry_run_of_a_server_that_is_gone_says_so(server: FaultServer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(2))
    server.answer = lambda path, request: (503, {"error": {"message": "gone"}})
    labeler = served(server, limits=Limits(retries=0))
    for mode in ("pairwise", "score"):
        with pytest.raises(BackendError, match=r"probing scorer at .*: gave up after 1 attempts, the last: HTTP 503"):
            label(LabelConfig(task="helpful", input=source, labeler=labeler, mode=mode, dry_run=True), quiet())


# --- scales that a server cannot tell apart


def test_a_server_without_pre_fill_is_asked_for_single_tokens() -> None:
    with FaultServer("openai") as server, connect(server) as lm:
        reward = DirectLLMScore(lm, "helpful")
        assert reward.scale == (0, 9)
        assert reward.fallback.startswith("the server does not go on with an answer that is begun for it, so that '1'")
        scores = reward.score(["why"], ["so"])
        asked = score_prompt(load_task("helpful"), "why", "so", scale=(0, 9))
        p = np.array([0.0, *scores_of(asked)[:9]])
        p[1] += scores_of(asked)[9]  # "10" is no score of this scale: what begins with "1" is "1"
        assert scores.info["labels_bounded"].tolist() == [1]  # "0", which the server never shows
        assert scores.info["score"][0] == pytest.approx(p @ np.arange(10) / p.sum(), abs=0.06)
        assert scores.info["scale"].tolist() == ["0 to 9"]
        assert json.loads(scores.info["server"][0])["fallback"] == reward.fallback
        labeler = PreferenceLabeler(lm, "helpful", mode="score")
        record = labeler.label(["why"], ["so"], ["no"]).records[0]
        assert record["parameters"]["labels"] == [str(i) for i in range(10)]
        assert [a["server"]["fallback"] for a in record["answers"]] == [reward.fallback] * 2
        assert [a["bounded"] for a in record["answers"]] == [[["0"]]] * 2
        assert DirectLLMScore(lm, "helpful", scale=(1, 9)).fallback == ""
        assert PreferenceLabeler(lm, "helpful").label(["why"], ["so"], ["no"]).status == ("ok",)


def test_a_scale_that_cannot_be_changed_says_what_to_change() -> None:
    template = "Rate from 1 to 10: {text}\nScore: "
    with FaultServer("openai") as server, connect(server) as lm:
        message = r"template ask for a score from 0 to 9 and give scale=\(0, 9\)"
        with pytest.raises(RLAIFError, match=message):
            DirectLLMScore(lm, "helpful", template=template)
        with pytest.raises(RLAIFError, match=message):
            PreferenceLabeler(lm, "helpful", mode="score", template=template)

    def three(path: str, request: Mapping[str, Any]) -> tuple[int, Any]:
        top = {"7": -1.0, "8": -2.0, "9": -3.0}
        return 200, {"model": "scorer", "choices": [{"text": "7", "logprobs": {"top_logprobs": [top]}}]}

    with FaultServer(answer=three) as server, connect(server) as lm:
        with pytest.raises(
            BackendError, match=r"expected at least 5 of the likeliest tokens from scorer at .* found 3"
        ):
            DirectLLMScore(lm, "helpful")


# --- judging


def test_judges_take_a_url(server: FaultServer) -> None:
    llm = {"cache": None, "boundaries": "prefix"}
    reward = make_reward("direct-llm", task="helpful", url=server.url, model="scorer", server=llm)
    values = reward.score(["why"], ["so"]).values
    panel = JudgePanel(
        load_task("helpful"),
        ["direct-llm"],
        judge=LanguageModelConfig("scorer", server.url, server=ServerConfig(cache=False, boundaries="prefix")),
        label=LabelingConfig(scale=(1, 10)),
        settings={},
        pairwise=True,
    )
    panel.build_all()
    assert panel.backend("direct-llm").score(["why"], ["so"]).values.tolist() == values.tolist()
    labels = panel.labeler().label(["why"], ["so"], ["no"])
    assert labels.status == ("ok",)
    assert labels.records[0]["answers"][0]["server"]["url"] == server.url


# --- the key


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_planted_key_is_nowhere(
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = {"error": {"message": f"no credit for Bearer {KEY} ({KEY})"}}
    with FaultServer(key=KEY) as server:
        server.answer = lambda path, r: (400, echo) if "poison" in str(r.get("prompt")) else None
        rows = [*pair_rows(4), {"prompt": "poison", "response_1": "a", "response_2": "b"}]
        llm = {"cache": str(tmp_path / "answers.sqlite"), "api_key_env": "MY_KEY", "limits": {"retries": 1}}
        options = ["--task", "helpful", "--input", str(write_rows(tmp_path / "pairs.jsonl", rows))]
        options += ["--labeler.url", server.url, "--labeler.model", "scorer", "--out", str(tmp_path / "labels")]
        options += ["--labeler.server.cache", llm["cache"], "--labeler.server.api-key-env", "MY_KEY"]
        assert label_main([*options, "--labeler.server.limits.retries", "1"]) == 0
        assert "[key]" in (tmp_path / "labels" / "errors.jsonl").read_text()
        options = {"model": "scorer", "url": server.url, "server": llm}
        train(train_config(policy, server, reward_options=options))
        asked = len(server.answered)
        server.answer = lambda path, r: (500, echo) if len(server.answered) > asked + 2 else None
        with pytest.raises(RLAIFError) as caught:
            train(train_config(policy, server, reward_options=options, seed=5, out=tmp_path / "failed"))
        assert "[key]" in str(caught.value)
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
    chain: BaseException | None = caught.value
    while chain is not None:
        assert KEY not in repr(chain) + str(chain)
        chain = chain.__cause__ or chain.__context__
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err + caplog.text
    kept = everything_in(tmp_path)
    assert b"scorer" in kept and b"MY_KEY" in kept
    assert KEY.encode() not in kept
