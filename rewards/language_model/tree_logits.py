"""The logits at every node of an answer tree, in one forward pass where a model's attention takes any mask.

All answers to a prompt are then branches that attend to the prompt and to their own beginnings only. A model with
position biases (BLOOM, MPT), windows of its own, chunks or a recurrent state reads each branch in a pass of its own.

Notation: n prompts, N nodes, V vocabulary; q queries see k keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rewards.language_model.answer_tree import AnswerTree
from rlaif_env.models import head_logits, pad_rows, trunk_of

KeysAndValues = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Of each layer, for one prefix that all prompts share: (1, heads, length, width) each."""


def read_prefix(model: Any, prefix: Sequence[int]) -> KeysAndValues:
    """The keys and values of a prefix, all of them."""
    from transformers import DynamicCache

    cache = DynamicCache()  # not the model's own, which forgets what is beyond a sliding window
    ids = torch.tensor([list(prefix)], device=model.device)
    trunk_of(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: Sequence[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def tree_logits(
    model: Any, prefix: KeysAndValues, suffixes: Sequence[Sequence[int]], tree: AnswerTree, pad_id: int
) -> torch.Tensor:
    """Logits at the end of each prompt and at every node of the tree, (n, N + 1, V), in one pass.

    Args:
        model: One that `rlaif_env.models.takes_any_mask`.
        prefix: What the prompts share at their beginning, from `read_prefix`; empty where nothing is shared.
        suffixes: The rest of n prompts, at least one token each.
        tree: The answers.
        pad_id: Fills the positions before a shorter prompt.
    """
    from transformers import DynamicCache

    nodes, before = len(tree.tokens), prefix[0][0].shape[2] if prefix else 0
    ids, real = pad_rows(suffixes, pad_id, side="left")
    n, width = ids.shape
    ids = np.concatenate([ids, np.broadcast_to(np.asarray(tree.tokens), (n, nodes))], axis=1)
    of_nodes = real.sum(axis=1)[:, None] - 1 + np.asarray(tree.depths)[None]
    positions = before + np.concatenate([(real.cumsum(axis=1) - 1).clip(0), of_nodes], axis=1)
    sees = np.zeros((n, width + nodes, before + width + nodes), dtype=bool)
    sees[:, :, :before] = True
    sees[:, :, before : before + width] = real[:, None] > 0
    sees[:, :width, before : before + width] &= np.tri(width, dtype=bool)
    sees[:, width:, before + width :] = tree.ancestry()
    diagonal = np.arange(width + nodes)
    sees[:, diagonal, before + diagonal] = True  # padding sees itself: a row that sees nothing would be NaN
    cache = None
    if prefix:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1), layer)
    hidden = trunk_of(model)(
        input_ids=torch.from_numpy(ids).to(model.device),
        attention_mask=_attention(model, torch.from_numpy(sees), torch.from_numpy(positions)),
        position_ids=torch.from_numpy(positions).to(model.device),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state[:, -(nodes + 1) :]
    return head_logits(model, hidden.reshape(-1, hidden.shape[-1])).reshape(n, nodes + 1, -1)


def _attention(model: Any, sees: torch.Tensor, positions: torch.Tensor) -> Any:
    """An additive mask (n, 1, q, k) of who sees whom; one a kind of layer where some layers see a window only.

    Args:
        model: Whose layers they are.
        sees: Whether a query sees a key, (n, q, k); the first k - q keys are those of the shared prefix.
        positions: Of the queries, (n, q), the prefix counted.
    """

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        blocked = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill_(~allowed, torch.finfo(model.dtype).min)
        return blocked[:, None].to(model.device)

    config = model.config.get_text_config()
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    if not window or kinds == {"full_attention"}:
        return additive(sees)
    prefix = torch.arange(sees.shape[2] - sees.shape[1]).expand(len(positions), -1)
    distance = positions[:, :, None] - torch.cat([prefix, positions], dim=1)[:, None]
    near = additive(sees & (distance < window))
    masks = {"full_attention": additive(sees), "sliding_attention": near}
    return {kind: masks[kind] for kind in kinds} or near  # without kinds, every layer has the window


def branch_logits(model: Any, rows: Sequence[Sequence[int]], tree: AnswerTree, pad_id: int) -> torch.Tensor:
    """What `tree_logits` gives, (n, N + 1, V), by a plain pass over prompt and branch for each branch of the tree.

    Padding is on the right, where causal attention and a recurrent state cannot see it: no mask is needed.
    """
    lengths, nodes, logits = [len(row) for row in rows], len(tree.tokens), None
    for leaf in sorted(set(range(nodes)) - set(tree.parents)):
        branch = [leaf]
        while (parent := tree.parents[branch[0]]) >= 0:
            branch.insert(0, parent)
        ids = pad_rows([[*row, *(tree.tokens[node] for node in branch)] for row in rows], pad_id)[0]
        hidden = trunk_of(model)(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False).last_hidden_state
        wanted = torch.tensor([[length - 1 + i for i in range(len(branch) + 1)] for length in lengths])
        states = hidden[torch.arange(len(rows))[:, None], wanted]
        found = head_logits(model, states.reshape(-1, states.shape[-1])).reshape(*wanted.shape, -1)
        if logits is None:
            logits = found.new_empty(len(rows), nodes + 1, found.shape[-1])
        logits[:, [0, *(node + 1 for node in branch)]] = found
    assert logits is not None  # a tree has a leaf
    return logits
