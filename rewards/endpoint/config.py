"""What a language model server is asked with: key, route, limits, cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rewards.api import configured
from rlaif_env.api import RLAIFError
from rlaif_env.options import JSON_MAPPING
from rlaif_env.servers.limits import Limits, checked_urls

_GRAMMARS = {"response_format", "grammar", "json_schema", "structured_outputs", "structural_tag"}
_GRAMMARS |= {"guided_json", "guided_regex", "guided_choice", "guided_grammar"}
_OWN = {"model", "prompt", "messages", "logprobs", "top_logprobs", "max_tokens", "stream", "n", "echo"}


@dataclass(frozen=True)
class ServerConfig:
    """How an OpenAI-compatible server is asked.

    Attributes:
        api_key_env: Environment variable with the key; nothing is sent where it is not set.
        route: "completion" sends the prompt as it is, "chat" as a user's turn, "auto" the first where it works.
        replicas: Addresses of further servers with the same model: each request goes to the least busy, and one that is
            lost is left out. Answers are kept under the first address alone.
        limits: Concurrency, retries, deadlines, prices and the spend cap: Limits, or their fields by name.
        cache: Where answers are kept: a file, True for the usual one, False for this process's memory only.
        revision: Anything that tells two states of the model apart; answers to one are not those of the other.
        extra: Further fields of every request, such as {"chat_template_kwargs": {"enable_thinking": false}}.
        boundaries: Ask what follows each answer of at least 0.005 ("all": up to k further requests a prompt), or only
            where an answer begins another one ("prefix": one or two; "80" then counts as "8").
        progress: Show a bar on the error output.

    Raises:
        RLAIFError: If the settings make no sense.
    """

    api_key_env: str = "RLAIF_LLM_API_KEY"
    route: Literal["auto", "completion", "chat"] = "auto"
    replicas: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    cache: bool | str = True
    revision: str = ""
    extra: Annotated[Mapping[str, Any], JSON_MAPPING] = field(default_factory=dict)
    boundaries: Literal["prefix", "all"] = "all"
    progress: bool = False

    def __post_init__(self) -> None:
        if self.route not in ("auto", "completion", "chat") or self.boundaries not in ("prefix", "all"):
            raise RLAIFError(
                "expected route 'auto', 'completion' or 'chat' and boundaries 'prefix' or 'all', found "
                f"{self.route!r} and {self.boundaries!r}"
            )
        if not isinstance(self.extra, Mapping):
            raise RLAIFError(f"expected extra fields by name, found {self.extra!r:.80}")
        if bad := sorted(self.extra.keys() & (_GRAMMARS | _OWN)):
            why = "under a grammar label mass looks like 1" if set(bad) & _GRAMMARS else "they are set here"
            raise RLAIFError(f"expected extra fields without {', '.join(bad)}: {why}")
        object.__setattr__(self, "replicas", checked_urls(self.replicas) if self.replicas else ())
        given: Any = self.limits
        if not isinstance(given, Limits):
            object.__setattr__(self, "limits", configured(Limits(), given, "limits of an endpoint"))
