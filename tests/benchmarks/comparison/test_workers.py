"""Several workers on one comparison: the same results, and what is left where one fails or all are interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.comparison.command import compare
from benchmarks.comparison.config import CompareConfig
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.planning.plan import planned
from rewards.labeling.config import LabelOptions
from rlaif_env.api import RLAIFError
from rlaif_env.records import RunError
from tests import ROOT
from tests.benchmarks.comparison.test_compare import SCORES, finished, folder, settings

__all__ = ["folder"]  # a fixture


def small(folder: Path, out: Path, **changed: object) -> CompareConfig:
    config = replace(settings(folder, out), arms=("direct-llm", "distilled-rm"), label_pairs=40, gold_rm=False)
    train = replace(config.train, updates=2)
    return replace(config, train=train, report=False, **changed)  # type: ignore[arg-type]


def results(out: Path) -> dict[str, bytes]:
    """What the stages hold that is no time and no path."""
    files = ("scores.json", "preferences.jsonl", "samples.jsonl", "run/model/model.safetensors")
    found = {f"{stage}/{file}": out / "stages" / stage / file for stage in finished(out) for file in files}
    return {name: path.read_bytes() for name, path in found.items() if path.exists()}


def test_workers_make_what_one_process_makes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    threads = torch.get_num_threads()
    try:
        for workers in (1, 2):
            torch.set_num_threads(workers)  # one for each: sums of another number of threads round otherwise
            compare(small(folder, tmp_path / str(workers), workers=workers))
    finally:
        torch.set_num_threads(threads)
    assert results(tmp_path / "2") == results(tmp_path / "1")
    jobs = planned(Pipeline(small(folder, tmp_path / "2"), Console(quiet=True)))
    assert {job.path.name for job in jobs} == set(finished(tmp_path / "2"))


@pytest.mark.slow
def test_where_a_worker_fails_the_others_finish_their_stage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    never = LabelOptions(**SCORES, max_tokens=1)  # every pair is too long for it
    with pytest.raises(RLAIFError, match="expected the labeler to label some of 40 pairs, see"):
        compare(small(folder, tmp_path, workers=2, label=never))
    assert any(name.startswith("answers-sft") for name in finished(tmp_path))  # by the other worker
    assert not any(name.startswith("labels") for name in finished(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["worker killed", "all killed", "Ctrl-C"])
def test_what_stops_workers_leaves_what_is_finished(folder: Path, tmp_path: Path, stop: str) -> None:
    out = tmp_path / "out"
    script = (
        "from pathlib import Path; from dataclasses import replace; import sys;"
        "from tests.benchmarks.comparison.test_workers import small; from rlaif_env import cli;"
        "from benchmarks.comparison import command;"
        f"config = small(Path({str(folder)!r}), Path({str(out)!r}), workers=2);"
        "config = replace(config, arms=('direct-llm', 'group-preference'));"
        "config = replace(config, train=replace(config.train, updates=int(sys.argv[1])));"
        "command.main = lambda argv: command.compare(config) and 0;"
        "sys.exit(cli.main(['compare']))"
    )

    def start(updates: int) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", script, str(updates)]
        environment = {**os.environ, "RLAIF_DEVICE": "cpu"}
        return subprocess.Popen(arguments, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    process = start(100_000)
    deadline = time.monotonic() + 300
    while len(list(out.glob("stages/train-*/metrics.jsonl"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(RunError, match="is being written by another run: wait for its end"):
        compare(small(folder, out))
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    if stop == "worker killed":
        os.kill(workers[0], signal.SIGKILL)
        time.sleep(2)
        assert process.poll() is None  # the other one goes on with its stage
        process.send_signal(signal.SIGINT)
    else:
        process.send_signal(signal.SIGKILL if stop == "all killed" else signal.SIGINT)
    _, told = process.communicate(timeout=300)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they end with it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if stop == "Ctrl-C":
        assert process.returncode == 130 and told.splitlines()[-1] == "rlaif compare: interrupted"
        assert all(list(path.glob("checkpoints/0*")) for path in out.glob("stages/train-*"))
    kept = finished(out)
    assert kept and not any(name.startswith("train") for name in kept)
    compare(replace(small(folder, out), arms=("direct-llm",)))
    assert {name: finished(out)[name] for name in kept} == kept
