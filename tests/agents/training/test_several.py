"""A training in several processes is the training in one, whichever of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.sampler import SamplerConfig
from agents.settings import ReinforceConfig
from agents.training.command import train
from agents.training.config import TrainConfig
from rlaif_env.api import RLAIFError
from rlaif_env.batches import shares
from rlaif_env.models.sharding import layers_of
from tests import ROOT
from tests.families import FAMILIES
from tests.stress.survival import prepared
from tests.tiny import tiny_backbone

# --- rows over processes ----------------------------------------------------------------------------------------------


def test_rows_are_divided_by_tokens_and_groups_stay_whole_where_that_is_even() -> None:
    # four groups of two with prompts of 10: 10 + 8, 10 + 6, 10 + 4, 10 + 2 tokens; the longest with the shortest
    assert shares([10] * 8, [4, 4, 3, 3, 2, 2, 1, 1], 2, 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    # one group: by rows, the prompt read by both, 3 + 8 and 3 + 7; or whole
    assert shares([3] * 4, [8, 1, 4, 2], 4, 2) == [[0], [1, 2, 3]]
    assert shares([3] * 4, [8, 1, 4, 2], 4, 2, whole=True) == [[0, 1, 2, 3], []]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_each_row_is_one_process_s_and_none_has_much_more_than_another(size: int) -> None:
    rng = np.random.default_rng(size)
    prompts, responses = rng.integers(5, 50, 9).repeat(4).tolist(), rng.integers(1, 60, 36).tolist()
    found = shares(prompts, responses, 4, size)
    assert sorted(row for rows in found for row in rows) == list(range(36))
    loads = [sum(responses[r] for r in rows) + sum(prompts[4 * g] for g in {r // 4 for r in rows}) for rows in found]
    # Graham: at most 4/3 of the best, which is no less than the mean; prompts read twice are in these loads
    assert max(loads) <= 4 / 3 * max(np.mean(loads), max(np.add(prompts, responses))) + 1


# --- forked processes -------------------------------------------------------------------------------------------------


def told(folder: Path, *cases: str) -> dict[str, Any]:
    """What `tests.stress.several` found."""
    command = [sys.executable, "-m", "tests.stress.several", str(folder), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told(tmp_path_factory.mktemp("several"), "updates_equal", "resumed", "disagreeing", "commands")


@pytest.mark.parametrize("name", ["lora", "full", "inexact"])
def test_twenty_updates_of_two_processes_are_those_of_one(found: dict[str, Any], name: str) -> None:
    gap = found["updates_equal"][name]
    assert gap["metrics"] == []
    assert gap["same"] and gap["apart"] < 1e-5 and gap["moved"] > 50 * gap["apart"]


def test_it_goes_on_in_another_number_of_processes_and_a_killed_leader_s_update_is_saved(found: dict[str, Any]) -> None:
    gap = found["resumed"]
    assert gap["codes"] == [[-signal.SIGKILL], [-signal.SIGKILL, 1], [0]]
    assert gap["between"] == 4  # killed in update 5, with checkpoints every 10
    assert "processes 1 -> 2" in gap["said"] and "processes 2 -> 1" in gap["said"]
    assert gap["same"] and gap["apart"] < 1e-5


def test_processes_that_are_not_alike_are_refused_and_the_leader_says_so(found: dict[str, Any]) -> None:
    cases = {"words": "found command line --agent.beta 0.1 on rank 1 and --agent.beta 0.0 on rank 0", "model": "policy"}
    for name, message in cases.items():
        case = found["disagreeing"][name]
        assert case["codes"] == [2, 0]
        assert message in case["said"][0] and "start the same command everywhere" in case["said"][0]
        assert case["said"][1] == ""


def test_fine_tuning_and_a_reward_model_s_training_are_those_of_one_process(found: dict[str, Any]) -> None:
    cases = found["commands"]
    for name in ("sft", "rm-lora"):
        assert cases[name]["codes"] == [[0], [0, 0]] and cases[name]["apart"] < 1e-5 and cases[name]["said"][1] == ""
    assert cases["broken"]["codes"] == [[2], [2, 0]]
    assert cases["broken"]["said"][0].count("expected a field 'response'") == 1 and cases["broken"]["said"][1] == ""


# --- sharded layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sharded", pytest.param("sharded_by_group", marks=pytest.mark.slow)])
def test_two_processes_that_hold_half_of_the_layers_each_learn_as_one(name: str, tmp_path: Path) -> None:
    case = told(tmp_path, name)[name]
    assert case["same"] and case["apart"] < 1e-5 and case["moved"] > 50 * case["apart"]
    assert [count["share"] for count in case["counts"]] == [0.5, 0.5]
    assert not any(count["others"] for count in case["counts"])  # adapter and head are whole
    leader, follower = case["counts"]
    assert leader["idle"] > 0 and follower["idle"] > follower["asked"] > 0  # their rows are uneven
    assert "on cpu (float32), 2 processes, task letters" in case["said"][0]


@pytest.mark.slow
def test_a_sharded_training_ends_with_the_last_whole_update_whatever_becomes_of_a_process(tmp_path: Path) -> None:
    found = told(tmp_path, "sharded_ends")["sharded_ends"]
    assert found["follower"]["same"] and found["follower"]["apart"] < 1e-5  # gone on with by one process
    expected = {
        "follower": ([2, -9], 3, "lost rank 1 (no answer"),
        "leader": ([-9, 1], 3, "last whole update, 3, is saved"),
        "follower-amid": ([2, -9], 5, "lost rank 1 (no answer"),
        "leader-amid": ([-9, 1], 5, "last whole update, 5, is saved"),
        "term": ([143, 0], 3, "terminated: a checkpoint"),
        "memory-0": ([2, 0], 5, "set agent.micro_batch"),
        "memory-1": ([2, 1], 2, "lost rank 1 (RLAIFError: expected memory for passes"),
        "finite": ([2, 0], 2, "found loss nan and gradient norm nan in rows"),
    }
    for name, (codes, saved, message) in expected.items():
        case = found[name]
        assert (case["codes"], case["saved"]) == (codes, saved) and message in "".join(case["said"]), case
        assert case["seconds"] < 30


@pytest.mark.slow
def test_the_layers_of_every_family_can_be_sharded(tmp_path: Path) -> None:
    found = told(tmp_path, "sharded_families")["sharded_families"]
    found.pop("time")
    assert len(found) == len(FAMILIES)
    assert all(case["gap"] < 1e-5 and case["size"] > 1e-6 for case in found.values()), found


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(sampler=SamplerConfig(url=("http://127.0.0.1:1",)), shard=True, out=tmp_path / "run")
    with pytest.raises(RLAIFError, match="expected several processes to divide the layers over, found one"):
        train(config)
    with pytest.raises(RLAIFError, match="expected with --shard an adapter to be trained"):
        replace(config, agent=ReinforceConfig(trainable="full"))
    for sampler in (SamplerConfig(), SamplerConfig(dtype="bfloat16")):
        with pytest.raises(RLAIFError, match=r"expected with --shard servers that sample \(--sampler.url\)"):
            replace(config, sampler=sampler)
    with pytest.raises(RLAIFError, match="expected with --shard no --overlap"):
        replace(config, overlap=True)
    model = tiny_backbone().model
    with pytest.raises(RLAIFError, match="expected a model whose 7 decoder layers can be told"):
        model.config.num_hidden_layers, before = 7, model.config.num_hidden_layers
        try:
            layers_of(model)
        finally:
            model.config.num_hidden_layers = before


@pytest.mark.slow
def test_however_it_ends_the_last_whole_update_is_saved_and_it_goes_on_to_the_same(tmp_path: Path) -> None:
    found = told(tmp_path, "ends")["ends"]
    found.pop("time")
    assert len(found) == 9
    for name, case in found.items():
        rank, method, count, number, _ = name.split("-")
        whole = int(count) - 1 - (method == "score") + (method == "_await_whole")  # one call scores held-out answers
        assert case["saved"] == whole, case
        assert case["again"] == [0, 0] and case["same"] and case["apart"] < 1e-5, case
        assert max(case["codes"]) > 0 and case["seconds"] < 20
        if number == "SIGKILL":
            assert case["codes"][int(rank)] == -signal.SIGKILL
            said = case["said"][1 - int(rank)]
            assert ("lost rank 1" if rank == "1" else f"checkpoint of the last whole update, {whole}, is saved") in said


@pytest.mark.slow
def test_what_fails_in_one_process_is_said_once_with_its_rank(tmp_path: Path) -> None:
    found = told(tmp_path, "failing")["failing"]
    assert found["memory"]["codes"] == [0, 0] and found["memory"]["saved"] == 6
    assert found["bug"]["codes"] == [2, 0] and found["bug"]["saved"] == 3
    assert "lost rank 1 (KeyError: 'a bug')" in found["bug"]["said"][0]
    assert found["sampling"]["codes"] == [1, 0] and found["sampling"]["saved"] == 2
    assert found["judge"]["codes"] == [2, 0] and found["judge"]["saved"] == 2
    assert all(case["said"][1] == "" for name, case in found.items() if name != "time")


# --- torchrun ---------------------------------------------------------------------------------------------------------

REWARD = """
import time
def vowels(prompts, responses):
    time.sleep(0.1)
    return [sum(c in "aeiou" for c in r) / len(r or "x") for r in responses]
"""


def at_work(folder: Path, updates: int, *options: str) -> tuple[subprocess.Popen[bytes], dict[str, int]]:
    """A training by torchrun in ``folder / "run"`` that has made four updates, and its processes' ids by rank."""
    prepared(folder)
    (folder / "reward.py").write_text(REWARD)
    settings = ["--task", folder / "task.toml", "--model", folder / "model", "--reward", f"{folder}/reward.py:vowels"]
    numbers = ["--updates", updates, "--group-size", 3, "--eval-prompts", 0, "--checkpoint-every", 1000]
    command = ["-m", "torch.distributed.run", "--standalone", *options, "--nproc-per-node", 2, "-m", "rlaif_env.cli"]
    words = [str(word) for word in (sys.executable, *command, "train", *settings, *numbers, "--out", folder / "run")]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.STDOUT, stdout=said)
    metrics = folder / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None, (folder / "said").read_text()
        time.sleep(0.1)
    workers = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == process.pid:
                pairs = (word.partition("=") for word in (entry / "environ").read_text().split("\0"))
                workers[{name: value for name, _, value in pairs}["RANK"]] = int(entry.name)
        except (OSError, KeyError):
            continue
    return process, workers


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "leader", "follower"])
def test_torchrun_and_its_processes_end_with_the_last_whole_update(whom: str, tmp_path: Path) -> None:
    process, workers = at_work(tmp_path, 500)
    if whom == "torchrun":
        process.terminate()
    else:
        os.kill(workers["0" if whom == "leader" else "1"], signal.SIGKILL)
    assert process.wait(60) != 0
    updates = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("0*"))
    assert saved >= 4 and updates - saved in (0, 1)  # the update in work may have been written down
    said = (tmp_path / "said").read_text().replace("\n", " ")
    expected = {
        "torchrun": "last whole update is saved",
        "leader": "rank 1: lost the leader",
        "follower": "lost rank 1",
    }
    assert expected[whom] in said


@pytest.mark.slow
def test_torchrun_starts_a_killed_training_again_and_it_goes_on(tmp_path: Path) -> None:
    process, workers = at_work(tmp_path, 12, "--max-restarts", "2")
    os.kill(workers["0"], signal.SIGKILL)
    assert process.wait(120) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13)) and (tmp_path / "run" / "finished.json").exists()
    assert "going on after update" in (tmp_path / "said").read_text()
