"""The exact likelihood of each of a language model's possible answers.

An answer "1" must not be confused with the beginning of "10", nor "7" with "7th". So the likelihood of an answer is
that of its tokens *and* of what follows not being a word character: with digits split into tokens,
P("1") = p("1")(1 - sum_d q(d|"1")) and P("10") = p("1")q("0"|"1")(1 - sum_d q(d|"10")). All the token sequences that
spell an answer (digits split or not, with a leading space where the prompt does not end in one) are different events,
so their probabilities add.

The answers of a set form an `AnswerTree`, so that one forward pass sees all of them (`rewards.language_model.local`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rewards.prompts import check_answers
from rlaif_env.api import RLAIFError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerTree:
    """The token sequences of k answers, as a tree of N nodes below the prompt."""

    tokens: tuple[int, ...]  # of each node, (N,); a node comes after its parent
    parents: tuple[int, ...]  # of each node, (N,); -1 is the end of the prompt
    ends: tuple[tuple[int, ...], ...]  # for each answer the nodes at which one of its spellings ends

    @property
    def depths(self) -> tuple[int, ...]:
        """How far each node is below the prompt's last token, (N,): 1 for its children."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    def ancestry(self) -> NDArray[np.bool_]:
        """(N, N): whether node j is node i or above it."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                seen[i] |= seen[parent]
        return seen


def answer_tree(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str], leads: Sequence[str] = ("",)) -> AnswerTree:
    """Spell k answers in tokens.

    Raises:
        RLAIFError: If one is empty or repeated, has white space around it, or two have the same tokens.
    """
    check_answers(answers)
    nodes: dict[tuple[int, ...], int] = {}  # by the tokens from the prompt on
    ends: list[tuple[int, ...]] = []
    owner: dict[tuple[int, ...], str] = {}
    for answer in answers:
        spellings = sorted(_spellings(tokenizer, answer, leads))
        for spelling in spellings:
            if owner.setdefault(spelling, answer) != answer:
                raise RLAIFError(
                    f"expected labels that the tokenizer tells apart, found {owner[spelling]!r} and {answer!r} with "
                    f"the same tokens {list(spelling)}"
                )
            for end in range(1, len(spelling) + 1):
                nodes.setdefault(spelling[:end], len(nodes))
        ends.append(tuple(nodes[spelling] for spelling in spellings))
    return AnswerTree(tuple(path[-1] for path in nodes), tuple(nodes.get(path[:-1], -1) for path in nodes), tuple(ends))


def _spellings(tokenizer: PreTrainedTokenizerBase, answer: str, leads: Sequence[str]) -> set[tuple[int, ...]]:
    """Token sequences of an answer after a line break, where nothing merges into it and no prefix space is put."""
    before = tokenizer.encode("\n", add_special_tokens=False)

    def tail(text: str) -> tuple[int, ...]:
        joint = tokenizer.encode("\n" + text, add_special_tokens=False)
        if joint[: len(before)] == before:
            return tuple(joint[len(before) :])
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    spellings = {tail(lead + answer) for lead in leads}
    rest = [tail(character) for character in answer[1:]]
    if all(len(tokens) == 1 for tokens in rest):  # also one token a character, where there are such tokens
        spellings |= {sum(rest, tail(lead + answer[0])) for lead in leads}
    unknown = tokenizer.unk_token_id
    if any(not s or (unknown is not None and unknown in s) for s in spellings):
        raise RLAIFError(
            f"expected the tokenizer to know the label {answer!r}, found no tokens for it; use other labels"
        )
    return spellings


def word_start_mask(tokenizer: PreTrainedTokenizerBase, width: int) -> NDArray[np.bool_]:
    """Which tokens, right after an answer, go on with the same word (letter, digit or underscore): bool (V,)."""
    anchor = tokenizer.encode("\n1", add_special_tokens=False)
    known = len(tokenizer)
    start = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
    texts = tokenizer.batch_decode([[*anchor, token] for token in range(known)], clean_up_tokenization_spaces=False)
    mask = np.zeros(width, dtype=bool)
    mask[:known] = [text[start : start + 1].isalnum() or text[start : start + 1] == "_" for text in texts]
    mask[[i for i in tokenizer.all_special_ids if i < width]] = False
    return mask


def answer_logprobs(tree: AnswerTree, logits: torch.Tensor, word_start: torch.Tensor) -> torch.Tensor:
    """Natural-log likelihood of each answer from the logits at the prompt's end and at every node.

    Args:
        tree: N nodes, k answers.
        logits: (n, N + 1, V); position 0 is the end of the prompt, position i + 1 node i.
        word_start: (V,) from `word_start_mask`.

    Returns:
        (n, k), float64.
    """
    import torch

    logits = logits.float()
    normaliser = logits.logsumexp(-1)  # (n, N + 1)
    following = (logits[:, 1:] - normaliser[:, 1:, None]).exp_()  # (n, N, V)
    # summed, not multiplied: a matrix product of 49,152 floats loses the fifth digit
    boundary = following.masked_fill_(word_start, 0.0).sum(-1).double().log()  # (n, N): the word ends after the node
    path: list[torch.Tensor] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        step = (logits[:, parent + 1, token] - normaliser[:, parent + 1]).double()
        path.append(step if parent < 0 else path[parent] + step)
    ended = torch.stack(path, dim=1) + boundary
    return torch.stack([ended[:, list(nodes)].logsumexp(-1) for nodes in tree.ends], dim=1)
