"""Asking a language model server many things at once, and getting every answer exactly once.

A request holds one of ``concurrency`` slots only while it is on the wire; what waits to be asked again holds none. What
can pass is asked again after a jittered, exponentially growing pause or what Retry-After says; what cannot pass fails
at once. An answer is stored before it is handed out; the same question in flight twice is asked once.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlaif_env.api import RLAIFError
from rlaif_env.servers.cache import AnswerCache, cache_key
from rlaif_env.servers.limits import Limits, Usage, checked_urls
from rlaif_env.servers.replicas import Replicas
from rlaif_env.servers.replies import MalformedReply, Reply, WithheldReply, parse_reply, used_tokens
from rlaif_env.servers.transport import PassingFailure, RequestFailed, Transport, refusal

T = TypeVar("T")
R = TypeVar("R")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
_LONGEST_WAIT = 3600.0  # seconds of Retry-After that are waited
_WORKERS_A_SLOT = 4  # so that slots stay busy while some questions wait to be asked again


@dataclass
class _Live:
    """What lives on the loop's thread."""

    transport: Transport
    running: dict[bytes, asyncio.Task[Reply]] = field(default_factory=dict)
    unstored: list[tuple[bytes, Reply, asyncio.Future[None]]] = field(default_factory=list)


class EndpointClient:
    """Requests to one model, on one server or on several that answer alike.

    Args:
        url: The server's address, up to and with "/v1" (added where there is no path), or several. The first stands
            for all of them where answers are kept.
        model: What the server calls the model.
        api_key_env: Environment variable with the key; sent as a bearer token if it is set.
        limits: What may be used.
        cache: Where answers are kept.
        revision: Anything that tells two states of the model apart; part of the cache's key.

    Raises:
        RLAIFError: If the address is none, or holds a password.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        *,
        api_key_env: str,
        limits: Limits,
        cache: AnswerCache,
        revision: str = "",
    ) -> None:
        self.replicas = Replicas(checked_urls(url))
        self.url = self.replicas.urls[0]
        self.model, self.revision, self.limits, self.cache = model, revision, limits, cache
        self.anew = False  # whether the server is asked whatever is stored
        self.api_key_env = api_key_env
        self.served: str | None = None  # what the server calls the model; set once it is known
        self.usage = Usage()
        self._key = os.environ.get(api_key_env, "").strip()
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise RLAIFError(f"expected printable ASCII characters in {api_key_env}, found others; set it again")
        self._random = random.Random()
        self._reserved = 0.0
        self._live: _Live | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the client's own loop and wait for it; from any thread, in or out of another loop."""
        try:
            live = self._started()
        except BaseException:
            work.close()
            raise
        return live.transport.run(work)

    def _started(self) -> _Live:
        if os.getpid() != self._pid:
            raise RLAIFError("expected an endpoint to be used in the process that made it, found a fork; make it there")
        with self._lock:
            if self._live is None:
                transport = Transport(
                    f"endpoint {self.url}",
                    key=self._key,
                    timeout=self.limits.timeout,
                    connections=self.limits.concurrency,
                    urls=self.replicas.urls,
                )
                self._live = _Live(transport)
            return self._live

    def close(self, *, wait: bool = True) -> None:
        """End the connections and the thread; a later request starts them again. A finaliser does not wait."""
        with self._lock:
            live, self._live = self._live, None
        if live is not None and os.getpid() == self._pid:
            live.transport.close(wait=wait)

    def until(self) -> float:
        """The moment (`time.monotonic`) at which a call that begins now must have ended."""
        return math.inf if self.limits.deadline is None else time.monotonic() + self.limits.deadline

    async def each(
        self, items: Sequence[T], work: Callable[[T], Awaitable[R]], done: Callable[[], object]
    ) -> list[R | RequestFailed]:
        """Do the same with every item, some at a time; a failure takes the item's place, a fatal one all later ones."""
        results: list[Any] = [None] * len(items)
        queue = iter(range(len(items)))
        fatal: list[RequestFailed] = []

        async def worker() -> None:
            for i in queue:
                try:
                    results[i] = fatal[0] if fatal else await work(items[i])
                except RequestFailed as error:
                    results[i] = error
                    if error.fatal:
                        fatal.append(error)
                done()

        workers = min(len(items), _WORKERS_A_SLOT * self.limits.concurrency)
        tasks = [asyncio.ensure_future(worker()) for _ in range(workers)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return [result for result in results if result is not None]

    async def ask(
        self, route: str, payload: Mapping[str, Any], *, logprobs: bool, until: float, stored: bool = True
    ) -> Reply:
        """One answer, from the cache if it is there.

        Args:
            route: "completions" or "chat/completions".
            payload: The request's body without the model.
            logprobs: Whether the answer must have log-probabilities.
            until: When to give up, as `until` gives it.
            stored: Whether the cache is looked into and the answer stored.

        Raises:
            RequestFailed: If there is no answer.
        """
        live = self._live
        assert live is not None  # `run` started it
        body = {"model": self.model, **payload}
        if not stored or self.anew:
            return await self._fetch(live, route, body, logprobs, until, None)
        key = cache_key(route=route, body=body, endpoint=self.url, served=self.served, revision=self.revision)
        if (kept := self.cache.get(key)) is not None:
            try:
                reply = Reply.from_json(kept)
            except MalformedReply:
                self.cache.forget(key)  # damaged on the disk: ask again
            else:
                self.usage.hits += 1
                return reply
        if key not in live.running:
            task = live.running[key] = asyncio.ensure_future(self._fetch(live, route, body, logprobs, until, key))
            task.add_done_callback(lambda task: live.running.pop(key, None))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, whoever else waits for it
        return await asyncio.shield(live.running[key])

    async def _fetch(
        self, live: _Live, route: str, body: Mapping[str, Any], logprobs: bool, until: float, key: bytes | None
    ) -> Reply:
        content = json.dumps(body).encode()

        def once(url: str) -> Coroutine[Any, Any, Reply]:
            return self._once(live, url, route, content, logprobs, until)

        estimate = self.limits.cost(len(content) // 3, int(body.get("max_tokens", 1)))
        for attempt in range(self.limits.retries + 1):
            async with live.transport.slots:
                self._reserve(estimate)
                started = time.monotonic()
                try:
                    reply = await self.replicas.ask(once, len(content))
                    break
                except PassingFailure as error:
                    failure = error
                finally:
                    self._reserved -= estimate
                    self.usage.busy_seconds += time.monotonic() - started
            await self._pause(attempt, failure, until)
        self.usage.answers += 1
        if key is not None:
            if not live.unstored:
                live.transport.loop.call_soon(self._store, live)
            live.unstored.append((key, reply, waiting := live.transport.loop.create_future()))
            await waiting
        return reply

    async def _pause(self, attempt: int, failure: PassingFailure, until: float) -> None:
        """Wait before a question is asked again, or give it up."""
        if attempt == self.limits.retries:
            raise RequestFailed(f"gave up after {attempt + 1} attempts, the last: {failure}")
        if failure.wait is not None and failure.wait > _LONGEST_WAIT:
            raise RequestFailed(
                f"gave up: expected a pause of at most {_LONGEST_WAIT:.0f} s, found that the server asks for "
                f"{failure.wait:.0f} s after {failure}; start again then, what was answered is kept"
            )
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * self._random.uniform(0.5, 1.0)
        pause = pause if failure.wait is None else failure.wait + pause / 10
        if time.monotonic() + pause >= until:
            raise RequestFailed(
                f"gave up at the deadline of {self.limits.deadline} s: the next attempt would be in {pause:.1f} s, "
                f"after {failure}; allow a longer deadline"
            )
        self.usage.retries += 1
        await asyncio.sleep(pause)

    async def _once(self, live: _Live, url: str, route: str, content: bytes, logprobs: bool, until: float) -> Reply:
        if (left := until - time.monotonic()) <= 0:
            raise RequestFailed(f"gave up at the deadline of {self.limits.deadline} s; allow a longer one", fatal=True)
        self.usage.requests += 1
        status, text, headers = await live.transport.ask(url, route, content, min(self.limits.timeout, left))
        if status != 200:
            facts: dict[str, Any] = {"url": url, "model": self.model, "key_env": self.api_key_env}
            raise refusal(status, text, headers.get("retry-after"), **facts, keyed=bool(self._key))
        try:
            reply = parse_reply(text, logprobs=logprobs)
        except MalformedReply as error:
            self._spend(content, used_tokens(text), 1)  # the server answered, though not so that it can be used
            if isinstance(error, WithheldReply):
                raise RequestFailed(str(error), status=status) from None
            raise PassingFailure(str(error)) from None
        self._spend(content, reply.tokens, max(1, len(reply.positions)))
        if self.served is not None and reply.model != self.served:
            raise PassingFailure(f"expected an answer of model {self.served!r}, found one of {reply.model!r}")
        return reply

    def _spend(self, content: bytes, said: tuple[int, int] | None, written: int) -> None:
        """Count the tokens of one answer: those that the server says, else a guess."""
        self.usage.estimated += said is None
        tokens = said or (len(content) // 4, written)
        self.usage.tokens_in += tokens[0]
        self.usage.tokens_out += tokens[1]
        self.usage.cost += self.limits.cost(*tokens)

    def _reserve(self, estimate: float) -> None:
        cap = self.limits.spend_cap
        if cap is not None and self.usage.cost + self._reserved + estimate > cap:
            raise RequestFailed(
                f"expected the cost to stay within the spend_cap of {cap:g}, found {self.usage.cost:.4f} spent and "
                "the next request beyond it; what was answered is kept: raise the cap to go on",
                fatal=True,
            )
        self._reserved += estimate

    def _store(self, live: _Live) -> None:
        """Store what came in since the last turn of the loop, in one transaction, and let it be handed out."""
        rows, live.unstored = live.unstored, []
        failure = None
        try:
            self.cache.put(((key, reply.to_json()) for key, reply, _ in rows), model=self.model, endpoint=self.url)
        except RLAIFError as error:
            failure = RequestFailed(str(error), fatal=True)
        for waiting in (waiting for _, _, waiting in rows if not waiting.done()):
            if failure is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(failure)

    async def models(self) -> list[str]:
        """The models that the server lists; empty where it has no list."""
        live, seconds = self._started(), self.limits.timeout
        try:
            _, text, _ = await self.replicas.ask(lambda url: live.transport.ask(url, "models", None, seconds))
            return [str(row["id"]) for row in json.loads(text)["data"]]
        except (PassingFailure, ValueError, LookupError, TypeError, RecursionError):
            return []
