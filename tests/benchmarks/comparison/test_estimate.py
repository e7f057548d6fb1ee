"""How long a comparison will take is said before it starts, by what is finished and by timing."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.comparison.command import compare
from benchmarks.comparison.config import AblationConfig, CompareConfig, same_arms
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.planning.estimate import estimate
from benchmarks.comparison.planning.plan import planned
from benchmarks.comparison.stages import RECORD, Job
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import RLAIFError
from rlaif_env.records import write_json
from tests.benchmarks.comparison.test_keys import dry, folder

__all__ = ["folder"]  # a fixture


def finish(job: Job, seconds: float) -> None:
    """The record of a stage that took so long."""
    job.path.mkdir(parents=True)
    needs = [{"name": need.name, "key": need.key} for need in job.needs]
    record = {"name": job.name, "key": job.key, "settings": dict(job.settings), "needs": needs}
    write_json(job.path / RECORD, {**record, "seconds": seconds, "cpu_seconds": 0.0, "peak_megabytes": 0.0})


def test_time_is_that_of_finished_stages_by_their_work(folder: Path, tmp_path: Path) -> None:
    config = replace(dry(folder, tmp_path).config, arms=("human-rm", "distilled-rm"), gold_rm=False, label_pairs=100)
    config = replace(config, train=replace(config.train, updates=10, eval_prompts=2))
    seconds = {"labels": 50.0, "rm": 30.0, "train": 100.0, "answers": 4.0, "judge": 2.0, "gold": 1.0}
    for job in planned(Pipeline(replace(config, arms=("distilled-rm",)), Console(quiet=True))):
        finish(job, seconds[job.name.partition("-")[0]])
    more = replace(config, label_pairs=300, train=replace(config.train, updates=40), workers=2)
    jobs = planned(pipeline := Pipeline(more, Console(quiet=True)))
    found = estimate(pipeline, jobs)
    by_name = {job.name: found.seconds[job.key] for job in jobs if not job.done}
    assert by_name["labels"] == pytest.approx(150)
    texts = 2 * 100 + 2000, 2 * 300 + 2000, 4000 + 2000  # to learn from, and to be tested on
    assert by_name["rm-ai"] == pytest.approx(30 * texts[1] / texts[0])
    assert by_name["rm-human"] == pytest.approx(30 * texts[2] / texts[0])
    assert by_name["train-human-rm-seed0"] == by_name["train-distilled-rm-seed0"] == pytest.approx(400)
    assert "answers-sft-seed0" not in by_name  # which is there
    assert found.timed == 0
    chain = by_name["labels"] + by_name["rm-ai"] + 400 + 4 + 2  # type: ignore[operator]
    assert found.wall == pytest.approx(max(chain, sum(filter(None, by_name.values())) / 2))
    assert f"{len(by_name)} stages to make: about 10 minutes (6 kinds of work by finished stages)" == found.line
    rows = {str(row[0]): row[1:] for row in found.table(jobs).rows}
    assert rows["answers-sft"] == [1, 0, "0.0"] and rows["train-human-rm"] == [0, 1, "6.7"]


def test_what_nothing_is_known_of_is_timed_and_a_server_is_left_alone(folder: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    config = dry(folder, tmp_path).config
    ablation = AblationConfig(prompt_grid=0, grid_cot=True, pairs=3, pair_counts=(40,))
    arms = ("human-rm", "pairwise-rm", "group-preference", "self-llm")
    config = replace(config, arms=arms, ablation=ablation, label_pairs=50, dry_run=True)
    config = replace(config, train=replace(config.train, eval_prompts=2))
    compare(config, Console(file=said, width=200))
    told = said.getvalue()
    assert "of timing)" in " ".join(told.split()) and "?" not in told
    assert not (tmp_path / "stages").exists() and not (tmp_path / "config.json").exists()
    served = replace(config, labeler=LanguageModelConfig("served", "http://localhost:1/v1"), ablation=AblationConfig())
    jobs = planned(pipeline := Pipeline(served, Console(quiet=True)))
    found = estimate(pipeline, jobs)
    unknown = {job.name for job in jobs if found.seconds[job.key] is None}
    assert {"labels", "train-group-preference-seed0", "judge-direct-llm-of-sft-seed0"} <= unknown
    assert not {"rm-ai", "train-distilled-rm-seed0", "train-direct-llm-seed0"} & unknown
    assert "that it is not known of" in found.line


def test_terms_that_nobody_accepted_are_told_before_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    monkeypatch.delenv("RLAIF_ACCEPT_GEMMA_TERMS", raising=False)
    config = CompareConfig(task="no such task", labeler=LanguageModelConfig("gemma-3-270m"), out=tmp_path / "out")
    with pytest.raises(RLAIFError, match="run `rlaif fetch gemma-3-270m --accept-gemma-terms` once"):
        compare(config)


def test_arms_that_come_to_the_same_thing_are_named() -> None:
    keys = {"self-llm": "a", "direct-llm": "a", "same-size-rm": "b", "distilled-rm": "b", "human-rm": "c"}
    assert same_arms(keys) == [
        "same-size-rm is distilled-rm here: the labeler is the policy's own model",
        "self-llm is direct-llm here: the labeler is the initial policy itself",
    ]
    assert same_arms({"human-rm": "c", "direct-llm": "d"}) == []
