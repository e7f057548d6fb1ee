"""What servers answer, and where answers are kept, as something to throw inputs at."""

from __future__ import annotations

import json
import math
import random
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast

import httpx

from rewards.endpoint.probe import probe
from rlaif_env.api import RLAIFError
from rlaif_env.servers.cache import AnswerCache, cache_key
from rlaif_env.servers.client import EndpointClient
from rlaif_env.servers.limits import Limits, retry_after
from rlaif_env.servers.replies import MalformedReply, Reply, error_message, parse_reply
from rlaif_env.servers.transport import RequestFailed
from tests.stress.fuzz_inputs import damaged, json_input
from tests.stress.fuzz_readers import Read, Reader, at_once, same

__all__ = ["SERVER_READERS"]

_TOP = [
    {"token": "8", "logprob": -0.3, "bytes": [56]},
    {"token": "7", "logprob": -1.6},
    {"token": "x", "logprob": -9999},
]
_USAGE = {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 13}
_CHOICE: dict[str, Any] = {
    "index": 0,
    "message": {"role": "assistant", "content": "8", "reasoning_content": None},
    "logprobs": {"content": [{"token": "8", "logprob": -0.3, "top_logprobs": _TOP}]},
    "finish_reason": "length",
}
_CHAT = {"id": "c-1", "object": "chat.completion", "model": "m", "choices": [_CHOICE], "usage": _USAGE}
_LOGPROBS = {
    "tokens": [" 10", ","],
    "token_logprobs": [-0.2, None],
    "top_logprobs": [{" 10": -0.2, " 9": -2.0}, {",": -0.01}],
    "text_offset": [0, 3],
}
_TEXT = {"index": 0, "text": " 10, 11", "logprobs": _LOGPROBS}
_COMPLETION = {"model": "m", "choices": [_TEXT], "usage": _USAGE}
_LLAMA_CPP = {**_COMPLETION, "choices": [{**_CHOICE, "message": None, "text": "8"}]}
_OLLAMA = {**_CHAT, "choices": [{**_CHOICE, "message": {"role": "assistant", "content": "is Paris"}}]}
_ERRORS = ({"error": {"message": "no", "type": "t", "code": 400}}, {"detail": [{"msg": "bad", "loc": ["body"]}]})
_ANSWERS = (_CHAT, _COMPLETION, _LLAMA_CPP, _OLLAMA, *_ERRORS)


def _server_answer(folder: Path, data: bytes) -> None:
    body = data.decode("utf-8", "replace")
    error_message(body).encode("utf-8", "backslashreplace")
    reply = parse_reply(body, logprobs=zlib.crc32(data) % 2 == 0)
    same(reply, Reply.from_json(reply.to_json()), "an answer stored and read")
    for position in reply.positions:
        same(True, all(-9001 < value <= 0 for _, value in position.top), "log-probabilities of at most 0")


class _Replayed:
    """As much of a client as a probe uses, its answers read from one body after the other."""

    model = "m"

    def __init__(self, bodies: Iterator[str]) -> None:
        self.bodies = bodies
        self.served: str | None = None

    def until(self) -> float:
        return math.inf

    async def ask(self, route: str, payload: Mapping[str, Any], *, logprobs: bool, until: float, stored: bool) -> Any:
        try:
            return parse_reply(next(self.bodies, ""), logprobs=logprobs)
        except MalformedReply as error:
            raise RequestFailed(str(error), status=400) from error

    async def models(self) -> list[str]:
        return [self.model]


def _probe(folder: Path, data: bytes) -> None:
    bodies = iter(data.decode("utf-8", "replace").split("\n"))
    try:
        probe(cast(Any, _Replayed(bodies)), "auto", {}).send(None)
    except StopIteration as finished:
        capabilities = finished.value
        sensible = capabilities.route in ("completion", "chat") and 2 <= capabilities.top <= 20
        same(True, sensible, "capabilities that make sense")


def _transport(folder: Path) -> Read:
    """The whole client over a transport that answers with the input: status, headers, an empty line, body."""
    now = b""

    def answer(request: httpx.Request) -> httpx.Response:
        status, _, rest = now.partition(b"\n")
        head, _, body = rest.partition(b"\n\n")
        headers = [tuple(line.split(b": ", 1)) for line in head.split(b"\n") if b": " in line]
        number = int(status) if status.isdigit() and 100 <= int(status) < 600 else 200
        return httpx.Response(number, headers=cast(Any, headers), stream=httpx.ByteStream(body))

    cache = AnswerCache(None)
    limits = Limits(retries=0, timeout=5.0)
    client = EndpointClient("http://127.0.0.1:9/v1", "m", api_key_env="RLAIF_NO_KEY", limits=limits, cache=cache)
    client._started().transport.http = httpx.AsyncClient(transport=httpx.MockTransport(answer))

    def read(data: bytes) -> None:
        nonlocal now
        now = data
        kept = len(cache)
        cost = client.usage.tokens_out
        question = {"prompt": zlib.crc32(data), "size": len(data)}

        async def work() -> Any:
            await client.models()
            return await client.ask("completions", question, logprobs=False, until=math.inf)

        client.run(work())
        same(True, len(cache) >= kept, "what was stored")
        same(True, math.isfinite(client.usage.tokens_out - cost), "the tokens counted")

    return read


def _transport_input(rng: random.Random) -> bytes:
    status = rng.choice((b"200", b"200", b"200", b"400", b"401", b"404", b"429", b"500", b"503", b"302", b"204"))
    heads = [b"retry-after: %s" % _retry_input(rng), b"content-type: application/json", b"content-encoding: gzip"]
    heads += [b"content-type: text/html; charset=utf-16", b"content-type: text/plain; charset=zzz"]
    heads += [b"content-encoding: br"]
    chosen = b"\n".join(rng.sample(heads, rng.randrange(3)))
    head = damaged(rng, chosen).replace(b"\n\n", b"\n") if rng.random() < 0.2 else chosen
    return status + b"\n" + head + b"\n\n" + json_input(rng, (*_ANSWERS, {"data": [{"id": "m"}]}))


_DATES = (b"Sun, 06 Nov 1994 08:49:37 GMT", b"Sunday, 06-Nov-94 08:49:37 GMT", b"Mon, 1 Jan 0001 00:00:00 +9999")
_RETRIES = (b"0", b"1", b"120", b"1.5", b"-3", b"nan", b"inf", b"1e400", b"1_0", b"1e18", b" 7 ", *_DATES)


def _retry_input(rng: random.Random) -> bytes:
    value = rng.choice(_RETRIES)
    return (damaged(rng, value) if rng.random() < 0.8 else value).replace(b"\n", b"")


def _retry_after(folder: Path, data: bytes) -> None:
    seconds = retry_after(data.decode("latin-1"))
    if seconds is None:
        raise RLAIFError("neither a number nor a date")
    same(True, 0 <= seconds < math.inf, "seconds that can be waited")


def _answer_cache(folder: Path) -> Read:
    whole = _cache_bytes(folder)
    file = folder / "answers.sqlite"

    def read(data: bytes) -> None:
        for old in folder.glob("answers.sqlite*"):
            old.unlink()
        file.write_bytes(whole)
        rng = random.Random(zlib.crc32(data))
        if rng.random() < 0.4:  # a good file with bad answers in it
            with closing(sqlite3.connect(file)) as raw, raw:
                name = rng.choice(("model", "used", "hits", "body", "stored", "endpoint"))
                value = rng.choice((data.decode("utf-8", "replace"), data, 2**62, -1.5, 0))
                raw.execute(f"UPDATE answers SET {name} = ?", (value,))
        else:
            file.write_bytes(damaged(rng, damaged(rng, whole)) if rng.random() < 0.9 else data)
        with AnswerCache(file) as cache:
            body = cache.get(cache_key(n=3))
            if body is not None:
                with suppress(RLAIFError):
                    Reply.from_json(body)
            len(cache)
            cache.put([(cache_key(new=1), "{}")], model="m", endpoint="e")
            same("{}", cache.get(cache_key(new=1)), "an answer stored")
            for row in cache.summary():
                f"{row['answers']:,} {row['hits']:,} {row['bytes']:,} {row['used'] + 0.0:.0f} {row['model']!s:.1}"
            cache.prune(unused_days=1.0)

    return read


def _cache_bytes(folder: Path) -> bytes:
    body = parse_reply(json.dumps(_CHAT), logprobs=True).to_json()
    file = folder / "seed.sqlite"
    with closing(sqlite3.connect(file)) as raw:
        raw.execute("PRAGMA page_size=512")
    with AnswerCache(file) as cache:
        cache.put([(cache_key(n=n), body) for n in range(8)], model="m", endpoint="e")
    with closing(sqlite3.connect(file)) as raw:
        raw.execute("PRAGMA journal_mode=DELETE")  # all in one file
    return file.read_bytes()


def _bodies_input(rng: random.Random) -> bytes:
    return b"\n".join(json_input(rng, _ANSWERS).replace(b"\n", b" ") for _ in range(rng.randrange(1, 5)))


SERVER_READERS: dict[str, Reader] = {
    "server-answer": Reader(lambda rng: json_input(rng, _ANSWERS), at_once(_server_answer)),
    "probe": Reader(_bodies_input, at_once(_probe)),
    "transport": Reader(_transport_input, _transport),
    "retry-after": Reader(_retry_input, at_once(_retry_after)),
    "answer-cache": Reader(lambda rng: json_input(rng, ({"text": "8", "positions": []},)), _answer_cache),
}
"""Readers of what servers answer, by name."""
