"""Prompts as a policy reads them: templates, system messages, cuts by turns; the same everywhere; judges see none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import rlaif_env  # noqa: F401
from agents.policy import Policy
from agents.sft import Demonstration, tokenize
from benchmarks.evaluation.systems import answer
from rewards.language_model.local import LocalLM
from rewards.reward_model.features import encode_for_reward
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import Task, load_task
from rlaif_env.data.templates import encode_prompts, template_for, turn_end
from rlaif_env.models import Backbone
from tests.tiny import character_tokenizer, tiny_model

CHAT = (
    "{% for m in messages %}<role>{{ m['role'] }}\n{{ m['content'] }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<role>assistant\n{% endif %}"
)
TALK = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: how are you?\n\nAssistant:"


def tokenizer_with(template: str | None = CHAT) -> Any:
    tokenizer = character_tokenizer(extra=("<role>", "<turn>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<role>", "<turn>"]})
    tokenizer.chat_template = template
    return tokenizer


def task(kind: str = "dialogue", **settings: Any) -> Task:
    made = load_task("helpful", source=[TALK, "say hi"])
    return replace(made, kind=kind, max_prompt_tokens=200, max_response_tokens=8, **settings)


def texts(task: Task, tokenizer: Any, limit: int | None = None) -> list[str]:
    rows, shown = encode_prompts(task, tokenizer, [TALK, "say hi"], limit)
    decoded = [tokenizer.decode(row) for row in rows]
    assert decoded == shown
    return decoded


WHOLE = "<role>user\nhello<turn>\n<role>assistant\nhi<turn>\n<role>user\nhow are you?<turn>\n<role>assistant\n"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"template": "plain"}, [TALK, "say hi"]),
        ({}, [WHOLE, "<role>user\nsay hi<turn>\n<role>assistant\n"]),
        ({"template": "human-assistant"}, [TALK, "\n\nHuman: say hi\n\nAssistant:"]),
        (
            {"system": "short"},
            [
                "<role>system\nshort<turn>\n" + WHOLE,
                "<role>system\nshort<turn>\n<role>user\nsay hi<turn>\n<role>assistant\n",
            ],
        ),
        (
            {"template": "human-assistant", "system": "short"},
            ["\n\nSystem: short" + TALK, "\n\nSystem: short\n\nHuman: say hi\n\nAssistant:"],
        ),
    ],
)
def test_each_template(settings: dict[str, Any], expected: list[str]) -> None:
    assert texts(task(**settings), tokenizer_with()) == expected


def test_auto_is_chat_only_for_dialogues_and_tokenizers_that_have_a_template() -> None:
    assert template_for(task(), tokenizer_with()) == "chat"
    assert template_for(task(), tokenizer_with(None)) == "plain"
    assert template_for(task("continuation"), tokenizer_with()) == "plain"
    assert template_for(task("summary"), tokenizer_with()) == "plain"
    with pytest.raises(
        RLAIFError, match="expected a tokenizer with a chat template, found none; use an instruct model"
    ):
        template_for(task(template="chat"), tokenizer_with(None))


def test_a_long_dialogue_is_cut_at_the_front_by_turns_and_its_system_message_stays() -> None:
    tokenizer, last = tokenizer_with(), "<role>user\nhow are you?<turn>\n<role>assistant\n"
    length = len(tokenizer(last)["input_ids"])
    assert texts(task(), tokenizer, length + 5)[0] == last
    system = "<role>system\nbe<turn>\n"
    more = len(tokenizer(system)["input_ids"])
    assert texts(task(system="be"), tokenizer, length + more)[0] == system + last
    assert texts(task(), tokenizer, length - 4)[0] == last.replace("how ", "")
    with pytest.raises(
        RLAIFError, match="expected room for a prompt in 5 tokens, found that the template 'chat' alone"
    ):
        texts(task(), tokenizer, 5)
    plain = task(template="plain")
    assert texts(plain, tokenizer, 40)[0] == "\n\nHuman: how are you?\n\nAssistant:"  # turns without a template too


def test_bad_templates_are_refused() -> None:
    with pytest.raises(RLAIFError, match="expected template auto, plain, chat, human-assistant, found 'chatml'"):
        task(template="chatml")
    with pytest.raises(RLAIFError, match="expected a system message as text and with a template of turns"):
        task(template="plain", system="x")
    with pytest.raises(RLAIFError, match="expected a template of turns for the system message, found that prompts are"):
        texts(task(system="short"), tokenizer_with(None))
    refusing = tokenizer_with("{{ raise_exception('no system') }}")
    with pytest.raises(RLAIFError, match="found it refuses user, assistant, user: no system"):
        texts(task(), refusing)


def test_the_response_ends_with_the_turn() -> None:
    tokenizer = tokenizer_with()
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert turn_end(task(), tokenizer) == turn
    assert turn_end(task(template="plain"), tokenizer) == tokenizer.eos_token_id
    (example,) = tokenize([Demonstration("say hi", "hi")], tokenizer, 200, 8, task())
    assert tokenizer.decode(example.prompt) == "<role>user\nsay hi<turn>\n<role>assistant\n"
    assert tokenizer.decode(example.response) == "hi<turn>"


def test_policy_judge_and_evaluation_agree(tmp_path: Any) -> None:
    """The environment's observation is what is evaluated and sampled for labels; the judge reads the conversation."""
    tokenizer, seen = tokenizer_with(), []
    base = Backbone(tiny_model(len(tokenizer), max_position_embeddings=512), tokenizer, name="tiny")
    base.end_ids.append(tokenizer.convert_tokens_to_ids("<turn>"))

    def reward(prompts: Any, responses: Any) -> list[float]:
        seen.extend(zip(prompts, responses, strict=True))
        return [0.0] * len(responses)

    source = {"train": (TALK, "say hi"), "test": (TALK, "say hi")}
    whole = task().with_source(replace(task().source, prompts=source))
    env = gym.make("RLAIF/TextGeneration-v0", task=whole, reward=reward, tokenizer=tokenizer, end_ids=base.end_ids)
    observation, info = env.reset(seed=0, options={"prompt_index": 0})
    ids = observation["input_ids"][observation["attention_mask"] > 0]
    assert tokenizer.decode(ids) == WHOLE and info["prompt"] == TALK
    uniform = np.random.default_rng(0).random((1, 8))
    drawn = Policy(base, trainable="none").sample(
        observation["input_ids"][None], observation["attention_mask"][None], uniform=uniform
    )
    info = env.step(drawn.ids[0])[4]
    assert seen == [(TALK, info["response"])] and "<" not in info["response"].replace("<unk>", "")
    labeller = LocalLM(base, task=whole)
    assert labeller._encode([TALK]) == [ids.tolist()]
    base.save_merged(None, tmp_path / "model")
    system = answer("a", tmp_path / "model", whole, prompts=2, reference=tmp_path / "model", max_new_tokens=8)
    assert np.isfinite(system.measures["reference_nll"]).all() and (system.measures["kl"] == 0).all()


def test_a_reward_model_reads_the_conversation_in_the_template_of_its_base() -> None:
    tokenizer = tokenizer_with()
    ids, cut = encode_for_reward(tokenizer, task(), TALK, "fine<eos>", 200)
    assert tokenizer.decode(ids) == WHOLE + "fine<turn><eos>" and cut == 0
    # what stands behind "Assistant: " in a file and what a policy says are the same
    assert encode_for_reward(tokenizer, task(), TALK, " fine\n", 200) == (ids, 0)
    ids, cut = encode_for_reward(tokenizer, task(template="plain"), TALK, "fine", 200)
    assert tokenizer.decode(ids) == TALK + " fine<eos>"
    assert encode_for_reward(tokenizer, task(), "", "alone", 200)[0] == [*tokenizer.encode("alone"), 1]
