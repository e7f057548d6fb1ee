"""Label likelihoods against brute force: each complete label and its terminator by a full forward pass of its own."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch

from rewards import make_reward
from rewards.api import MINIMUM_MASS
from rewards.direct_score import (
    DirectLLMScore,
    ScoreConfig,
    expected_scores,
    from_kwargs,
    rescaled,
    score_distribution,
)
from rewards.language_model.answer_tree import answer_tree, word_start_mask
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM
from rewards.prompts import leads_after
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.models import BUILTIN_MODEL, Backbone, backbone, encode
from tests.tiny import character_tokenizer, tiny_backbone

SCORES = [str(i) for i in range(1, 11)]


def brute_force(model: Backbone, prompt: str, labels: list[str]) -> np.ndarray:
    """log sum over spellings of p(tokens) (1 - sum of q(word character | prompt, tokens)), a full forward each."""
    tokenizer = model.tokenizer
    letters = []
    anchor = tokenizer.decode(tokenizer.encode("\n1", add_special_tokens=False))
    for token in range(len(tokenizer)):
        if token not in tokenizer.all_special_ids:
            text = tokenizer.decode([*tokenizer.encode("\n1", add_special_tokens=False), token])[len(anchor) :]
            if text[:1].isalnum() or text[:1] == "_":
                letters.append(token)
    ids = encode(tokenizer, [prompt])[0]
    out = []
    for label in labels:
        total = 0.0
        spellings = {
            tuple(tokenizer.encode(label, add_special_tokens=False)),
            tuple(tokenizer.convert_tokens_to_ids(list(label))),
        }
        if not prompt[-1].isspace():
            spaced = tokenizer.encode(" " + label[0], add_special_tokens=False)
            spellings |= {tuple(tokenizer.encode(" " + label, add_special_tokens=False))}
            spellings |= {(*spaced, *tokenizer.convert_tokens_to_ids(list(label[1:])))}
        for spelling in spellings:
            with torch.no_grad():
                logits = model.model(torch.tensor([[*ids, *spelling]])).logits[0].double()
            q = logits.softmax(-1)
            p = np.prod([q[len(ids) - 1 + i, token].item() for i, token in enumerate(spelling)])
            total += p * (1 - q[-1, letters].sum().item())
        out.append(np.log(total))
    return np.array(out)


@pytest.mark.parametrize("extra", [(), ("10",), ("10", "th", "1s")])
@pytest.mark.parametrize("prompt", ["Score: ", "Score:", "x"])
def test_toy_model_equals_brute_force(extra: tuple[str, ...], prompt: str) -> None:
    model = tiny_backbone(seed=3, extra=extra)
    found = LocalLM(model).label_logprobs([prompt, "another: "], SCORES)
    assert np.abs(found[0] - brute_force(model, prompt, SCORES)).max() < 1e-5
    assert (np.exp(found).sum(1) <= 1).all()


def test_real_model_equals_brute_force() -> None:
    model = backbone(BUILTIN_MODEL, device="cpu", dtype="float32")
    prompts = ["Review: A fine film, on the whole.\nScore: ", "Review: Dreadful.\n\nOut of 10 points I give it"]
    found = LocalLM(model).label_logprobs(prompts, SCORES)
    for row, prompt in zip(found, prompts, strict=True):
        assert np.abs(np.exp(row) - np.exp(brute_force(model, prompt, SCORES))).max() < 1e-5
        assert (
            np.abs(row - brute_force(model, prompt, SCORES)).max() < 5e-5
        )  # and their logarithms to float32's rounding


def test_ten_and_eight_at_one_half_each_give_nine() -> None:
    """A two-layer model is trained to answer "10" and "8" equally often: the expected score is 9, the reward 7/9."""
    torch.manual_seed(0)
    model = tiny_backbone(seed=1)
    tokenizer, net = model.tokenizer, model.model
    net.requires_grad_(True)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    rows = [tokenizer.encode(f"Score: {answer}.", add_special_tokens=False) for answer in ("10", "8")]
    start = len(tokenizer.encode("Score: ", add_special_tokens=False))
    for _ in range(300):
        loss = torch.zeros(())
        for row in rows:
            logits = net(torch.tensor([row])).logits[0, start - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(row[start:]), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.requires_grad_(False)
    scorer = DirectLLMScore(LocalLM(model), "movie-review", scale=(1, 10), template="Score: ")
    scores = scorer.score([""], [""])
    assert scores.info["score"][0] == pytest.approx(9.0, abs=0.02)
    assert scores.values[0] == pytest.approx(7 / 9, abs=0.005)
    assert scores.info["label_mass"][0] == pytest.approx(1.0, abs=0.01)


def test_expected_score_arithmetic_is_exact() -> None:
    logprobs = np.full((1, 10), -np.inf)
    logprobs[0, [7, 9]] = np.log(0.5)
    probabilities, mass = score_distribution(logprobs)
    assert mass[0] == pytest.approx(1.0)
    assert expected_scores(probabilities)[0] == pytest.approx(9.0)


def test_a_score_is_mapped_affinely() -> None:
    assert rescaled(np.array([1.0, 5.5, 10.0]), (1, 10)).tolist() == [-1.0, 0.0, 1.0]
    assert rescaled(np.array([1.0, 4.0]), (0, 4)).tolist() == [-0.5, 1.0]


def test_the_scale_is_the_tasks_unless_another_is_given() -> None:
    model = LocalLM(tiny_backbone())
    assert DirectLLMScore(model).scale == (1, 9)
    assert DirectLLMScore(model, "helpful").scale == (1, 10)
    scorer = DirectLLMScore(model, scale=[0, 5], minimum_mass=0.0)
    assert (scorer.config, scorer.scale) == (ScoreConfig((0, 5), minimum_mass=0.0), (0, 5))
    with pytest.raises(RLAIFError, match=r"DirectLLMScore: .*unexpected keyword argument 'colour'"):
        DirectLLMScore(model, colour=1)


def test_the_factory_names_its_settings_and_says_no_default_itself() -> None:
    parameters = inspect.signature(from_kwargs).parameters
    assert parameters["scale"].default is None
    assert parameters["minimum_mass"].default == MINIMUM_MASS == ScoreConfig().minimum_mass
    assert {entry.name for config in (LanguageModelConfig, ScoreConfig) for entry in fields(config)} < set(parameters)
    with pytest.raises(RLAIFError, match=r"reward 'direct-llm': .*unexpected keyword argument 'colour'"):
        make_reward("direct-llm", colour=1)


def test_a_tree_shares_beginnings() -> None:
    tree = answer_tree(character_tokenizer(), SCORES)
    assert len(tree.tokens) == 10  # nine digits, and the 0 of 10 below the 1
    assert [len(ends) for ends in tree.ends] == [1] * 10
    assert tree.parents[tree.ends[9][0]] == tree.ends[0][0]
    assert tree.depths[tree.ends[9][0]] == 2
    both = answer_tree(character_tokenizer(("10",)), SCORES)
    assert len(both.ends[9]) == 2  # "10" in one token, and in two


def test_word_starts() -> None:
    tokenizer = character_tokenizer(("th",))
    mask = word_start_mask(tokenizer, len(tokenizer) + 3)
    words = {tokenizer.convert_ids_to_tokens(int(i)) for i in np.flatnonzero(mask)}
    assert {"a", "Z", "7", "_", "th"} <= words
    assert not words & {" ", ".", "\n", "<eos>", "<pad>", "<unk>"}
    assert leads_after("Score: ") == ("",)
    assert leads_after("Score:") == ("", " ")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "expected distinct labels"),
        (["1", "1"], "expected distinct labels"),
        ([" 1"], "expected distinct labels without white space around them"),
        (["é"], "expected the tokenizer to know the label 'é'"),
    ],
)
def test_label_errors(labels: list[str], message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        answer_tree(character_tokenizer(), labels)


def test_a_row_without_mass_is_an_error_not_a_score() -> None:
    scorer = DirectLLMScore(LocalLM(tiny_backbone()), "movie-review", minimum_mass=0.999)
    with pytest.raises(BackendError, match=r"expected direct-llm:tiny to put at least 0.999 .* found .* in row 0"):
        scorer.score(["a film"], ["is good"])
