"""What a model says of itself: the ends of its turn, by name and loaded; what would be read wrongly is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import rlaif_env  # noqa: F401
from rlaif_env.api import RLAIFError
from rlaif_env.models import Backbone, backbone, model_end_ids
from tests.tiny import character_tokenizer, save_tiny, tiny_model


def ends_at(folder: Path, ends: Any) -> Path:
    """A tiny model whose generation config has these ends."""
    save_tiny(folder, character_tokenizer(extra=("<turn>",)))
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
    return folder


def test_every_end_of_turn_ends_a_response(tmp_path: Path) -> None:
    turn = len(character_tokenizer())
    folder = ends_at(tmp_path, [1, turn])
    assert model_end_ids(folder) == backbone(folder).end_ids == [1, turn]
    env = gym.make(
        "RLAIF/TextGeneration-v0", tokenizer=folder, reward=lambda p, r: [0.0], action_mask=True, truncate_prompts=True
    )
    _, info = env.reset(seed=0)
    assert info["action_mask"][0][[1, turn]].tolist() == [1, 1]
    action = np.full(env.action_space.shape, turn, dtype=np.int64)
    action[:2] = character_tokenizer().encode("ok")
    info = env.step(action)[4]
    assert (info["response"], info["finish_reason"], info["response_length"]) == ("ok", "stop", 3)


@pytest.mark.parametrize("ends", [None, 1, [10**6], []])
def test_without_more_ends_the_eos_is_the_only_one(tmp_path: Path, ends: Any) -> None:
    assert model_end_ids(ends_at(tmp_path, ends)) == [1]


def test_a_model_without_a_generation_config_and_a_broken_one(tmp_path: Path) -> None:
    folder = ends_at(tmp_path, 1)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(RLAIFError, match="unknown model"):
        model_end_ids(folder)
    (folder / "generation_config.json").unlink()
    assert model_end_ids(folder) == [1]


@pytest.mark.parametrize("given", [[-1], [10**6], ["a"], [True]])
def test_ends_that_are_no_ids_are_refused(given: Any) -> None:
    with pytest.raises(RLAIFError, match="expected end_ids from 0 to"):
        gym.make("RLAIF/TextGeneration-v0", reward=lambda p, r: [0.0], tokenizer=character_tokenizer(), end_ids=given)


def test_logits_that_are_not_the_heads_are_refused() -> None:
    tokenizer = character_tokenizer()
    model: Any = tiny_model(len(tokenizer))
    model.forward = _scaled(model.forward)
    with pytest.raises(RLAIFError, match="found odd, 'llama', which makes more of its last hidden states"):
        Backbone(model, tokenizer, name="odd")


def _scaled(forward: Any) -> Any:
    def run(*arguments: Any, **given: Any) -> Any:
        out = forward(*arguments, **given)
        out.logits = out.logits * 1.1
        return out

    return run
