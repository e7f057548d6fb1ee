"""A tiny real causal LM, made in the test: two layers, a vocabulary of characters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from gymnasium.spaces import MultiDiscrete
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlaif_env.models import Backbone

CHARACTERS = " \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-_'\"()"


def character_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One id a character, and one for each of ``extra``; <pad> 0, <eos> 1, <unk> 2."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    longest_first = "|".join([*sorted(extra, key=len, reverse=True), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def tiny_model(width: int, seed: int = 0) -> LlamaForCausalLM:
    """Random weights, large enough that the distributions are far from uniform."""
    config = LlamaConfig(
        vocab_size=width,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_backbone(seed: int = 0, extra: tuple[str, ...] = ()) -> Backbone:
    """A fresh tiny model with its tokenizer."""
    tokenizer = character_tokenizer(extra)
    return Backbone(tiny_model(len(tokenizer), seed), tokenizer, name="tiny")


def shape_of(model: Backbone, group_size: int = 2, steps: int = 4) -> Any:
    """What an agent reads of a vector environment for a model: K, T and V."""
    return SimpleNamespace(group_size=group_size, single_action_space=MultiDiscrete([model.logit_width] * steps))
