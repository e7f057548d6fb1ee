"""A server for tests and measurements, on loopback, that speaks the shapes of four servers and can fail in every way.

Its model knows ten scores: what it answers to a prompt depends on the prompt alone, by a hash, so that a test can tell
whether each answer belongs to its question. It splits "10" into "1" and "0".
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["FAULTS", "FaultServer", "next_tokens", "scores_of"]

FAULTS = (
    "429",
    "429-retry-after",
    "500",
    "reset",
    "timeout",
    "truncated",
    "html",
    "no-choices",
    "no-logprobs",
    "wrong-model",
    "late",
)
_FILLER = [(f"word{i}", 0.05 / 2**i) for i in range(24)]


def scores_of(prompt: str) -> list[float]:
    """The probabilities of the scores 1 to 10 after a prompt; they sum to 0.9."""
    digest = hashlib.sha256(prompt.encode()).digest()
    weights = [1 + byte for byte in digest[:10]]
    return [0.9 * w / sum(weights) for w in weights]


def next_tokens(prompt: str, begun: str = "") -> list[tuple[str, float]]:
    """The likeliest next tokens and their probabilities."""
    if begun == "":
        p = scores_of(prompt)
        tokens = [("1", p[0] + p[9])] + [(str(i + 1), p[i]) for i in range(1, 9)]
        return sorted([*tokens, ("The", 0.06), ("\n", 0.03)], key=lambda t: -t[1])
    if begun == "1":
        p = scores_of(prompt)
        ten = p[9] / (p[0] + p[9])
        return sorted([("0", ten), ("\n", 1 - ten - 0.01), (".", 0.01)], key=lambda t: -t[1])
    return [("\n", 0.97), (" out", 0.02), (".", 0.01)]


class FaultServer:
    """An OpenAI-compatible server in a thread; a context manager.

    Args:
        style: "openai" (chat only), "vllm", "llama.cpp" or "ollama".
        faults: Share of requests that fail, each way as often.
        kinds: The ways.
        seconds: Time for each answer.
        key: The key that is asked for; the error names the wrong one, as some servers do.
        answer: (path, request) -> (status, body) or None, to replace the answers of a test's choice.
    """

    def __init__(
        self,
        style: str = "vllm",
        *,
        model: str = "scorer",
        faults: float = 0.0,
        kinds: tuple[str, ...] = FAULTS,
        seconds: float = 0.0,
        key: str | None = None,
        seed: int = 0,
        answer: Callable[[str, Mapping[str, Any]], tuple[int, Any] | None] | None = None,
    ) -> None:
        self.style, self.model, self.faults, self.kinds, self.seconds = style, model, faults, kinds, seconds
        self.key, self.answer = key, answer
        self.random = random.Random(seed)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keep_requests = True
        self.answered: Counter[str] = Counter()  # whole, right answers by prompt and what was begun
        self.failed: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()  # requests, and the tokens read and written for answers of status 200
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0

    def __enter__(self) -> FaultServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *exception: object) -> None:
        async def shut() -> None:
            self._server.close()
            others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                line, *rest = head.decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (h.partition(":") for h in rest if h)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                path = line.split()[1]
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    going_on = await self._reply(writer, path, headers, body)
                finally:
                    self.in_flight -= 1
                if not going_on:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _reply(self, writer: asyncio.StreamWriter, path: str, headers: dict[str, str], body: bytes) -> bool:
        request = json.loads(body) if body else {}
        if self.keep_requests:
            self.requests.append((path, request))
            self.headers.append(headers)
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            wrong = headers.get("authorization", "").removeprefix("Bearer ")
            return await self._send(writer, 401, {"error": {"message": f"Incorrect API key provided: {wrong}"}})
        self.counted["requests"] += not path.endswith("/models")
        status, value = self._value(path, request)
        probing = request.get("max_tokens", 1) == 4
        fault = "" if probing or self.random.random() >= self.faults else self.random.choice(self.kinds)
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if fault:
            self.failed[fault] += 1
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "timeout":
            await asyncio.sleep(30)
            return False
        if fault == "late":
            await asyncio.sleep(self.random.random() * 0.1)  # overtaken by answers to later requests
        elif fault in ("429", "429-retry-after", "500"):
            extra = {"retry-after": "0.2"} if fault == "429-retry-after" else {}
            return await self._send(writer, int(fault[:3]), {"error": {"message": "overloaded"}}, extra)
        elif fault == "html":
            return await self._send(writer, 200, b"<html><body>Bad gateway</body></html>")
        elif status != 200:
            pass  # nothing of a refusal can be missing
        elif fault == "truncated":
            return await self._send(writer, status, json.dumps(value).encode()[:-40])
        elif fault == "no-choices":
            value = {**value, "choices": []}
        elif fault == "no-logprobs":
            value = {**value, "choices": [{**value["choices"][0], "logprobs": None}]}
        elif fault == "wrong-model":
            value = {**value, "model": "another"}
        if status == 200 and not probing and fault in ("", "late") and "choices" in value:
            self.answered["|".join(_texts(request))] += 1
        if status == 200 and "usage" in value:
            self.counted["in"] += value["usage"]["prompt_tokens"]
            self.counted["out"] += value["usage"]["completion_tokens"]
        return await self._send(writer, status, value)

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, value: Any, extra: Mapping[str, str] | None = None
    ) -> bool:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "text/html" if body[:1] == b"<" else "application/json"
        lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body)}"]
        lines += [f"{name}: {text}" for name, text in (extra or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        return True

    def _value(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        if self.answer is not None and (own := self.answer(path, request)) is not None:
            return own
        if path.endswith("/models"):
            return 200, {"object": "list", "data": [{"id": self.model, "object": "model"}]}
        prompt, begun = _texts(request)
        chat = path.endswith("/chat/completions")
        if self.style == "openai" and (not chat or {"continue_final_message", "top_k"} & set(request)):
            if not chat:
                return 404, {
                    "error": {"message": "This is a chat model and not supported in the v1/completions endpoint."}
                }
            return 400, {"error": {"message": f"Unrecognized request argument supplied: {sorted(request)}"}}
        prefills = self.style in ("vllm", "llama.cpp") or not chat
        if "capital of France" in prompt:
            pieces = ["is", " the", " capital"] if prefills else ["The", " capital", " of"]
            return 200, self._wrap(chat, request, [[(t, 0.9), *_FILLER] for t in pieces])
        if prompt.endswith("7, 8, 9,"):
            return 200, self._wrap(chat, request, [[(t, 0.9), *_FILLER] for t in (" ", "1", "0", ",")])
        if not request.get("logprobs"):
            text = "".join(token for token, _ in next_tokens(prompt)[:1]) + " because. END of it"
            return 200, self._wrap(chat, request, [[(text, 0.9)]])
        if not chat and (found := re.fullmatch(r"(.*[\s=])(\d+)", prompt, re.DOTALL)):
            prompt, begun = found.groups()
        return 200, self._wrap(chat, request, [next_tokens(prompt, begun if prefills else "")])

    def _wrap(self, chat: bool, request: dict[str, Any], positions: list[list[tuple[str, float]]]) -> dict[str, Any]:
        """Put tokens with probabilities into the server's shape."""
        k = request.get("top_logprobs", 0) if chat else request.get("logprobs") or 0
        drawn = [(p[0][0], math.log(p[0][1])) for p in positions]
        tops = [[(t, math.log(v)) for t, v in p[:k]] for p in positions]
        text = "".join(t for t, _ in drawn)
        content = [
            {
                "token": t,
                "logprob": v,
                "bytes": list(t.encode()),
                "top_logprobs": [{"token": a, "logprob": b, "bytes": list(a.encode())} for a, b in top],
            }
            for (t, v), top in zip(drawn, tops, strict=True)
        ]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
            choice["logprobs"] = {"content": content} if request.get("logprobs") else None
        else:
            choice["text"] = text
            if k and self.style == "llama.cpp":
                choice["logprobs"] = {"content": [{**entry, "id": i} for i, entry in enumerate(content)]}
            elif k:
                choice["logprobs"] = {
                    "text_offset": [0] * len(drawn),
                    "tokens": [t for t, _ in drawn],
                    "token_logprobs": [v for _, v in drawn],
                    "top_logprobs": [dict(top) for top in tops],
                }
        usage = {"prompt_tokens": len("".join(_texts(request))) // 4, "completion_tokens": len(drawn)}
        kind = "chat.completion" if chat else "text_completion"
        return {"id": "x", "object": kind, "created": 0, "model": self.model, "choices": [choice], "usage": usage}


def _texts(request: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt of a request and what was begun of its answer."""
    if "messages" in request:
        turns = request["messages"]
        begun = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
        return turns[0]["content"], begun
    return request.get("prompt", ""), ""


def main() -> None:
    """Serve with so many seconds for each answer until the process is ended; the first line of output is the URL."""
    with FaultServer(seconds=float(sys.argv[1])) as server:
        server.keep_requests = False
        print(server.url, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
