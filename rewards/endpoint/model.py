"""`EndpointLM`: the language model behind any OpenAI-compatible server, with the protocol of `LocalLM`.

How this differs from a model in this process: the server shows only its k likeliest tokens, so the likelihood of a
rarer label is an upper bound (`rewards.endpoint.likelihoods`), and what goes on with the word after a label is taken
off by asking once more with the label put behind the prompt. The prompt goes as text, so its last characters and a
label put behind it are split into tokens together. Never is a grammar sent: it would make any label mass 1.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rewards.endpoint.cache import AnswerCache, cache_main, default_cache
from rewards.endpoint.client import EndpointClient, RequestFailed
from rewards.endpoint.likelihoods import LabelAnswer, NoLabelShown, label_answer, needs_second_answer
from rewards.endpoint.limits import Limits, Usage, progress_over
from rewards.endpoint.probe import Abilities, label_payload, probe, rendered
from rewards.endpoint.replies import Position, Reply
from rewards.prompts import leads_after
from rlaif_env.api import BackendError, RLAIFError

__all__ = ["EndpointLM", "Limits", "cache_main"]

_GRAMMARS: tuple[str, ...] = (
    "response_format",
    "grammar",
    "json_schema",
    "structured_outputs",
    "guided_json",
    "guided_regex",
)
_GRAMMARS += ("guided_choice", "guided_grammar", "structural_tag")
_OWN = ("model", "prompt", "messages", "logprobs", "top_logprobs", "max_tokens", "stream", "n", "echo")
_CHAT_LEADS = ("", " ")


def _end(client: EndpointClient) -> None:
    client.close()
    client.cache.close()


@dataclass(frozen=True)
class _Question:
    prompt: str
    until: float


class EndpointLM:
    """A language model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, a hosted API.

    Args:
        base_url: The server's address, such as "http://localhost:8000/v1".
        model: What the server calls the model.
        api_key_env: Environment variable with the key; nothing is sent where it is not set.
        route: "completion" sends the prompt as it is, "chat" as a user's turn, "auto" the first where it works.
        limits: Concurrency, retries, deadlines, prices and the spend cap: a `Limits` or its fields.
        cache: Where answers are kept: a file, True for the usual one, None for this process's memory only.
        revision: Anything that tells two states of the model apart; answers to one are not those of the other.
        extra: Further fields of every request, such as ``{"chat_template_kwargs": {"enable_thinking": False}}``.
        boundaries: Ask what follows each label of at least 0.005 ("all": up to k further requests a prompt), or only
            where a label begins another one ("prefix": one or two; "80" then counts as "8").
        progress: Show a bar on the error output.

    The server is probed before the first request; `probe` does it at once.

    Raises:
        RLAIFError: If the settings make no sense.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "RLAIF_LLM_API_KEY",
        route: Literal["auto", "completion", "chat"] = "auto",
        limits: Limits | Mapping[str, Any] | None = None,
        cache: str | Path | bool | None = True,
        revision: str = "",
        extra: Mapping[str, Any] | None = None,
        boundaries: Literal["prefix", "all"] = "all",
        progress: bool = False,
    ) -> None:
        if route not in ("auto", "completion", "chat") or boundaries not in ("prefix", "all"):
            raise RLAIFError(
                "expected route 'auto', 'completion' or 'chat' and boundaries 'prefix' or 'all', found "
                f"{route!r} and {boundaries!r}"
            )
        if not isinstance(extra, Mapping | None):
            raise RLAIFError(f"expected extra fields by name, found {extra!r:.80}")
        if bad := sorted(set(extra or ()) & {*_GRAMMARS, *_OWN}):
            why = "under a grammar label mass looks like 1" if set(bad) & set(_GRAMMARS) else "they are set here"
            raise RLAIFError(f"expected extra fields without {', '.join(bad)}: {why}")
        try:
            kept = limits if isinstance(limits, Limits) else Limits(**(limits or {}))
        except TypeError as error:
            raise RLAIFError(f"limits of an endpoint: {error}") from None
        path = default_cache() if cache is True else None if cache is False or cache is None else Path(cache)
        self.route, self.boundaries, self.progress = route, boundaries, progress
        self.extra = dict(extra or {})
        self._client = EndpointClient(
            base_url, model, api_key_env=api_key_env, limits=kept, cache=AnswerCache(path), revision=revision
        )
        self.url = self._client.url
        self._end = weakref.finalize(
            self, _end, self._client
        )  # also where nobody closes it: a reward in an environment
        self.name = f"{model} at {self.url}"
        self._abilities: Abilities | None = None
        self._probing = threading.Lock()
        self._bounded = 0
        self._takes_top_k = True

    def __deepcopy__(self, memo: object) -> EndpointLM:
        """A live connection is shared, never cloned."""
        return self

    def __repr__(self) -> str:
        return f"EndpointLM({self.url!r}, {self._client.model!r})"

    def probe(self) -> Abilities:
        """Find out what the server can do; asked once.

        Raises:
            BackendError: If it cannot do what is needed; the message says what to change.
        """
        with self._probing:
            if self._abilities is None:
                try:
                    self._abilities = self._client.run(probe(self._client, self.route, self.extra))
                except RequestFailed as error:
                    raise BackendError(f"probing {self.name}: {error}") from None
            return self._abilities

    @property
    def usage(self) -> Usage:
        """What was used so far."""
        return self._client.usage

    def label_facts(self) -> dict[str, Any]:
        """What decides how exact the likelihoods are, to be kept with every label; JSON-able."""
        own = {"url": self.url, "model": self._client.model, "revision": self._client.revision}
        return {**own, "boundaries": self.boundaries, **asdict(self.probe())}

    @property
    def facts(self) -> dict[str, Any]:
        """`label_facts`, how many labels were bounded so far, and whether ``top_k`` is sent with a generation."""
        return {**self.label_facts(), "labels_bounded": self._bounded, "top_k_sent": self._takes_top_k}

    def usable_scale(self, scale: tuple[int, int]) -> tuple[tuple[int, int], str]:
        """The scale, or one whose scores the server can tell apart and show, and why it is not the given one.

        Returns:
            The scale and "", or 0 to 9 (1 to 5 where few tokens are shown), each score one token, and the reason.

        Raises:
            BackendError: If fewer than five tokens are shown.
        """
        able = self.probe()
        labels = [str(i) for i in range(scale[0], scale[1] + 1)]
        if begin := self._merged(labels, able):
            why = (
                f"the server does not go on with an answer that is begun for it, so that {begin[0]!r} cannot be told "
                "from the beginning of a longer score"
            )
        elif able.top < len(labels):
            why = f"the server shows {able.top} tokens and the scale has {len(labels)} scores"
        else:
            return scale, ""
        if able.top >= 10:
            return (0, 9), why
        if able.top >= 5:
            return (1, 5), why
        raise BackendError(
            f"expected at least 5 of the likeliest tokens from {self.name}, found {able.top}: too few for a scale; "
            "have the server show more (vLLM: --max-logprobs 20), or use another server or route"
        )

    @staticmethod
    def _merged(labels: Sequence[str], able: Abilities) -> list[str]:
        """The labels that the server cannot tell from the beginning of another one."""
        return needs_second_answer(labels) if not able.prefill and able.ten_is_split is not False else []

    def answers(self, prompts: Sequence[str], labels: Sequence[str]) -> list[LabelAnswer | RequestFailed]:
        """Label likelihoods row by row; a row that failed holds its reason and does not stop the others.

        Raises:
            BackendError: If the server cannot do what these labels need.
        """
        if not labels or len(set(labels)) != len(labels) or any(not s or s != s.strip() for s in labels):
            raise RLAIFError(f"expected distinct labels without white space around them, found {list(labels)}")
        if not prompts:
            return []
        able = self.probe()
        if begin := self._merged(labels, able):
            raise BackendError(
                f"expected labels none of which begins another one, found {begin[0]!r} among {list(labels)}: "
                f"{self.name} does not go on with an answer that is begun for it, so that the two cannot be told "
                "apart; use the scale 0 to 9 (scale=(0, 9)), or a server with the completion route"
            )
        until = self._client.until()

        async def one(question: _Question) -> LabelAnswer:
            try:
                return await label_answer(
                    self._next_token(question, able),
                    labels,
                    _CHAT_LEADS if able.route == "chat" else leads_after(question.prompt),
                    more=able.prefill,
                    every_boundary=self.boundaries == "all",
                    top=able.top,
                )
            except NoLabelShown as error:
                raise RequestFailed(str(error)) from None

        found = self._each([_Question(prompt, until) for prompt in prompts], one)
        self._bounded += sum(len(answer.bounded) for answer in found if isinstance(answer, LabelAnswer))
        return found

    def _next_token(self, question: _Question, able: Abilities) -> Callable[[str], Awaitable[Position]]:
        async def next_token(text: str) -> Position:
            payload = label_payload(able, question.prompt, text, self.extra)
            reply = await self._client.ask(able.path, payload, logprobs=True, until=question.until)
            return reply.positions[0]

        return next_token

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """Natural-log likelihoods, (n, k); see `rewards.api.LanguageModel`.

        Raises:
            BackendError: If rows failed: which, and why. What was answered is kept; asking again asks only the rest.
        """
        return self.bounded_logprobs(prompts, labels)[0]

    def bounded_logprobs(
        self, prompts: Sequence[str], labels: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """`label_logprobs`, and which of them are only upper bounds because the server does not show them, (n, k)."""
        found = self._all(self.answers(prompts, labels))
        shape = len(prompts), len(labels)
        bounded = [[label in answer.bounded for label in labels] for answer in found]
        values = np.array([answer.logprobs for answer in found], dtype=np.float64)
        return values.reshape(shape), np.array(bounded, dtype=bool).reshape(shape)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Continue n prompts; see `rewards.api.LanguageModel`.

        A server that refuses ``top_k`` is asked without it, and `facts` says so.

        Raises:
            BackendError: If rows failed: which, and why.
        """
        able = self.probe()
        settings: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        if stop:
            settings["stop"] = list(stop)[:4]  # more are refused by some servers; the rest is cut off here
        until = self._client.until()

        async def one(prompt: str) -> Reply:
            payload = {**rendered(able, prompt, ""), **settings, **self.extra}
            if top_k and self._takes_top_k:
                try:
                    return await self._client.ask(able.path, {**payload, "top_k": top_k}, logprobs=False, until=until)
                except RequestFailed as error:
                    if error.status not in (400, 422) or "top_k" not in str(error):
                        raise
                    self._takes_top_k = False
            return await self._client.ask(able.path, payload, logprobs=False, until=until)

        texts = [reply.text for reply in self._all(self._each(list(prompts), one))]
        return [text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))] for text in texts]

    def _each(self, items: Sequence[Any], work: Callable[[Any], Awaitable[Any]]) -> list[Any]:
        bar, advance = progress_over(len(items), self.progress)
        with bar:
            return self._client.run(self._client.each(items, work, advance))

    def _all(self, found: Sequence[Any]) -> list[Any]:
        failed = [(i, answer) for i, answer in enumerate(found) if isinstance(answer, RequestFailed)]
        if failed:
            shown = "; ".join(f"row {i}: {error}" for i, error in failed[:3])
            raise BackendError(
                f"{self.name}: expected {len(found)} answers, found that {len(failed)} failed ({shown}); what was "
                "answered is kept, and asking again asks only the rest",
                [i for i, _ in failed],
            )
        return list(found)

    def close(self) -> None:
        """End the connections and close the cache; a second call does nothing."""
        self._end()

    def __enter__(self) -> EndpointLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
