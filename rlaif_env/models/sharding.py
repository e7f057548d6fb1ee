"""A model larger than one device: the frozen weights of its decoder layers, divided over the processes by FSDP2.

Each layer is gathered before it is run, forward and backward, and dropped after it; so every process has to run the
layers as often as the others. Embeddings, norms, head and adapters stay whole: FSDP2 has no gradient to reduce.
"""

from __future__ import annotations

import warnings
from typing import Any

from rlaif_env.api import RLAIFError
from rlaif_env.models.adapters import Backbone
from rlaif_env.models.architecture import trunk_of


def layers_of(model: Any) -> Any:
    """A model's decoder layers, a `ModuleList`.

    Raises:
        RLAIFError: If its trunk has no list of as many modules as its config says layers.
    """
    import torch

    wanted = int(model.config.get_text_config().num_hidden_layers)
    lists = (module for module in trunk_of(model).children() if isinstance(module, torch.nn.ModuleList))
    found = next((layers for layers in lists if len(layers) == wanted), None)
    if found is None:
        raise RLAIFError(
            f"expected a model whose {wanted} decoder layers can be told, to divide them over processes, found "
            f"{model.config.model_type!r}; leave --shard away"
        )
    return found


def shard(base: Backbone, device: str) -> None:
    """Divide the layers of a backbone over the processes, and put it on a device layer by layer; adapters stay whole.

    All adapters have to be on it. Every process calls it.

    Raises:
        RLAIFError: If its layers are not found; nothing has been changed then.
    """
    from torch import distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    layers = layers_of(base.model)
    # nothing here changes a layer's output in place; that no family does is tested
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    # connections of their own: what is gathered amid a pass cannot be taken for what processes tell each other
    mesh = DeviceMesh.from_group(dist.new_group(), device.partition(":")[0])
    for layer in layers:
        adapters = {parameter for name, parameter in layer.named_parameters() if "lora_" in name}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    trunk = trunk_of(base.model)
    fully_shard(trunk, mesh=mesh, ignored_params=set(trunk.parameters()))  # their root, with no weights of its own
    base.model.to(device)
    base.sharded = True
