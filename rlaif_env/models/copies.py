"""A copy of a model's weights, where the model itself is shared with others: to train, or to run in another dtype."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from rlaif_env.models.adapters import Backbone

if TYPE_CHECKING:
    import torch


def private_copy(base: Backbone, dtype: str = "float32") -> Backbone:
    """The weights as they are in memory, in a dtype and on the same device, without the adapters: nobody else's.

    Not read again by name: a live model has none to be read by, or one whose files hold other weights. Buffers, the
    rotary frequencies among them, keep their dtype.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    with base.using(None):
        # what is in the memo is taken for copied: there is never a copy in the dtype that the weights have
        cast = (p.detach().to(getattr(torch, dtype), copy=True) for p in base.model.parameters())
        memo = {id(p): torch.nn.Parameter(c) for p, c in zip(base.model.parameters(), cast, strict=True)}
        model: Any = copy.deepcopy(base.model, memo)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    vars(model).pop("peft_config", None)
    model._hf_peft_config_loaded = False
    return Backbone(model, base.tokenizer, name=base.name)


def refresh_copy(copied: Backbone, base: Backbone, adapter: str | None) -> None:
    """Bring a private copy to the weights of now: those of an adapter folded in, or of all parameters without one."""
    import torch

    with torch.no_grad():
        if adapter is not None:
            for name, _, whole in base.folded(adapter):
                copied.model.get_submodule(name).weight.copy_(whole)
            return
        for mine, theirs in zip(copied.model.parameters(), base.model.parameters(), strict=True):
            mine.copy_(theirs)


def decode_fast_on_cpu(model: Any) -> None:
    """Have a model in bfloat16 do in another way what torch does slowly on a CPU; the results are the same to rounding.

    Attention of one new token is computed in float32, five times as fast; and the head is given states that are no view
    of others, with which its matrix would be copied for every row of a prefill.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    model.get_output_embeddings().register_forward_pre_hook(lambda _, states: (states[0].contiguous(),))
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_IN_FLOAT32, _attention_in_float32)
        AttentionMaskInterface.register(_IN_FLOAT32, sdpa_mask)
        model.set_attn_implementation(_IN_FLOAT32)


_IN_FLOAT32 = "sdpa-in-float32"


def _attention_in_float32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **settings)
    return out.to(query.dtype), weights
