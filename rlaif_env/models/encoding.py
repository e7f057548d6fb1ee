"""Texts as token ids: encoded with the BOS where the tokenizer adds one, padded, told apart by fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import RLAIFError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does to text: its vocabulary and special tokens."""
    facts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of n texts, with the BOS token where the tokenizer adds one, never an EOS, never truncated."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None and _adds_bos(tokenizer):
        rows = [[tokenizer.bos_token_id, *row] for row in rows]
    return rows


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    with_special = tokenizer("a")["input_ids"]
    return bool(with_special) and with_special[0] == tokenizer.bos_token_id


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, *, side: str = "right", width: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad n rows of ids to one width: ids (n, L) and mask (n, L), 1 where real."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise RLAIFError(f"expected at most {width} tokens, found {len(row)} in row {i}")
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = row
        mask[i, where] = 1
    return ids, mask
