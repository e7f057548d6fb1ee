"""A tiny real causal LM, made in the test, and the tokenizers it goes with: a character or a byte a token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gymnasium.spaces import MultiDiscrete
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlaif_env.models import Backbone

CHARACTERS = " \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-_'\"()"
SMALLEST: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
"""A shape for tests that open a model very often."""


def character_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One id a character, and one for each of ``extra``; <pad> 0, <eos> 1, <unk> 2."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    longest_first = "|".join([*sorted(extra, key=len, reverse=True), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte: any Unicode text, 258 ids; <pad> is 0, <eos> is 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<eos>": 1, **{sign: i for i, sign in enumerate(alphabet, start=2)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(width: int, seed: int = 0, **shape: Any) -> LlamaForCausalLM:
    """Random weights, large enough that the distributions are far from uniform; ``shape`` goes to its config."""
    default: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    ids = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = LlamaConfig(vocab_size=width, initializer_range=0.3, **ids, **default | shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_backbone(seed: int = 0, extra: tuple[str, ...] = (), **shape: Any) -> Backbone:
    """A fresh tiny model with its tokenizer."""
    tokenizer = character_tokenizer(extra)
    return Backbone(tiny_model(len(tokenizer), seed, **shape), tokenizer, name="tiny")


def shape_of(model: Backbone, group_size: int = 2, steps: int = 4) -> Any:
    """What an agent reads of a vector environment for a model: K, T and V."""
    return SimpleNamespace(group_size=group_size, single_action_space=MultiDiscrete([model.logit_width] * steps))


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **shape: Any) -> Path:
    """Put a tiny model and its tokenizer, over characters unless another is given, in a folder."""
    tokenizer = tokenizer or character_tokenizer()
    tiny_model(len(tokenizer), **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
