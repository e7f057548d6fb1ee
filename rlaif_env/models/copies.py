"""A copy of a model's weights to train, where the model itself is shared with others."""

from __future__ import annotations

import copy
from typing import Any

from rlaif_env.models.adapters import Backbone


def private_copy(base: Backbone) -> Backbone:
    """The weights as they are in memory, float32 and on the same device, without the adapters: nobody else's.

    Not read again by name: a live model has none to be read by, or one whose files hold other weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    with base.using(None):
        model: Any = copy.deepcopy(base.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    vars(model).pop("peft_config", None)
    model._hf_peft_config_loaded = False
    return Backbone(model.float(), base.tokenizer, name=base.name)
