"""Texts as token ids and back: with the BOS where the tokenizer adds one, a response told from prompt and response.

A response is never encoded or decoded alone: SentencePiece tokenizers put a space before the first word of a text, or
take it off, so that " good" behind "The film was" would come back as "good".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import RLAIFError, Tokenizer

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


def continuation_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int]:
    """Token ids of a text as they follow its prompt, where the prompt stands as it is encoded alone.

    Where the two would merge over the border, the text is encoded behind a line break, into which nothing merges.
    """
    for before in (prompt, "\n"):
        start, whole = tokenizer([before, before + text], add_special_tokens=False)["input_ids"]
        if before and whole[: len(start)] == start:
            return list(whole[len(start) :])
    return list(tokenizer.encode(text, add_special_tokens=False))


def continuation_text(tokenizer: Tokenizer | PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Text of the ids that follow a prompt's, as the tokenizer decodes both together, without special tokens."""
    before, whole = (str(tokenizer.decode(row, skip_special_tokens=True)) for row in (list(prompt), [*prompt, *ids]))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def keep_end(ids: Sequence[int], limit: int, bos_id: int | None) -> list[int]:
    """The last ``limit`` (at least 1) ids of a longer row; a BOS at its beginning stays there."""
    bos = [*ids[:1]] if limit > 1 and bos_id is not None and len(ids) > limit and ids[0] == bos_id else []
    return [*bos, *ids[-(limit - len(bos)) :]]


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
