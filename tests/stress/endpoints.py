"""How well a language model behind a server serves: nothing lost, nothing asked twice, nothing wasted.

    python -m tests.stress.endpoints faults     10,000 labels while a fifth of all answers fail, in eleven ways
    python -m tests.stress.endpoints kill       kill -9 in the middle of 5,000, and again
    python -m tests.stress.endpoints speed      64 in flight against a 50 ms server, beside a bare httpx loop
    python -m tests.stress.endpoints costs      what a labelling says it cost, and would cost, beside the server's count
    python -m tests.stress.endpoints agreement --url http://localhost:8000/v1 --model NAME
                                              a server with the built-in model's weights against the model itself

Each prints one JSON object. The first four bring their own server (`tests.stress.endpoint_server`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from rewards.direct_score import DirectLLMScore
from rewards.endpoint.config import ServerConfig
from rewards.endpoint.likelihoods import AnswerLikelihoods
from rewards.endpoint.model import EndpointLM
from rewards.labeling.command import LabelConfig, label
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM
from rlaif_env.data.tasks import load_task
from rlaif_env.servers.cache import AnswerCache
from rlaif_env.servers.limits import Limits
from rlaif_env.servers.transport import RequestFailed
from rlaif_env.statistics import spearman
from tests import ROOT
from tests.stress.endpoint_server import FAULTS, FaultServer, scores_of

__all__ = ["CHILD", "LABELLINGS", "agreement_run", "cost_run", "fault_run", "kill_run", "main", "speed_run"]

_ANSWERED = ("429", "500", "reset", "truncated", "no-choices", "no-logprobs", "wrong-model", "late")
_LABELS = [str(i) for i in range(2, 10)]
CHILD = """
import sys
from rewards.endpoint.model import EndpointLM
url, store, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
with EndpointLM(url, "scorer", cache=store, boundaries="prefix", limits={"concurrency": 32}) as lm:
    lm.label_logprobs([f"Rate {i}: " for i in range(n)], ["2", "3"])
"""


def fault_run(
    n: int, *, concurrency: int = 32, seconds: float = 0.1, timeout: float = 10.0, kinds: tuple[str, ...] = FAULTS
) -> dict[str, Any]:
    """Label n prompts, one in a hundred of which can never be answered, against a server that fails often.

    Returns:
        Counts of rows: lost, invented (not what the server answers to this prompt), doubled (accepted twice), failed,
        and failed though they could be answered. ``of_the_bound`` is the least time in which so many slots can hold so
        many requests of the server's own duration (hanging ones last until the timeout), as a share of the time it
        took; ``slots_busy`` the share of time that the slots were on the wire; ``memory_growth_mb`` the resident memory
        at the end less that after a fifth of the time.
    """

    def never(path: str, request: Mapping[str, Any]) -> tuple[int, Any] | None:
        return (400, {"error": {"message": "too long"}}) if "hopeless" in str(request.get("prompt")) else None

    prompts = [f"Rate {'hopeless ' if i % 100 == 7 else ''}{i}: " for i in range(n)]
    limits = {"retries": 12, "timeout": timeout, "concurrency": concurrency}
    with (
        tempfile.TemporaryDirectory() as folder,
        FaultServer(faults=0.2, kinds=kinds, seconds=seconds, answer=never) as server,
        EndpointLM(
            server.url, "scorer", cache=Path(folder) / "answers.sqlite", boundaries="prefix", limits=limits
        ) as lm,
    ):
        server.keep_requests = False
        lm.probe()
        before, started = replace(lm.usage), time.monotonic()
        with _MemoryWatch() as memory:
            found = lm.answers(prompts, _LABELS)
        wall = time.monotonic() - started
        accepted = lm.usage.answers - before.answers
        requests = lm.usage.requests - before.requests
        retried = lm.usage.retries
        busy = lm.usage.busy_seconds - before.busy_seconds
        failures = dict(server.failed)
    bad = {i: str(row) for i, row in enumerate(found) if isinstance(row, RequestFailed)}
    hopeless = {i for i in range(n) if i % 100 == 7}
    good = {i: row.logprobs for i, row in enumerate(found) if isinstance(row, AnswerLikelihoods)}
    shown = np.exp(list(good.values()))
    truth = np.array([scores_of(prompts[i])[1:9] for i in good])
    hanging = failures.get("timeout", 0)
    least = ((requests - hanging) * seconds + hanging * timeout) / concurrency
    return {
        "labels": n,
        "lost": n - len(found),
        "invented": int((np.abs(shown - truth).max(axis=1) > 1e-9).sum()),
        "doubled": accepted - len(good),
        "failed": len(bad),
        "failed_for_nothing": len(bad.keys() ^ hopeless),
        "reasons": sorted(set(bad.values())),
        "retries": retried,
        "server_failures": failures,
        "seconds": round(wall, 1),
        "labels_a_second": round(n / wall, 1),
        "of_the_bound": round(least / wall, 3),
        "slots_busy": round(busy / (concurrency * wall), 3),
        "memory_growth_mb": round(memory.growth(), 1),
    }


class _MemoryWatch:
    """Looks at this process's resident memory twice a second, in a thread."""

    def __enter__(self) -> _MemoryWatch:
        self._seen = [_resident_mb()]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._seen.append(_resident_mb())

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self._seen.append(_resident_mb())

    def growth(self) -> float:
        """Megabytes at the end less those after a fifth of the time."""
        return self._seen[-1] - self._seen[len(self._seen) // 5]


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def kill_run(n: int, *, seconds: float = 0.05) -> dict[str, int]:
    """Kill a process (SIGKILL) in the middle of n questions, and have another one ask them all.

    Returns:
        ``stored`` when it was killed, ``asked_again`` of the stored ones by the second process, and ``on_their_way``:
        answers that the server had given and the killed process had not stored.
    """
    with tempfile.TemporaryDirectory() as folder, FaultServer(seconds=seconds) as server:
        store = Path(folder) / "answers.sqlite"
        server.keep_requests = False
        command = [sys.executable, "-c", CHILD, server.url, str(store), str(n)]
        child = subprocess.Popen(command, cwd=ROOT)
        while sum(server.answered.values()) < n // 2 and child.poll() is None:
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        time.sleep(seconds + 0.2)
        with AnswerCache(store) as cache:
            stored = len(cache)
        first = sum(server.answered.values())
        subprocess.run(command, cwd=ROOT, check=True)
        with AnswerCache(store) as cache:
            in_the_end = len(cache)
        second = sum(server.answered.values()) - first
        return {
            "questions": n,
            "stored": stored,
            "asked_again": second - (n - stored),
            "on_their_way": first - stored,
            "in_the_end": in_the_end,
        }


def speed_run(n: int = 1500, *, in_flight: int = 64, seconds: float = 0.05, rounds: int = 3) -> dict[str, Any]:
    """Requests a second beside those of a bare httpx loop with the same payload, in turns, best of each."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.stress.endpoint_server", str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        ours: list[float] = []
        bare: list[float] = []
        for turn in range(rounds):
            prompts = [f"Rate {turn}.{i}: " for i in range(n)]
            bare.append(n / asyncio.run(_bare_loop(url, prompts, in_flight)))
            with (
                tempfile.TemporaryDirectory() as folder,
                EndpointLM(
                    url,
                    "scorer",
                    cache=Path(folder) / "a.sqlite",
                    boundaries="prefix",
                    limits={"concurrency": in_flight},
                ) as lm,
            ):
                lm.probe()
                started = time.perf_counter()
                lm.label_logprobs(prompts, _LABELS)
                ours.append(n / (time.perf_counter() - started))
    finally:
        server.terminate()
        server.wait()
    return {
        "endpoint": [round(v) for v in ours],
        "bare_httpx": [round(v) for v in bare],
        "ratio_of_best": round(max(ours) / max(bare), 3),
        "ratio_of_medians": round(float(np.median(ours) / np.median(bare)), 3),
    }


LABELLINGS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "completion, score": ("vllm", {}, {"mode": "score"}),
    "completion, pairwise": ("vllm", {}, {}),
    "completion, pairwise, cot": ("vllm", {}, {"cot": True, "rationale_tokens": 16}),
    "completion, score, prefix": ("vllm", {"boundaries": "prefix"}, {"mode": "score"}),
    "completion in the chat's shape, score": ("llama.cpp", {}, {"mode": "score"}),
    "chat that goes on, score": ("vllm", {"route": "chat"}, {"mode": "score"}),
    "chat that goes on, pairwise": ("vllm", {"route": "chat"}, {}),
    "chat that does not, score": ("openai", {}, {"mode": "score"}),
    "chat that does not, pairwise": ("openai", {}, {}),
}
"""Kinds of server and ways of asking: the server's style, how it is asked, the labelling."""


def cost_run(name: str, n: int = 60, *, faults: float = 0.0) -> dict[str, float]:
    """Label n pairs at a price for each of `LABELLINGS`, before that as a dry run.

    Returns:
        What the report says of requests, tokens read and written, and cost, each as a share of what the server counted
        ("report requests", "report in", ...); and the same of the dry run's estimate.
    """
    style, server, labelling = LABELLINGS[name]
    limits = Limits(price_in=1.0, price_out=4.0, retries=12)
    with tempfile.TemporaryDirectory() as folder, FaultServer(style, faults=faults, kinds=_ANSWERED) as running:
        source = Path(folder) / "pairs.jsonl"
        texts = [" ".join(f"word{j}" for j in range(i % 40)) for i in range(n)]
        rows = [{"prompt": f"{i} {x}", "response_1": f"one {x}", "response_2": f"two {i}"} for i, x in enumerate(texts)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        labeler = LanguageModelConfig("scorer", running.url, server=ServerConfig(cache=False, limits=limits, **server))
        config = LabelConfig(task="helpful", input=source, labeler=labeler, **labelling)
        estimate = label(replace(config, dry_run=True), Console(quiet=True))
        running.counted.clear()
        report = label(replace(config, out=Path(folder) / "out"), Console(quiet=True))
        counted = {**running.counted, "cost": (running.counted["in"] + 4 * running.counted["out"]) / 1e6}
    said = {
        "report": {
            "requests": report["server_usage"]["requests"],
            "in": report["tokens"]["input"],
            "out": report["tokens"]["output"],
            "cost": report["cost"],
        },
        "dry run": dict(zip(("in", "out"), estimate["tokens"], strict=True))
        | {"requests": estimate["requests"], "cost": estimate["cost"]},
    }
    return {f"{who} {what}": round(v / counted[what], 3) for who, values in said.items() for what, v in values.items()}


async def _bare_loop(url: str, prompts: Sequence[str], in_flight: int) -> float:
    """Seconds that a plain loop takes for the same requests, answers read as JSON."""
    queue = iter(prompts)
    fixed = {"model": "scorer", "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0, "logprobs": 20}
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx.AsyncClient(limits=limits, trust_env=False) as client:

        async def worker() -> None:
            for prompt in queue:
                reply = await client.post(f"{url}/completions", json={**fixed, "prompt": prompt})
                reply.json()["choices"][0]["logprobs"]["top_logprobs"]

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return time.perf_counter() - started


def agreement_run(url: str, model: str, *, n: int = 100, **settings: Any) -> dict[str, Any]:
    """Scores of n movie snippets by the built-in model in this process and by a server with the same weights.

    Returns:
        The share of scores within 0.25, the largest difference, Spearman's rank correlation, the share of label masses
        within 0.02, their largest and mean difference (the server's less the own), requests and seconds a snippet.
    """
    texts = [p.response_1 for p, _ in zip(load_task("movie-review").preferences("test"), range(n), strict=False)]
    none = [""] * len(texts)
    local = DirectLLMScore(LocalLM(), scale=(1, 10)).score(none, texts).info
    started = time.monotonic()
    with EndpointLM(url, model, cache=None, **settings) as lm:
        served = DirectLLMScore(lm, scale=(1, 10)).score(none, texts).info
        spent = time.monotonic() - started
        facts, requests = lm.facts, lm.usage.requests
    gap = np.abs(local["score"] - served["score"])
    more = served["label_mass"] - local["label_mass"]
    return {
        "snippets": len(texts),
        "within_a_quarter": float((gap <= 0.25).mean()),
        "largest_gap": round(float(gap.max()), 4),
        "spearman": round(float(spearman(local["score"], served["score"])), 4),
        "mass_within_0.02": float((np.abs(more) <= 0.02).mean()),
        "largest_mass_gap": round(float(np.abs(more).max()), 4),
        "mean_mass_gap": round(float(more.mean()), 4),
        "requests_a_snippet": round(requests / len(texts), 2),
        "seconds_a_snippet": round(spent / len(texts), 2),
        "facts": facts,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one thing and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("faults", "kill", "speed", "costs", "agreement"))
    parser.add_argument("--n", type=int, help="labels, questions, requests or snippets")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--boundaries", choices=("prefix", "all"), default="all")
    config = parser.parse_args(argv)
    if config.what == "faults":
        found: dict[str, Any] = fault_run(config.n or 10_000)
    elif config.what == "kill":
        found = dict(kill_run(config.n or 5000))
    elif config.what == "speed":
        found = speed_run(config.n or 1500)
    elif config.what == "costs":
        found = {name: cost_run(name, config.n or 60) for name in LABELLINGS}
        found["completion, score, a fifth failing"] = cost_run("completion, score", config.n or 60, faults=0.2)
    else:
        found = agreement_run(
            config.url, config.model, n=config.n or 100, boundaries=config.boundaries, limits={"concurrency": 2}
        )
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
