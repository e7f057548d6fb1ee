"""What OpenAI-compatible servers answer, read into one shape.

Two shapes carry log-probabilities, and servers do not keep them to one route each:

    chat         choices[0].logprobs.content[i] = {token, logprob, top_logprobs: [{token, logprob}, ...]}
    completion   choices[0].logprobs = {tokens, token_logprobs, top_logprobs: [{text: logprob}, ...]}

(llama.cpp may answer the completion route in the first.) A log-probability of null, -9999 or less is no number but a
server's way of saying that it has none: it is left out here, and what is left out is a missing token for the reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlaif_env.api import RLAIFError

_NO_NUMBER = -9000.0
_TOLERANCE = 1e-3
_MOST_TOKENS = 10**12


class MalformedReply(RLAIFError):
    """A server's answer that cannot be read; asking again may help."""


class WithheldReply(MalformedReply):
    """An answer that the server, or the model, does not give to this question; asking again does not help."""


@dataclass(frozen=True)
class Position:
    """One generated token: its text, and the likeliest tokens at its place; two of them may have the same text."""

    token: str
    logprob: float | None  # its natural-log probability; None where the server has none
    top: tuple[tuple[str, float], ...]  # (text, natural-log probability), likeliest first


@dataclass(frozen=True)
class Reply:
    """One answer: the text that was generated, and what is known of it."""

    text: str
    positions: tuple[Position, ...]  # its tokens, where log-probabilities were asked for and given
    reasoning: bool  # whether the model thought in a field of its own
    model: str  # what the server calls it
    tokens: tuple[int, int] | None  # read and written; None where the server does not say

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Reply:
        """The reverse of `to_json`; raises `MalformedReply` if the text was not written by it."""
        try:
            row = json.loads(text)
            positions = tuple(_position(p["token"], p["logprob"], p["top"]) for p in row["positions"])
            tokens = None if row["tokens"] is None else (int(row["tokens"][0]), int(row["tokens"][1]))
            return Reply(str(row["text"]), positions, bool(row["reasoning"]), str(row["model"]), tokens)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise MalformedReply(f"expected a stored answer, found {text[:60]!r} ({error})") from error


def parse_reply(body: str, *, logprobs: bool) -> Reply:
    """Read the body of an answer from the chat or the completion route.

    Args:
        body: The answer's text.
        logprobs: Whether log-probabilities must be there.

    Raises:
        MalformedReply: If it is no such answer, or has no text or none of the log-probabilities that must be there.
        WithheldReply: If it was filtered or refused.
    """
    try:
        row = json.loads(body)
    except (ValueError, RecursionError):
        what = "an HTML page" if body.lstrip()[:1] == "<" else "no whole JSON object"
        raise MalformedReply(f"expected a JSON answer, found {what}: {body[:80]!r}") from None
    if not isinstance(row, dict):
        raise MalformedReply(f"expected a JSON object, found {type(row).__name__}: {body[:80]!r}")
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        error = _error_text(row)
        raise MalformedReply(
            f"expected an answer with choices, found {f'an error: {error}' if error else 'no choices'}"
        )
    choice = min(
        (c for c in choices if isinstance(c, dict)), key=lambda c: c["index"] if isinstance(c.get("index"), int) else 0
    )
    message, positions, finish = choice.get("message"), _positions(choice.get("logprobs")), choice.get("finish_reason")
    chat = message if isinstance(message, dict) else {"content": choice.get("text")}
    text, reasoning = chat.get("content"), bool(chat.get("reasoning_content") or chat.get("reasoning"))
    if finish == "content_filter" or chat.get("refusal"):
        why = f"a refusal: {chat['refusal']!s:.200}" if chat.get("refusal") else "that it was filtered (content_filter)"
        raise WithheldReply(f"expected an answer, found {why}; change the texts, or use another model or server")
    if text is None and chat is message and (positions or reasoning):
        text = ""  # what was asked for are the tokens; or it only thought, which `reasoning` says
    if not isinstance(text, str):
        fields = ", ".join(sorted(choice))
        raise MalformedReply(f"expected an answer with text, found {text!r:.80} (finish_reason {finish!r}) in {fields}")
    if logprobs and not positions:
        raise MalformedReply("expected log-probabilities in the answer, found none")
    return Reply(text, positions, reasoning, str(row.get("model") or ""), _usage(row.get("usage")))


def _error_text(row: Mapping[str, Any]) -> str:
    error = row.get("error", row.get("detail", row.get("message")))
    if isinstance(error, dict):
        error = error.get("message", error)
    return "" if error is None else str(error)[:300]


def error_message(body: str) -> str:
    """The sentence in an error's body."""
    try:
        row = json.loads(body)
    except (ValueError, RecursionError):
        row = None
    return _error_text(row) if isinstance(row, dict) else body.strip()[:120]


def used_tokens(body: str) -> tuple[int, int] | None:
    """The tokens read and written for an answer that could not be read otherwise; None where it does not say."""
    try:
        row = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return _usage(row.get("usage")) if isinstance(row, dict) else None


def _usage(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens") or 0
    if type(read) is not int or type(written) is not int:
        return None
    return (read, written) if 0 <= min(read, written) and max(read, written) <= _MOST_TOKENS else None


def _positions(logprobs: Any) -> tuple[Position, ...]:
    """The generated tokens in either shape."""
    if not isinstance(logprobs, dict):
        return ()
    try:
        if isinstance(content := logprobs.get("content"), list):
            shown = [[(t["token"], t["logprob"]) for t in entry.get("top_logprobs") or ()] for entry in content]
            return tuple(_position(e["token"], e.get("logprob"), top) for e, top in zip(content, shown, strict=True))
        if not isinstance(tops := logprobs.get("top_logprobs"), list):
            return ()
        tokens = logprobs.get("tokens") or [""] * len(tops)
        own = logprobs.get("token_logprobs") or [None] * len(tops)
        return tuple(_position(t, v, (top or {}).items()) for t, v, top in zip(tokens, own, tops, strict=True))
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise MalformedReply(f"expected log-probabilities by token, found another shape ({error})") from None


def _position(token: Any, logprob: Any, top: Iterable[tuple[Any, Any]]) -> Position:
    """A token with its log-probability and the likeliest ones; those that are no number are left out."""
    pairs = [(str(text), number) for text, value in top if (number := _number(value)) is not None]
    total = math.fsum(math.exp(value) for _, value in pairs)
    if total > 1 + _TOLERANCE * max(1, len(pairs)):
        raise MalformedReply(f"expected log-probabilities that sum to at most 1, found {total:.3g}")
    return Position(str(token), _number(logprob), tuple(sorted(pairs, key=lambda pair: -pair[1])))


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if math.isnan(number) or number > _TOLERANCE:
        raise MalformedReply(f"expected log-probabilities of at most 0, found {value!r}")
    return None if number <= _NO_NUMBER else min(number, 0.0)
