"""What the phases of a run must cost: floating-point operations and bytes, from model size and lengths.

A product of an (m, k) with a (k, n) matrix is 2 m k n operations; nothing else is counted, so that these are floors.
Bytes are those of the weights, read once a forward pass: what bounds decoding, where a pass has few tokens. Divided by
what the machine reaches (`benchmarks.speed.timing.machine`) they give the least time a phase can take;
docs/performance.md works the formulas out.

Notation: n rows of B prompts with K samples each, P prompt tokens, T response tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.speed.timing import Machine


@dataclass(frozen=True)
class Sizes:
    """A model in numbers."""

    body: int  # weights in the matrices of all layers
    head: int  # V times H
    attention: int  # query width, summed over layers: what one token pays for each token it attends to, twice
    adapter: int = 0  # weights of the LoRA adapter; 0 with full fine-tuning
    itemsize: int = 4  # bytes of a weight
    cache: int = 0  # keys and values that one token leaves behind, over all layers; 0 leaves their reading out

    @classmethod
    def of(cls, model: Any, adapter: int = 0) -> Sizes:
        """The sizes of a Hugging Face causal LM, whatever adapters are on it."""
        import torch

        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inside = {
            id(module.weight): module.weight.numel()
            for name, module in model.get_decoder().named_modules()
            if isinstance(module, torch.nn.Linear) and ".lora_" not in name
        }
        head = config.vocab_size * config.hidden_size
        attention = config.num_hidden_layers * config.num_attention_heads * width
        return cls(sum(inside.values()), head, attention, adapter, next(model.parameters()).element_size())


@dataclass(frozen=True)
class Cost:
    """Operations, and bytes of weights read in passes that are bound by them."""

    flops: float  # floating-point operations
    # (operations, bytes) of decoding steps: each takes the longer of the two
    steps: tuple[tuple[float, float], ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.steps + other.steps)

    def seconds(self, machine: Machine) -> float:
        """The least time on a machine."""
        decoding = sum(max(flops / machine.flops, read / machine.bytes) for flops, read in self.steps)
        return self.flops / machine.flops + decoding

    @property
    def total(self) -> float:
        """All operations."""
        return self.flops + sum(flops for flops, _ in self.steps)


def _forward(sizes: Sizes, tokens: float, pairs: float) -> float:
    """A forward pass of tokens that attend to so many (token, token) pairs, without the head."""
    return 2 * sizes.body * tokens + 4 * sizes.attention * pairs


def _pairs(prompts: int, rows: int, prompt: int, response: int) -> float:
    """Who attends to whom where each prompt is read once and each row's response after it."""
    return prompts * prompt * (prompt + 1) / 2 + rows * response * (prompt + (response + 1) / 2)


def sampling(sizes: Sizes, *, rows: int, group: int, prompt: int, response: int) -> Cost:
    """Prefill once a prompt, then one step a token: (n, P, T) without early stops."""
    prompts = rows // group
    prefill = _forward(sizes, prompts * prompt, _pairs(prompts, 0, prompt, 0)) + 2 * sizes.head * prompts
    step = tuple(
        (
            _forward(sizes, rows, rows * (prompt + t)) + 2 * sizes.head * rows,
            float(sizes.itemsize * (sizes.body + sizes.head + sizes.cache * rows * (prompt + t))),
        )
        for t in range(1, response)
    )
    return Cost(prefill, step)


def reference(sizes: Sizes, *, rows: int, group: int, prompt: int, response: int) -> Cost:
    """One forward pass of the reference, each prompt read once."""
    prompts, read = rows // group, response - 1
    tokens = prompts * prompt + rows * read
    return Cost(_forward(sizes, tokens, _pairs(prompts, rows, prompt, read)) + 2 * sizes.head * rows * response)


def gradient(sizes: Sizes, *, rows: int, group: int, prompt: int, response: int) -> Cost:
    """Forward and backward pass of the policy, each prompt read once.

    Backward through frozen weights costs as much as forward (the weights' own gradients are not taken), through trained
    ones twice that, through attention twice; a frozen head costs two products.
    """
    prompts, read = rows // group, response - 1
    tokens, pairs = prompts * prompt + rows * read, _pairs(prompts, rows, prompt, read)
    if sizes.adapter:
        weights = 2 * (2 * sizes.body) + 3 * (2 * sizes.adapter)
        head = 2 * (2 * sizes.head)
    else:
        weights, head = 3 * (2 * sizes.body), 3 * (2 * sizes.head)
    return Cost(weights * tokens + 3 * 4 * sizes.attention * pairs + head * rows * response)


def scoring(sizes: Sizes, *, prefix: int, suffixes: list[int], nodes: int) -> Cost:
    """Label likelihoods of prompts with a shared prefix and a tree of so many label tokens, the prefix read once."""
    pairs = prefix * (prefix + 1) / 2
    tokens = float(prefix)
    for length in suffixes:
        own = length + nodes
        tokens += own
        pairs += length * (prefix + (length + 1) / 2) + nodes * (prefix + length + 1)
    return Cost(_forward(sizes, tokens, pairs) + 2 * sizes.head * len(suffixes) * (nodes + 1))
