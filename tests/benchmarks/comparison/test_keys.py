"""What the stages of a comparison are known by: a change here has everybody's finished stages made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.comparison.config import ARMS, CompareConfig
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.stages import Plan
from rewards.labeling.config import LabelOptions
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.data.preferences import write_preferences
from tests.rewards.test_backends import preferences
from tests.tiny import tiny_backbone

TASK = """
name = "toy"
kind = "continuation"
criterion = "how many vowels it has"
max_prompt_tokens = 8
max_response_tokens = 4
[source.prompts]
train = ["ab"]
test = ["cd", "mn"]
[source.preferences]
train = "{0}"
gold = "{0}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, another model to label, and a task with people's preferences."""
    folder = tmp_path_factory.mktemp("keys")
    for name, seed in (("policy", 0), ("labeler", 1)):
        tiny_backbone(seed).save_merged(None, folder / name)
    write_preferences(folder / "human.jsonl", preferences("human", 20))
    (folder / "toy.toml").write_text(TASK.format(folder / "human.jsonl"))
    return folder


def dry(folder: Path, out: Path, labeler: str = "labeler", **label: Any) -> Pipeline:
    models: dict[str, Any] = {"model": str(folder / "policy"), "labeler": LanguageModelConfig(str(folder / labeler))}
    asked: dict[str, Any] = {"mode": "score", "shots": 0, **label}
    config = CompareConfig(
        task=str(folder / "toy.toml"), out=out, arms=tuple(ARMS), label=LabelOptions(**asked), **models
    )
    pipeline = Pipeline(config, Console(quiet=True))
    pipeline.stages = Plan(out / "stages")
    return pipeline


LORA = {"rank": 16, "alpha": 32.0}
ADAMW = {"name": "adamw", "weight_decay": 0.0, "max_grad_norm": 1.0}
SCORER = {"model": "labeler", "url": None, "chat": False, "dtype": None, "server": None}
SCORE = {"scale": None, "shots": 0, "template": None, "minimum_mass": 1e-3}
SAMPLER = {"url": [], "adapters": "", "patience": 900.0, "concurrency": 64, "timeout": 600.0}
LABELS = {
    **SCORE,
    **{"mode": "score", "prompt": "base", "cot": False, "samples": 1, "temperature": None, "rationale_tokens": 512},
    **{"max_tokens": 4096, "seed": 0, "calibrate": 0, "calibration": None, "input": None, "split": "train"},
    **{"pairs": 1500, "min_gap": 0.0, "policy": None, "policy_temperature": 0.9, "template_file": None},
    **{"sampler": SAMPLER | {"api_key_env": "RLAIF_SAMPLER_API_KEY"}, "labeler": SCORER},
}
REWARD_MODEL = {
    **{"trainable": "head", "epochs": 2, "learning_rate": 1e-4, "batch_pairs": 32, "lora": LORA, "optimizer": ADAMW},
    **{"seed": 0, "split_by": "auto", "validation_share": 0.1, "test_share": 0.1, "folds": 0, "pairs": 12000},
    **{"texts": 4000, "layers": 0, "max_tokens": 1152, "center": True, "normalize": "none", "min_gap": 0.5},
    **{"test_pairs": 2000, "model": "policy"},
}
AGENT = {
    **{"baseline": "auto", "beta": 0.05, "reward_normalisation": "std", "learning_rate": 1.2e-3, "warmup_updates": 5},
    **{"temperature": 0.9, "missing_eos_penalty": 0.0, "trainable": "lora", "lora": LORA, "optimizer": ADAMW},
    **{"value_learning_rate": 1e-3, "average_decay": 0.9, "importance_cap": 2.0, "importance_level": "token"},
}
TRAINING = {"updates": 50, "prompts_per_update": 4, "group_size": 6, "decay": True, "agent": AGENT, "seed": 0}
ANSWERS = {"prompts": None, "split": "test", "seed": 0, "model": "policy"}


def test_what_a_stage_is_made_from_is_as_it_was(folder: Path, tmp_path: Path) -> None:
    pipeline = dry(folder, tmp_path)
    for arm in ("sft", *ARMS):
        answers = pipeline.answers(arm, 0)
        for judge in ("direct-llm", "human-rm", "gold-rm") if arm == "sft" else ():
            pipeline.judgement(judge, answers)
    contents = {pipeline.content(str(folder / name)): name for name in ("policy", "labeler")}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(x) for name, x in value.items() if name not in pipeline.shared}
        return contents.get(value, value) if isinstance(value, str) else value

    found: dict[str, list[Any]] = {}
    assert isinstance(pipeline.stages, Plan)
    for job in pipeline.stages.jobs:
        found.setdefault(job.name, []).append((plain(dict(job.settings)), [other.name for other in job.needs]))
    train, own = {**TRAINING, "model": "policy"}, SCORER | {"model": "policy"}
    group = {"scorer": SCORER, **SCORE, "mode": "score", "prompt": "base"}
    expected: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
        "labels": [(LABELS, []), (LABELS | {"mode": "pairwise"}, []), (LABELS | {"labeler": own}, [])],
        "gold-preferences": [({}, [])],
        "rm-human": [({**REWARD_MODEL, "labels": None}, [])],
        "rm-ai": 3 * [(REWARD_MODEL, ["labels"])],
        "rm-both": [({**REWARD_MODEL, "labels": None}, ["labels"])],
        "rm-gold": [(REWARD_MODEL, ["gold-preferences"])],
        "train-human-rm-seed0": [({**train, "reward": {"reward": "human-rm"}}, ["rm-human"])],
        "train-distilled-rm-seed0": 3 * [({**train, "reward": {"reward": "distilled-rm"}}, ["rm-ai"])],
        "train-reward-model-seed0": [({**train, "reward": {"reward": "reward-model"}}, ["rm-both"])],
        "train-direct-llm-seed0": [({**train, "reward": {"scorer": who, **SCORE}}, []) for who in (SCORER, own)],
        "train-group-preference-seed0": [({**train, "reward": group}, [])],
        "answers-sft-seed0": [(ANSWERS, [])],
        "answers-human-rm-seed0": [(ANSWERS, ["train-human-rm-seed0"])],
        "judge-human-rm-of-sft-seed0": [({"judge": {"reward": "human-rm"}}, ["rm-human", "answers-sft-seed0"])],
        "judge-direct-llm-of-sft-seed0": [({"judge": {"scorer": SCORER, **SCORE}}, ["answers-sft-seed0"])],
        "judge-gold-rm-of-sft-seed0": [({"judge": {"reward": "reward-model"}}, ["rm-gold", "answers-sft-seed0"])],
    }
    assert {name: found[name] for name in expected} == expected


def test_another_number_of_exemplars_is_one_that_the_task_has(folder: Path, tmp_path: Path) -> None:
    movie = replace(dry(folder, tmp_path).config, task="movie-review")
    reviews = Pipeline(movie, Console(quiet=True))
    reviews.stages = Plan(tmp_path / "stages")
    assert reviews.other_shots("direct-llm") == 1  # none were asked for
    assert dry(folder, tmp_path, shots=3).other_shots("self-llm") == 2
    assert dry(folder, tmp_path).other_shots("direct-llm") is None  # a task of one's own has no exemplars
    assert dry(folder, tmp_path, template="{text}").other_shots("direct-llm") is None
    assert dry(folder, tmp_path).other_shots("human-rm") is None


@pytest.mark.parametrize("calibrate", [0, 5])
def test_pairwise_labels_are_those_of_the_mode_whatever_the_mode(folder: Path, tmp_path: Path, calibrate: int) -> None:
    score = dry(folder, tmp_path, shots=-1, scale=(1, 3), calibrate=calibrate)
    pairwise = dry(folder, tmp_path, mode="pairwise", shots=-1, calibrate=calibrate)
    keys = {arm: (score.training(arm, 0).key, pairwise.training(arm, 0).key) for arm in ("pairwise-rm", "distilled-rm")}
    assert keys["pairwise-rm"] == 2 * (keys["distilled-rm"][1],)
    assert keys["distilled-rm"][0] != keys["distilled-rm"][1]
