"""How many tokens fit into a pass: from what a model keeps for each of them, and the memory there is.

Rows are no measure of memory: sixteen of thirty tokens and sixteen of a thousand differ by thirty times.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_env.api import RLAIFError

if TYPE_CHECKING:
    import torch

_CPU_TOKENS, _GPU_TOKENS = 2048, 1 << 16  # in one pass with gradient: more is no faster
_DRAWING = 24  # bytes a logit while a token is drawn from it
_LONG = 900  # tokens of a pass; after shorter ones giving back takes longer than it helps
_SHARE = 0.5  # of the memory there is, for one pass: estimates are that rough, and others live there too


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device: of a GPU what is free, of the CPU also what the control group leaves."""
    import torch

    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    limits = [_meminfo(), _control_group()]
    return min((limit for limit in limits if limit is not None), default=1 << 34)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (ValueError, OSError, AttributeError):  # no such names on this system
            return None


def _control_group() -> int | None:
    """What a container may still take, where it has a limit (version 2)."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no group, or one without a limit: "max"
        return None


def give_back(tokens: int) -> None:
    """Let the system have what a long pass has freed: glibc keeps it otherwise, a gigabyte and more on a CPU."""
    if tokens >= _LONG and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def bytes_per_token(model: Any) -> int:
    """About what a forward pass keeps of each token for its gradient.

    A layer of a transformer with frozen weights and adapters keeps some eight states of the hidden width and four of
    the inner width; measured on the built-in model: 1.25 MB a token, estimated 1.29.
    """
    config = model.config.get_text_config()
    hidden, layers, size = int(config.hidden_size), int(config.num_hidden_layers), model.dtype.itemsize
    widths = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"))
    inner = next((width for width in widths if isinstance(width, int)), 4 * hidden)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return int(layers * (8 * hidden + 4 * inner * experts) * size)


def tokens_that_fit(model: Any) -> int:
    """Padded tokens in one pass with gradient: what fits into half of the memory there is, on a CPU 2048 at most.

    A power of two, so that a little more or less memory makes no other passes.
    """
    fit = int(_SHARE * available_memory(model.device) / bytes_per_token(model))
    fit = min(fit, _GPU_TOKENS if model.device.type == "cuda" else _CPU_TOKENS)
    return 1 << max(0, fit.bit_length() - 1)


def rows_that_fit(model: Any, tokens: int) -> int:
    """How many rows of so many tokens can be sampled at once: their keys and values, and logits of the last ones."""
    config = model.config.get_text_config()
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    shared = getattr(config, "num_key_value_heads", None) or heads
    keys = int(config.num_hidden_layers) * 2 * hidden * shared // heads * model.dtype.itemsize
    row = tokens * keys + int(config.vocab_size) * _DRAWING
    return max(1, int(_SHARE * available_memory(model.device) / row))


def check_longest(model: Any, tokens: int, setting: str) -> None:
    """Refuse, before any work, a row that cannot fit even alone in a pass with gradient.

    Args:
        model: Whose pass it is.
        tokens: Of the longest row.
        setting: What to lower, for the message.

    Raises:
        RLAIFError: If what it needs is more than there is.
    """
    needed, there = tokens * bytes_per_token(model), available_memory(model.device)
    if needed > there:
        raise RLAIFError(
            f"expected memory for a gradient pass over one row of {tokens} tokens, about {needed / 1e9:.1f} GB, found "
            f"{there / 1e9:.1f} GB on {model.device}; lower {setting}, or use a smaller model"
        )


def within(rows: Sequence[int], widths: Sequence[int] | Mapping[int, int], tokens: int) -> list[list[int]]:
    """Rows that are neighbours in as few passes as possible, each of at most so many padded tokens, or of one row.

    Args:
        rows: Row numbers.
        widths: Tokens of each row, by number.
        tokens: The budget of a pass.
    """
    parts: list[list[int]] = []
    widest = 0
    for row in rows:
        widest = max(widest, widths[row])
        if not parts or widest * (len(parts[-1]) + 1) > tokens:
            parts.append([])
            widest = widths[row]
        parts[-1].append(row)
    return parts
