"""HTTP requests on an event loop in a thread of its own, and what a server's refusals mean.

So a caller may be synchronous, inside a running loop, or one of several threads. A failure either may pass, and the
request can be made again (429, 5xx, a broken connection, a timeout), or it is final.
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from rlaif_env.api import RLAIFError
from rlaif_env.servers.limits import is_loopback, retry_after
from rlaif_env.servers.replies import error_message

T = TypeVar("T")


def may_pass(status: int) -> bool:
    """Whether a refusal may pass: the server is busy, or it fails (from 500)."""
    return status in (408, 409, 425, 429) or status >= 500


class RequestFailed(RLAIFError):
    """A request that was given up. ``fatal``: every other request would fail for the same reason."""

    def __init__(self, message: str, *, fatal: bool = False, status: int = 0) -> None:
        super().__init__(message)
        self.fatal = fatal
        self.status = status


class PassingFailure(Exception):
    """A failure that may pass; ``wait`` is what Retry-After says, in seconds.

    ``lost``: it is the server that fails, not this request: no connection, no answer in time, 5xx.
    """

    def __init__(self, reason: str, wait: float | None = None, *, lost: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.lost = wait, lost


class Transport:
    """A started thread with an event loop and an HTTP client.

    Args:
        name: Of the thread.
        key: Sent as a bearer token unless empty, and kept out of all that is returned or raised.
        timeout: Seconds for one request.
        connections: Requests at once, which ``slots`` bounds.
        urls: The servers; those of this machine are not asked through the environment's proxies.
    """

    def __init__(self, name: str, *, key: str, timeout: float, connections: int, urls: Sequence[str]) -> None:
        bearer = {"authorization": f"Bearer {key}"} if key else {}
        hosts = [urlsplit(url).hostname or "" for url in urls]
        own = [f"[{host}]" if ":" in host else host for host in hosts if is_loopback(host)]
        self._key, self.loop = key, asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(connections)
        self.http = httpx.AsyncClient(
            headers={"content-type": "application/json", **bearer},
            timeout=timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections),  # the slots are the bound
            http2=importlib.util.find_spec("h2") is not None,
            trust_env=len(own) < len(hosts),
            mounts={f"all://{host}": None for host in own},
        )
        self.thread = threading.Thread(target=self._live, name=name, daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it; from any thread, in or out of another loop."""
        try:
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except BaseException:
            work.close()
            raise
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _live(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def close(self, *, wait: bool = True) -> None:
        """End the connections and the thread.

        A finaliser does not wait: it may run amid anything, such as an import whose lock the thread needs to end.
        """

        async def shut() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self.http.aclose()
            self.loop.call_soon(self.loop.stop)

        asyncio.run_coroutine_threadsafe(shut(), self.loop)
        if wait and self.thread is not threading.current_thread():
            self.thread.join()

    async def ask(
        self, url: str, route: str, content: bytes | None, seconds: float
    ) -> tuple[int, str, Mapping[str, str]]:
        """Status, text and headers of the answer to a JSON body, or to none; `PassingFailure` where no answer comes."""
        method = "GET" if content is None else "POST"
        try:
            request = self.http.request(method, f"{url}/{route}", content=content)
            response = await asyncio.wait_for(request, seconds)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            raise PassingFailure(f"no answer within {seconds:.3g} s", lost=True) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise PassingFailure(self.redact(f"{type(error).__name__}: {error} ({url})"), lost=True) from None
        text = self.redact(response.content.decode("utf-8", "replace"))  # JSON is UTF-8 whatever the headers say
        return response.status_code, text, response.headers

    def redact(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, "[key]") if self._key else text


def refusal(
    status: int, text: str, wait: str | None, *, url: str, model: str, key_env: str, keyed: bool
) -> RequestFailed | PassingFailure:
    """What an answer of another status than 200 means; ``wait`` is its Retry-After."""
    refused = f"HTTP {status}: {error_message(text)}"
    if status == 429 and "insufficient_quota" in text:
        return RequestFailed(f"{refused}; the account has no credit left", fatal=True, status=status)
    if may_pass(status):
        return PassingFailure(refused, retry_after(wait), lost=status >= 500)
    if status in (401, 403):
        message = f"expected {url} to accept {'its key' if keyed else 'no key'} ({key_env}), found {refused}"
        return RequestFailed(message, fatal=True, status=status)
    if status == 404 or 300 <= status < 400:
        return RequestFailed(
            f"expected an OpenAI-compatible server with the model {model!r} at {url}, found {refused}; check the "
            "address and the model's name",
            fatal=True,
            status=status,
        )
    return RequestFailed(f"the server refused the request: {refused}", status=status)
