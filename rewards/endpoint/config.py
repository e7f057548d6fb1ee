"""What a language model server is asked with: key, route, limits, cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rewards.endpoint.limits import Limits

__all__ = ["ServerConfig"]


@dataclass(frozen=True)
class ServerConfig:
    """How an OpenAI-compatible server is asked.

    Attributes:
        api_key_env: Environment variable with the key; nothing is sent where it is not set.
        route: "completion" sends the prompt as it is, "chat" as a user's turn, "auto" the first where it works.
        limits: Concurrency, retries, deadlines, prices and the spend cap.
        cache: Where answers are kept: a file, True for the usual one, False for this process's memory only.
        revision: Anything that tells two states of the model apart; answers to one are not those of the other.
        extra: Further fields of every request, such as ``{"chat_template_kwargs": {"enable_thinking": False}}``.
        boundaries: Ask what follows each label of at least 0.005 ("all": up to k further requests a prompt), or only
            where a label begins another one ("prefix": one or two; "80" then counts as "8").
        progress: Show a bar on the error output.
    """

    api_key_env: str = "RLAIF_LLM_API_KEY"
    route: Literal["auto", "completion", "chat"] = "auto"
    limits: Limits = field(default_factory=Limits)
    cache: str | bool = True
    revision: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    boundaries: Literal["prefix", "all"] = "all"
    progress: bool = False
