"""The real Gemma-3-270M, held to SentencePiece and llama.cpp; ``make test-gemma``, where its terms were accepted."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
import torch

from rewards import LocalLM, make_reward
from rlaif_env.models import Backbone, backbone, encode, fetching, load_tokenizer, logit_width, resolve
from rlaif_env.models.assets import MODELS
from tests.rewards.language_model.test_labels import brute_force

NAME = "gemma-3-270m"
TERMS = MODELS[NAME].terms
assert TERMS is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get(TERMS.variable) != "1"
        and fetching.damage(fetching.cache_folder() / NAME, MODELS[NAME]) is not None,
        reason=f"the {TERMS.name} were not accepted here: rlaif fetch {NAME} {TERMS.option}",
    ),
]
# What SentencePiece 0.2.3 makes of them with the pieces, scores and types that stand in the GGUF: spaces and newlines
# in runs, digits one by one, bytes for rare characters, no space before the first word.
ENCODED = {
    "May 1999 –": [12055, 236743, 236770, 236819, 236819, 236819, 1271],
    "  “déjà vu”": [138, 236913, 66378, 27084, 11042, 236919],
    " \U0001f3ac\t!": [236743, 245357, 255968, 236888],
    "Score: 10": [15279, 236787, 236743, 236770, 236771],
    " Score: 7/10": [27242, 236787, 236743, 236832, 236786, 236770, 236771],
    "  indented\n    twice\n\n\nthrice": [138, 724, 16764, 107, 140, 140351, 109, 594, 16916],
    " leading and trailing ": [5830, 532, 45330, 236743],
    "a\u00a0b\r\n": [236746, 432, 398, 236763, 251, 107],
    "\U0001fac8 \u1234\u3400 \U00012000": [478, 397, 409, 374, 95682, 465, 382, 366, 236743, 247364],
    "映画は最高だった。": [45467, 237048, 30833, 24833, 236924],
    "x" + 31 * " " + "y": [236781, 167, 236762],
    "don't can't I'll": [13246, 236789, 236745, 740, 236789, 236745, 564, 236789, 859],
    "naïve café — résumé": [1789, 238527, 560, 33443, 2192, 118515],
}
# The likeliest next tokens by llama.cpp (xllamacpp 2026.10.11549) from the GGUF as it is: log-probabilities. It rounds
# the activations to eight bits, which ours are not.
CONTINUED: dict[str, dict[str, float]] = {
    "The capital of France is": {" the": -1.594, " a": -2.290, " Paris": -2.419, " one": -2.727, " known": -2.998},
    "Paris is the capital of": {" France": -0.353, " the": -1.975, " French": -2.632, " Europe": -4.454},
}
ENGLISH = (
    "The Nile is a major river in northeastern Africa. It flows north into the Mediterranean Sea. The Nile is about "
    "6,650 km long and is among the longest rivers in the world. Its drainage basin covers eleven countries."
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(NAME)


@pytest.fixture(scope="module")
def model() -> Backbone:
    return backbone(NAME, device="cpu", dtype="float32")


def log_probabilities(model: Backbone, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model.model(torch.tensor([ids])).logits[0].log_softmax(-1))


@pytest.mark.parametrize("text", ENCODED)
def test_texts_are_encoded_as_sentencepiece_does(text: str, tokenizer: Any) -> None:
    assert tokenizer.encode(text, add_special_tokens=False) == ENCODED[text]
    assert tokenizer.decode(ENCODED[text]) == text


def test_the_tokenizer(tokenizer: Any) -> None:
    assert len(tokenizer) == logit_width(NAME) == 262_144
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 105, "<end_of_turn>": 106}
    assert tokenizer.convert_tokens_to_ids(list(special)) == list(special.values())
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 32_768 and tokenizer.chat_template is None
    assert encode(tokenizer, ["a b", ""]) == [[2, 236746, 518], [2]]  # it begins every text with <bos>


def test_the_configuration(model: Backbone) -> None:
    config = model.model.config
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert (config.model_type, config.num_hidden_layers, full) == ("gemma3_text", 18, [5, 11, 17])
    thetas = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert (config.sliding_window, config.query_pre_attn_scalar, config.tie_word_embeddings) == (512, 256, True)
    assert sum(weight.numel() for weight in model.model.parameters()) == 268_098_176
    assert model.model.generation_config.eos_token_id == 1  # a base model: no turns to end


@pytest.mark.parametrize("text", CONTINUED)
def test_the_next_token_is_llama_cpps(text: str, model: Backbone, tokenizer: Any) -> None:
    found = log_probabilities(model, encode(tokenizer, [text])[0])[-1]
    first = {tokenizer.decode([i]): float(found[i]) for i in found.topk(len(CONTINUED[text])).indices.tolist()}
    assert list(first) == list(CONTINUED[text])
    assert list(first.values()) == pytest.approx(list(CONTINUED[text].values()), abs=0.35)


def test_english_is_likely_after_the_bos_token(model: Backbone, tokenizer: Any) -> None:
    ids = encode(tokenizer, [ENGLISH])[0]
    text = ids[1:]
    perplexities = [
        float((-log_probabilities(model, row)[-len(text) : -1].gather(1, torch.tensor(text[1:])[:, None])).mean().exp())
        for row in (ids, text)
    ]
    assert perplexities[0] < 10 < 100 < perplexities[1]  # 9 with it; 220 without


def test_answers_have_the_likelihoods_of_plain_forward_passes(model: Backbone) -> None:
    prompts = ["Review: A fine film, on the whole.\nScore: ", "Review: Dreadful.\n\nOut of 10 points I give it"]
    labels = [str(i) for i in range(1, 11)]
    for row, prompt in zip(LocalLM(model).label_logprobs(prompts, labels), prompts, strict=True):
        assert np.abs(np.exp(row) - np.exp(brute_force(model, prompt, labels))).max() < 1e-5


def test_its_score_knows_praise_from_blame(model: Backbone) -> None:
    texts = [
        "A wonderful, moving film.",
        "One of the best of the year.",
        "Dreadful and dull.",
        "A boring waste of time.",
    ]
    backend = make_reward("direct-llm", model=NAME, task="movie-review", shots=3, device="cpu", dtype="float32")
    scores = backend.score([""] * 4, texts)
    assert scores.values[:2].min() > scores.values[2:].max()
    assert scores.info["label_mass"].min() > 0.9


def test_who_gets_the_folder_gets_the_notice() -> None:
    folder = MODELS[NAME].folder
    assert "Gemma Terms of Use" in (fetching.cache_folder() / folder / "NOTICE").read_text()
    assert resolve(NAME) == str(fetching.cache_folder() / folder)
    assert json.loads((fetching.cache_folder() / folder / "config.json").read_text())["dtype"] == "float32"
