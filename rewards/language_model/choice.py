"""A language model by name, in this process or behind a URL."""

from __future__ import annotations

from dataclasses import replace

from rewards.api import LanguageModel
from rewards.endpoint.config import ServerConfig
from rewards.endpoint.model import EndpointLM
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM
from rlaif_env.api import RLAIFError

__all__ = ["language_model_from"]


def language_model_from(config: LanguageModelConfig) -> LanguageModel:
    """The language model that the settings name, loaded or connected to; a server is probed.

    Raises:
        RLAIFError: If a model cannot be had, the server cannot do what is needed, or its settings come without its URL.
    """
    if config.url is not None:
        server = replace(config.server, route="chat") if config.chat else config.server
        served = EndpointLM(config.url, config.model, server)
        served.probe()
        return served
    limits = replace(
        config.server.limits, price_in=0.0, price_out=0.0, spend_cap=None
    )  # a price says what it would cost
    server = replace(config.server, limits=limits)
    if changed := [name for name, value in vars(server).items() if value != getattr(ServerConfig(), name)]:
        raise RLAIFError(f"expected a server's URL with the settings {', '.join(changed)}, found none")
    return LocalLM(config.model, device=config.device, dtype=config.dtype, chat=config.chat)
