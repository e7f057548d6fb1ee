"""`EndpointLM`: the language model behind any OpenAI-compatible server, with the protocol of `LocalLM`.

How this differs from a model in this process: the server shows only its k likeliest tokens, so the likelihood of a
rarer answer is an upper bound (`rewards.endpoint.likelihoods`), and what goes on with the word after an answer is taken
off by asking once more with the answer put behind the prompt. The prompt goes as text, so its last characters and an
answer put behind it are split into tokens together. Never is a grammar sent: it would make any label mass 1.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.api import Live, configured
from rewards.endpoint.config import ServerConfig
from rewards.endpoint.likelihoods import AnswerLikelihoods, answer_likelihoods
from rewards.endpoint.probe import Capabilities, probe
from rewards.prompts import before_stop, check_answers, leads_after
from rlaif_env.api import BackendError
from rlaif_env.servers.cache import AnswerCache, default_cache
from rlaif_env.servers.client import EndpointClient
from rlaif_env.servers.replies import Position, Reply
from rlaif_env.servers.transport import RequestFailed


def _end(client: EndpointClient, *, wait: bool = False) -> None:
    client.close(wait=wait)
    client.cache.close()


class EndpointLM(Live, AbstractContextManager["EndpointLM"]):
    """A language model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, a hosted API.

    The server is probed before the first request; `probe` does it at once.

    Args:
        url: The server's address, such as "http://localhost:8000/v1".
        model: What the server calls the model.
        config: How the server is asked.
        settings: Fields of `ServerConfig` by name, instead of or in place of the config's.

    Attributes:
        usage: What was used so far, a `Usage`.

    Raises:
        RLAIFError: If the settings make no sense.
    """

    def __init__(self, url: str, model: str, config: ServerConfig | None = None, **settings: Any) -> None:
        self.config = configured(config or ServerConfig(), settings, "a language model at a URL")
        c = self.config
        path = default_cache() if c.cache is True else Path(c.cache) if c.cache else None
        self._client = EndpointClient(
            (url, *c.replicas),
            model,
            api_key_env=c.api_key_env,
            limits=c.limits,
            cache=AnswerCache(path),
            revision=c.revision,
        )
        self._end = weakref.finalize(self, _end, self._client)  # also where nobody closes it: in an environment
        self.url, self.usage = self._client.url, self._client.usage
        self.name = f"{model} at {self.url}"
        self._capabilities: Capabilities | None = None
        self._probing = threading.Lock()
        self._bounded = 0
        self._takes_top_k = True

    def __repr__(self) -> str:
        return f"EndpointLM({self.url!r}, {self._client.model!r})"

    def probe(self) -> Capabilities:
        """Find out what the server can do; asked once.

        Raises:
            BackendError: If it cannot do what is needed; the message says what to change.
        """
        with self._probing:
            if self._capabilities is None:
                try:
                    self._capabilities = self._client.run(probe(self._client, self.config.route, self.config.extra))
                except RequestFailed as error:
                    raise BackendError(f"probing {self.name}: {error}") from None
            return self._capabilities

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Within it the server is asked whatever answers are stored, and none is: to see how far they vary."""
        self._client.anew = True
        try:
            yield
        finally:
            self._client.anew = False

    def label_facts(self) -> dict[str, Any]:
        """What decides how exact the likelihoods are, to be kept with every label; JSON-able."""
        own = {"url": self.url, "model": self._client.model, "revision": self.config.revision}
        return {**own, "boundaries": self.config.boundaries, **asdict(self.probe())}

    @property
    def facts(self) -> dict[str, Any]:
        """`label_facts`, how many answers were bounded so far, and whether ``top_k`` is sent with a generation."""
        return {**self.label_facts(), "labels_bounded": self._bounded, "top_k_sent": self._takes_top_k}

    def usable_scale(self, scale: tuple[int, int]) -> tuple[tuple[int, int], str]:
        """The scale, or one whose scores the server can tell apart and show, and why it is not the given one.

        Returns:
            The scale and "", or 0 to 9 (1 to 5 where few tokens are shown), each score one token, and the reason.

        Raises:
            BackendError: If fewer than five tokens are shown.
        """
        top = self.probe().top
        scores = [str(i) for i in range(scale[0], scale[1] + 1)]
        if merged := self._merged(scores):
            why = (
                f"the server does not go on with an answer that is begun for it, so that {merged[0]!r} cannot be told "
                "from the beginning of a longer score"
            )
        elif top < len(scores):
            why = f"the server shows {top} tokens and the scale has {len(scores)} scores"
        else:
            return scale, ""
        if top < 5:
            raise BackendError(
                f"expected at least 5 of the likeliest tokens from {self.name}, found {top}: too few for a scale; "
                "have the server show more (vLLM: --max-logprobs 20), or use another server or route"
            )
        return (0, 9) if top >= 10 else (1, 5), why

    def _merged(self, labels: Sequence[str]) -> list[str]:
        """The answers that the server cannot tell from the beginning of another one."""
        if self.probe().prefill or self.probe().ten_is_split is False:
            return []
        return [label for label in labels if any(other != label and other.startswith(label) for other in labels)]

    def answers(self, prompts: Sequence[str], labels: Sequence[str]) -> list[AnswerLikelihoods | RequestFailed]:
        """Likelihoods of the answers row by row; a row that failed holds its reason and does not stop the others.

        Raises:
            BackendError: If the server cannot do what these answers need.
        """
        check_answers(labels)
        if not prompts:
            return []
        capabilities = self.probe()
        if merged := self._merged(labels):
            raise BackendError(
                f"expected labels none of which begins another one, found {merged[0]!r} among {list(labels)}: "
                f"{self.name} does not go on with an answer that is begun for it, so that the two cannot be told "
                "apart; use the scale 0 to 9 (--scale 0 9, --reward.scale 0 9; in Python: scale=(0, 9)), or a server "
                "with the completion route"
            )
        until = self._client.until()

        async def answer(prompt: str) -> AnswerLikelihoods:
            async def next_token(begun: str) -> Position:
                payload = capabilities.next_token_request(prompt, begun, self.config.extra)
                reply = await self._client.ask(capabilities.path, payload, logprobs=True, until=until)
                return reply.positions[0]

            return await answer_likelihoods(
                next_token,
                labels,
                ("", " ") if capabilities.route == "chat" else leads_after(prompt),
                more=capabilities.prefill,
                every_boundary=self.config.boundaries == "all",
                top=capabilities.top,
            )

        rows = self._each(prompts, answer)
        self._bounded += sum(len(row.bounded) for row in rows if isinstance(row, AnswerLikelihoods))
        return rows

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
        rows = self._all(self.answers(prompts, labels))
        shape = len(prompts), len(labels)
        bounded = [[label in row.bounded for label in labels] for row in rows]
        logprobs = np.array([row.logprobs for row in rows], dtype=np.float64)
        return logprobs.reshape(shape), np.array(bounded, dtype=bool).reshape(shape)

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
        capabilities = self.probe()
        settings: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        if stop:
            settings["stop"] = list(stop)[:4]  # more are refused by some servers; the rest is cut off here
        until = self._client.until()

        async def answer(prompt: str) -> Reply:
            reply = await ask(prompt)
            if reply.reasoning and not reply.text:
                raise RequestFailed(
                    f"expected a text of at most {max_new_tokens} tokens, found that the model only thought; turn "
                    "thinking off (extra), or allow more tokens"
                )
            return reply

        async def ask(prompt: str) -> Reply:
            payload = {**capabilities.prompt_fields(prompt), **settings, **self.config.extra}
            cut = {"top_k": top_k} if top_k and self._takes_top_k else {}
            try:
                return await self._client.ask(capabilities.path, payload | cut, logprobs=False, until=until)
            except RequestFailed as error:
                if not cut or error.status not in (400, 422) or "top_k" not in str(error):
                    raise
            self._takes_top_k = False
            return await self._client.ask(capabilities.path, payload, logprobs=False, until=until)

        return [before_stop(reply.text, stop) for reply in self._all(self._each(prompts, answer))]

    def _each(self, prompts: Sequence[str], answer: Callable[[str], Awaitable[Any]]) -> list[Any]:
        """Each prompt's answer, or its `RequestFailed`; with a bar on the error output if that is wanted."""
        if not prompts or not self.config.progress:
            return self._client.run(self._client.each(prompts, answer, lambda: None))
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("asking", total=len(prompts))
            return self._client.run(self._client.each(prompts, answer, lambda: bar.advance(task)))

    def _all(self, rows: list[Any]) -> list[Any]:
        """The answers, if none has failed."""
        if failed := [(i, row) for i, row in enumerate(rows) if isinstance(row, RequestFailed)]:
            shown = "; ".join(f"row {i}: {error}" for i, error in failed[:3])
            raise BackendError(
                f"{self.name}: expected {len(rows)} answers, found that {len(failed)} failed ({shown}); what was "
                "answered is kept, and asking again asks only the rest",
                [i for i, _ in failed],
            )
        return rows

    def close(self) -> None:
        """End the connections and close the cache; a second call does nothing."""
        if self._end.detach() is not None:
            _end(self._client, wait=True)

    def __exit__(self, *exception: object) -> None:
        self.close()
