"""A server in this process that speaks the routes of a stock vLLM that sampling needs, over a tiny model's logits.

It can be killed and started again, and be wrong in every way that is to be detected. Adapters are read from their
folders and added to the weights by hand (W + alpha / r · B A), not by the code that wrote them.
"""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class FakeVLLM:
    """A context manager; what it is asked for stands in ``served`` (completions by model) and ``seeds``.

    Args:
        model: The base model.
        runtime_loading: Whether adapters can be loaded while it runs.
        max_lora_rank: The largest rank it takes.
        raw: Whether log-probabilities are those before the temperature.
        blind: Whether it does not see the folders it is told of.
        stale: Whether it keeps the weights of the first adapter it was given.
        renamed: What answers call the model, where that is not what was asked for.
        context: Tokens of prompt and response together.
        fail: Called with the number of the completion; a status to answer instead, or None.
    """

    def __init__(self, model: Any, **settings: Any) -> None:
        self.model = model
        given: dict[str, Any] = {
            "runtime_loading": True,
            "max_lora_rank": 16,
            "raw": False,
            "blind": False,
            "stale": False,
            "renamed": None,
            "context": 512,
            "fail": lambda number: None,
        }
        for name, value in {**given, **settings}.items():
            setattr(self, name, value)
        self.port = 0
        self.adapters: dict[str, tuple[str, Any]] = {}
        self.served: Counter[str] = Counter()
        self.seeds: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> FakeVLLM:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Start it, on the port it had before; it has no adapters then."""
        self.adapters = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        """Close it and every connection, whatever is being answered."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                fake._connections.add(self.connection)

            def finish(self) -> None:
                fake._connections.discard(self.connection)
                super().finish()

            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(*fake.list_models())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                routes = {"completions": fake.complete}
                if fake.runtime_loading:
                    routes |= {"load_lora_adapter": fake.load, "unload_lora_adapter": fake.unload}
                route = routes.get(self.path.removeprefix("/v1/"))
                self._answer(*((404, {"detail": "Not Found"}) if route is None else route(body)))

            def _answer(self, status: int, body: Any) -> None:
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True

        return Handler

    def list_models(self) -> tuple[int, Any]:
        rows = [{"id": "base", "root": "/base", "parent": None, "max_model_len": self.context, "owned_by": "vllm"}]
        rows += [{"id": n, "root": r, "parent": "base", "owned_by": "vllm"} for n, (r, _) in self.adapters.items()]
        return 200, {"object": "list", "data": rows}

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if self.blind or not (folder / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        config = json.loads((folder / "adapter_config.json").read_bytes())
        if config["r"] > self.max_lora_rank:
            return _error(500, f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}.")
        kept = next(iter(self.adapters.values()), None) if self.stale else None
        merged = _merged(self.model, folder, config) if kept is None else kept[1]
        self.adapters[name] = (str(folder), merged)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lora_name"]
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        if not self.stale:
            del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["model"]
        if name != "base" and name not in self.adapters:
            return _error(404, f"The model `{name}` does not exist.")
        if "return_tokens_as_token_ids" not in body and "allowed_token_ids" not in body:
            with self._lock:
                self.served[name] += 1
                self.bodies.append(body)
                number = sum(self.served.values())
            if (status := self.fail(number)) is not None:
                return _error(status, "told to fail")
        model = self.model if name == "base" else self.adapters[name][1]
        choice = self._choice(model, body)
        return 200, {"model": self.renamed or name, "choices": [{"index": 0, "text": "", **choice}]}

    @torch.no_grad()
    def _choice(self, model: Any, body: dict[str, Any]) -> dict[str, Any]:
        prompt, temperature = list(body["prompt"]), float(body.get("temperature", 1.0))
        choice: dict[str, Any] = {"prompt_token_ids": prompt, "finish_reason": "length"}
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        ids: list[int] = []
        logprobs: list[float] = []
        shown: list[dict[str, float]] = []
        while len(ids) < body["max_tokens"]:
            logits = model(torch.tensor([prompt + ids])).logits[0, -1].float()
            drawn_from = logits / temperature
            if allowed := body.get("allowed_token_ids"):
                mask = torch.full_like(drawn_from, -torch.inf)
                mask[allowed] = 0.0
                drawn_from = drawn_from + mask
            token = int(torch.multinomial(torch.softmax(drawn_from, -1), 1, generator=generator))
            ids.append(token)
            told = torch.log_softmax(logits if self.raw else drawn_from, -1)
            logprobs.append(float(told[token]))
            likeliest = {*told.topk(body["logprobs"]).indices.tolist(), token}
            shown.append({f"token_id:{i}": float(told[i]) for i in likeliest})
            if token in body.get("stop_token_ids", ()):
                choice["finish_reason"] = "stop"
                break
        return {**choice, "token_ids": ids, "logprobs": {"token_logprobs": logprobs, "top_logprobs": shown}}


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "Error", "param": None, "code": status}}


def _merged(model: Any, folder: Path, config: dict[str, Any]) -> Any:
    """The model with an adapter of peft's format added to its weights."""
    merged, tensors = copy.deepcopy(model), load_file(folder / "adapter_model.safetensors")
    for name, down in tensors.items():
        if ".lora_A." in name:
            module = merged.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A.")[0])
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            with torch.no_grad():
                module.weight.add_((config["lora_alpha"] / config["r"]) * (up @ down))
    return merged
