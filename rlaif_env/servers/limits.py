"""What an endpoint may use and has used, and where it is."""

from __future__ import annotations

import email.utils
import ipaddress
import math
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from urllib.parse import urlsplit

from rlaif_env.api import RLAIFError


@dataclass(frozen=True)
class Limits:
    """What a client may use.

    Attributes:
        concurrency: Requests on the wire at once.
        retries: How often a request is asked again.
        timeout: Seconds for one request.
        deadline: Seconds for all requests of one call; None is no limit.
        spend_cap: Stop before the cost of all calls exceeds this; needs prices.
        price_in: Price of a million tokens read.
        price_out: Price of a million tokens written.
    """

    concurrency: int = 16
    retries: int = 6
    timeout: float = 60.0
    deadline: float | None = None
    spend_cap: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0 or (self.deadline or 1.0) <= 0:
            raise RLAIFError(
                "expected concurrency >= 1, retries >= 0, timeout and deadline above 0, found "
                f"{self.concurrency}, {self.retries}, {self.timeout} and {self.deadline}"
            )
        if self.spend_cap is not None and (self.spend_cap <= 0 or self.price_in <= 0):
            raise RLAIFError(
                f"expected a spend_cap above 0 with price_in (and price_out) per million tokens, found "
                f"{self.spend_cap} with {self.price_in} and {self.price_out}"
            )

    def cost(self, read: int, written: int) -> float:
        """The price of so many tokens."""
        return (read * self.price_in + written * self.price_out) / 1e6


@dataclass
class Usage:
    """What a client has used."""

    requests: int = 0  # sent, repeated ones included
    answers: int = 0  # received whole and stored
    hits: int = 0  # answered from the cache
    retries: int = 0  # requests that were asked again
    busy_seconds: float = 0.0  # on the wire, summed over requests
    tokens_in: int = 0  # read by the server, those of answers that could not be used included
    tokens_out: int = 0  # written
    estimated: int = 0  # of the answers, those whose tokens the server does not say: a guess from the characters
    cost: float = 0.0  # in the currency of the prices

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


def checked_url(url: str) -> str:
    """The base URL of a server's routes; raises `RLAIFError` if it is none, or holds a password."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        shown = url.rpartition("@")[2]
        raise RLAIFError(f"expected a server's address such as http://localhost:8000/v1, found {shown!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RLAIFError(
            f"expected an address without password and query for {host}, found one with; put the key into the "
            "environment variable that api_key_env names"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def checked_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """The base URLs of one server or of several; raises `RLAIFError` if one is none, or given twice, or none is."""
    checked = tuple(checked_url(url) for url in ([urls] if isinstance(urls, str) else urls))
    if not checked or len(set(checked)) < len(checked):
        raise RLAIFError(f"expected the addresses of servers, each once, found {', '.join(checked) or 'none'}")
    return checked


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which no other can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def retry_after(value: str | None) -> float | None:
    """Seconds to wait: a number or an HTTP date; None where there is neither."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError, LookupError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
