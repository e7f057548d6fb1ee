"""A policy behind vLLM servers: it responds to prompts, and its weights are not loaded here."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from rewards.language_model.local import numbers_for
from rewards.prompts import before_stop
from rlaif_env.data.tasks import Task
from rlaif_env.data.templates import encode_prompts
from rlaif_env.models import continuation_text, load_tokenizer, model_end_ids
from rlaif_env.servers.vllm import VLLMConfig, VLLMServers
from rlaif_env.servers.vllm_server import Adapter


class ServedPolicy:
    """Responds as the policy in a folder does, by servers that have its base model.

    Args:
        policy: A folder with an adapter, itself or in "adapter" (as `rlaif train` leaves one), which the servers see
            under the same path; anything else is a name or folder of the model that they serve.
        servers: Which servers.
        task: Whose template the prompts are put in.
        tell: Called with a sentence when a server is lost, waited for, or back.

    Raises:
        RLAIFError: If a server is not there, is no vLLM, or does not take the adapter.
    """

    def __init__(self, policy: str, servers: VLLMConfig, task: Task, tell: Callable[[str], object]) -> None:
        self.name, self._task = policy, task
        self._tokenizer, self._ends = load_tokenizer(policy), model_end_ids(policy)
        self._servers = VLLMServers(servers, tell)
        self._servers.start(task.max_prompt_tokens + task.max_response_tokens)
        path = Path(policy).expanduser().resolve()
        folder = next((f for f in (path, path / "adapter") if (f / "adapter_config.json").is_file()), None)
        name = f"{path.parent.name}-{uuid.uuid4().hex[:8]}"
        self._servers.use(Adapter(name, folder, fingerprint=name))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Continue n prompts, each by a seed of its own; a continuation ends before the first stop string."""
        rows, _ = encode_prompts(self._task, self._tokenizer, prompts, self._task.prompt_limit)
        responses = self._servers.sample(
            rows,
            [int(numbers_for(prompt, seed, 1)[0] * 2**53) for prompt in prompts],
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop_ids=self._ends,
        )
        known = ([i for i in response.ids if i < len(self._tokenizer)] for response in responses)
        texts = [continuation_text(self._tokenizer, *pair) for pair in zip(rows, known, strict=True)]
        return [before_stop(text, stop) for text in texts]

    def close(self) -> None:
        """Unload the adapter and end the connections."""
        self._servers.release()
        self._servers.close()
