"""Every architecture, by what is done with it, against a plain forward pass of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agents.policy import Policy
from rewards.language_model.local import LocalLM
from rlaif_env.models import Backbone, LoraConfig
from tests.families import FAMILIES, WINDOW, family
from tests.rewards.language_model.test_labels import SCORES, brute_force
from tests.tiny import character_tokenizer

PREAMBLE = "A review is rated from 1 to 10.\n\n"
PROMPTS = [f"{PREAMBLE}Review: {text}\nScore: " for text in ("fine", "dull and far too long", "so so")]
CLOSE = 1e-4

@pytest.fixture(params=list(FAMILIES))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    tokenizer = character_tokenizer()
    return Backbone(family(request.param, tokenizer), tokenizer, name=request.param)


def plain_logprobs(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a response by one forward pass over the whole row: no padding, no cache, no mask."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs: torch.Tensor = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]


def test_label_likelihoods(backbone: Backbone) -> None:
    """Past the window; with a shared beginning longer than the window, without, and of a row alone."""
    assert len(PREAMBLE) > 2 * WINDOW
    expected = [brute_force(backbone, prompt, SCORES) for prompt in PROMPTS]
    shared = LocalLM(backbone)
    for scorer in (shared, LocalLM(backbone, share_prefix=False)):
        assert np.abs(scorer.label_logprobs(PROMPTS, SCORES) - expected).max() < CLOSE
    assert np.abs(shared.label_logprobs(PROMPTS[:1], SCORES) - expected[0]).max() < CLOSE


def rows(backbone: Backbone, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    from rlaif_env.models import encode, pad_rows

    return pad_rows(encode(backbone.tokenizer, prompts), backbone.tokenizer.pad_token_id, side="left")


def perturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_sampling_and_log_probabilities(backbone: Backbone, tmp_path: Path) -> None:
    """Sampled with the adapter folded in, evaluated with it on, saved and opened by plain transformers: all one."""
    policy = Policy(backbone, lora=LoraConfig(2, 4.0))
    perturb(policy)
    ids, mask = rows(backbone, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    drawn = policy.sample(ids, mask, uniform=np.random.default_rng(0).random((len(ids), 12)), group_size=2)
    seen = (np.arange(12) < drawn.lengths[:, None]).astype(np.float32)
    tensors = [torch.from_numpy(array) for array in (ids, mask, drawn.ids, seen)]
    with policy.training():
        logprobs = policy.evaluate(*tensors).logprobs
        (logprobs * tensors[3]).sum().backward()
    gradient = [p.grad.clone() for p in policy.parameters]
    policy.save(tmp_path / "saved")
    reference = policy.evaluate(*tensors, reference=True).logprobs
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for parameter in policy.parameters:
        parameter.grad = None
    for i, length in enumerate(drawn.lengths):
        prompt, response = ids[i][mask[i] > 0].tolist(), drawn.ids[i, :length].tolist()
        with torch.no_grad():
            opened = plain_logprobs(plain, prompt, response, 0.9).numpy()
            with backbone.using(None) as model:
                start = plain_logprobs(model, prompt, response, 0.9).numpy()
        assert np.abs(opened - drawn.logprobs[i, :length]).max() < CLOSE
        assert np.abs(opened - logprobs[i, :length].detach().numpy()).max() < CLOSE
        assert np.abs(start - reference[i, :length].numpy()).max() < CLOSE
        with backbone.using(policy.adapter) as model:
            plain_logprobs(model, prompt, response, 0.9).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in policy.parameters)
    apart = max(float((p.grad - g).abs().max()) for p, g in zip(policy.parameters, gradient, strict=True))
    assert apart < CLOSE * largest


def test_full_fine_tuning(backbone: Backbone, tmp_path: Path) -> None:
    """All weights: the own copy evaluates as the plain model does and is saved as it is."""
    from rlaif_env.models import backbone as load

    backbone.save_merged(None, tmp_path / "start")
    policy = Policy(load(tmp_path / "start", device="cpu", dtype="float32"), trainable="full")
    ids, mask = rows(backbone, PROMPTS)
    responses = np.random.default_rng(0).integers(3, 40, (3, 6))
    tensors = [torch.from_numpy(array) for array in (ids, mask, responses, np.ones((3, 6), np.float32))]
    with policy.training():
        policy.evaluate(*tensors).logprobs.sum().backward()
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.sub_(0 if parameter.grad is None else 1e-2 * parameter.grad.sign())
        with policy.training():
            logprobs = policy.evaluate(*tensors).logprobs
        policy.save(tmp_path / "saved")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        for i in range(3):
            expected = plain_logprobs(plain, ids[i][mask[i] > 0].tolist(), responses[i].tolist(), 0.9)
            assert float((expected - logprobs[i]).abs().max()) < CLOSE
