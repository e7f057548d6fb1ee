"""Responses sampled by vLLM servers: the policy's adapter is written, loaded there and shown to be the right one.

Notation: n left-padded prompts, ids and mask (n, P); responses of at most T tokens.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agents.policy import Policy
from rlaif_env.api import RLAIFError
from rlaif_env.models import Samples, encode
from rlaif_env.records import RunError
from rlaif_env.servers.vllm import VLLMServers
from rlaif_env.servers.vllm_server import Adapter, Probe

_PROBE = (
    "The film is a delight from beginning to end, and I would gladly see it again with friends. The food at the inn "
    "was cold, though; 12 of the 30 guests asked for their money."
)
_PROBE_TOKENS, _PROBES = 64, 8  # of the text at most, and beginnings of it that are looked at
_SAME_MODEL = 0.2  # nats a token between servers and trainer: bfloat16 differs by about 0.07, another model by more
_EXACT = 1e-3  # nats a token: more is a lower precision


class ServedSampler:
    """Samples from vLLM servers that have the policy's base model; begins with `open`.

    The log-probabilities are the server's: near the trainer's in one precision, not the same.

    Args:
        policy: With an adapter, or without any training: the base model then.
        servers: Which servers.

    Raises:
        RLAIFError: If all of the policy's weights are trained.
    """

    exact = False

    def __init__(self, policy: Policy, servers: VLLMServers) -> None:
        if policy.backbone is not policy.reference:
            raise RLAIFError(
                "expected an adapter to be trained where a server samples, found full fine-tuning: the server would "
                "need all weights anew before each batch; set --agent.trainable lora, or leave --sampler.url away"
            )
        self._policy, self._servers = policy, servers
        self._name, self._version = "", 0
        self._folder: Path | None = None  # of this run's adapters alone
        self._tolerance, self._probe, self._loaded = 0.0, tuple[tuple[int, ...], ...](), ""

    def open(self, folder: Path, *, name: str, tokens: int, tell: Callable[[str], object]) -> None:
        """Look at the servers, load the policy as it is now, and see that they score and draw as the trainer does.

        Args:
            folder: For the adapter that is in use; the servers see it under the same path.
            name: The run's, which adapters are called after.
            tokens: The longest prompt and response.
            tell: Called with a sentence to show.

        Raises:
            RLAIFError: What has to be changed: a server's flags, its address, or its base model.
        """
        tokenizer = self._policy.tokenizer
        ids = encode(tokenizer, [_PROBE])[0][: min(_PROBE_TOKENS, tokens - 1)]
        ends = sorted({int(end) for end in np.linspace(min(4, len(ids)), len(ids), _PROBES)})
        self._probe = tuple(tuple(ids[:end]) for end in ends)
        self._name = (
            f"{re.sub('[^A-Za-z0-9_.-]', '-', name)}-{uuid.uuid4().hex[:8]}"  # no other run's, nor a killed one's
        )
        self._folder = folder.resolve() / self._name
        self._servers.tell = tell
        self._servers.start(tokens)
        url, gap = max(self._servers.base_gaps(self._known(None)).items(), key=lambda item: item[1])
        if not gap <= _SAME_MODEL:
            raise RLAIFError(
                f"expected the base model {self._policy.reference.name} at {url}, found one that scores a text "
                f"differently, by {gap:.2g} nats a token; start the server with the model that is trained"
            )
        if gap > _EXACT:
            tell(
                f"{url} differs from the trainer by {gap:.2g} nats a token: a lower precision; the gradient corrects it"
            )
        self._tolerance = 4 * gap + 2e-4
        self._refresh()

    def sample(
        self, ids: NDArray[np.int64], mask: NDArray[Any], *, uniform: NDArray[np.float64], group_size: int = 1
    ) -> Samples:
        """As `agents.sampler.Sampler.sample`; a row's seed is the 53 bits of its first number."""
        samples = self.begin(ids, mask, uniform)()
        self._check(int(samples.lengths.argmax()), ids, mask, samples)
        return samples

    def begin(self, ids: NDArray[np.int64], mask: NDArray[Any], uniform: NDArray[np.float64]) -> Callable[[], Samples]:
        """Put the policy as it is now on the servers; what is returned has them sample, in any thread.

        The trainer looks at no response then: its weights may be others by the time it is there.
        """
        self._refresh()
        return partial(self._sample, ids, mask, uniform)

    def _sample(self, ids: NDArray[np.int64], mask: NDArray[Any], uniform: NDArray[np.float64]) -> Samples:
        rows = [row[seen.astype(bool)].tolist() for row, seen in zip(ids, mask, strict=True)]
        responses = self._servers.sample(
            rows,
            [int(number * 2**53) for number in uniform[:, 0]],
            temperature=self._policy.temperature,
            max_new_tokens=uniform.shape[1],
            stop_ids=self._policy.backbone.end_ids,
        )
        drawn = np.full(uniform.shape, self._policy.tokenizer.pad_token_id, dtype=np.int64)
        logprobs = np.zeros(uniform.shape, dtype=np.float32)
        for i, response in enumerate(responses):
            drawn[i, : len(response.ids)], logprobs[i, : len(response.ids)] = response.ids, response.logprobs
        lengths = np.array([len(response.ids) for response in responses], dtype=np.int64)
        return Samples(drawn, lengths, logprobs)

    def _check(self, row: int, ids: NDArray[np.int64], mask: NDArray[Any], samples: Samples) -> None:
        """Have the trainer look at one response; RLAIFError if it was drawn from other weights or told otherwise."""
        policy, n = self._policy, int(samples.lengths[row])
        prompt = ids[row : row + 1, mask[row].astype(bool)]
        arrays = (prompt, np.ones_like(prompt), samples.ids[row : row + 1, :n], np.ones((1, n), dtype=np.int64))
        tensors = (torch.from_numpy(array).to(policy.backbone.device) for array in arrays)
        known = policy.evaluate_alone(*tensors).logprobs[0].double().cpu().numpy()
        gap = float(np.abs(known - samples.logprobs[row, :n]).mean())
        bound = 2 * self._tolerance / min(1.0, policy.temperature)
        if not gap <= bound:
            raise RLAIFError(
                f"expected responses drawn from the policy of now, with log-probabilities within {bound:.2g} nats a "
                f"token, found one {gap:.2g} off (row {row}, {self._servers.names}); start the servers again"
            )

    def close(self) -> None:
        """Unload the adapter and remove its folder."""
        try:
            self._servers.release()
        finally:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                with suppress(OSError):
                    self._folder.parent.rmdir()  # if it is empty
            self._servers.close()

    def _refresh(self) -> None:
        """Have the servers sample from the policy as it is now; nothing is done where it is as it was."""
        policy = self._policy
        if (fingerprint := policy.fingerprint()) == self._loaded:
            return
        if self._folder is None:
            raise RLAIFError("expected open() before samples are asked for, found that it was not called")
        self._version += 1
        name, old = f"{self._name}-{self._version}", self._folder / f"{self._name}-{self._version - 1}"
        folder = None if policy.adapter is None else self._folder / name
        if folder is not None:
            try:
                policy.backbone.save_adapter(str(policy.adapter), folder)
            except OSError as error:
                raise RunError(f"cannot write the adapter to {folder}: {error}; make room there") from error
        self._servers.use(Adapter(name, folder, fingerprint, self._known(policy.adapter), self._tolerance))
        self._loaded = fingerprint
        shutil.rmtree(old, ignore_errors=True)

    def _known(self, adapter: str | None) -> Probe:
        """What the trainer expects after the beginnings of the probe text."""
        with self._policy.backbone.using(adapter) as model, torch.no_grad():
            ids = torch.tensor([self._probe[-1]], device=self._policy.backbone.device)
            logits = self._policy.together("forward", partial(model, ids)).logits[0]
            logits = logits[[len(row) - 1 for row in self._probe]].float()
        return Probe(self._probe, torch.log_softmax(logits, -1).cpu().numpy())
