"""A language model by name, in this process or behind a URL."""

from __future__ import annotations

from dataclasses import replace

from rewards.api import LanguageModel
from rewards.endpoint.model import EndpointLM
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM


def language_model_from(config: LanguageModelConfig) -> LanguageModel:
    """The language model that the settings name, loaded or connected to; a server is probed.

    Raises:
        RLAIFError: If a model cannot be had, or the server cannot do what is needed.
    """
    if config.url is not None:
        route = "chat" if config.chat and config.server.route == "auto" else config.server.route
        served = EndpointLM(config.url, config.model, replace(config.server, route=route))
        served.probe()
        return served
    return LocalLM(config.model, device=config.device, dtype=config.dtype, chat=config.chat)
