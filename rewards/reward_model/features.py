"""What a reward model sees of a text: one encoding for training and serving, and the states at its EOS.

`encode_for_reward` is the only way a text becomes ids here, so that a model is asked in service exactly what it was
trained on. The ids end in one EOS, also where the pad token is the EOS: what is padding is told from lengths, never
from ids. Rows are padded on the right, where causal attention cannot see it, so a score does not depend on the batch.

The state need not be the last layer's. What makes one text better than another is often read best from the middle of
a model whose last layers prepare the next word; a head on layer d needs the first d layers only, and is saved as a
model of d layers.

Notation: n rows, D depths, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlaif_env.api import RLAIFError
from rlaif_env.batches import TOKENS_PER_BATCH, length_buckets, shares
from rlaif_env.data.tasks import Task
from rlaif_env.data.templates import conversation, template_for
from rlaif_env.models import Backbone, encode, keep_end, linear_modules, pad_rows, trunk_of
from rlaif_env.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURN = "\n\nAssistant:"
_SUMMARY = "\n\nSummary: "


def reward_text(task: Task, prompt: str, response: str) -> str:
    """Prompt and response as the one text that is scored; a response without a prompt stands alone."""
    if task.kind == "continuation" or not prompt:
        return task.judged(prompt, response)
    if task.kind == "summary":
        return prompt + _SUMMARY + response
    return prompt.rstrip().removesuffix(_TURN) + _TURN + " " + response.lstrip(" ")


def encode_for_reward(
    tokenizer: PreTrainedTokenizerBase, task: Task, prompt: str, response: str, max_tokens: int
) -> tuple[list[int], int]:
    """Token ids of one scored text, ending in exactly one EOS, and how many tokens were cut from its beginning.

    In a task whose prompts go through the chat template, the text is the whole conversation in it. An EOS that is
    spelled out inside the text is left out; a text longer than ``max_tokens``, EOS included and at least
    2, keeps its end, where the response is. Prompt and response may be empty.
    """
    eos = tokenizer.eos_token_id
    if prompt and template_for(task, tokenizer) == "chat":
        text = conversation(task, tokenizer, prompt, response).rstrip()
        row = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has the BOS
        while row[-1:] == [eos]:
            row.pop()
    else:
        row = [i for i in encode(tokenizer, [reward_text(task, prompt, response)])[0] if i != eos]
    kept = keep_end(row, max_tokens - 1, tokenizer.bos_token_id)
    return [*kept, eos], len(row) - len(kept)


def depth_of(model: Any) -> int:
    """How many layers a model has."""
    return int(model.config.get_text_config().num_hidden_layers)


def _blocks(model: Any) -> tuple[Any, str, Any]:
    """The module that holds the list of layers, the list's name in it, and the norm after the last of them."""
    config = model.config.get_text_config()
    for owner in trunk_of(model).modules():
        children = dict(owner.named_children())
        for name, child in children.items():
            if isinstance(child, torch.nn.ModuleList) and len(child) == config.num_hidden_layers:
                shapes = {(config.hidden_size,)}
                norms = [other for other in children.values() if {tuple(p.shape) for p in other.parameters()} == shapes]
                if norms:
                    return owner, name, norms[-1]
    raise RLAIFError(
        f"expected a model made of one list of {config.num_hidden_layers} layers and a norm, found another structure "
        f"in {type(model).__name__}; use all its layers (--layers {config.num_hidden_layers}; in Python: "
        f"layers={config.num_hidden_layers})"
    )


@contextlib.contextmanager
def _first_layers(model: Any, depth: int) -> Iterator[Any]:
    """Run the model's trunk with its first layers only; its final norm stays."""
    if depth == depth_of(model):
        yield trunk_of(model)
        return
    owner, name, _ = _blocks(model)
    layers = getattr(owner, name)
    setattr(owner, name, layers[:depth])
    try:
        yield trunk_of(model)
    finally:
        setattr(owner, name, layers)


def lora_targets(model: Any, depth: int) -> list[str]:
    """Full names of the linear modules in a model's first layers, adapters on them or not."""
    owner, name, _ = _blocks(model)
    return linear_modules(model, [module for layer in getattr(owner, name)[:depth] for module in layer.modules()])


def last_states(model: Any, rows: Sequence[Sequence[int]], depths: Sequence[int]) -> torch.Tensor:
    """The state at the last token of each row after so many layers and the final norm, with gradient.

    Args:
        model: A causal LM or sequence classifier, its adapter chosen by the caller.
        rows: n rows of ids, each with at least one.
        depths: D numbers of layers, from 1 to all, the largest last.

    Returns:
        float32 (n, D, H).
    """
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    ids = torch.from_numpy(pad_rows(rows, rows[0][-1])[0]).to(model.device)
    at = (torch.arange(len(rows), device=model.device), lengths - 1)
    with _first_layers(model, depths[-1]) as trunk:
        out = trunk(input_ids=ids, use_cache=False, output_hidden_states=len(depths) > 1)
    states = [out.last_hidden_state[at].float()]
    if len(depths) > 1:
        norm = _blocks(model)[2]
        states = [norm(out.hidden_states[depth][at]).float() for depth in depths[:-1]] + states
    return torch.stack(states, dim=1)


def extract(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    depths: Sequence[int],
    *,
    adapter: str | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    advance: Callable[[int], object] = lambda done: None,
    ranks: Ranks | None = None,
) -> torch.Tensor:
    """`last_states` of any number of rows, without gradient, in the caller's order: float32 (n, D, H) on the CPU.

    A forward pass has at most so many padded tokens; ``advance`` is called with the number of rows done after each.
    Several processes, each called with the same, divide the rows.
    """
    ranks = ranks or Ranks()
    lengths = [len(row) for row in rows]
    own = shares([0] * len(rows), lengths, 1, ranks.size)[ranks.rank]
    out = torch.zeros(len(rows), len(depths), backbone.model.config.get_text_config().hidden_size)

    def read() -> None:
        with backbone.using(adapter) as model, torch.inference_mode():
            for bucket in length_buckets([lengths[i] for i in own], tokens_per_batch):
                members = [own[i] for i in bucket]
                out[members] = last_states(model, [rows[i] for i in members], depths).cpu()
                advance(len(members))

    ranks.agree(read)
    ranks.sum_([out])
    advance(len(rows) - len(own))
    return out
