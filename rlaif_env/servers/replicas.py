"""Servers that answer alike: which one is asked next, and what becomes of one that is lost."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from rlaif_env.servers.transport import PassingFailure

T = TypeVar("T")


class Replicas:
    """Servers with the same model, for use on one event loop.

    A request goes to the server with the least open work. One that is lost (no connection, no answer in time, 5xx) is
    left out, and its requests are asked again of the others; after a rest one request tries it.

    Args:
        urls: Their addresses, one at least.
        rest: Seconds before a lost one is tried; infinite where the caller looks after it and says `back`.
    """

    def __init__(self, urls: Sequence[str], rest: float = 10.0) -> None:
        self.urls, self.rest = tuple(urls), rest
        self.work = dict.fromkeys(self.urls, 0)  # open, in the unit of `ask`'s weight
        self._lost: dict[str, float] = {}  # until when each is left out

    @property
    def lost(self) -> list[str]:
        """Those that are left out."""
        return [url for url in self.urls if url in self._lost]

    def leave_out(self, url: str) -> None:
        """Ask a server nothing until its rest is over, or it is `back`."""
        self._lost[url] = time.monotonic() + self.rest

    def back(self, url: str) -> None:
        """Ask a server again."""
        self._lost.pop(url, None)

    def _next(self, tried: set[str]) -> str | None:
        now, untried = time.monotonic(), [url for url in self.urls if url not in tried]
        ready = [url for url in untried if self._lost.get(url, 0.0) <= now]
        if not ready and math.isfinite(self.rest):
            ready = untried  # better one that may be lost than none
        url = min(ready, key=self.work.__getitem__, default=None)
        if url in self._lost:
            self.leave_out(url)  # nobody else tries it meanwhile
        return url

    async def ask(self, request: Callable[[str], Awaitable[T]], weight: int = 1) -> T:
        """What one of them answers to a request, which is made with its address.

        Raises:
            PassingFailure: That of the last one where all are lost; one that is no loss of a server at once.
        """
        tried: set[str] = set()
        failure = PassingFailure("no server is left", lost=True)
        while (url := self._next(tried)) is not None:
            self.work[url] += weight
            try:
                answer = await request(url)
                self.back(url)
                return answer
            except PassingFailure as error:
                if not error.lost:
                    raise
                failure = error
                tried.add(url)
                self.leave_out(url)
            finally:
                self.work[url] -= weight
        raise failure
