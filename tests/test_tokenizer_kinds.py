"""Every kind of tokenizer, by what is done with it, against the tokenizer's own joint encoding and decoding."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import rlaif_env  # noqa: F401
from agents.sft import Demonstration, tokenize
from rewards.language_model.answer_tree import answer_tree
from rewards.language_model.local import LocalLM
from rewards.reward_model.features import encode_for_reward
from rlaif_env import Task
from rlaif_env.data.tasks import PromptSource
from rlaif_env.models import Backbone, encode
from tests.families import TOKENIZERS, family, tokenizer_of

PROMPT, RESPONSE = "The film was", " good. Score: 10, un café à la crème\nYes"
CLOSED = "Is it good?\n"

@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = tokenizer_of(request.param)
    if made.pad_token is None:  # what loading by name does
        made.pad_token = made.eos_token
    return made


def continued(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and those that follow it in the tokenizer's encoding of both together."""
    before, whole = encode(tokenizer, [prompt])[0], encode(tokenizer, [prompt + response])[0]
    assert whole[: len(before)] == before
    return before, whole[len(before) :]


@pytest.mark.parametrize(("prompt", "response"), [(PROMPT, RESPONSE), (CLOSED, "Yes, it is."), (PROMPT, "ly good")])
def test_the_environment_reads_what_the_policy_wrote(
    tokenizer: Any, prompt: str, response: str
) -> None:
    task = Task("t", "continuation", "x", 64, 128, source=PromptSource(prompts={"train": (prompt,)}))
    read: list[str] = []

    def reward(prompts: Any, responses: Any) -> list[float]:
        read.extend(task.judged(p, r) for p, r in zip(prompts, responses, strict=True))
        return [0.0] * len(responses)

    env = gym.make("RLAIF/TextGeneration-v0", task=task, reward=reward, tokenizer=tokenizer)
    env.reset(seed=0)
    ids = continued(tokenizer, prompt, response)[1]
    action = np.full(env.action_space.shape, tokenizer.eos_token_id, dtype=np.int64)
    action[: len(ids)] = ids
    info = env.step(action)[4]
    assert info["response"] == response and info["finish_reason"] == "stop"
    assert read == [prompt + response]


def test_demonstrations_are_encoded_as_the_policy_meets_them(tokenizer: Any) -> None:
    (example,) = tokenize([Demonstration(PROMPT, RESPONSE)], tokenizer, 64, 128)
    before, after = continued(tokenizer, PROMPT, RESPONSE)
    assert list(example.prompt) == before
    assert list(example.response) == [*after, tokenizer.eos_token_id]


def test_a_cut_prompt_keeps_its_beginning_of_sequence(tokenizer: Any) -> None:
    task = Task("t", "continuation", "x", 6, 4, source=PromptSource(prompts={"train": (PROMPT * 4,)}))
    env = gym.make(
        "RLAIF/TextGeneration-v0", task=task, reward=lambda p, r: [0.0], tokenizer=tokenizer, truncate_prompts=True
    )
    observation, _ = env.reset(seed=0)
    (example,) = tokenize([Demonstration(PROMPT * 4, RESPONSE)], tokenizer, 6, 4)
    whole = encode(tokenizer, [PROMPT * 4])[0]
    bos = [whole[0]] if whole[0] == tokenizer.bos_token_id else []
    expected = [*bos, *whole[len(whole) - (6 - len(bos)) :]]
    assert observation["input_ids"].tolist() == expected
    assert list(example.prompt) == expected


def test_a_reward_model_reads_the_joint_text(tokenizer: Any) -> None:
    task = Task("t", "continuation", "x", 64, 128)
    ids, cut = encode_for_reward(tokenizer, task, PROMPT, RESPONSE, 256)
    assert (ids, cut) == ([*encode(tokenizer, [PROMPT + RESPONSE])[0], tokenizer.eos_token_id], 0)


@pytest.mark.parametrize("prompt", ["Score: ", "Score:", "Score:\n"])
def test_every_way_to_write_an_answer_is_in_the_tree(tokenizer: Any, prompt: str) -> None:
    labels = [str(i) for i in range(1, 11)]
    lead = "" if prompt[-1].isspace() else " "
    tree = answer_tree(tokenizer, labels, ("",) if not lead else ("", " "))
    for label, ends in zip(labels, tree.ends, strict=True):
        before, whole = (encode(tokenizer, [text])[0] for text in (prompt, prompt + lead + label))
        if whole[: len(before)] != before:
            continue  # the answer merges into the prompt's last token: nobody who is asked can write it so
        spelled = set()
        for node in ends:
            path: list[int] = []
            while node >= 0:
                path.insert(0, tree.tokens[node])
                node = tree.parents[node]
            spelled.add(tuple(path))
        assert tuple(whole[len(before) :]) in spelled


def test_a_rationale_is_what_follows_the_prompt(tokenizer: Any) -> None:
    """A greedy continuation, as the tokenizer decodes it behind its prompt."""
    model = LocalLM(Backbone(family("llama", tokenizer, seed=2), tokenizer))
    (text,) = model.generate([PROMPT], max_new_tokens=8)
    before = encode(tokenizer, [PROMPT])[0]
    import torch

    ids = list(before)
    for _ in range(8):
        ids.append(int(model.backbone.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    start = tokenizer.decode(before, skip_special_tokens=True)
    assert whole.startswith(start) and text == whole[len(start) :]
