"""What a server can do, found out by asking it, not by its name.

Some short questions: which route gives log-probabilities and how many tokens at most, whether an answer that is begun
for the model is gone on with, whether the model thinks first, and whether "10" is one token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.endpoint.client import EndpointClient, RequestFailed
from rewards.endpoint.replies import Reply

__all__ = ["Abilities", "label_payload", "probe", "rendered"]

_TOP = (20, 5)  # most servers show 20 tokens, the older completion routes 5
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
_COUNT = "7, 8, 9, 10, 11\n7, 8, 9, 10, 11\n7, 8, 9,"
_CAPITAL, _BEGUN = "What is the capital of France? Answer in one sentence.", "The capital of France is Par"


@dataclass(frozen=True)
class Abilities:
    """What a server can do.

    Attributes:
        route: "completion" or "chat".
        top: The largest number of likeliest tokens that it shows.
        prefill: Whether it goes on with an answer that is begun for it.
        prefill_fields: Whether it has to be told so by fields of the request.
        ten_is_split: Whether its tokenizer splits "10"; None where it was not seen.
        served: What the server calls the model.
    """

    route: str
    top: int
    prefill: bool
    prefill_fields: bool
    ten_is_split: bool | None
    served: str

    @property
    def path(self) -> str:
        """The route's path below the base URL."""
        return "completions" if self.route == "completion" else "chat/completions"


def rendered(able: Abilities, prompt: str, begun: str) -> dict[str, Any]:
    """The fields that hold a prompt and the beginning of its answer."""
    if able.route == "completion":
        return {"prompt": prompt + begun}
    turns = [{"role": "user", "content": prompt}]
    if not begun:
        return {"messages": turns}
    fields = _CONTINUE if able.prefill_fields else {}
    return {"messages": [*turns, {"role": "assistant", "content": begun}], **fields}


def label_payload(
    able: Abilities, prompt: str, begun: str, extra: Mapping[str, Any], tokens: int = 1
) -> dict[str, Any]:
    """A request for the next token's likeliest values. Temperature 1: no server can have scaled them."""
    shown: dict[str, Any] = {"logprobs": able.top}
    if able.route == "chat":
        shown = {"logprobs": True, "top_logprobs": able.top}
    fixed = {"max_tokens": tokens, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    return {**rendered(able, prompt, begun), **fixed, **shown, **extra}


async def probe(client: EndpointClient, route: str, extra: Mapping[str, Any]) -> Abilities:
    """Ask a server what it can do.

    Raises:
        RequestFailed: If it cannot show log-probabilities, thinks before it answers, or has another model.
    """
    refused: list[str] = []
    for name in ("completion", "chat") if route == "auto" else (route,):
        for top in _TOP:
            able = Abilities(name, top, name == "completion", False, None, "")
            try:
                reply = await _ask(client, able, _COUNT, "", extra)
            except RequestFailed as error:
                if error.fatal and error.status != 404:
                    raise
                if error.status == 0:
                    raise  # the server is not there, or not well: nothing was learnt about it
                refused.append(f"{name} with {top} tokens: {error}")
                if error.status == 404:
                    break
                continue
            if not reply.positions:
                refused.append(f"{name} with {top} tokens: an answer without them")
                break
            return await _explored(client, able, reply, extra)
    raise RequestFailed(
        "expected a server that returns log-probabilities, found: " + "; ".join(refused) + ". vLLM returns them "
        "(--max-logprobs 20), llama.cpp's server and Ollama from 0.12.11 do, many hosted reasoning models do not",
        fatal=True,
    )


async def _explored(client: EndpointClient, able: Abilities, reply: Reply, extra: Mapping[str, Any]) -> Abilities:
    if able.route == "chat" and (reply.reasoning or reply.positions[0].token.strip().startswith("<think")):
        raise RequestFailed(
            "expected a model that answers at once, found one that thinks first; turn thinking off, for example with "
            'extra={"chat_template_kwargs": {"enable_thinking": False}} or extra={"reasoning_effort": "none"}',
            fatal=True,
        )
    first = reply.positions[0]
    values = [value for _, value in first.top]
    if len(values) < 2 or math.exp(values[0]) == math.exp(values[-1]):
        raise RequestFailed(
            f"expected the log-probabilities of the likeliest tokens to differ, found {values[:3]}; this server does "
            "not return real ones",
            fatal=True,
        )
    served = await _served(client, reply.model)
    prefill, fields = able.prefill, False
    if able.route == "chat":
        prefill, fields = await _prefill(client, able, extra)
    return Abilities(able.route, min(able.top, len(values)), prefill, fields, _ten_is_split(reply), served)


async def _ask(client: EndpointClient, able: Abilities, prompt: str, begun: str, extra: Mapping[str, Any]) -> Reply:
    payload = label_payload(able, prompt, begun, extra, tokens=4) | {"temperature": 0.0}
    return await client.ask(able.path, payload, logprobs=False, until=client.until(), stored=False)


async def _prefill(client: EndpointClient, able: Abilities, extra: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a begun answer is gone on with, and whether that takes fields of its own."""
    for fields in (True, False):
        trial = Abilities("chat", able.top, True, fields, None, "")
        try:
            reply = await _ask(client, trial, _CAPITAL, _BEGUN, extra)
        except RequestFailed as error:
            if error.status not in (400, 422, 500):
                raise
            continue
        if reply.text.lstrip().startswith("is"):
            return True, fields
    return False, False


async def _served(client: EndpointClient, said: str) -> str:
    """What the server calls the model, if that is the one asked for."""
    asked = client.model
    if not said or said == asked or said.startswith(f"{asked}-") or said.rpartition("/")[2] == asked:
        client.served = said
        return said
    listed = await client.models()
    if listed not in ([], [said]) or (listed == [] and said):
        raise RequestFailed(
            f"expected answers of model {asked!r}, found {said!r} (the server lists {', '.join(listed) or 'none'}); "
            "give the name that the server uses",
            fatal=True,
        )
    client.served = said  # a server with one model may call it as it likes
    return said


def _ten_is_split(reply: Reply) -> bool | None:
    """Whether "10" came in two tokens in the answer to a count up to 9."""
    texts = [position.token.strip() for position in reply.positions]
    if "10" in texts:
        return False
    return True if "".join(texts).startswith("10") else None
