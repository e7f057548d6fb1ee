"""What differs between architectures of causal LMs, told from a model itself.

Its trunk and head, what its attention takes, the modules an adapter goes on, the tokens that end its turn.

Notation: m states, H hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rlaif_env.api import RLAIFError

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1e-2
"""Of the largest logit, so that bfloat16 passes and a scale or a soft cap that is left out does not."""


_EXPERT_NAMES = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))


def trunk_of(model: Any) -> Any:
    """The model without its head: its output has ``last_hidden_state``."""
    trunk = model.get_decoder()
    return trunk if trunk is not model else model.model


def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of last hidden states: (m, H) -> (m, V), with the scale and soft cap that some architectures put on them.

    Two-dimensional on purpose: a matrix product of a slice of (n, L, H) would copy the V x H head each time.
    """
    config = model.config.get_text_config()
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = (logits / cap).tanh() * cap
    return logits


def plain_head(model: Any) -> torch.Tensor | None:
    """The head's matrix (V, H), where `head_logits` is nothing but the product with it; else None."""
    import torch

    config, head = model.config.get_text_config(), model.get_output_embeddings()
    altered = any(getattr(config, a, None) for a in ("logit_scale", "logits_scaling", "final_logit_softcapping"))
    plain = type(head) is torch.nn.Linear and getattr(head, "bias", None) is None and not altered
    return head.weight if plain else None


def context_of(model: Any) -> int | None:
    """How many tokens a model has positions for, None where its config names no limit.

    Beyond it a table of learned positions fails, on a GPU so that the process cannot go on.
    """
    config = model.config.get_text_config()  # n_positions and the like are read under the first name too
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def check_architecture(model: Any, name: str) -> None:
    """Refuse, by name, a causal LM that this project would read wrongly; forward passes of three tokens tell.

    Raises:
        RLAIFError: If it keeps no keys and values, sees padding that is masked, or makes more of its last hidden states
            than `head_logits` knows.
    """
    import torch

    mask = torch.tensor([[0, 1, 1]], device=model.device)
    rows = (torch.tensor([[first, 0, 1]], device=model.device) for first in (0, 1))
    with torch.inference_mode():
        out, other = (model(input_ids=ids, attention_mask=mask, use_cache=True) for ids in rows)
        hidden = trunk_of(model)(input_ids=mask, use_cache=False).last_hidden_state[0]
        head, whole = head_logits(model, hidden).float(), model(input_ids=mask, use_cache=False).logits[0].float()
    problem = None
    if getattr(out, "past_key_values", None) is None:
        problem = "keeps no keys and values while it writes"
    elif _apart(out.logits[0, 1:], other.logits[0, 1:]):
        problem = "sees padding that an attention mask hides"
    elif _apart(head, whole):
        problem = "makes more of its last hidden states than its head and a scale or soft cap"
    if problem is not None:
        raise RLAIFError(
            f"expected an architecture that is sampled in batches and read by its last hidden states, found {name}, "
            f"{model.config.model_type!r}, which {problem}; use another model"
        )


def _apart(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() > _TOLERANCE * max(1.0, float(expected.abs().max())))


def keeps_keys_only(model: Any) -> bool:
    """Whether keys and values of each token are all that later tokens see of it: no recurrent state, no convolution."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return kinds <= {"full_attention", "sliding_attention"} and not getattr(model, "_is_stateful", False)


def takes_any_mask(model: Any) -> bool:
    """Whether a mask (n, 1, q, k) and position ids say all about who sees whom, and from how far."""
    config = model.config.get_text_config()
    local = "local" in (getattr(config, "attention_layers", None) or ())  # a window of the layer's own, as GPT-Neo's
    takes = inspect.signature(trunk_of(model).forward).parameters
    return keeps_keys_only(model) and "position_ids" in takes and not getattr(config, "alibi", False) and not local


def linear_modules(model: Any, within: Iterable[Any] | None = None) -> list[str]:
    """Full names of a model's linear modules, in its order: where LoRA goes.

    The head and routers of experts are left out. Experts fused into one tensor are no linear modules; beside them those
    that peft would take for experts by their names are left out as well.

    Args:
        model: With or without adapters on it; a module that has one stands here under its own name.
        within: Only these modules; by default all.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, wanted = model.get_output_embeddings(), None if within is None else {id(module) for module in within}
    fused = any("Experts" in type(module).__name__ for module in model.modules())
    names = []
    for path, module in model.named_modules():
        name, kind = path.removesuffix(".base_layer"), type(module).__name__
        linear = isinstance(module, torch.nn.Linear | Conv1D) and module is not head and "Router" not in kind
        taken_for_expert = fused and name.rpartition(".")[2] in _EXPERT_NAMES
        if linear and not taken_for_expert and ".lora_" not in path and (wanted is None or id(module) in wanted):
            names.append(name)
    return names


def end_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Ids of the tokens that end a response: the tokenizer's EOS first, then those that the model's settings add."""
    more = getattr(generation_config, "eos_token_id", None)
    more = more if isinstance(more, list | tuple) else [more]
    known = [i for i in [tokenizer.eos_token_id, *more] if isinstance(i, int) and 0 <= i < len(tokenizer)]
    return list(dict.fromkeys(known))
