"""The only room that loads weights: models by name, the adapters on them, encoding, sampling, the built-in assets."""

from rlaif_env.models.adapters import Backbone, head_logits, plain_head
from rlaif_env.models.assets import BUILTIN_MODEL, MODELS
from rlaif_env.models.encoding import encode, pad_rows, tokenizer_fingerprint
from rlaif_env.models.loading import (
    backbone,
    default_device,
    default_dtype,
    load_tokenizer,
    load_weights,
    logit_width,
    refuse_pickled,
    resolve,
)
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
    "default_device",
    "default_dtype",
    "encode",
    "head_logits",
    "linear_schedule",
    "load_tokenizer",
    "load_weights",
    "logit_width",
    "make_optimizer",
    "pad_rows",
    "plain_head",
    "refuse_pickled",
    "resolve",
    "sample",
    "tokenizer_fingerprint",
]
