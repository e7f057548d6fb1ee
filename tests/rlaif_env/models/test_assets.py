"""The models and the corpus that come from the package index, as they are once fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards import LocalLM
from rlaif_env.api import AssetError
from rlaif_env.models import assets, backbone, load_tokenizer, resolve


def test_the_corpus_is_whole() -> None:
    folder = assets.corpus_folder()
    assert folder in assets.verify()
    lines = (folder / "movieReviewSnippets_GroundTruth.txt").read_bytes().splitlines()
    assert len(lines) == 10_605
    assert {path.suffix for path in folder.iterdir()} == {".txt", ".json"}


def test_the_tokenizer_of_the_built_in_model() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder())
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert len(tokenizer) == 49_152 and tokenizer.model_max_length == 8192
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Score: 10")) == ["Score", ":", "Ġ", "1", "0"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  37")) == ["a", "ĠĠ", "3", "7"]
    assert tokenizer.encode("") == []  # no BOS
    for text in ("The film, 1999 –\n\n  Café “déjà vu” 🎬\t!", " leading and trailing "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_built_in_model_writes_english() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.model_folder()
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".gguf")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The best thing about this movie", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(written).startswith(" is that it")


@pytest.mark.slow
def test_making_the_model_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = assets.model_folder()
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    again = assets.model_folder()
    hashes = [
        {name: facts["sha256"] for name, facts in json.loads((folder / "manifest.json").read_text())["files"].items()}
        for folder in (first, again)
    ]
    assert hashes[0]["model.safetensors"] == hashes[1]["model.safetensors"]
    assert hashes[0]["tokenizer.json"] == hashes[1]["tokenizer.json"]


def test_the_command_fetches_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert assets.fetch_main(["hutto_ICWSM_2014", "smollm2-135m-instruct"]) == 0
    assert capsys.readouterr().out.split() == [str(assets.corpus_folder()), str(assets.model_folder())]


def test_gemma_is_not_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    monkeypatch.delenv("RLAIF_ACCEPT_GEMMA_TERMS", raising=False)
    for use in (resolve, load_tokenizer, backbone, LocalLM, lambda name: assets.fetch_main([name])):
        with pytest.raises(
            AssetError, match=r"Gemma Terms of Use \(https.*rlaif fetch gemma-3-270m --accept-gemma-terms"
        ):
            use("gemma-3-270m")
