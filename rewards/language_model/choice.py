"""A language model by name, in this process or behind a URL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rewards.api import LanguageModel
from rewards.endpoint.model import EndpointLM
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM
from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["language_model_from"]


def language_model_from(
    model: LanguageModelConfig | Any = BUILTIN_MODEL,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    url: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    chat: bool = False,
    endpoint: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """The language model behind a command's options.

    Args:
        model: As in `LocalLM`, or a `LanguageModel`, which is returned; with ``url`` the name the server knows it by.
        tokenizer: As in `LocalLM`.
        url: Base URL of an OpenAI-compatible server; None runs the model here.
        device: As in `rlaif_env.models.backbone`.
        dtype: As in `rlaif_env.models.backbone`.
        chat: As in `LocalLM`; on a server, its chat route.
        endpoint: The other arguments of `rewards.endpoint.model.EndpointLM`, with ``url`` only.

    Raises:
        RLAIFError: If a model cannot be had, or the server cannot do what is needed.
    """
    if isinstance(model, LanguageModelConfig):
        if model.url is None:
            return LocalLM(model.model, device=model.device, dtype=model.dtype, chat=model.chat)
        server = {entry.name: getattr(model.server, entry.name) for entry in fields(model.server)}
        if model.chat:
            server["route"] = "chat"
        asked = EndpointLM(model.url, model.model, **server)
        asked.probe()
        return asked
    if url is not None:
        try:
            served = EndpointLM(url, str(model), **{**({"route": "chat"} if chat else {}), **(endpoint or {})})
        except TypeError as error:
            raise RLAIFError(f"a language model at a URL: {error}") from error
        served.probe()
        return served
    if endpoint:
        raise RLAIFError(f"expected a server's URL with the settings {sorted(endpoint)}, found none")
    if isinstance(model, LanguageModel):
        return model
    return LocalLM(model, tokenizer, device=device, dtype=dtype, chat=chat)
