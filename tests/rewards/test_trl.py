"""Every backend runs unmodified as a reward function of TRL's RLOOTrainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import DirectLLMScore, LocalLM, as_trl_reward
from rewards.compose import compose
from rewards.reward_model.model import RewardModel, distilled_rm, human_rm
from rewards.reward_model.record import LabelRecord
from rlaif_env.api import RewardBackend
from rlaif_env.data.tasks import PromptSource, Task
from rlaif_env.models import backbone
from tests.tiny import tiny_backbone

trl = pytest.importorskip("trl", reason="the extra 'integrations' is needed")
datasets = pytest.importorskip("datasets", reason="the extra 'integrations' is needed")

TASK = Task("toy", "continuation", "how good it is", 24, 6, PromptSource(prompts={"train": ("the film", "ok")}))


def reward_model(base: Path, folder: Path, source: str) -> Path:
    """A reward model on disk, trained on labels of a source."""
    weight = torch.randn(32, generator=torch.Generator().manual_seed(1)) / 4
    RewardModel(backbone(base), weight, TASK, layers=1, labels=LabelRecord({source: 1})).save(folder)
    return folder


BACKENDS: dict[str, Callable[[Path, Path], RewardBackend]] = {
    "human-rm": lambda base, tmp: human_rm(task=TASK, model=reward_model(base, tmp / "rm", "human")),
    "distilled-rm": lambda base, tmp: distilled_rm(task=TASK, model=reward_model(base, tmp / "rm", "ai:tiny")),
    "direct-llm": lambda base, tmp: DirectLLMScore(LocalLM(base), TASK, minimum_mass=0.0),
    "compose": lambda base, tmp: compose(
        {
            "people": (1.0, human_rm(task=TASK, model=reward_model(base, tmp / "rm", "human"))),
            "short": (-0.1, lambda prompts, responses: [float(len(r)) for r in responses]),
        }
    ),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_trains_with_trl(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_backbone().save_merged(None, base)
    backend = BACKENDS[name](base, tmp_path)
    reward = as_trl_reward(backend)
    seen: list[list[float]] = []

    def spied(**columns: Any) -> list[float]:
        seen.append(reward(**columns))
        return seen[-1]

    spied.__name__ = reward.__name__
    trainer = trl.RLOOTrainer(
        model=str(base),
        reward_funcs=spied,
        args=trl.RLOOConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            seed=0,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["the film ", "ok ", "it was ", "no "]}),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if f"rewards/{backend.name}/mean" in row]
    assert len(logged) == 2
    assert len(seen) >= 2
    for row, rewards in zip(logged, seen, strict=False):
        assert row[f"rewards/{backend.name}/mean"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)
    assert all(len(rewards) == 4 for rewards in seen)
