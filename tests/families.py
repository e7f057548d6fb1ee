"""Tiny random models of many architectures, and tokenizers of each kind: what "any model" is held to.

Every model has two layers or a few, 32 hidden units, and weights large enough that its distributions are far from
uniform; where an architecture has a sliding window it is `WINDOW` tokens, shorter than the prompts it is tried on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WINDOW = 8

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
_USUAL = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
_GEMMA = {**_USUAL, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": _USUAL,
    "mistral": {**_USUAL, "sliding_window": WINDOW},
    "mixtral": {**_USUAL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {**_USUAL, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {**_USUAL, "head_dim": 8},
    "gemma": {**_USUAL, "head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "num_hidden_layers": 6},
    "phi3": {**_USUAL, "sliding_window": WINDOW},
    "phi": _USUAL,
    "gpt2": _GPT,
    "gpt_neox": {**_SIZES, "intermediate_size": 64},
    "gptj": {**_GPT, "rotary_dim": 8},
    "opt": {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {**_SIZES, "ffn_hidden_size": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "granite": {**_USUAL, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    "cohere": {**_USUAL, "logit_scale": 0.5},
    "olmo2": _USUAL,
    "smollm3": {**_USUAL, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "stablelm": _USUAL,
    "starcoder2": {**_USUAL, "sliding_window": WINDOW},
    "gpt_oss": {**_USUAL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "gpt_neo": {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512},
        **{"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    },
    "gpt_bigcode": _GPT,
    "falcon-alibi": {**_SIZES, "model_type": "falcon", "ffn_hidden_size": 64, "alibi": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "cohere2": {**_USUAL, "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 4},
    "olmo3": {**_USUAL, "num_hidden_layers": 4, "sliding_window": WINDOW},
    "gemma4_text": {**_GEMMA, "num_hidden_layers": 6, "vocab_size_per_layer_input": 512},
    "glm4": {**_USUAL, "head_dim": 8},
    "qwen3_moe": {**_USUAL, **_EXPERTS, "head_dim": 8, "num_experts": 4},
    "granitemoe": {**_USUAL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **{**_USUAL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8},
        **{**_EXPERTS, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        "first_k_dense_replace": 1,
    },
    "llama4_text": {
        **{**_USUAL, "num_hidden_layers": 4, "head_dim": 8, "attention_chunk_size": WINDOW},
        **{"num_local_experts": 4, "intermediate_size_mlp": 64},
    },
    "lfm2": {**_USUAL, "layer_types": ["conv", "full_attention"]},
}
"""Configurations by name, beside `transformers`' own defaults; the name is the model type unless one is given."""

REFUSED: Mapping[str, Mapping[str, Any]] = {
    "openai-gpt": _GPT,
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
    },
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 512},
}
"""Models that the project cannot read rightly, and says so."""


def family(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A tiny model of a family for a tokenizer, float32, in eval mode."""
    seed = 1 if name == "qwen3_moe" else 0  # at 0 two experts tie within 3e-8 at one token: rounding picks one of them
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    known: Mapping[str, Mapping[str, Any]] = {**FAMILIES, **REFUSED}
    given = {f"{kind}_token_id": i for kind, i in ids.items()}
    settings = {"model_type": name, **known[name], "vocab_size": len(tokenizer), **given}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.initializer_range = 0.3
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float().eval()


# --- tokenizers -------------------------------------------------------------------------------------------------------

CORPUS = (
    "The film was good. A review is rated from 1 to 10. Score: 7. It was the best of films, it was not bad at all!",
    "Dull, badly acted and far too long; the story of 1999 is a wonder. Does he write well? Yes, he does.",
    "un café à la crème, ein schöner Film, 映画はとても良い, 10 9 8 7 6 5 4 3 2 1 0",
)
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<turn>")
SPACE = "▁"


def _byte_level() -> Tokenizer:
    """As GPT-2, Llama-3, Qwen and SmolLM: bytes, merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def _sentencepiece(prepend: bool) -> Tokenizer:
    """As Llama-2 and Mistral (a space is put before the text, and taken off when decoded), or as Gemma (it is not)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prepend else replace
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")  # no piece goes on over a space
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prepend else back)
    return _trained(tokenizer, [SPACE, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-\n"])


def _metaspace(scheme: str) -> Tokenizer:
    """As newer SentencePiece conversions: the pre-tokenizer puts the space, before the first word or before each."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-\n"
    return _trained(tokenizer, [SPACE, *letters])


def _trained(tokenizer: Tokenizer, alphabet: list[str]) -> Tokenizer:
    from tokenizers.trainers import BpeTrainer

    trainer = BpeTrainer(vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return tokenizer


def _wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", **special}
    kept = {name: token for name, token in names.items() if token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **kept)


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a kind in `TOKENIZERS`."""
    return TOKENIZERS[kind]()


TOKENIZERS: Mapping[str, Any] = {
    "byte-level": lambda: _wrapped(_byte_level()),
    "byte-level, BOS added": lambda: _wrapped(_with_bos(_byte_level()), bos_token="<bos>"),
    "Llama-2": lambda: _wrapped(_with_bos(_sentencepiece(True)), bos_token="<bos>"),
    "Llama-2, no BOS": lambda: _wrapped(_sentencepiece(True)),
    "Gemma": lambda: _wrapped(_with_bos(_sentencepiece(False)), bos_token="<bos>"),
    "Metaspace, first": lambda: _wrapped(_metaspace("first")),
    "Metaspace, always": lambda: _wrapped(_metaspace("always")),
    "pad = EOS": lambda: _wrapped(_byte_level(), pad_token="<eos>"),
    "no pad": lambda: _wrapped(_byte_level(), pad_token=""),
}
