"""A judge that fails on some responses: what is dropped, counted, kept, stopped, gone on with and asked again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.paid import Dropped, Paid
from agents.training.command import main, train
from agents.training.config import TrainConfig
from agents.training.heldout import HeldOut, changes
from agents.training.rescore import main as rescore_main
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.data.tasks import load_task
from rlaif_env.keywords import resolve_reward
from rlaif_env.records import read_metrics
from rlaif_env.runs import RunFolder
from tests.stress.endpoint_server import FaultServer
from tests.stress.survival import differences, paid_by, samples

JUDGE = """
import hashlib
import os
import numpy as np
from rlaif_env.api import BackendError, Scores

def unlucky(text, share):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < share

class Letters:  # tells responses apart: where all rewards are alike, rounding alone would decide what is learned
    name = "letters"

    def score(self, prompts, responses):
        share = int(os.environ.get("UNLUCKY", "0"))
        rows = [i for i, pair in enumerate(zip(prompts, responses)) if unlucky("|".join(pair), share)]
        if rows:
            raise BackendError("the judge is out", rows)
        total = np.array([sum(i * ord(c) for i, c in enumerate(r, 1)) for r in responses], dtype=np.float32)
        return Scores(total / 1024, {"total": total, "large": total > 1000})

def make(task):
    return Letters()
"""

Start = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Configurations of six updates of a tiny model whose judge fails on a share of the texts (UNLUCKY, in percent)."""
    return paid_by(JUDGE, tmp_path_factory.mktemp("job"), eval_prompts=4, on_judge_failure="drop-group")


@pytest.fixture
def unlucky(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    return lambda share: monkeypatch.setenv("UNLUCKY", str(share))


def failed_groups(rows: list[dict[str, Any]], group_size: int) -> int:
    groups = [rows[i : i + group_size] for i in range(0, len(rows), group_size)]
    return sum(any(row["reward"] is None for row in group) for group in groups)


def finished(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "finished.json").read_text())
    return found


# --- what was paid, and how much of it may be missing -----------------------------------------------------------------


def paid(failed: list[int], n: int = 6, k: int = 2) -> Paid:
    rewards = np.arange(float(n))
    mask = np.isin(np.arange(n), failed)
    rewards[mask] = np.nan
    reasons = np.array(["out" if f else None for f in mask], dtype=object)
    return Paid.of(rewards, {"judge_failed": reasons, "_judge_failed": mask} if failed else {}, k)


def test_groups_are_whole_or_left_out() -> None:
    assert paid([]).whole.all() and paid([]).dropped == 0 and paid([]).reason == ""
    two = paid([1, 5])
    assert two.whole.tolist() == [False, False, True, True, False, False]
    assert (two.groups, two.dropped, two.reason) == (3, 2, "out")
    assert two.column("reward", two.rewards).tolist() == [0.0, None, 2.0, 3.0, 4.0, None]
    assert paid([2], k=1).dropped == 1


def test_too_much_that_is_dropped_within_ten_batches_is_told_and_what_is_older_is_forgotten() -> None:
    counted = Dropped(0.2)  # of 30 groups in ten batches: 6
    assert [bool(counted.count(paid([0, 2]))) for _ in range(3)] == [False] * 3
    assert counted.updated() == {"dropped_groups": 6.0} and counted.updated() == {"dropped_groups": 0.0}
    told = counted.count(paid([0]))
    assert told.startswith("expected the judge to fail in at most 0.2 of the groups of 10 batches (max_dropped), found")
    assert "7 of 30 were dropped within 4; it failed last with: out" in told
    assert [counted.count(paid([])) for _ in range(8)] == [""] * 8
    assert counted.count(paid([0, 2])) == "" and counted.total == 9
    assert all(Dropped(1.0).count(paid([0, 2, 4])) == "" for _ in range(30))


def test_held_out_prompts_without_a_score_are_left_out_of_the_change_and_counted(tmp_path: Path) -> None:
    nan = float("nan")
    rest = {"length": np.arange(8.0)}
    texts = [f"p{i}" for i in range(8)], ["r"] * 8
    before = HeldOut(*texts, {"reward": np.array([nan, *range(7)], float), **rest}, {0: "out"})
    after = HeldOut(*texts, {"reward": np.array([*range(1, 8), nan], float), **rest}, {7: "out"})
    first, last, change = changes(before, after)["reward"]
    assert (first.n, last.n, change.n) == (6, 6, 6) and changes(before, after)["length"][2].n == 8
    assert change.estimate == pytest.approx(last.estimate - first.estimate) == 2.0
    assert before.means() == {"reward": 3.0, "length": 3.5, "unscored": 1.0}
    (tmp_path / "x.json").write_text(json.dumps(before.to_json(), allow_nan=False))
    again = HeldOut.read(tmp_path / "x.json")
    np.testing.assert_array_equal(again.measures["reward"], before.measures["reward"])
    assert (
        again.failures == {0: "out"} and json.loads((tmp_path / "x.json").read_text())["measures"]["reward"][0] is None
    )


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_whose_judge_fails_on_some_rows_ends_with_its_counts_right(
    job: Start, unlucky: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlucky(12)
    run = tmp_path / "run"
    result = train(job(run, validate_every=3, validation_prompts=2))
    rows, metrics = samples(run), read_metrics(run)
    assert len(rows) == 6 * 6 and [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    lost = [row for row in rows if row["reward"] is None]
    assert lost and {row["judge_failed"] for row in lost} == {"the judge is out"}
    assert all(row["total"] is None and row["large"] is None and row["gold"] is not None for row in lost)
    assert result.dropped == finished(run)["dropped_groups"] == failed_groups(rows, 2)
    for row in metrics:
        ours = [s for s in rows if s["step"] == row["step"]]
        groups = [ours[i : i + 2] for i in range(0, 6, 2)]
        whole = [s["reward"] for group in groups for s in group if all(s["reward"] is not None for s in group)]
        assert row["reward"] == pytest.approx(np.mean(whole), abs=1e-6)
        assert row["reward/total"] == pytest.approx(1024 * np.mean(whole), rel=1e-6)
        assert row["dropped_groups"] == failed_groups(ours, 2)
    unlucky(0)
    judge = resolve_reward(job(run).reward, load_task(job(run).task), {})
    true = judge.score([row["prompt"] for row in rows], [row["response"] for row in rows]).values
    assert [row["reward"] for row in rows] == [
        None if row["reward"] is None else float(t) for row, t in zip(rows, true, strict=True)
    ]


def test_a_batch_without_one_whole_group_is_no_update_and_its_responses_are_kept(
    job: Start, unlucky: Callable[[int], None], tmp_path: Path
) -> None:
    unlucky(45)
    run = tmp_path / "run"
    train(job(run, max_dropped=1.0, eval_prompts=0, prompts_per_update=1))
    rows, metrics = samples(run), read_metrics(run)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert len(rows) > 12 and len(rows) == 2 * (6 + finished(run)["dropped_groups"])
    assert sum(row["dropped_groups"] for row in metrics) == finished(run)["dropped_groups"] == failed_groups(rows, 2)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_nothing_changes_where_nothing_fails_and_a_run_cut_short_goes_on_exactly(
    job: Start, unlucky: Callable[[int], None], tmp_path: Path
) -> None:
    unlucky(0)
    strict, lenient = (train(job(tmp_path / m, on_judge_failure=m)).folder for m in ("raise", "drop-group"))
    assert samples(strict) == samples(lenient)
    assert (strict / "policy/adapter_model.safetensors").exists() == (
        lenient / "policy/adapter_model.safetensors"
    ).exists()
    unlucky(20)
    whole = train(job(tmp_path / "whole", max_dropped=1.0)).folder
    assert finished(whole)["dropped_groups"] > 0
    late = train(job(tmp_path / "late", max_dropped=1.0)).folder
    train(job(late, max_dropped=1.0, resume=str(late / "checkpoints" / "000004")))
    assert differences(whole, late) == [] and finished(late) == finished(whole)


def test_a_judge_that_is_gone_stops_the_run_saved_and_once_back_it_goes_on(
    job: Start, unlucky: Callable[[int], None], tmp_path: Path
) -> None:
    unlucky(100)
    run = tmp_path / "run"
    with pytest.raises(
        BackendError, match=r"to score some of 4 held-out prompts, found that it failed on all \(the judge is out"
    ):
        train(job(tmp_path / "none"))
    config = job(run, eval_prompts=0)
    with pytest.raises(BackendError) as told:
        train(config)
    message = r"found that 18 of 30 were dropped within 6; it failed last with: the judge is out"
    assert message in str(told.value) and "--max-dropped 1` drops as many as it takes" in str(told.value)
    assert len(samples(run)) == 36 and not (run / "metrics.jsonl").exists()
    unlucky(0)
    result = train(config)
    assert len(samples(run)) == 72 and result.dropped == 18 and [row["step"] for row in read_metrics(run)][-1] == 6
    assert read_metrics(run)[0]["dropped_groups"] == 18.0


def test_a_failure_still_ends_a_run_by_default_and_the_error_says_how_it_goes_on_without(
    job: Start, unlucky: Callable[[int], None], tmp_path: Path
) -> None:
    unlucky(20)
    config = job(tmp_path / "run", on_judge_failure="raise", eval_prompts=0)
    with pytest.raises(BackendError, match=r"`rlaif train --resume .* --on-judge-failure drop-group` without these"):
        train(config)
    line = ["--resume", str(tmp_path / "run"), "--reward", config.reward, "--on-judge-failure", "drop-group"]
    assert main([*line, "--max-dropped", "1"]) == 0
    assert finished(tmp_path / "run")["dropped_groups"] > 0
    with pytest.raises(RLAIFError, match="expected max_dropped from 0 to 1, found 2"):
        job(tmp_path / "x", max_dropped=2)


def test_a_server_that_refuses_some_questions_does_not_end_a_run(
    job: Start, unlucky: Callable[[int], None], tmp_path: Path
) -> None:
    """A real reward "direct-llm" over HTTP: a share of the prompts is answered by an error that is not tried again."""
    unlucky(0)
    import hashlib

    def refuses(path: str, request: Any) -> tuple[int, Any] | None:
        text = str(request.get("prompt", ""))
        bad = "capital of France" not in text and hashlib.sha256(text.encode()).digest()[0] < 25
        return (400, {"error": {"message": "content policy"}}) if bad and not text.endswith("7, 8, 9,") else None

    run = tmp_path / "run"
    with FaultServer(answer=refuses) as server:
        options = {"model": "scorer", "url": server.url, "scale": (0, 9), "server": {"cache": False}}
        result = train(job(run, reward="direct-llm", reward_options=options, eval_prompts=0, max_dropped=1.0))
    rows = samples(run)
    lost = [row for row in rows if row["reward"] is None]
    assert len(read_metrics(run)) == 6 and lost and all("content policy" in row["judge_failed"] for row in lost)
    assert result.dropped == failed_groups(rows, 2) > 0


# --- rlaif rescore ----------------------------------------------------------------------------------------------------


def test_failed_responses_are_asked_again_and_nothing_else_is_touched(
    job: Start, unlucky: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlucky(30)
    run = tmp_path / "run"
    config = job(run, max_dropped=1.0, eval_prompts=4)
    train(config)
    kept = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    lines, rows = (run / "samples.jsonl").read_bytes().splitlines(), samples(run)
    lost = [i for i, row in enumerate(rows) if row["reward"] is None]
    held = [json.loads((run / f"{when}.json").read_text()) for when in ("before", "after")]
    assert lost and held[1]["failures"]
    with pytest.raises(RLAIFError, match="on the command line too, because this run's reward is code"):
        rescore_main([str(run)])
    command = [str(run), "--reward", config.reward]
    capsys.readouterr()
    unlucky(15)
    assert rescore_main(command) == 1
    some = samples(run)
    left = [i for i, row in enumerate(some) if row["reward"] is None]
    assert 0 < len(left) < len(lost) and {*left} < {*lost}
    assert "are left (the judge is out)" in " ".join(capsys.readouterr().out.split())
    unlucky(0)
    assert rescore_main(command) == 0
    again = samples(run)
    judge = resolve_reward(config.reward, load_task(config.task), {})
    true = judge.score([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert [row["reward"] for row in again] == true.values.tolist()
    assert [row["total"] for row in again] == true.info["total"].tolist() and again[lost[0]]["judge_failed"] is None
    assert [row["large"] for row in again] == true.info["large"].tolist()
    now = (run / "samples.jsonl").read_bytes().splitlines()
    assert [i for i, (a, b) in enumerate(zip(lines, now, strict=True)) if a != b] == lost
    for one, when in zip(held, ("before", "after"), strict=True):
        value = json.loads((run / f"{when}.json").read_text())
        assert value["failures"] == {} and None not in value["measures"]["reward"] + value["measures"]["total"]
        assert value["measures"]["gold"] == one["measures"]["gold"]
        for i, old in enumerate(one["measures"]["reward"]):
            assert old is None or old == value["measures"]["reward"][i]
    assert json.loads((run / "evaluation.json").read_text())["reward"][2]["n"] == 4
    changed = {p.name for p, data in kept.items() if p.read_bytes() != data}
    assert changed <= {"samples.jsonl", "before.json", "after.json", "evaluation.json", "evaluation.jsonl", "run.lock"}
    assert rescore_main(command) == 0 and "0 of 0 responses" in capsys.readouterr().out

    # a checkpoint's place in samples.jsonl is still right
    train(job(run, max_dropped=1.0, resume=str(run / "checkpoints" / "000004")))
    upto = [row for row in again if row["step"] <= 4]
    assert samples(run)[: len(upto)] == upto and len(samples(run)) == len(upto) + 12


def test_a_reward_that_was_mended_is_asked_when_that_is_said(
    job: Start, unlucky: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlucky(30)
    run, code = tmp_path / "run", tmp_path / "own.py"
    code.write_text(JUDGE, encoding="utf-8")
    config = job(run, max_dropped=1.0, reward=f"{code}:make")
    train(config)
    before = samples(run)
    code.write_text(JUDGE.replace("if rows:", "if False:").replace("total / 1024", "total / 1024 + 1000"), "utf-8")
    command, hash_of = [str(run), "--reward", config.reward], run / "config.json"
    with pytest.raises(RLAIFError, match=r"content.code.* with --change-reward the reward that is here is asked"):
        rescore_main(command)
    assert samples(run) == before
    recorded = json.loads(hash_of.read_text())["config"]
    assert rescore_main([*command, "--change-reward"]) == 0
    shown, record = " ".join(capsys.readouterr().out.split()), json.loads(hash_of.read_text())
    assert "the reward is not the run's: content.code." in shown and record["rescored"].startswith("content.code.")
    assert record["config"] == recorded  # what was learned from is what it was
    for old, new in zip(before, samples(run), strict=True):
        assert new["reward"] > 1000 if old["reward"] is None else new == old
    held = json.loads((run / "after.json").read_text())
    assert held["failures"] == {} and max(held["measures"]["reward"]) > 1000 > min(held["measures"]["reward"])


def test_folders_of_other_commands_are_told_how_they_ask_again(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "labels", {}, command="label"):
        pass
    with pytest.raises(RLAIFError, match=r"expected the folder of a training, found one of rlaif label .* ask again"):
        rescore_main([str(tmp_path / "labels")])
