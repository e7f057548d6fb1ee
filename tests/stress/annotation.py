"""Many annotators at once and a server that is killed: is an answer lost or doubled, and how long does one take?

    python -m tests.stress.annotation                                  # 1,000 items, 8 annotators, 12 kills
    python -m tests.stress.annotation --items 100 --kills 3 --think 0

The server is the real command in a process of its own, killed with SIGKILL at random moments and started again. The
annotators are threads with a connection each; they retry an answer under its id until it is acknowledged, as the page
does, and send some answers twice. Times are of answers that were acknowledged at the first attempt, from the request to
the whole reply, which comes after the answer is on the disk.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.annotate.store import Store
from rlaif_env.api import RLAIFError
from rlaif_env.data.jsonl import write_jsonl
from tests.benchmarks.annotate.annotating import answer_ids

__all__ = ["StressConfig", "main", "stress"]


@dataclass(frozen=True)
class StressConfig:
    """Options of the benchmark.

    Attributes:
        items: Pairs to judge.
        annotators: Simulated people at once.
        overlap: How many of them judge each pair.
        kills: Times the server is killed, at random moments.
        think: Mean seconds between a reply and the next answer.
        seed: Of all choices, and of the moments.
    """

    items: int = 1_000
    annotators: int = 8
    overlap: int = 2
    kills: int = 12
    think: float = 0.1
    seed: int = 0


@dataclass
class _Person:
    """One simulated annotator and what they saw."""

    name: str
    port: int
    csrf: str
    rng: random.Random
    think: float
    key: str = ""
    acknowledged: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    retries: int = 0
    problem: str = ""
    connection: http.client.HTTPConnection | None = None

    def work(self) -> None:
        """Judge until all is done."""
        try:
            self.key = self.insist("/join", {"name": self.name})[1]["key"]
            state = self.insist("/state", {})[1]
            while state["item"] is not None:
                time.sleep(self.rng.expovariate(1 / self.think) if self.think else 0)
                answer = {
                    "id": secrets.token_hex(16),
                    "showing": state["item"]["showing"],
                    "choice": self.rng.choice("1120"),
                    "strength": "",
                    "comment": "",
                    "seconds": 1.0,
                }
                took, state = self.insist("/answer", answer)
                self.acknowledged.append(answer["id"])
                if took is not None:
                    self.seconds.append(took)
                if self.rng.random() < 0.05:
                    state = self.insist("/answer", answer)[1]
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            self.hang_up()

    def insist(self, route: str, body: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
        """A request until it is answered; the seconds it took, None if it needed another attempt."""
        deadline = time.monotonic() + 120
        first = True
        while True:
            try:
                started = time.perf_counter()
                status, result = self.ask(route, body)
                took = time.perf_counter() - started
            except (OSError, http.client.HTTPException):
                self.hang_up()
                if time.monotonic() > deadline:
                    raise
                first = False
                self.retries += 1
                time.sleep(0.05)
                continue
            if status >= 400:
                raise RLAIFError(f"{route}: {status} {result}")
            return (took if first else None), result

    def hang_up(self) -> None:
        """Close the connection; the next request makes another."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def ask(self, route: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            self.connection.connect()
            # the kernel would else hold the body back until the head is acknowledged; browsers send both at once
            self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        headers = {
            "Content-Type": "application/json",
            "Origin": f"http://127.0.0.1:{self.port}",
            "X-CSRF": self.csrf,
            "X-Annotator": self.key,
        }
        self.connection.request("POST", route, json.dumps(body), headers)
        reply = self.connection.getresponse()
        return reply.status, json.loads(reply.read())


def stress(config: StressConfig, folder: Path) -> dict[str, Any]:
    """Run the benchmark in a folder.

    Returns:
        The settings and the figures: answers acknowledged, lost and doubled; milliseconds of an answer.

    Raises:
        RLAIFError: If the server does not start, or refuses an annotator.
    """
    write_jsonl(folder / "pairs.jsonl", (_pair(i) for i in range(config.items)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / "people"
    command = [sys.executable, "-m", "rlaif_env.cli", "annotate", "--input", str(folder / "pairs.jsonl")]
    command += ["--out", str(out), "--port", str(port), "--overlap", str(config.overlap), "--seed", str(config.seed)]
    server = _start(command, port, folder)
    csrf = re.search(r'"csrf": "([\w-]+)"', _page(port))
    if csrf is None:
        raise RLAIFError("expected the page to carry a CSRF token, found none")
    rng = random.Random(config.seed)
    people = [
        _Person(f"annotator {i}", port, csrf[1], random.Random(config.seed * 1_000 + i), config.think)
        for i in range(config.annotators)
    ]
    threads = [threading.Thread(target=person.work) for person in people]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    kills = 0
    total = config.items * (config.overlap or config.annotators)
    marks = sorted(rng.randrange(1, max(2, int(0.95 * total))) for _ in range(config.kills))
    try:
        while any(thread.is_alive() for thread in threads):
            if kills < len(marks) and sum(len(person.acknowledged) for person in people) >= marks[kills]:
                time.sleep(rng.random() * 0.05)
                os.kill(server.pid, signal.SIGKILL)
                server.wait()
                kills += 1
                server = _start(command, port, folder)
            time.sleep(0.02)
    finally:
        server.kill()
        server.wait()
        for thread in threads:
            thread.join(timeout=150)
    if problems := [f"{person.name}: {person.problem}" for person in people if person.problem]:
        raise RLAIFError("; ".join(problems))
    return {**asdict(config), "kills": kills, "wall_seconds": round(time.monotonic() - started, 1)} | _audit(
        out, people
    )


def _audit(out: Path, people: Sequence[_Person]) -> dict[str, Any]:
    """What the database holds against what the annotators were told."""
    acknowledged = [name for person in people for name in person.acknowledged]
    store = Store(out / "annotations.sqlite")
    try:
        kept = answer_ids(store)
        judgements = store.judgements()
        overlap = store.plan.overlap or len(people)
        asked = sum(item.kind == "item" for item in store.items().values())
    finally:
        store.close()
    judged: dict[int, int] = {}
    for judgement in judgements:
        if judgement.kind == "item":
            judged[judgement.item] = judged.get(judgement.item, 0) + 1
    seconds = np.array([took for person in people for took in person.seconds])
    milliseconds = {f"p{q}": round(float(np.quantile(seconds, q / 100)) * 1000, 1) for q in (50, 95, 99)}
    return {
        "acknowledged": len(acknowledged),
        "lost": len(set(acknowledged) - kept),
        "doubled": len(judgements) - len(kept) + len(kept - set(acknowledged)),
        "retries": sum(person.retries for person in people),
        "items_with_too_few_judges": asked - sum(count >= overlap for count in judged.values()),
        "items_with_too_many_judges": sum(count > overlap for count in judged.values()),
        "timed": int(seconds.size),
        "answer_milliseconds": milliseconds | {"longest": round(float(seconds.max()) * 1000, 1)},
    }


def _pair(i: int) -> dict[str, str]:
    words = "the film is a slow warm loud bright story of people who never quite meet and one who does".split()
    rng = random.Random(i)
    first, second = (" ".join(rng.choices(words, k=40)) for _ in range(2))
    return {"prompt": f"Review {i}:", "response_1": first, "response_2": second}


def _start(command: Sequence[str], port: int, folder: Path) -> subprocess.Popen[bytes]:
    """The server, once it answers."""
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            _page(port)
            return server
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.1)
    server.kill()
    log_text = (folder / "server.log").read_text(encoding="utf-8", errors="replace")[-2_000:]
    raise RLAIFError(f"expected the server to start, found: {log_text}")


def _page(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its figures; 1 if an answer was lost or doubled."""
    import tyro

    config = tyro.cli(StressConfig, args=argv, prog="python -m tests.stress.annotation")
    with tempfile.TemporaryDirectory() as folder:
        result = stress(config, Path(folder))
    print(json.dumps(result, indent=2))
    return 1 if result["lost"] or result["doubled"] or result["items_with_too_few_judges"] else 0


if __name__ == "__main__":
    sys.exit(main())
