"""A language model as a setting: which one, where it runs, how it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rewards.api import configured
from rewards.endpoint.config import ServerConfig
from rlaif_env.api import RLAIFError
from rlaif_env.files import content_of
from rlaif_env.models import BUILTIN_MODEL
from rlaif_env.servers.limits import checked_url


@dataclass(frozen=True)
class LanguageModelConfig:
    """A language model in this process or behind a server.

    Attributes:
        model: The built-in name, a folder, a Hugging Face id, or what the server calls it.
        url: Base URL of an OpenAI-compatible server that has it; None runs it here.
        chat: Put prompts through the model's chat template; on a server, use its chat route.
        device: "cpu", "cuda", ...; by default the GPU where there is one. Models in this process only.
        dtype: Of the weights; by default bfloat16 on a GPU that has it and float32 elsewhere. In this process only.
        server: How the server is asked: a ServerConfig, or its fields by name.

    Raises:
        RLAIFError: If the URL is none or holds a password, or the server's settings make no sense or come without it.
    """

    model: str = BUILTIN_MODEL
    url: str | None = None
    chat: bool = False
    device: str | None = None
    dtype: str | None = None
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        given: Any = self.server
        if not isinstance(given, ServerConfig):
            object.__setattr__(self, "server", configured(ServerConfig(), given, "a language model at a URL"))
        if self.url is not None:
            checked_url(self.url)  # before the address is recorded: one with a password must not be
            return
        limits = replace(self.server.limits, price_in=0.0, price_out=0.0, spend_cap=None)  # what a run here would cost
        server = replace(self.server, limits=limits)
        if changed := [name for name, value in vars(server).items() if value != getattr(ServerConfig(), name)]:
            raise RLAIFError(f"expected a server's URL with the settings {', '.join(changed)}, found none")

    @property
    def content(self) -> str:
        """What stands for its weights: the content of its folder; a hub's or a server's model is known by its name."""
        return content_of(self.model) if self.url is None else self.name

    @property
    def name(self) -> str:
        """What labels and reports call it."""
        return self.model if self.url is None else f"{self.model} at {checked_url(self.url)}"
