"""The comparison of reward backends on a tiny model: what it writes, what it keeps, what a kill costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from agents.sampler import SamplerConfig
from agents.settings import ReinforceConfig
from agents.training.config import TrainingConfig
from benchmarks.comparison import tables
from benchmarks.comparison.command import compare
from benchmarks.comparison.config import AblationConfig, CompareConfig
from benchmarks.comparison.figures import FIGURES
from benchmarks.comparison.outcomes import Outcome, over_optimised_from
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.stages import Plan
from benchmarks.comparison.tables import percent
from benchmarks.evaluation.systems import System
from rewards.direct_score import ScoreConfig
from rewards.endpoint.config import ServerConfig
from rewards.labeling.config import LabelOptions
from rewards.labeling.labeler import LabelingConfig, PreferenceLabeler
from rewards.labeling.probabilities import tempered
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM
from rewards.reward_model.training import RewardModelConfig
from rlaif_env.api import RLAIFError
from rlaif_env.data.preferences import read_preferences, write_preferences
from rlaif_env.data.tasks import load_task
from rlaif_env.servers.limits import Limits
from tests import ROOT
from tests.rewards.test_backends import preferences
from tests.tiny import tiny_backbone

TASK = """
name = "toy"
kind = "continuation"
criterion = "how many vowels it has"
max_prompt_tokens = 8
max_response_tokens = 4
gold = "vader"
[source]
allow_empty = true
[source.prompts]
train = ["ab", "film", "xyz.", "Q", "so", "Tuv"]
test = ["cd", "mn", "op", "rs", "bad", "good"]
[source.preferences]
train = "{folder}/human.jsonl"
validation = "{folder}/validation.jsonl"
test = "{folder}/test.jsonl"
gold = "{folder}/gold.jsonl"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy, and a task with people's preferences in every split."""
    folder = tmp_path_factory.mktemp("compare")
    for name, seed in (("policy", 0), ("other", 1)):
        tiny_backbone(seed).save_merged(None, folder / name)
    records = preferences("human", 600)
    for name, part in (("human", slice(0, 300)), ("validation", slice(300, 380)), ("test", slice(380, 450))):
        write_preferences(folder / f"{name}.jsonl", records[part])
    write_preferences(folder / "gold.jsonl", records[450:])
    (folder / "toy.toml").write_text(TASK.format(folder=folder))
    return folder


SCORES: dict[str, Any] = {"mode": "score", "minimum_mass": 1e-9, "scale": (1, 3)}


def settings(folder: Path, out: Path) -> CompareConfig:
    return CompareConfig(
        task=str(folder / "toy.toml"),
        model=str(folder / "policy"),
        labeler=LanguageModelConfig(str(folder / "policy")),
        out=out,
        label=LabelOptions(**SCORES),
        label_pairs=120,
        reward_model=RewardModelConfig(test_pairs=50),
        train=TrainingConfig(
            updates=4, prompts_per_update=3, group_size=2, eval_prompts=6, agent=ReinforceConfig(learning_rate=1e-2)
        ),
    )


def finished(out: Path) -> dict[str, int]:
    """When each finished stage was finished."""
    return {file.parent.name: file.stat().st_mtime_ns for file in (out / "stages").glob("*/stage.json")}


def outcome_of(out: Path) -> dict[str, object]:
    """What a comparison says, without what its making cost."""
    found = json.loads((out / "comparison.json").read_text())
    tables = [table for table in found["tables"] if "cost" not in table["title"]]
    return {"tables": tables, "warnings": found["warnings"], "advice": found["advice"]}


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLAIF_DEVICE", "cpu")
        compare(settings(folder, out))
    return out


def test_the_table_has_the_papers_rows_beside_the_papers_figures(done: Path) -> None:
    found = json.loads((done / "comparison.json").read_text())
    every, main = found["tables"][:2]
    assert [row[0] for row in every["rows"]][-1] == "sft" and len(every["rows"]) == 4
    rows = {row[0]: row for row in main["rows"]}
    assert set(rows) == {
        "RLAIF vs SFT (distilled-rm)",
        "RLHF vs SFT (human-rm)",
        "RLAIF vs RLHF (distilled-rm vs human-rm)",
        "d-RLAIF vs SFT (direct-llm)",
        "d-RLAIF vs RLAIF (direct-llm vs distilled-rm)",
        "d-RLAIF vs RLHF (direct-llm vs human-rm)",
    }
    assert rows["RLHF vs SFT (human-rm)"][-2:] == ["73; 64", "61; 61"]
    assert all(len(row) == len(table["columns"]) for table in found["tables"] for row in table["rows"])
    assert main["columns"][1].startswith("people (gold RM)")
    assert [figure["file"] for figure in found["figures"]] == [figure[0] for figure in FIGURES]
    assert any(warning.startswith("One seed") for warning in found["warnings"])
    assert [sentence.split(":")[0] for sentence in found["advice"]][-1] == "One seed"
    for name in ("table.md", "report.html", *(figure[0] for figure in FIGURES)):
        assert (done / name).stat().st_size > 500, name


def test_every_policy_answers_the_same_prompts_and_is_judged_by_all(done: Path) -> None:
    rows = [json.loads(line) for line in (done / "responses.jsonl").read_text().splitlines()]
    systems = {row["system"] for row in rows}
    assert systems == {"sft/0", "human-rm/0", "distilled-rm/0", "direct-llm/0"}
    for name in systems:
        assert [r["prompt"] for r in rows if r["system"] == name] == ["cd", "mn", "op", "rs", "bad", "good"]
    judges = {"judge:human-rm", "judge:distilled-rm", "judge:direct-llm", "judge:gold-rm", "gold", "length", "kl"}
    assert all(judges <= set(row["measures"]) for row in rows)
    sft = [row["measures"]["kl"] for row in rows if row["system"] == "sft/0"]
    assert np.allclose(sft, 0, atol=1e-4)


def test_called_again_nothing_is_made_again(folder: Path, done: Path) -> None:
    before, outcome = finished(done), outcome_of(done)
    figures = {name: (done / name).read_bytes() for name, *_ in FIGURES}
    page = Path(shutil.copy(ROOT / "docs" / "results.md", folder))
    config = replace(settings(folder, done), document=page)
    compare(replace(config, train=replace(config.train, sampler=SamplerConfig(patience=1.0))))
    assert finished(done) == before
    assert outcome_of(done) == outcome
    assert {name: (done / name).read_bytes() for name in figures} == figures
    # what the page of results wants is there, and goes into it
    text = page.read_text(encoding="utf-8")
    assert (
        "| RLAIF vs RLHF (distilled-rm vs human-rm) | " in text and "; arms human-rm, distilled-rm, direct-llm" in text
    )
    assert (folder / "images" / "results-curves.svg").read_bytes() == figures["curves.svg"]


def test_a_page_without_markers_is_told_before_anything_is_made(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    with pytest.raises(RLAIFError, match="expected <!-- made by make paper: NAME --> and <!-- end NAME --> in"):
        compare(replace(settings(folder, tmp_path / "out"), document=page))
    assert not (tmp_path / "out").exists()


def test_policies_are_sampled_as_it_says(folder: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    config, before = settings(folder, done), finished(done)
    rounded = replace(config, train=replace(config.train, sampler=SamplerConfig(dtype="bfloat16")))
    stage = Pipeline(rounded, Console(quiet=True)).training("human-rm", 0)
    assert [*set(finished(done)) - set(before)] == [stage.path.name]  # only the training itself is another
    assert "importance_gap" in (stage.path / "metrics.jsonl").read_text().splitlines()[0]


def test_another_setting_redoes_what_depends_on_it(folder: Path, done: Path) -> None:
    before = finished(done)
    compare(replace(settings(folder, done), label_pairs=110, report=False))
    after = finished(done)
    assert {name: after[name] for name in before} == before
    made = sorted({name.rsplit("-", 1)[0] for name in set(after) - set(before)})
    others = ("sft", "human-rm", "direct-llm")
    assert made == sorted(
        [
            "labels",
            "rm-ai",
            "train-distilled-rm-seed0",
            "answers-distilled-rm-seed0",
            *(f"judge-distilled-rm-of-{name}-seed0" for name in (*others, "distilled-rm")),
            *(f"judge-{judge}-of-distilled-rm-seed0" for judge in ("human-rm", "direct-llm", "gold-rm")),
        ]
    )


def test_arms_that_are_the_same_thing_share_their_stages(folder: Path, done: Path) -> None:
    before = finished(done)
    arms = ("human-rm", "distilled-rm", "same-size-rm", "direct-llm", "self-llm")
    compare(replace(settings(folder, done), arms=arms, report=False))
    assert finished(done) == before  # the labeler is as large as the policy, and is the policy
    rows = json.loads((done / "comparison.json").read_text())["tables"][1]["rows"]
    twins = next(row for row in rows if row[0].startswith("d-RLAIF vs same-size"))
    assert twins[-2:] == ["60; -", "56; -"]


def test_pairwise_labels_stand_beside_those_of_the_mode(folder: Path, done: Path) -> None:
    before = finished(done)
    compare(replace(settings(folder, done), arms=("distilled-rm", "pairwise-rm"), report=False))
    made = {name.rsplit("-", 1)[0] for name in set(finished(done)) - set(before)}
    assert {"labels", "rm-ai", "train-distilled-rm-seed0", "judge-distilled-rm-of-sft-seed0"} <= made
    tables = {table["title"]: table for table in json.loads((done / "comparison.json").read_text())["tables"]}
    models = [row[0] for row in tables["Reward models on held-out pairs"]["rows"]]
    assert {"distilled-rm", "pairwise-rm", "gold"} == set(models)
    cost = {row[0]: row for row in tables["What each arm cost"]["rows"]}
    read = {arm: int(row[3].split(" + ")[0].replace(",", "")) for arm, row in cost.items() if arm != "direct-llm"}
    assert read["pairwise-rm"] > read["distilled-rm"] > 0  # both responses are read in both orders
    assert "pairwise-rm" in tables["What each judge says of each policy"]["columns"]


def test_seeds_combined_labels_and_ablations(folder: Path, done: Path) -> None:
    out = done  # goes on with what is there
    compare(
        replace(
            settings(folder, out),
            arms=("combined-rm", "human-rm"),
            seeds=(0, 1),
            ablation=AblationConfig(
                pair_counts=(40, 160),
                prompt_grid=0,
                pairs=20,
                staleness=True,
                equal_kl=True,
                samples=3,
                gold_bases=(str(folder / "other"),),
            ),
            report=False,
        )
    )
    found = json.loads((out / "comparison.json").read_text())
    titles = [table["title"] for table in found["tables"]]
    assert "Seed by seed" in titles
    assert any(warning.startswith("Two seeds: the intervals are over prompts") for warning in found["warnings"])
    tables = {table["title"]: table for table in found["tables"]}
    counts = tables["Ablation: number of preference pairs"]["rows"]
    assert {(row[0], row[1]) for row in counts} == {("human", 40), ("human", 160), ("ai", 40), ("ai", 160)}
    asked = tables["Ablation: how the labeler is asked"]["rows"]
    assert [(row[1], row[2]) for row in asked] == [("score", "-"), ("pairwise", "base"), ("pairwise", "detailed")]
    stale = tables["Ablation: does the reward go stale?"]["rows"]
    assert {(row[0], row[1]) for row in stale} >= {("human-rm/0", "human-rm"), ("combined-rm/1", "direct-llm")}
    distance = tables["At equal KL: what distance from SFT buys"]
    assert [row[0] for row in distance["rows"]] == ["combined-rm", "human-rm"]
    seen = tables["Signal: what each reward sees of gold"]
    assert [row[0] for row in seen["rows"]] == ["combined-rm", "human-rm"]
    bases = next(table for title, table in tables.items() if title.startswith("Gold reward models on other bases"))
    assert bases["columns"] == ["first against second", "the policy's base", str(folder / "other")]
    assert len(list(out.glob("stages/rm-gold-*"))) == 2
    reports = [json.loads(file.read_text())["figures"] for file in out.glob("stages/rm-gold-*/run/report.json")]
    assert set(bases["rows"][0][1:]) == {percent(report["human"]["accuracy"]) for report in reports}
    both = json.loads(next(out.glob("stages/rm-both-*/run/report.json")).read_text())["labels"]["sources"]
    assert set(both) == {"human", f"ai:{folder / 'policy'}"}


def test_what_a_server_answers_is_kept_apart_by_its_url(folder: Path, tmp_path: Path) -> None:
    def keys(url: str, concurrency: int = 1, *, chat: bool = False, **server: Any) -> dict[str, str]:
        limits = Limits(concurrency, retries=concurrency, timeout=concurrency, price_in=concurrency)
        labeler = LanguageModelConfig("served", url, chat, server=ServerConfig(limits=limits, **server))
        pipeline = Pipeline(replace(settings(folder, tmp_path), labeler=labeler), Console(quiet=True))
        pipeline.stages = Plan(tmp_path / "stages")
        for arm in ("direct-llm", "distilled-rm", "human-rm"):
            pipeline.judgement("direct-llm", pipeline.answers(arm, 0))
        by_name = {stage.name: stage.key for stage in pipeline.stages.finished}
        return by_name | {"self-llm": pipeline.training("self-llm", 0).key}

    here, there = keys("http://localhost:1/v1"), keys("http://localhost:2/v1")
    alike = {"rm-human", "train-human-rm-seed0", "answers-human-rm-seed0", "self-llm"}
    assert {name for name in here if here[name] == there[name]} == alike
    assert set(here) > alike | {"labels", "rm-ai", "train-distilled-rm-seed0", "judge-direct-llm-of-human-rm-seed0"}
    assert keys("http://localhost:1/v1", 64, cache=False) == here
    for server in ({"revision": "2"}, {"route": "chat"}, {"boundaries": "prefix"}, {"extra": {"x": 1}}, {"chat": True}):
        other = keys("http://localhost:1/v1", **server)
        assert {name for name in here if here[name] == other[name]} == alike, server


def test_calibrated_labels_are_made_of_the_answers_that_are_there(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path / "out")
    there, asked = list(read_preferences(folder / "human.jsonl")), vars(LabelingConfig(**SCORES))
    labeler = PreferenceLabeler(LocalLM(folder / "policy"), str(folder / "toy.toml"), **asked)
    columns = ([getattr(p, name) for p in there[120:180]] for name in ("prompt", "response_1", "response_2"))
    surer = [tempered(p, 0.5) for p in labeler.label(*columns).p_first]
    people = [replace(p, p_first=q) for p, q in zip(there[120:180], surer, strict=True)]
    write_preferences(tmp_path / "people.jsonl", people)
    config = replace(config, human_labels=tmp_path / "people.jsonl", label=LabelOptions(**SCORES, shots=0))
    raw = Pipeline(config, Console(quiet=True)).labels("ai")
    config = replace(config, label=LabelOptions(**SCORES, shots=0, calibrate=60))
    stage = Pipeline(config, Console(quiet=True)).labels("ai")
    report = stage.read_json("report.json")
    assert report["calibration"] == {"temperature": pytest.approx(0.5, rel=1e-6), "pairs": 60, "asked": 60}
    before, after = (list(read_preferences(s.path / "preferences.jsonl")) for s in (raw, stage))
    assert [p.p_first for p in after] == [tempered(p.p_first, report["calibration"]["temperature"]) for p in before]
    kept, answers = ((s.path / "journal.jsonl").read_bytes().splitlines() for s in (raw, stage))
    assert answers[: len(kept)] == kept and report["asked_in_this_run"] == len(answers) - len(kept)
    assert stage.seconds > raw.seconds


def test_labels_are_calibrated_on_the_people_that_the_comparison_has(folder: Path, tmp_path: Path) -> None:
    def key(**changed: Any) -> str:
        label = LabelOptions(mode="score", scale=(1, 3), calibrate=10 * (len(changed) > 0))
        pipeline = Pipeline(replace(settings(folder, tmp_path), label=label, **changed), Console(quiet=True))
        pipeline.stages = Plan(tmp_path / "stages")
        return pipeline.labels("ai").key

    people = [folder / "gold.jsonl", tmp_path / "copy.jsonl", folder / "test.jsonl"]
    people[1].write_bytes(people[0].read_bytes())
    keys = [key(human_labels=path) for path in people]
    assert keys[0] == keys[1] != keys[2]  # by content
    assert key() not in keys


def test_the_direct_score_is_asked_for_as_the_labels_are() -> None:
    asked: dict[str, Any] = {"scale": (1, 5), "shots": 3, "minimum_mass": 0.1}
    served, movie = LanguageModelConfig("served", "http://localhost:1"), load_task("movie-review")
    assert LabelOptions(mode="score", **asked).direct_score(served, movie) == ScoreConfig((1, 5), 3, None, 0.1)
    assert LabelOptions(**asked).direct_score(served, movie) == ScoreConfig((1, 5), 0, None, 0.1)
    assert CompareConfig().label.mode == "score"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": ("human",)}, "unknown arm 'human': expected one of human-rm, distilled-rm"),
        ({"arms": ()}, "expected arms to be given, each once"),
        ({"seeds": (1, 1)}, "expected seeds to be given, each once"),
        ({"train": {"updates": 0}}, "expected updates of at least 1, found 0"),
        ({"train": {"eval_prompts": 1}}, "expected at least 2 eval_prompts"),
        (
            {"train": {"eval_prompts": 7}},
            "expected 1 to 6 prompts, as many as split 'test' of task 'toy' has, found 7",
        ),
        ({"ablation": {"pairs": 0}}, "expected ablation.pairs of at least 1, found 0"),
        ({"ablation": {"samples": 1}}, "expected ablation.samples of at least 2, to compare within a prompt, or 0"),
        (
            {"ablation": {"equal_kl": True}, "train": {"agent": ReinforceConfig(beta=0.0)}},
            "expected train.agent.beta above 0 for ablation.equal_kl, found 0",
        ),
        ({"labeler": {"model": "/no/such/model"}}, "expected a model folder, found nothing at /no/such/model"),
    ],
)
def test_bad_settings_are_told_before_anything_is_made(
    folder: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    config = settings(folder, tmp_path / "bad")
    with pytest.raises(RLAIFError, match="^.*" + message.replace("(", "\\(")):
        nested = {name: replace(getattr(config, name), **v) for name, v in changed.items() if isinstance(v, dict)}
        compare(replace(config, **{**changed, **nested}))
    assert not (tmp_path / "bad" / "stages").exists()


def test_gold_models_on_other_bases_want_the_ratings_they_learn_from(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text(TASK.format(folder=folder).replace('gold = "' + str(folder), '# "'))
    ablation = AblationConfig(gold_bases=(str(folder / "other"),))
    with pytest.raises(RLAIFError, match="expected people's preferences of the split 'gold' in task 'toy'"):
        compare(replace(settings(folder, tmp_path / "out"), task=str(tmp_path / "toy.toml"), ablation=ablation))
    assert not (tmp_path / "out" / "stages").exists()


def test_a_damaged_stage_record_is_refused(folder: Path, done: Path) -> None:
    record = next((done / "stages").glob("answers-sft-seed0-*/stage.json"))
    kept = record.read_text()
    record.write_text("{")
    try:
        with pytest.raises(RLAIFError, match="remove the folder"):
            compare(settings(folder, done))
    finally:
        record.write_text(kept)


def test_policies_that_write_the_same_tie_under_every_judge() -> None:
    noise = 1e-6 * np.random.default_rng(0).normal(size=(2, 6))
    outcomes = []
    for arm, off in zip(("sft", "direct-llm"), noise, strict=True):
        measures = {"judge:direct-llm": 0.5 + off, "length": np.full(6, 4.0)}
        outcomes.append(Outcome(arm, 0, System(arm, "", list("abcdef"), ["same"] * 6, measures), None, {}))
    (row,) = tables._main(outcomes, {"judge:direct-llm": "direct-llm"}).rows
    assert str(row[1]).startswith("50 [") and row[3] == "1.000"


@pytest.mark.parametrize(("prompts", "told"), [("aaabbb", "(2 units only)"), ("abcdef", "[")])
def test_every_figure_of_a_table_is_over_the_same_prompts_and_ends_where_its_measure_does(
    prompts: str, told: str
) -> None:
    outcomes = []
    for arm, gold, distinct in (("sft", [1, -1] * 3, [0, 1] * 3), ("direct-llm", [-1, 1] * 3, [1, 0.9] * 3)):
        measures = {"gold": gold, "distinct-2": distinct, "length": [3, 4, 5, 6, 7, 8]}
        arrays = {name: np.array(values, dtype=float) for name, values in measures.items()}
        responses = [f"{arm} {i}" for i in range(6)]
        outcomes.append(Outcome(arm, 0, System(arm, "", list(prompts), responses, arrays), None, {}))
    judges = {"gold": "gold"}
    main, by_judge, writing = (
        tables._main(outcomes, judges),
        tables._by_judge(outcomes, judges),
        tables._writing(outcomes),
    )
    (row,) = main.rows
    assert all(told in str(row[i]) for i in (1, 2)) and (row[3] == "-") == (told != "[")
    cells = [*by_judge.rows[0][1:], *by_judge.rows[1][1:], *writing.rows[0][1:]]
    assert all(told in str(cell) for cell in cells)
    assert f"over {len(set(prompts))} held-out prompts" in main.caption
    if told == "[":
        assert by_judge.rows[0][1] == "0.00 [-1.00, 1.00]" and str(writing.rows[0][2]).endswith("1.00]")


def test_over_optimisation_is_told_where_gold_falls_for_sure_while_the_reward_rises() -> None:
    rng = np.random.default_rng(0)
    steps = list(range(1, 41))
    rising = np.linspace(0, 2, 40) + rng.normal(0, 0.02, 40)
    hill = np.concatenate([np.linspace(0, 1, 20), np.linspace(1, 0, 20)]) + rng.normal(0, 0.02, 40)
    since = over_optimised_from(steps, rising, hill)
    assert since is not None and 11 <= since <= 21
    assert over_optimised_from(steps, rising, rising) is None
    assert over_optimised_from(steps, hill, hill) is None  # both fall: no proxy going its own way
    noise = [over_optimised_from(steps, rising, rng.normal(0, 1, 40)) for _ in range(200)]
    assert sum(found is not None for found in noise) <= 20
    assert over_optimised_from(steps[:10], rising[:10], hill[:10]) is None


@pytest.mark.slow
def test_killed_at_three_points_nothing_finished_is_made_again(folder: Path, done: Path, tmp_path: Path) -> None:
    """kill -9 while labels, a reward model's training and a policy's training are being made."""
    compare(settings(folder, done))
    out = tmp_path / "killed"
    script = (
        "from pathlib import Path; from tests.benchmarks.comparison.test_compare import settings;"
        "from benchmarks.comparison.command import compare;"
        f"compare(settings(Path({str(folder)!r}), Path({str(out)!r})))"
    )
    environment = {**os.environ, "RLAIF_DEVICE": "cpu"}
    kept: dict[str, int] = {}
    for point in ("labels-*/journal.jsonl", "rm-gold-*", "train-direct-llm-*/metrics.jsonl"):
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=ROOT)
        while not list((out / "stages").glob(point)):
            assert process.poll() is None, f"ended before {point}"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        now = finished(out)
        assert {name: now.get(name) for name in kept} == kept
        assert not (out / "comparison.json").exists()
        kept = now
    assert kept
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert {name: finished(out)[name] for name in kept} == kept
    assert outcome_of(out) == outcome_of(done)
