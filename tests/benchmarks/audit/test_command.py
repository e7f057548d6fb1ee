"""`rlaif audit` from the command line: its files, its exit code, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.audit import config
from benchmarks.audit.command import main
from benchmarks.audit.config import checks_named, parsed
from benchmarks.audit.report import figure_text
from benchmarks.audit.samples import sampler
from benchmarks.report import write_report
from rewards.reward_model.model import RewardModel
from rewards.reward_model.record import LabelRecord
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import PromptSource, Task, load_task
from rlaif_env.models import backbone
from rlaif_env.statistics import Interval
from tests import ROOT
from tests.benchmarks.audit.rewards import own_file
from tests.tiny import tiny_backbone


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    reward = f"{own_file(folder)}:words"
    sizes = ["--texts", "60", "--pairs", "300", "--policy", "none"]
    assert main([reward, *sizes, "--out", str(folder / "out")]) == 0
    assert main([reward, *sizes, "--checks", "length", "cost", "--strict", "--out", str(folder / "strict")]) == 1
    return folder / "out"


def test_the_json_holds_every_figure_the_worst_first(audited: Path) -> None:
    found = json.loads((audited / "audit.json").read_text())
    verdicts = [finding["verdict"] for finding in found["findings"]]
    assert verdicts == sorted(verdicts, key=["flag", "unclear", "ok", "figure"].index)
    flags = {finding["check"] for finding in found["findings"] if finding["verdict"] == "flag"}
    assert {"length", "repetition"} <= flags
    assert found["facts"]["rows scored"] == sum(cost["scored"] for cost in found["costs"].values())
    assert found["not_measured"]["own-text"] == "the audit was given no policy to sample from"
    assert all(finding["bound"] for finding in found["findings"] if finding["verdict"] != "figure")
    assert json.loads((audited / "config.json").read_text())["config"]["texts"] == 60


def test_the_page_says_it_at_the_top_and_loads_nothing(audited: Path) -> None:
    page = (audited / "audit.html").read_text(encoding="utf-8")
    top = page[: page.index('<section id="results"')]
    assert "surely faults (" in top and "Length is paid for" in top
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    first = page[page.index('<section id="results"') :]
    assert first.index("FLAG") < first.index(">ok<")
    assert "Not measured" in page and "What the audit cost" in page
    with pytest.raises(RLAIFError, match=r"found .*audit\.html: open that"):
        write_report(audited)


def test_what_cannot_be_audited_is_said_before_anything_slow(tmp_path: Path) -> None:
    with pytest.raises(RLAIFError, match="unknown reward 'nothing'"):
        main(["nothing"])
    with pytest.raises(RLAIFError, match=r"expected checks among agreement, .*found nothing"):
        main(["direct-llm", "--checks", "nothing"])
    with pytest.raises(RLAIFError, match=r"expected a level from 0\.5 and under 1, found 1"):
        main(["direct-llm", "--level", "1"])
    with pytest.raises(RLAIFError, match="expected at least 12 texts and 1 pair, found 3 and 1"):
        main(["direct-llm", "--texts", "3", "--pairs", "1", "--policy", "none"])
    with pytest.raises(RLAIFError, match=r"expected options among .*found nonsense"):
        main(["direct-llm", "--reward.nonsense", "1"])


def test_a_reward_s_own_options_are_options(tmp_path: Path) -> None:
    read = parsed(["direct-llm", "--reward.scale", "1", "5", "--checks", "length", "cost", "--texts", "60"])
    assert (read.reward, read.reward_options, read.checks) == ("direct-llm", {"scale": [1, 5]}, ("length", "cost"))
    assert list(checks_named(["cost", "length"])) == ["length", "cost"]  # the cost of all the others is last


def test_another_package_s_check_is_found_and_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The check on the page of the documentation."""
    page = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    (tmp_path / "my_checks.py").write_text(re.findall(r"```python\n(# my_checks.py.*?)```", page, re.S)[0])
    monkeypatch.syspath_prepend(tmp_path)
    own = [EntryPoint("shouting", "my_checks:shouting", config.CHECK_GROUP)]
    monkeypatch.setattr(config, "entry_points", lambda group: own)
    assert main([f"{own_file(tmp_path)}:words", "--texts", "60", "--policy", "none", "--out", str(tmp_path / "o")]) == 0
    (finding,) = json.loads((tmp_path / "o" / "audit.json").read_text())["findings"]
    assert (finding["check"], finding["verdict"], finding["estimate"]["estimate"]) == ("shouting", "ok", 0.0)


def test_a_policy_may_be_a_file_of_responses(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": p, "response": r} for p, r in (("a", "x"), ("b", "y"), ("a", "z"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("movie-review")
    found = sampler(str(file), task, prompts=1, samples=2, seed=0, folder=tmp_path)()
    assert [(one.prompt, one.responses) for one in found] == [("a", ("x", "z")), ("b", ("y",))]


def test_samples_are_drawn_once_and_are_those_of_the_seed(tmp_path: Path) -> None:
    tiny_backbone(0).save_merged(None, tmp_path / "policy")
    source = PromptSource(prompts={"test": ("ab", "film", "xyz.", "Q")})
    task = Task("toy", "continuation", "how good it is", 8, 6, source)
    sizes = {"prompts": 2, "samples": 5, "folder": tmp_path / "kept"}
    found = sampler(str(tmp_path / "policy"), task, seed=0, **sizes)()
    assert [one.prompt for one in found] == ["ab", "xyz."] and [len(one.responses) for one in found] == [5, 5]
    (file,) = (tmp_path / "kept").iterdir()
    written = file.stat().st_mtime_ns
    assert sampler(str(tmp_path / "policy"), task, seed=0, **sizes)() == found and file.stat().st_mtime_ns == written
    assert sampler(str(tmp_path / "policy"), task, seed=1, **sizes)() != found
    with pytest.raises(RLAIFError, match="expected at least 1 prompt and 2 samples of each, found 2 and 1"):
        sampler(str(tmp_path / "policy"), task, prompts=2, samples=1, seed=0, folder=tmp_path)


def reward_model(folder: Path, task: str | Task = "movie-review", seed: int = 0) -> Path:
    """A reward model on disk."""
    base = folder / "base"
    if not base.exists():
        tiny_backbone(0).save_merged(None, base)
    weight = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    model = RewardModel(backbone(base), weight, task, labels=LabelRecord({"human": 1}))
    model.save(folder / f"rm{seed}", merged=False)
    return folder / f"rm{seed}"


def test_a_reward_model_measures_gold_where_it_is_told_to(tmp_path: Path) -> None:
    gold, file = reward_model(tmp_path), tmp_path / "policy.jsonl"
    rows = [{"prompt": p, "response": " film" * (n + 1)} for p in ("ab", "cd", "ef", "gh") for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--texts", "24", "--pairs", "60", "--policy", str(file), "--checks", "best-of-n"]
    command = [f"{own_file(tmp_path)}:words", *small, "--gold", str(gold), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    name = RewardModel.load(gold).name
    assert found["facts"]["gold"] == f"reward model {name} ({gold})"
    assert f"Gold: reward model {name}." in (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    values = {finding["name"]: finding["estimate"]["estimate"] for finding in found["findings"]}
    prompts, responses = ([row[name] for row in rows] for name in ("prompt", "response"))
    golds = RewardModel.load(gold).score(prompts, responses).values.astype(float).reshape(4, 12)
    expected = (golds[:, -1] - golds.mean(axis=1)).mean() / np.sqrt(golds.var(axis=1, ddof=1).mean())  # the longest
    assert values["gold of the best of 12 above that of a sample"] == pytest.approx(expected, abs=1e-5)


def test_gold_that_is_no_reward_model_or_the_audited_one_or_another_task_s_is_refused(tmp_path: Path) -> None:
    rest = ["--policy", "none", "--texts", "24", "--out", str(tmp_path / "out")]
    same = reward_model(tmp_path)
    shutil.copytree(same, tmp_path / "copy")
    toy = reward_model(tmp_path, Task("toy", "continuation", "how good it is", 8, 6, PromptSource(prompts={})), seed=1)
    for gold, message in {
        tmp_path / "base": r"expected a reward model in .*base, found no reward_model\.json there",
        tmp_path / "nothing": r"expected the folder of a reward model, found none at .*nothing",
        tmp_path / "copy": r"expected --gold to be another reward model than the audited one, found the same in .*copy",
        toy: r"expected --gold to be a reward model for the task 'movie-review', found one for 'toy' in .*rm1",
    }.items():
        with pytest.raises(RLAIFError, match=message):
            main(["human-rm", "--reward.model", str(same), "--gold", str(gold), *rest])
    assert not (tmp_path / "out").exists()


def test_figures_as_text() -> None:
    assert figure_text(Interval(0.5, 0.25, 0.751, 9, 9), "share") == "50 [25, 75]%"
    assert figure_text(Interval(-0.001, -0.004, 0.3, 9, 9), "SD") == "0.00 [0.00, 0.30] SD"
    assert figure_text(Interval(-1.0, -1.0, -1.0, 9, 9), "SD") == "-1.00 SD"
    assert figure_text(Interval(0.00012, 0.00012, 0.00012, 9, 9), "s") == "0.00012 s"
    assert figure_text(Interval(0.25, None, None, 3, 3), "") == "0.25 (3 units only)"
