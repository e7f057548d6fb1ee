"""The sampler draws from the model's own distribution, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL, backbone, encode
from rlaif_env.models.sampling import Samples, sample
from tests.tiny import tiny_backbone

PROMPTS = ["ab", "a longer prompt", "c", "the same", "ab"]


def draw(prompts: list[str] = PROMPTS, seed: int = 0, k: int = 1, **settings: Any) -> Samples:
    model = tiny_backbone(4)
    keywords: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": [1, *range(20, 40)], "pad_id": 0, **settings}
    uniform = np.random.default_rng(seed).random((len(prompts) * k, 12))
    rows = encode(model.tokenizer, prompts)
    return sample(model.model, rows, uniform=keywords.pop("uniform", uniform), samples_per_prompt=k, **keywords)


def test_compaction_and_neighbours_change_nothing() -> None:
    whole = draw()
    assert len(set(whole.lengths)) > 2, "rows should end at different times"
    plain = draw(compact=False)
    assert np.array_equal(whole.ids, plain.ids) and np.array_equal(whole.lengths, plain.lengths)
    uniform = np.random.default_rng(0).random((5, 12))
    for i, prompt in enumerate(PROMPTS):
        alone = draw([prompt], uniform=uniform[i : i + 1])
        assert np.array_equal(alone.ids[0], whole.ids[i])
        assert np.allclose(alone.logprobs[0], whole.logprobs[i], atol=1e-4)


def test_groups_equal_repeated_prompts() -> None:
    grouped = draw(["ab", "xyz"], k=3)
    repeated = draw(["ab"] * 3 + ["xyz"] * 3)
    assert np.array_equal(grouped.ids, repeated.ids)


def test_ends_are_kept_and_padded_after() -> None:
    drawn = draw()
    for ids, length, logprobs in zip(drawn.ids, drawn.lengths, drawn.logprobs, strict=True):
        assert (ids[length:] == 0).all() and (logprobs[length:] == 0).all() and (logprobs[:length] < 0).all()
        stops = [i for i, token in enumerate(ids[:length]) if token == 1 or 20 <= token < 40]
        assert stops in ([], [length - 1]) and (stops or length == 12)


def test_logprobs_are_the_models() -> None:
    drawn = draw(temperature=0.7)
    model = tiny_backbone(4)
    for prompt, ids, length, logprobs in zip(PROMPTS, drawn.ids, drawn.lengths, drawn.logprobs, strict=True):
        before = encode(model.tokenizer, [prompt])[0]
        logits = model.model(torch.tensor([[*before, *ids[:length]]])).logits[0, len(before) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(ids[:length])[:, None])[:, 0]
        assert np.allclose(expected.detach().numpy(), logprobs[:length], atol=1e-4)


def test_frequencies_pass_a_chi_square() -> None:
    """4,000 first tokens against the softmax; the statistic exceeds this bound by chance once in 10^5."""
    model = tiny_backbone(4)
    n = 4000
    drawn = sample(
        model.model,
        [[5, 6]],
        max_new_tokens=1,
        stop_ids=[1],
        pad_id=0,
        uniform=np.random.default_rng(1).random((n, 1)),
        samples_per_prompt=n,
    )
    p = model.model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1).detach().numpy()
    counts = np.bincount(drawn.ids[:, 0], minlength=len(p))
    big = p * n >= 5
    expected = np.append(p[big], p[~big].sum()) * n
    found = np.append(counts[big], counts[~big].sum())
    statistic = ((found - expected) ** 2 / expected).sum()
    df = len(expected) - 1
    assert statistic < df + 4.3 * (2 * df) ** 0.5 + 8


def test_greedy_top_k_and_the_real_model() -> None:
    model = backbone(BUILTIN_MODEL, device="cpu", dtype="float32")
    rows = encode(model.tokenizer, ["The film was", "My favourite actor in this is"])
    settings: dict[str, Any] = {
        "max_new_tokens": 5,
        "stop_ids": [2],
        "pad_id": 2,
        "uniform": np.random.default_rng(0).random((2, 5)),
    }
    greedy = sample(model.model, rows, temperature=0.0, **settings)
    assert np.array_equal(greedy.ids, sample(model.model, rows, top_k=1, **settings).ids)
    for row, ids in zip(rows, greedy.ids, strict=True):
        expected = model.model.generate(torch.tensor([row]), max_new_tokens=5, do_sample=False)[0, len(row) :]
        assert ids[: len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": [""]}, "expected prompts of at least one token"),
        ({"max_new_tokens": 0}, "expected max_new_tokens >= 1"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"max_new_tokens": 13}, "expected uniform numbers of shape"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        draw(**settings)
