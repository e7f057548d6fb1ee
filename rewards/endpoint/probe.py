"""What a server can do, found out by asking it, not by its name.

Some short questions: which route gives log-probabilities and how many tokens at most, whether an answer that is begun
for the model is gone on with, whether the model thinks first, and whether "10" is one token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlaif_env.servers.client import EndpointClient
from rlaif_env.servers.replies import Reply
from rlaif_env.servers.transport import RequestFailed

_TOP = (20, 5)  # most servers show 20 tokens, the older completion routes 5
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
_COUNT = "7, 8, 9, 10, 11\n7, 8, 9, 10, 11\n7, 8, 9,"
_CAPITAL, _BEGUN = "What is the capital of France? Answer in one sentence.", "The capital of France is Par"


@dataclass(frozen=True)
class Capabilities:
    """What a server can do."""

    route: str  # "completion" or "chat"
    top: int  # the largest number of likeliest tokens that it shows
    prefill: bool  # whether it goes on with an answer that is begun for it
    prefill_fields: bool = False  # whether it has to be told so by fields of the request
    ten_is_split: bool | None = None  # whether its tokenizer splits "10"; None where it was not seen
    served: str = ""  # what the server calls the model

    @property
    def path(self) -> str:
        """The route's path below the base URL."""
        return "completions" if self.route == "completion" else "chat/completions"

    def prompt_fields(self, prompt: str, begun: str = "") -> dict[str, Any]:
        """The fields of a request that hold a prompt and the beginning of its answer."""
        if self.route == "completion":
            return {"prompt": prompt + begun}
        turns = [{"role": "user", "content": prompt}]
        if not begun:
            return {"messages": turns}
        turns.append({"role": "assistant", "content": begun})
        return {"messages": turns, **(_CONTINUE if self.prefill_fields else {})}

    def next_token_request(self, prompt: str, begun: str, extra: Mapping[str, Any], tokens: int = 1) -> dict[str, Any]:
        """A request for the next token's likeliest values. Temperature 1: no server can have scaled them."""
        shown = {"logprobs": True, "top_logprobs": self.top} if self.route == "chat" else {"logprobs": self.top}
        fixed = {"max_tokens": tokens, "temperature": 1.0, "top_p": 1.0, "seed": 0}
        return {**self.prompt_fields(prompt, begun), **fixed, **shown, **extra}


async def probe(client: EndpointClient, route: str, extra: Mapping[str, Any]) -> Capabilities:
    """Ask a server what it can do.

    Raises:
        RequestFailed: If it cannot show log-probabilities, thinks before it answers, or has another model.
    """
    refused: list[str] = []
    for name in ("completion", "chat") if route == "auto" else (route,):
        for top in _TOP:
            trial = Capabilities(name, top, prefill=name == "completion")
            try:
                reply = await _ask(client, trial, _COUNT, "", extra)
            except RequestFailed as error:
                if error.status == 0 or (error.fatal and error.status != 404):
                    raise  # 0: the server is not there, or not well: nothing was learnt about it
                refused.append(f"{name} with {top} tokens: {error}")
                if error.status == 404:
                    break
                continue
            if reply.positions:
                return await _explored(client, trial, reply, extra)
            refused.append(f"{name} with {top} tokens: an answer without them")
            break
    raise RequestFailed(
        "expected a server that returns log-probabilities, found: " + "; ".join(refused) + ". vLLM returns them "
        "(--max-logprobs 20), llama.cpp's server and Ollama from 0.12.11 do, many hosted reasoning models do not",
        fatal=True,
    )


async def _explored(
    client: EndpointClient, trial: Capabilities, reply: Reply, extra: Mapping[str, Any]
) -> Capabilities:
    """All that can be known of a server whose reply to the count shows log-probabilities."""
    first = reply.positions[0]
    if trial.route == "chat" and (reply.reasoning or first.token.strip().startswith("<think")):
        raise RequestFailed(
            "expected a model that answers at once, found one that thinks first; turn thinking off, for example with "
            'extra={"chat_template_kwargs": {"enable_thinking": False}} or extra={"reasoning_effort": "none"}',
            fatal=True,
        )
    values = [value for _, value in first.top]
    if len(values) < 2 or math.exp(values[0]) == math.exp(values[-1]):
        raise RequestFailed(
            f"expected the log-probabilities of the likeliest tokens to differ, found {values[:3]}; this server does "
            "not return real ones",
            fatal=True,
        )
    client.served = await _served(client, reply.model)
    if trial.route == "chat":
        trial = await _with_prefill(client, trial, extra)
    counted = [position.token.strip() for position in reply.positions]
    split = False if "10" in counted else "".join(counted).startswith("10") or None
    return replace(trial, top=min(trial.top, len(values)), ten_is_split=split, served=client.served)


async def _ask(client: EndpointClient, trial: Capabilities, prompt: str, begun: str, extra: Mapping[str, Any]) -> Reply:
    payload = trial.next_token_request(prompt, begun, extra, tokens=4) | {"temperature": 0.0}
    return await client.ask(trial.path, payload, logprobs=False, until=client.until(), stored=False)


async def _with_prefill(client: EndpointClient, chat: Capabilities, extra: Mapping[str, Any]) -> Capabilities:
    """Whether a begun answer is gone on with, and whether that takes fields of its own."""
    for fields in (True, False):
        trial = replace(chat, prefill=True, prefill_fields=fields)
        try:
            reply = await _ask(client, trial, _CAPITAL, _BEGUN, extra)
        except RequestFailed as error:
            if error.status not in (400, 422, 500):
                raise
            continue
        if reply.text.lstrip().startswith("is"):
            return trial
    return chat


async def _served(client: EndpointClient, answering: str) -> str:
    """What the server calls the model that answers, if that is the one asked for."""
    asked = client.model
    if not answering or answering.startswith(f"{asked}-") or asked in (answering, answering.rpartition("/")[2]):
        return answering
    listed = await client.models()
    if listed != [answering]:  # a server with one model may call it as it likes
        raise RequestFailed(
            f"expected answers of model {asked!r}, found {answering!r} (the server lists "
            f"{', '.join(listed) or 'none'}); give the name that the server uses",
            fatal=True,
        )
    return answering
