"""The routes as another program meets them: who is let through, what is refused, and what every answer carries."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.annotate import server
from benchmarks.annotate.items import Item
from benchmarks.annotate.store import Store
from rlaif_env.api import RLAIFError
from rlaif_env.servers.limits import is_loopback
from tests.benchmarks.annotate.annotating import better, pairs, project

HOST = "127.0.0.1:8765"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    result = project(tmp_path, pairs(6), criterion="how <b>good</b> it is </script><script>alert(1)</script>")
    yield result
    result.close()


class Client:
    """Requests of the page, or of something that pretends to be it."""

    def __init__(self, store: Store, **settings: Any) -> None:
        self.app = server.application(store, **{"host": "127.0.0.1", **settings})
        self.marks = {
            "Host": HOST,
            "Origin": f"http://{HOST}",
            "X-CSRF": store.csrf,
            "Content-Type": "application/json",
        }

    def get(self, path: str = "/", **headers: str) -> httpx.Response:
        return self.send("GET", path, None, {"Host": HOST, **headers})

    def post(self, path: str, body: Any, **headers: str | None) -> httpx.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        kept = {n: v for n, v in {**self.marks, **sent}.items() if v is not None}
        return self.send("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), kept)

    def send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}") as client:
                return await client.request(method, path, content=body, headers=headers)

        return asyncio.run(go())

    def join(self, name: str) -> None:
        self.marks["X-Annotator"] = self.post("/join", {"name": name}).json()["key"]


def test_an_annotator_joins_answers_and_takes_back(store: Store) -> None:
    client = Client(store)
    client.join("Ada")
    state = client.post("/state", {}).json()
    assert (state["name"], state["answered"], state["left"]) == ("Ada", 0, 6)
    choice = better(state["item"])
    body = {"id": "0123456789", "showing": state["item"]["showing"], "choice": choice, "strength": "", "comment": ""}
    for _ in range(2):
        after = client.post("/answer", {**body, "seconds": 1.5})
        assert (after.status_code, after.json()["answered"]) == (200, 1)
    assert [j.p_first for j in store.judgements()] == [1.0]
    assert client.post("/undo", {"showing": body["showing"]}).json()["item"]["before"]["choice"] == choice


def test_the_page_is_one_document_that_loads_nothing(store: Store) -> None:
    page = Client(store).get()
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert page.text.count(f'nonce="{nonce}"') == 2
    assert page.text.count("<script") == 2  # the settings and the one script: no text of the task made another
    assert "{{" not in page.text
    assert not any(mark in page.text for mark in ("src=", "http://", "https://", "@import", "url("))
    assert Client(store).get().headers["content-security-policy"] != policy


def test_every_answer_carries_the_security_headers(store: Store) -> None:
    client = Client(store)
    for reply in (client.get(), client.get("/nothing"), client.post("/state", {}), client.get(Host="evil.example")):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "[::1]:8765", "LOCALHOST", "localhost:9000"])
def test_loopback_s_own_names_are_let_in(host: str, store: Store) -> None:
    assert Client(store).get(Host=host).status_code == 200
    assert Client(store).post("/join", {"name": "Ada"}, Host=host, Origin=f"http://{host.lower()}").status_code == 201


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "192.168.0.7:8765", "", "localhost@evil"]
)
def test_other_hosts_are_refused(host: str, store: Store) -> None:
    reply = Client(store).get(Host=host)
    assert (reply.status_code, "own address" in reply.json()["error"]) == (403, True)


FORGED: dict[str, dict[str, str | None]] = {
    "another origin": {"Origin": "https://evil.example"},
    "no origin": {"Origin": None},
    "an opaque origin": {"Origin": "null"},
    "another port": {"Origin": "http://127.0.0.1:9999"},
    "no CSRF token": {"X_CSRF": None},
    "another CSRF token": {"X_CSRF": "x" * 43},
    "another site": {"Sec_Fetch_Site": "cross-site"},
    "a form": {"Content_Type": "application/x-www-form-urlencoded"},
    "plain text": {"Content_Type": "text/plain"},
}


@pytest.mark.parametrize("name", FORGED)
def test_requests_of_other_pages_are_refused(name: str, store: Store) -> None:
    reply = Client(store).post("/join", {"name": "Mallory"}, **FORGED[name])
    assert reply.status_code == 403
    assert store.annotators() == []


def test_bodies_are_bounded(store: Store) -> None:
    client = Client(store)
    client.join("Ada")
    assert client.post("/state", b" " * (server.MAX_BODY + 1)).status_code == 413
    worst = {"id": "x" * 64, "showing": 1, "choice": "1", "strength": "", "comment": "\U0001f600" * 2000, "seconds": 1}
    worst["showing"] = client.post("/state", {}).json()["item"]["showing"]
    assert len(json.dumps(worst)) < server.MAX_BODY
    assert client.post("/answer", worst).status_code == 200


BODIES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "expected a JSON object"),
    "no object": (b"[1]", "found list"),
    "nested": (b"[" * 20_000, "expected a JSON object"),
    "no text": (b"\xff\xfe", "expected UTF-8, found the byte 0xff"),
    "no id": (b'{"showing": 1}', "expected id of type str, found 'None'"),
    "a text for a number": (
        b'{"id": "12345678", "choice": "1", "strength": "", "comment": "", "showing": "1", "seconds": 1}',
        "expected showing of type int, found '1'",
    ),
    "a truth for a number": (
        b'{"id": "12345678", "choice": "1", "strength": "", "comment": "", "showing": true, "seconds": 1}',
        "expected showing of type int, found 'True'",
    ),
    "more than SQLite holds": (
        b'{"id": "12345678", "choice": "1", "strength": "", "comment": "", "showing": 9223372036854775808}',
        "expected showing of type int",
    ),
    "not a number": (
        b'{"id": "12345678", "choice": "1", "strength": "", "comment": "", "showing": 1, "seconds": NaN}',
        "expected numbers, found NaN",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_answers(name: str, store: Store) -> None:
    client = Client(store)
    client.join("Ada")
    body, message = BODIES[name]
    reply = client.post("/answer", body)
    assert (reply.status_code, message in reply.json()["error"]) == (400, True), reply.text


def test_without_a_key_nothing_is_shown(store: Store) -> None:
    client = Client(store)
    for key in ({}, {"X_Annotator": "guessed"}):
        reply = client.post("/state", {}, **key)
        assert reply.status_code == 401
    assert client.get("/state").status_code == 405
    assert client.get("/annotations.sqlite").status_code == 404


def test_two_annotators_with_one_name(store: Store) -> None:
    client = Client(store)
    assert client.post("/join", {"name": "Ada"}).status_code == 201
    reply = client.post("/join", {"name": "ada"})
    assert (reply.status_code, "open your own link" in reply.json()["error"]) == (409, True)


def test_by_invitation_nobody_else_joins(store: Store) -> None:
    reply = Client(store, joining=False).post("/join", {"name": "Ada"})
    assert (reply.status_code, "by invitation" in reply.json()["error"]) == (403, True)
    assert store.annotators() == []


def test_off_loopback_the_token_of_the_link_is_wanted(store: Store) -> None:
    client = Client(store, host="0.0.0.0", token="the-token")
    assert client.get().status_code == 403
    assert client.get("/?token=another").status_code == 403
    assert client.get("/?token=the-token").status_code == 200
    assert client.get("/?token=the-token", Host="192.168.0.7:8765").status_code == 200
    assert client.get("/?token=the-token", Host=f"{socket.gethostname()}:8765").status_code == 200
    assert client.get("/?token=the-token", Host="rebound.example:8765").status_code == 403
    assert client.post("/join", {"name": "Ada"}).status_code == 403
    assert client.post("/join", {"name": "Ada"}, X_Token="the-tokem").status_code == 403
    assert client.post("/join", {"name": "Ada"}, X_Token="the-token").status_code == 201


def test_a_full_disk_reaches_the_page_as_such(store: Store) -> None:
    client = Client(store)
    client.join("Ada")
    state = client.post("/state", {}).json()
    body = {"id": "0123456789", "showing": state["item"]["showing"], "choice": "1", "strength": "", "seconds": 1}
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(50):
        reply = client.post("/answer", {**body, "id": f"answer {number:04}", "comment": "x" * 2000})
        if reply.status_code != 200:
            break
        body["showing"] = reply.json()["item"]["showing"]
    assert (reply.status_code, "disk is full" in reply.json()["error"]) == (507, True)
    assert len(store.judgements()) == number


HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "x" * 100_000,
    "‮Hello‬ שלום עולم مرحبا 👩‍👩‍👧‍👦🏳️‍🌈",
    "</script></textarea>{{settings}}&lt;&#0;",
)


def test_hostile_text_comes_as_it_is(tmp_path: Path) -> None:
    store = project(tmp_path, [Item(text, (text, text + "!")) for text in HOSTILE])
    client = Client(store)
    client.join("Ada")
    state = client.post("/state", {}).json()
    result = set()
    while state["item"]:
        result.add(state["item"]["prompt"])
        assert set(state["item"]["responses"]) == {state["item"]["prompt"], state["item"]["prompt"] + "!"}
        body = {"id": f"answer {len(result)}", "showing": state["item"]["showing"], "choice": "0", "seconds": 1}
        state = client.post("/answer", {**body, "strength": "", "comment": ""}).json()
    assert result == set(HOSTILE)
    store.close()


def test_answers_are_sent_at_once() -> None:
    with server.listen("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP  # else asyncio would leave TCP_NODELAY off: 40 ms an answer


def test_a_port_in_use_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RLAIFError, match=f"expected to listen on port {port} of 127.0.0.1, found: Address already"):
            server.listen("127.0.0.1", port)


@pytest.mark.parametrize(
    "host, port, message",
    [("127.0.0.1", 99999, "from 0 to 65535, found 99999"), ("203.0.113.1", 0, "expected to listen on port 0 of 203")],
)
def test_addresses_that_cannot_be_had(host: str, port: int, message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        server.listen(host, port)


def test_what_is_loopback() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "192.168.0.1", "example.org", "")] == [False] * 5
