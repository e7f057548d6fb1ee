"""Sampling from stock vLLM servers with one base model, any of which may be killed and started again at any moment.

Before a server is asked for samples it is made ready: the adapter is loaded there and shown to be the right one. One
that is lost is left out until it has been made ready again, and its rows are asked again of the others.

How a mix-up is found: an adapter's name is used once, and each answer must name it; its log-probabilities of a probe
text must be those of the one who made it; and its fingerprint is the salt of the prefix cache, so that nothing that was
computed with other weights is used.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif_env.api import RLAIFError
from rlaif_env.servers.limits import checked_urls
from rlaif_env.servers.replicas import Replicas
from rlaif_env.servers.transport import PassingFailure, Transport
from rlaif_env.servers.vllm_server import START, Adapter, Probe, Response, VLLMServer

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
_ATTEMPTS = 8  # at one row, waiting for a server between them; no outage counts twice


@dataclass(frozen=True)
class VLLMConfig:
    """vLLM servers that sample.

    Attributes:
        url: Addresses of vLLM servers, each with the base model, that sample instead of this process.
        adapters: Folder for the adapter they sample with, which they see under the same path; in the folder that is
            written to where not given.
        patience: Seconds to wait for a server where none is there.
        concurrency: Responses that are open at each server at once.
        timeout: Seconds for one response.
        api_key_env: Environment variable with the servers' key; nothing is sent where it is not set.

    Raises:
        RLAIFError: If an address is none, or the settings make no sense.
    """

    url: tuple[str, ...] = ()
    adapters: str = ""
    patience: float = 900.0
    concurrency: int = 64
    timeout: float = 600.0
    api_key_env: str = "RLAIF_SAMPLER_API_KEY"

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", checked_urls(self.url) if self.url else ())
        if self.patience < 0 or self.concurrency < 1 or self.timeout <= 0:
            raise RLAIFError(
                "expected sampler.patience of at least 0, concurrency of at least 1 and a timeout above 0, found "
                f"{self.patience}, {self.concurrency} and {self.timeout}"
            )
        if self.adapters and not self.url:
            raise RLAIFError("expected sampler.url beside sampler.adapters, found none")


class VLLMServers:
    """Stock vLLM servers with one base model, which any one of them samples from.

    Args:
        config: Which servers, and how they are asked.
        tell: Called with a sentence when a server is lost, waited for, or back.
    """

    def __init__(self, config: VLLMConfig, tell: Callable[[str], object] = lambda text: None) -> None:
        self.replicas = Replicas(config.url, rest=float("inf"))
        self.patience, self.tell = config.patience, tell
        self._adapter: Adapter | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._transport = Transport(
            f"vLLM {config.url[0]}",
            key=os.environ.get(config.api_key_env, "").strip(),
            timeout=config.timeout,
            connections=config.concurrency * len(config.url),
            urls=config.url,
        )
        self._servers = {url: VLLMServer(self._transport, url, config.timeout) for url in config.url}
        self._collected = weakref.finalize(self, self._transport.close, wait=False)

    @property
    def names(self) -> str:
        """Their addresses."""
        return ", ".join(self._servers)

    def start(self, tokens: int) -> None:
        """Look at each server: RLAIFError if one is not there or no vLLM, or its context shorter than ``tokens``."""
        self._transport.run(self._each(lambda server: server.look(tokens)))

    def base_gaps(self, probe: Probe) -> dict[str, float]:
        """How far each server's base model is from a probe: mean absolute difference, nats."""

        async def gap(server: VLLMServer) -> float:
            try:
                return await server.gap(str((await server.base())["id"]), probe)
            except PassingFailure as error:
                raise RLAIFError(f"expected {server.url} to score a text, found {error}; {START}") from None

        return dict(zip(self._servers, self._transport.run(self._each(gap)), strict=True))

    def use(self, adapter: Adapter) -> None:
        """Sample from this adapter from now on: load it everywhere, and unload the one before.

        Raises:
            RLAIFError: If it cannot be loaded, or is not the one it should be, or no server is there for too long.
        """

        async def swap() -> None:
            before, self._adapter = self._adapter, adapter
            await self._each(self._make_ready)
            if len(self.replicas.lost) == len(self._servers):
                await self._wait("none could be made ready")
            await self._each(lambda server: self._unload(server, before))

        self._transport.run(swap())

    def close(self) -> None:
        """End the connections and the thread; a second call does nothing."""
        if self._collected.detach() is not None:
            self._transport.close()

    def release(self) -> None:
        """Unload the adapter wherever that can be done."""
        adapter, self._adapter = self._adapter, None
        self._transport.run(self._each(lambda server: self._unload(server, adapter)))

    def sample(
        self,
        rows: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_new_tokens: int,
        stop_ids: Sequence[int],
    ) -> list[Response]:
        """A response to each prompt (token ids), drawn by a seed of its own.

        Raises:
            RLAIFError: If a server refuses a request, answers for another model, or none is there for too long.
        """
        settings = {"temperature": temperature, "max_tokens": max_new_tokens, "stop_token_ids": list(stop_ids)}

        async def all_rows() -> list[Response]:
            await self._each(self._make_ready, self.replicas.lost)  # one may be there again
            bodies = [{**settings, "prompt": list(row), "seed": seed} for row, seed in zip(rows, seeds, strict=True)]
            tasks = [asyncio.ensure_future(self._respond(body)) for body in bodies]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

        return self._transport.run(all_rows())

    async def _each(self, work: Callable[[VLLMServer], Awaitable[Any]], urls: Sequence[str] | None = None) -> list[Any]:
        return list(
            await asyncio.gather(*(work(self._servers[url]) for url in (self._servers if urls is None else urls)))
        )

    async def _respond(self, body: dict[str, Any]) -> Response:
        """One response, from whichever server is there; waits where none is."""
        weight = len(body["prompt"]) + int(body["max_tokens"])
        for attempt in range(_ATTEMPTS):
            async with self._transport.slots:
                try:
                    return await self.replicas.ask(lambda url: self._once(url, body), weight)
                except PassingFailure as error:
                    failure = error
            if failure.lost:
                await self._wait(str(failure))
            if attempt or not failure.lost:
                await asyncio.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt))
        raise RLAIFError(
            f"expected a response of a vLLM server, found after {_ATTEMPTS} attempts: {failure}; see the server's log"
        )

    async def _once(self, url: str, body: dict[str, Any]) -> Response:
        adapter, server = self._adapter, self._servers[url]
        assert adapter is not None
        try:
            salt = {"cache_salt": adapter.fingerprint} if adapter.fingerprint else {}
            return await server.respond(await server.name_of(adapter), {**body, **salt})
        except PassingFailure as error:
            if error.lost and url not in self.replicas.lost:
                self.tell(f"{url} is left out, its rows are asked again: {error}")
            raise

    async def _wait(self, why: str) -> None:
        """Return when a server is there; all who wait do so together."""
        if self._waiting is None or self._waiting.done():
            self._waiting = asyncio.ensure_future(self._until_one_is_there(why))
        await asyncio.shield(self._waiting)

    async def _until_one_is_there(self, why: str) -> None:
        end, pause, told = time.monotonic() + self.patience, _FIRST_PAUSE, False
        while len(self.replicas.lost) == len(self._servers):
            await self._each(self._make_ready)
            if len(self.replicas.lost) < len(self._servers):
                return
            if time.monotonic() + pause > end:
                raise RLAIFError(
                    f"expected a vLLM server at {self.names} within {self.patience:.0f} s, found none ({why}); start "
                    f"it ({START}), then go on with what is saved: the last whole update (--resume, or the same --out)"
                )
            if not told:
                self.tell(f"waiting up to {self.patience:.0f} s for a server at {self.names}: {why}")
                told = True
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause)

    async def _make_ready(self, server: VLLMServer) -> None:
        """Have a server use the current adapter, and see that it does; it is left out where it is lost."""
        adapter, was_lost = self._adapter, server.url in self.replicas.lost
        assert adapter is not None
        try:
            await server.prepare(adapter)
        except PassingFailure as error:
            if not was_lost:
                self.tell(f"{server.url} is left out: {error}")
            self.replicas.leave_out(server.url)
        else:
            self.replicas.back(server.url)
            if was_lost:
                self.tell(f"{server.url} is back")

    async def _unload(self, server: VLLMServer, adapter: Adapter | None) -> None:
        if adapter is None or adapter.folder is None or server.url in self.replicas.lost:
            return
        try:
            await server.unload(adapter.name)
        except (PassingFailure, RLAIFError) as error:
            self.tell(f"{server.url} keeps the adapter {adapter.name}: {error}")
