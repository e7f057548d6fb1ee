"""Batching, padding and the shared prefix change nothing; bad input is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.policy import Policy
from rewards import make_reward
from rewards.direct_score import DirectLLMScore
from rewards.language_model.local import LocalLM
from rlaif_env.api import ContextError, RLAIFError
from rlaif_env.models import BUILTIN_MODEL, Backbone, backbone, load_tokenizer
from rlaif_env.models.sampling import context_of
from tests.families import family
from tests.tiny import character_tokenizer, tiny_backbone, tiny_model

LABELS = [str(i) for i in range(1, 11)]
TEXTS = ["A fine film.", "Bad", "It is long, and it is dull, and it never ends" * 3, "ok", "Nothing more to say of it."]


@pytest.fixture(scope="module", params=["tiny", "real"])
def model(request: pytest.FixtureRequest) -> Backbone:
    return tiny_backbone(5) if request.param == "tiny" else backbone(BUILTIN_MODEL, device="cpu", dtype="float32")


def test_batched_equals_single_and_cached_equals_uncached(model: Backbone) -> None:
    prompts = [f"A review is rated from 1 to 10.\n\nReview: {text}\nScore: " for text in TEXTS]
    plain = LocalLM(model, share_prefix=False)
    single = np.concatenate([plain.label_logprobs([prompt], LABELS) for prompt in prompts])
    batched = plain.label_logprobs(prompts, LABELS)
    shared = LocalLM(model)
    cached = shared.label_logprobs(prompts, LABELS)
    assert shared._prefixes, "the common beginning was not computed once"
    again = shared.label_logprobs(prompts[::-1], LABELS)[::-1]
    narrow = LocalLM(model, tokens_per_batch=1).label_logprobs(prompts, LABELS)
    for other in (batched, cached, again, narrow):
        assert np.abs(other - single).max() < 1e-4


def test_the_prefix_is_kept_between_calls() -> None:
    lm = LocalLM(tiny_backbone(2))
    calls = []
    decoder = lm.backbone.model.get_decoder()
    forward = decoder.forward
    decoder.forward = lambda *a, **k: calls.append(k["input_ids"].shape) or forward(*a, **k)  # type: ignore[func-returns-value]
    prompts = [f"the same beginning of every prompt: {w} = " for w in ("a", "b", "c")]
    lm.label_logprobs(prompts, ["1", "2"])
    assert calls[0][0] == 1 and len(calls) == 2
    lm.label_logprobs(prompts[:1], ["1", "2"])
    assert len(calls) == 3 and calls[2][1] < 12, "one forward of what follows the prefix"


def test_generate_is_row_wise_and_seeded(model: Backbone) -> None:
    lm = LocalLM(model)
    prompts = ["The film", "A story of two", "Once"]
    drawn = lm.generate(prompts, max_new_tokens=6, temperature=0.8, top_k=20, seed=3)
    assert drawn == [lm.generate([p], max_new_tokens=6, temperature=0.8, top_k=20, seed=3)[0] for p in prompts]
    assert drawn != lm.generate(prompts, max_new_tokens=6, temperature=0.8, top_k=20, seed=4)
    assert all("i" not in text for text in lm.generate(prompts, max_new_tokens=6, stop=["i"]))


def test_direct_score_on_the_real_model() -> None:
    backend = make_reward("direct-llm", model=BUILTIN_MODEL, task="movie-review", device="cpu", dtype="float32")
    assert isinstance(backend, DirectLLMScore)
    good, bad = "a triumph: moving, funny and superbly acted.", "a tedious, clumsy and pointless waste of time."
    scores = backend.score(["The film is", "The film is"], [" " + good, " " + bad])
    assert scores.values[0] > scores.values[1]
    assert (scores.info["label_mass"] > 0.3).all() and (scores.info["score"] >= 1).all()
    assert np.allclose(
        scores.values, 2 * (scores.info["score"] - backend.scale[0]) / (backend.scale[1] - backend.scale[0]) - 1
    )
    assert copy.deepcopy(backend) is backend


def test_one_copy_of_the_weights() -> None:
    first = backbone(BUILTIN_MODEL, device="cpu", dtype="float32")
    assert LocalLM(BUILTIN_MODEL, device="cpu", dtype="float32").backbone is first
    assert copy.deepcopy(first) is first


def test_an_adapter_that_fits_nothing_leaves_the_model_as_it_was() -> None:
    model = tiny_backbone(7)
    for _ in range(2):
        with pytest.raises(ValueError, match="no-such-module"):
            model.add_lora("wrong", rank=2, alpha=4.0, targets=["no-such-module"])
    assert model.adapters == []
    model.add_lora("right", rank=2, alpha=4.0)
    with pytest.raises(ValueError, match="no-such-module"):
        model.add_lora("wrong", rank=2, alpha=4.0, targets=["no-such-module"])
    assert model.adapters == ["right"]
    model.add_lora("wrong", rank=2, alpha=4.0)


def test_adapters_are_exactly_reversible() -> None:
    model = tiny_backbone(7)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model.model(ids).logits
    mark = model.fingerprint()
    parameters = model.add_lora("a", rank=4, alpha=8, seed=1)
    assert torch.equal(model.model(ids).logits, plain)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    with model.using("a") as net:
        on = net(ids).logits
    assert (on - plain).abs().max() > 0.1
    with model.merged("a") as net:
        merged = net(ids).logits
    assert torch.allclose(merged, on, atol=1e-4)
    assert torch.equal(model.model(ids).logits, plain), "merging must be undone exactly"
    model._fingerprint = None
    assert model.fingerprint() == mark
    with pytest.raises(RLAIFError, match="expected one of the adapters"), model.using("b"):
        pass


def test_saved_merged_model_opens_and_agrees(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_backbone(7)
    for parameter in model.add_lora("a", rank=4, alpha=8, seed=1):
        parameter.data.add_(0.1)
    model.save_merged("a", tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    with model.using("a") as net, torch.no_grad():
        assert torch.allclose(opened(ids).logits, net(ids).logits, atol=1e-4)
    assert len(load_tokenizer(tmp_path / "out")) == len(model.tokenizer)


def test_model_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it asks the hub, at length
    empty, pickled = tmp_path / "empty", tmp_path / "pickled"
    empty.mkdir()
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    no_pad, no_eos = character_tokenizer(), character_tokenizer()
    no_pad.pad_token = None
    no_eos.eos_token = None
    cases = {
        "expected a model folder with a config.json": lambda: backbone(empty),
        "expected safetensors weights in .*pickled": lambda: backbone(pickled),
        "expected a model folder, found nothing at": lambda: backbone(tmp_path / "nowhere"),
        "unknown model 'no-such-model': expected 'smollm2-135m-instruct'": lambda: backbone("no-such-model"),
        "found no pad token": lambda: Backbone(tiny_model(90), no_pad),
        "found no EOS token": lambda: Backbone(tiny_model(90), no_eos),
        "expected a tokenizer of at most 40 ids, the model's logit width": lambda: Backbone(
            tiny_model(40), character_tokenizer()
        ),
        "expected a tokenizer with a live model": lambda: LocalLM(tiny_model(90)),
        "expected a chat template for chat=True": lambda: LocalLM(tiny_backbone(), chat=True),
        "expected labelling prompts of 1 to 8 tokens, found 9": lambda: LocalLM(
            tiny_backbone(), max_tokens=8
        ).label_logprobs(["123456789"], ["1"]),
        "expected labelling prompts of 1 to 512 tokens, found 0": lambda: LocalLM(tiny_backbone()).label_logprobs(
            [""], ["1"]
        ),
        "expected 0 to 4 shots": lambda: DirectLLMScore(LocalLM(tiny_backbone()), shots=9),
        "expected a template with the places": lambda: DirectLLMScore(LocalLM(tiny_backbone()), template="{answer}"),
        "expected a scale of two whole numbers": lambda: DirectLLMScore(LocalLM(tiny_backbone()), scale=(5, 5)),
        "unknown reward 'gpt'": lambda: make_reward("gpt"),
    }
    for message, broken in cases.items():
        with pytest.raises(RLAIFError, match=message):
            broken()


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj", "llama", "bloom"])
def test_what_is_longer_than_the_positions_of_a_model_is_refused_before_any_work(name: str) -> None:
    """With a table of positions it was an IndexError, on a GPU an assertion after which the process is lost."""
    tokenizer = character_tokenizer()
    base = Backbone(family(name, tokenizer), tokenizer)
    lm, limit = LocalLM(base, max_tokens=9999), 512
    assert context_of(base.model) == (None if name == "bloom" else limit)
    labels = ["1", "10"]  # " ", "1", "0" after the prompt
    assert len(lm.generate(["a" * (limit - 6)], max_new_tokens=6)) == 1
    assert np.isfinite(lm.label_logprobs(["a" * (limit - 3)], labels)).all()
    policy, ids = Policy(base, trainable="none"), np.full((1, limit - 5), 5)
    own = f"in the model's context of {limit}, found"
    calls = {
        f"1 to 506 tokens beside 6 more {own} 507 in row 1": lambda: lm.generate(["a", "a" * 507], max_new_tokens=6),
        f"1 to 509 tokens beside 3 more {own} 510 in row 1": lambda: lm.label_logprobs(["a", "a" * 510], labels),
        f"at most 506 tokens beside 6 new ones {own} 507;": lambda: policy.sample(ids, ids, uniform=np.zeros((1, 6))),
    }
    for message, call in calls.items():
        if name == "bloom":
            call()  # a bias by distance instead of positions has no end
            continue
        with pytest.raises(ContextError, match=re.escape(message)):
            call()


def test_braces_in_a_text_stay_text() -> None:
    scorer = DirectLLMScore(LocalLM(tiny_backbone()), "movie-review")
    assert "{0} {text} }{" in scorer.render("", "{0} {text} }{")
