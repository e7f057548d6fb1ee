"""The likelihoods of answers ("labels") from a server that shows only the likeliest next tokens.

The spellings of the labels are walked as texts. At the prompt's end the server shows its k likeliest tokens; one that
spells a label ends there, one that only begins a label ("1" of "10", a lone space) is put behind the prompt and asked
about once more. Where a label is itself the beginning of another, that second reply also says how much of its
likelihood belongs to longer words, as in `rewards.language_model.answer_tree`:

    P("1") = p("1") (1 - share of the shown tokens' probability that goes on with the word, after "1")

so that the tokens that are not shown are taken to go on with the word as often as those that are.

A label that is nowhere among the k likeliest gets an upper bound, not 0: it is at most as likely as the k-th token, and
all missing ones together at most as likely as all that is not shown.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from rlaif_env.servers.replies import Position
from rlaif_env.servers.transport import RequestFailed

_NEGLIGIBLE = 1e-5
_WORTH_ASKING = 0.005  # a less likely label is too rare for its longer words to be seen in a score
_FLOOR = 1e-12


@dataclass(frozen=True)
class AnswerLikelihoods:
    """The likelihoods of k labels after one prompt."""

    logprobs: tuple[float, ...]  # natural-log likelihoods, (k,)
    bounded: tuple[str, ...]  # the labels whose likelihood is an upper bound, because the server does not show them
    requests: int  # how many answers it took, stored ones included


async def answer_likelihoods(
    next_token: Callable[[str], Awaitable[Position]],
    labels: Sequence[str],
    leads: Sequence[str],
    *,
    more: bool = True,
    every_boundary: bool = False,
    top: int = 20,
) -> AnswerLikelihoods:
    """Likelihoods of labels as the next words.

    Args:
        next_token: The server's view of the next token after the prompt and a text.
        labels: k distinct labels.
        leads: What may stand before a label, as `rewards.prompts.leads_after` gives it.
        more: Whether a text can be put behind the prompt. If not, only the first token is looked at.
        every_boundary: Whether it is also asked what follows the labels that begin no other one.
        top: How many tokens were asked for; a server may add the drawn one.

    Raises:
        RequestFailed: If no label is shown.
    """
    spellings = {lead + label: label for label in labels for lead in leads}
    likelihoods: dict[str, float] = dict.fromkeys(labels, 0.0)
    bounds: dict[str, float] = dict.fromkeys(labels, 0.0)
    open_: dict[str, float] = {"": 1.0}  # texts to ask about, with their likelihoods
    requests = 0
    while open_:
        shortest = min(len(text) for text in open_)
        level = {text: open_.pop(text) for text in sorted(open_) if len(text) == shortest}
        replies = await asyncio.gather(*(next_token(text) for text in level), return_exceptions=True)
        requests += len(level)
        for (text, before), position in zip(level.items(), replies, strict=True):
            if isinstance(position, BaseException):
                raise position
            tokens = _tokens(position)
            if text in spellings:
                likelihoods[spellings[text]] += before * _word_ends(tokens)
            below = {s: label for s, label in spellings.items() if s.startswith(text) and s != text}
            seen: set[str] = set()
            for token, p in tokens:
                reached = text + token
                reachable = {s: label for s, label in below.items() if s.startswith(reached)}
                if not token or not reachable:
                    continue
                seen |= set(reachable.values())
                begins = bool(reachable.keys() - {reached})
                worth = before * p > (_NEGLIGIBLE if begins else _WORTH_ASKING)
                if more and worth and (begins or every_boundary):
                    open_[reached] = open_.get(reached, 0.0) + before * p
                elif reached in below:
                    likelihoods[below[reached]] += before * p
            unseen = set(below.values()) - seen
            for label in unseen:
                bounds[label] += before * _bound(position, len(unseen), top)
            if not text and not seen:
                shown = ", ".join(repr(token) for token, _ in tokens[:5])
                raise RequestFailed(
                    f"expected at least one of the labels {labels[0]!r} to {labels[-1]!r} among the {len(tokens)} "
                    f"likeliest next tokens, found {shown}; use another prompt, exemplars (shots), route or model"
                )
    bounded = tuple(label for label in labels if likelihoods[label] <= 0.0)
    values = [max(bounds[label], _FLOOR) if label in bounded else likelihoods[label] for label in labels]
    return AnswerLikelihoods(tuple(math.log(min(v, 1.0)) for v in values), bounded, requests)


def _tokens(position: Position) -> list[tuple[str, float]]:
    """All tokens that are shown, with probabilities: the likeliest, and the drawn one if it is not among them."""
    tokens = [(token, math.exp(value)) for token, value in position.top]
    if position.logprob is not None and all(token != position.token for token, _ in position.top):
        tokens.append((position.token, math.exp(position.logprob)))
    return tokens


def _word_ends(tokens: Sequence[tuple[str, float]]) -> float:
    """How surely a word ends before a token: of the probability that is shown, the share of no word character."""
    shown = math.fsum(p for _, p in tokens)
    longer = math.fsum(p for token, p in tokens if token[:1].isalnum() or token[:1] == "_")
    return 1.0 - longer / shown if shown > 0.0 else 1.0


def _bound(position: Position, count: int, top: int) -> float:
    """The most that each of ``count`` tokens can have that are not shown."""
    shown = math.fsum(p for _, p in _tokens(position))
    kth = math.exp(position.top[:top][-1][1]) if position.top else 1.0
    return min(kth, max(1.0 - shown, 0.0) / max(count, 1))
