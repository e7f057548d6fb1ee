"""The only room that loads weights: models by name, the adapters on them, encoding, sampling, the built-in assets."""

from rlaif_env.models.adapters import Backbone
from rlaif_env.models.architecture import (
    context_of,
    end_ids,
    head_logits,
    keeps_keys_only,
    linear_modules,
    plain_head,
    takes_any_mask,
    trunk_of,
)
from rlaif_env.models.assets import BUILTIN_MODEL, MODELS
from rlaif_env.models.copies import decode_fast_on_cpu, private_copy, refresh_copy
from rlaif_env.models.encoding import (
    continuation_ids,
    continuation_text,
    encode,
    keep_end,
    pad_rows,
    tokenizer_fingerprint,
)
from rlaif_env.models.loading import (
    backbone,
    default_device,
    default_dtype,
    load_tokenizer,
    load_weights,
    logit_width,
    model_end_ids,
    refuse_pickled,
    resolve,
)
from rlaif_env.models.memory import check_longest, give_back, rows_that_fit, tokens_that_fit, within
from rlaif_env.models.optimisation import LoraConfig, OptimizerConfig, linear_schedule, make_optimizer
from rlaif_env.models.sampling import TEMPERATURE, Samples, sample

__all__ = [
    "BUILTIN_MODEL",
    "MODELS",
    "TEMPERATURE",
    "Backbone",
    "LoraConfig",
    "OptimizerConfig",
    "Samples",
    "backbone",
    "check_longest",
    "context_of",
    "continuation_ids",
    "continuation_text",
    "decode_fast_on_cpu",
    "default_device",
    "default_dtype",
    "encode",
    "end_ids",
    "give_back",
    "head_logits",
    "keep_end",
    "keeps_keys_only",
    "linear_modules",
    "linear_schedule",
    "load_tokenizer",
    "load_weights",
    "logit_width",
    "make_optimizer",
    "model_end_ids",
    "pad_rows",
    "plain_head",
    "private_copy",
    "refresh_copy",
    "refuse_pickled",
    "resolve",
    "rows_that_fit",
    "sample",
    "takes_any_mask",
    "tokenizer_fingerprint",
    "tokens_that_fit",
    "trunk_of",
    "within",
]
