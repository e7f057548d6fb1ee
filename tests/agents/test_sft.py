"""Supervised fine-tuning: the loss is on responses only, learns, is deterministic, and refuses bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents.policy import Policy
from agents.sft import (
    Demonstration,
    Example,
    SFTConfig,
    demonstrations,
    held_out_loss,
    main,
    response_loss,
    sft,
    tokenize,
)
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.data.preferences import split_of
from tests.tiny import tiny_backbone

ROWS = [Demonstration(f"say {word} {n}: ", word) for word in ("red", "green", "blue") for n in range(60)]


def policy(trainable: str = "lora") -> Policy:
    return Policy(tiny_backbone(), trainable=trainable, temperature=1.0)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_of_every_form(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "completion": "d"}, {"text": "ef"}]
    found = list(demonstrations(write(tmp_path / "d.jsonl", rows)))
    assert found == [Demonstration("a", "b"), Demonstration("c", "d"), Demonstration("", "ef")]


def test_bad_rows_are_named_all_together(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a"},
        {"text": ""},
        {"text": "t", "prompt": "p"},
        {"text": "\u0000"},
    ]
    with pytest.raises(DataError) as error:
        list(demonstrations(write(tmp_path / "d.jsonl", rows)))
    for words in (
        "line 2: expected a field 'response', found the fields prompt",
        "line 3: expected text to hold text, found ''",
        "line 4: expected text, or prompt and response, found both in a row",
        "line 5: expected text to be plain text, found the control character U+0000",
    ):
        assert words in str(error.value)


def test_tokens_end_in_an_eos_unless_cut_and_what_is_cut_is_counted() -> None:
    tokenizer = tiny_backbone().tokenizer
    eos = tokenizer.eos_token_id
    (whole,) = tokenize([Demonstration("ab", "cd")], tokenizer, 9, 9)
    assert tokenizer.decode(whole.prompt) == "ab"
    assert (tokenizer.decode(whole.response[:-1]), whole.response[-1], whole.cut) == ("cd", eos, 0)
    (cut,) = tokenize([Demonstration("abcd", "efgh")], tokenizer, 2, 3)
    assert (tokenizer.decode(cut.prompt), tokenizer.decode(cut.response), cut.cut) == ("cd", "efg", 4)
    (text,) = tokenize([Demonstration("", "abc")], tokenizer, 9, 9)
    assert (tokenizer.decode(text.prompt), tokenizer.decode(text.response[:-1])) == ("a", "bc")
    with pytest.raises(DataError, match="row 1: expected at least two tokens, found 1"):
        tokenize([Demonstration("", "a")], tokenizer, 9, 9)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_on_responses_only() -> None:
    """The gradient is zero at every state that predicts a token of a prompt, or padding."""
    p = policy()
    model = p.backbone.model
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out))[1])
    examples = tokenize([Demonstration("abc", "de"), Demonstration("a", "fghi")], p.tokenizer, 9, 9)
    with p.training():
        hidden: list[torch.Tensor] = []
        inner = model.get_decoder().register_forward_hook(
            lambda module, args, out: (out.last_hidden_state.retain_grad(), hidden.append(out.last_hidden_state))[1]
        )
        response_loss(p, examples).backward()
    hook.remove()
    inner.remove()
    (state,) = hidden
    assert state.grad is not None
    moved = state.grad.abs().sum(-1) > 0
    # left-padded prompts of 3: the state at the last prompt token predicts the first response token
    assert moved.tolist() == [
        [False, False, True, True, True, False, False],
        [False, False, True, True, True, True, True],
    ]


def test_the_loss_by_the_models_own_probabilities() -> None:
    p = policy()
    example = tokenize([Demonstration("abc", "de")], p.tokenizer, 9, 9)[0]
    ids = torch.tensor([[*example.prompt, *example.response]])
    logprobs = p.backbone.model(input_ids=ids).logits[0].log_softmax(-1)
    at = [(2 + k, token) for k, token in enumerate(example.response)]
    expected = -sum(float(logprobs[position, token].detach()) for position, token in at)
    with torch.no_grad():
        assert float(response_loss(p, [example])) == pytest.approx(expected, abs=1e-4)
        other = Example([5, 6], example.response, 0)
        both = float(response_loss(p, [example, other]))
        assert both == pytest.approx(expected + float(response_loss(p, [other])), abs=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_it_learns_and_saves_a_plain_model(trainable: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_backbone().save_merged(None, base)
    config = SFTConfig(model=str(base), trainable=trainable, learning_rate=1e-2, epochs=2)
    tuned, figures = sft(config, ROWS)
    assert figures["validation_loss"] < figures["validation_loss_before"] / 2
    assert figures["rows"] + figures["validation_rows"] == len(ROWS)
    tuned.save(tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tuned.tokenizer.encode("say red 7: ", add_special_tokens=False)])
    with tuned.training(), torch.no_grad():
        assert torch.allclose(opened(ids).logits, tuned.backbone.model(ids).logits, atol=1e-4)


def test_twice_with_a_seed_is_the_same_and_another_seed_is_not() -> None:
    states = [sft(SFTConfig(seed=seed, rows=40), ROWS, base=tiny_backbone())[0].state() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_step_is_the_same_for_any_micro_batch() -> None:
    runs = [
        sft(SFTConfig(batch=16, micro_batch=size, rows=32, learning_rate=1e-3), ROWS, base=tiny_backbone())
        for size in (3, 16)
    ]
    assert runs[0][1]["validation_loss"] == pytest.approx(runs[1][1]["validation_loss"], abs=1e-4)


def test_rows_of_one_split_of_a_task_can_still_be_divided() -> None:
    rows = [Demonstration(f"q{i} ", "a") for i in range(400) if split_of(f"q{i} ") == "train"]
    figures = sft(SFTConfig(rows=10), rows, base=tiny_backbone())[1]
    assert figures["validation_rows"] > 3


def test_the_held_out_loss_does_not_depend_on_the_batch() -> None:
    p = policy()
    examples = tokenize(ROWS[::9], p.tokenizer, 20, 9)
    assert held_out_loss(p, examples, 1) == pytest.approx(held_out_loss(p, examples, 50), abs=1e-4)


def test_errors() -> None:
    with pytest.raises(RLAIFError, match="expected rows to train on and to hold out, found 1 and 0"):
        sft(SFTConfig(), [Demonstration("a", "b")], base=tiny_backbone())
    with pytest.raises(RLAIFError, match="expected batch of at least 1, found 0"):
        SFTConfig(batch=0)
    with pytest.raises(RLAIFError, match="expected rows >= 0 and learning_rate >= 0, found 0 and nan"):
        SFTConfig(learning_rate=float("nan"))
    base = tiny_backbone()
    with torch.no_grad():
        base.model.lm_head.weight[5] = float("nan")
    with pytest.raises(RLAIFError, match="expected a finite loss and gradient, found loss nan"):
        sft(SFTConfig(), ROWS, base=base)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_backbone().save_merged(None, tmp_path / "base")
    data = write(tmp_path / "d.jsonl", [{"prompt": row.prompt, "response": row.response} for row in ROWS])
    arguments = ["--data", data, "--model", tmp_path / "base", "--out", tmp_path / "run", "--rows", 50]
    assert main([str(argument) for argument in arguments]) == 0
    shown = capsys.readouterr().out
    assert "50 rows" in shown and "held-out loss" in shown
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 4
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_corpus_gives_openings_and_their_rest() -> None:
    rows = list(demonstrations(None))
    assert len(rows) > 3000
    assert all(len(row.prompt.split()) == 6 and row.response.startswith(" ") for row in rows)
