"""One stock vLLM server: its models, its LoRA adapters, samples and log-probabilities of token ids.

A failure that says that the server is lost, or was started again, is a `PassingFailure`; what a person has to mend is
an `RLAIFError` with the flag that mends it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import RLAIFError
from rlaif_env.servers.replies import error_message
from rlaif_env.servers.transport import PassingFailure, Transport, may_pass

START = "docs/scale.md has the command that starts one"
_KNOCK = 10.0  # seconds for what a server answers without computing
_SHOWN = 5  # of the likeliest tokens, which every server shows
_WHOLE = ("stop", "length")  # a response that a server gives up when it is stopped has another reason
_PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # whatever the model's own settings are


@dataclass(frozen=True)
class Probe:
    """n beginnings of a text as token ids, and what the trainer expects next: natural-log probabilities, (n, V)."""

    rows: tuple[tuple[int, ...], ...]
    logprobs: NDArray[np.float32]  # at temperature 1


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a folder that the servers see; without a folder the base model.

    Attributes:
        name: What the servers are to call it; never used before.
        folder: As peft writes it.
        fingerprint: Of its weights.
        probe: What it is known by; None where that is not known.
        tolerance: How far a server may be from the probe, the mean of absolute differences.
    """

    name: str
    folder: Path | None
    fingerprint: str = ""
    probe: Probe | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Response:
    """A sampled response: its tokens, the ending one included, and each one's log-probability at the temperature."""

    ids: list[int]
    logprobs: list[float]


class VLLMServer:
    """One server.

    Args:
        transport: What requests go through.
        url: The server's address.
        timeout: Seconds for what it has to compute.
    """

    def __init__(self, transport: Transport, url: str, timeout: float) -> None:
        self.url, self._transport, self._timeout = url, transport, timeout

    async def look(self, tokens: int) -> None:
        """Raise RLAIFError if it is not there, is no vLLM, or its context is shorter than so many tokens."""
        try:
            base = await self.base()
        except PassingFailure as error:
            raise RLAIFError(f"expected a vLLM server at {self.url}, found {error}; start it ({START})") from None
        if (context := base.get("max_model_len") or tokens) < tokens:
            raise RLAIFError(
                f"expected a context of at least {tokens} tokens, the longest prompt and response, at {self.url}, "
                f"found {context}; start the server with --max-model-len {tokens}"
            )

    async def prepare(self, adapter: Adapter) -> None:
        """Load an adapter unless it is there, and see that it is the right one.

        Raises:
            PassingFailure: If the server is lost.
            RLAIFError: If it cannot load it, or has another one.
        """
        if adapter.folder is not None:
            await self._load(adapter.name, adapter.folder)
        if adapter.probe is None:
            return
        name = await self.name_of(adapter)
        await self._check_mode(name, adapter.probe.rows[0])
        gap = await self.gap(name, adapter.probe, adapter.fingerprint)
        if not gap <= adapter.tolerance:
            raise RLAIFError(
                f"expected {self.url} to score a text with {name!r} as the trainer does (to {adapter.tolerance:.2g} "
                f"nats a token), found {gap:.2g}: it has another or an older adapter under this name; start it again"
            )

    async def _load(self, name: str, folder: Path) -> None:
        listed = await self._models()
        if name not in listed:
            await self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            listed = await self._models()
        if (root := listed.get(name, {}).get("root")) != str(folder):
            raise RLAIFError(
                f"expected {self.url} to list the adapter {name!r} of {folder}, found {root}; start the server again"
            )

    async def unload(self, name: str) -> None:
        """Unload an adapter, if it is there."""
        if name in await self._models():
            await self._post("unload_lora_adapter", {"lora_name": name})

    async def _check_mode(self, name: str, probe: Sequence[int]) -> None:
        """Have it draw from one token alone: that token's probability is 1 in the distribution that is drawn from."""
        fixed = {"prompt": list(probe), "max_tokens": 1, "stop_token_ids": [], "allowed_token_ids": [probe[0]]}
        drawn = await self.respond(name, fixed)
        if drawn.ids != [probe[0]] or abs(drawn.logprobs[0]) > 1e-3:
            raise RLAIFError(
                f"expected the log-probabilities of {self.url} to be those of the distribution that is drawn from, "
                "found them before the temperature; start the server with --logprobs-mode processed_logprobs"
            )

    async def gap(self, name: str, probe: Probe, salt: str = "") -> float:
        """How far a model's likeliest next tokens are from a probe: mean absolute difference, nats.

        By sampling one token each: the log-probabilities of a prompt (``prompt_logprobs``) of an adapter bring vLLM
        0.32 down where other requests are in the batch.
        """
        fixed = {"model": name, "max_tokens": 1, "temperature": 1.0, "seed": 0, "logprobs": _SHOWN, **_PLAIN}
        fixed |= {"return_tokens_as_token_ids": True, **({"cache_salt": salt} if salt else {})}

        async def look(row: Sequence[int], known: NDArray[np.float32]) -> list[float]:
            answer = await self._post("completions", {**fixed, "prompt": list(row)})
            try:
                shown = answer["choices"][0]["logprobs"]["top_logprobs"][0]
                pairs = [(int(token.removeprefix("token_id:")), float(value)) for token, value in shown.items()]
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise RLAIFError(
                    f"expected the likeliest tokens by id from {self.url}, found none ({error!r}); {START}"
                ) from None
            return [abs(value - float(known[token])) if token < len(known) else np.inf for token, value in pairs]

        gaps = await asyncio.gather(*(look(row, known) for row, known in zip(probe.rows, probe.logprobs, strict=True)))
        return float(np.mean([gap for row in gaps for gap in row]))

    async def respond(self, name: str, body: Mapping[str, Any]) -> Response:
        """One response to the body's "prompt" (token ids) of at most its "max_tokens", ended by its "stop_token_ids".

        Never cut to the likeliest tokens, and ended by those ids alone, whatever the server's own settings are.
        """
        fixed = {"model": name, "logprobs": 0, "return_token_ids": True, "ignore_eos": True, **_PLAIN}
        answer = await self._post("completions", {**fixed, **body})
        try:
            model, choice = answer["model"], answer["choices"][0]
            ids, values = list(choice["token_ids"]), [float(value) for value in choice["logprobs"]["token_logprobs"]]
            prompt, finish = list(choice["prompt_token_ids"]), choice["finish_reason"]
        except (LookupError, TypeError) as error:
            raise PassingFailure(f"expected token ids and log-probabilities, found neither ({error!r})") from None
        if model != name:
            raise RLAIFError(f"expected a response of {name!r} from {self.url}, found one of {model!r}")
        if prompt != body["prompt"]:
            sent, read = len(body["prompt"]), len(prompt)
            raise RLAIFError(f"expected {self.url} to read the {sent} token ids it was sent, found {read} others")
        ended = finish == "stop" and bool(ids) and ids[-1] in body["stop_token_ids"]
        if finish not in _WHOLE or not (ended or len(ids) == body["max_tokens"]) or len(values) != len(ids):
            raise PassingFailure(f"a response of {len(ids)} tokens is not whole ({finish})", lost=True)
        return Response(ids, values)

    async def name_of(self, adapter: Adapter) -> str:
        """What the server calls an adapter, or the base model."""
        return adapter.name if adapter.folder is not None else str((await self.base())["id"])

    async def base(self) -> Mapping[str, Any]:
        """The base model as the server lists it."""
        listed = await self._models()
        base = next((row for row in listed.values() if row.get("parent") is None), None)
        if base is None or base.get("owned_by") != "vllm":
            raise RLAIFError(f"expected a vLLM server at {self.url}, found models {sorted(listed)} of another; {START}")
        return base

    async def _models(self) -> dict[str, dict[str, Any]]:
        answer = await self._post("models", None)
        try:
            return {str(row["id"]): dict(row) for row in answer["data"]}
        except (LookupError, TypeError, ValueError):
            raise RLAIFError(f"expected a vLLM server at {self.url}, found no list of models; {START}") from None

    async def _post(self, route: str, body: Mapping[str, Any] | None) -> Any:
        """The JSON that a route answers to a body, or to none; the text where it loads or unloads."""
        content = None if body is None else json.dumps(body).encode()
        status, text, _ = await self._transport.ask(
            self.url, route, content, _KNOCK if body is None else max(_KNOCK, self._timeout)
        )
        if status != 200:
            raise self._refused(status, error_message(text), route, body or {})
        try:
            return text if route.endswith("_lora_adapter") else json.loads(text)
        except (ValueError, RecursionError):
            if body is None:
                raise RLAIFError(f"expected a vLLM server at {self.url}, found {text[:60]!r}; {START}") from None
            raise PassingFailure(f"expected a JSON answer, found {text[:60]!r}") from None

    def _refused(self, status: int, reason: str, route: str, body: Mapping[str, Any]) -> RLAIFError | PassingFailure:
        """What an answer of another status than 200 means."""
        refusal, loads = f"HTTP {status}: {reason}", route.endswith("_lora_adapter")
        if "max_lora_rank" in reason:
            return RLAIFError(
                f"expected {self.url} to take the adapter, found {refusal}; start the server with a larger "
                "--max-lora-rank, or lower --agent.lora.rank"
            )
        if loads and "No adapter found" in reason:
            return RLAIFError(
                f"expected {self.url} to see the folder {body.get('lora_path')}, found {refusal}; name one that it "
                "sees under the same path (--sampler.adapters)"
            )
        if loads and (status == 405 or (status == 404 and "cannot be found" not in reason)):
            return RLAIFError(
                f"expected {self.url} to load adapters while it runs, found {refusal}; start it with --enable-lora and "
                "the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        if status == 404 and route == "completions" and "does not exist" in reason:
            return PassingFailure(f"it was started again: {refusal}", lost=True)
        if may_pass(status):
            return PassingFailure(refusal, lost=status >= 500)
        if status in (401, 403):
            mend = "put the key into the environment variable that --sampler.api-key-env names"
        else:
            mend = START if status == 404 else "see the server's log"
        return RLAIFError(f"expected a vLLM server at {self.url} to answer {route}, found {refusal}; {mend}")
