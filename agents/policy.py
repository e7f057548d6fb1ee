"""The language-model policy: sampling, log-probabilities, entropies, values, and its SFT reference.

With LoRA the policy is an adapter on a shared `Backbone` and the reference is the same weights with the adapter off, so
there is one copy of them. With full fine-tuning the policy has its own copy.

Notation: n rows; prompts are left-padded, ids and mask (n, P); responses are right-padded, they and their mask (n, T);
H hidden width.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agents.logprobs import chunked_logprobs, response_states
from rlaif_env.api import RLAIFError
from rlaif_env.models import (
    TEMPERATURE,
    Backbone,
    LoraConfig,
    Samples,
    backbone,
    head_logits,
    plain_head,
    private_copy,
    rows_that_fit,
    sample,
    trunk_of,
)

_Result = TypeVar("_Result")

_LOGITS_HELD = 1 << 23
"""Logits in memory at one time."""


@dataclass(frozen=True)
class Evaluation:
    """What a model says of responses already written."""

    logprobs: Tensor  # of each response token, (n, T), 0 outside the mask
    entropy: Tensor  # of the distribution at each response token, nats, (n, T), 0 outside the mask, no gradient
    # Last hidden states at the states x_t that the tokens are chosen in, (n, T, H); None unless asked for
    features: Tensor | None


class Policy:
    """A policy pi(token | prompt, tokens so far) = softmax(logits / temperature), and the reference it started as.

    Args:
        model: A model name or a `Backbone`.
        trainable: "lora" (an adapter; the default), "full" (a copy of all weights as they are in memory, float32), or
            "none" (the model as it is, to sample from and evaluate).
        lora: The adapter, for "lora".
        temperature: Of sampling (0.9 in section A.3), and so of the policy's distribution everywhere.
        seed: Of the adapter's initial weights.
        adapter: The adapter's name on the backbone; a number is added where it is taken.
        device: As in `rlaif_env.models.backbone`.
        dtype: As in `rlaif_env.models.backbone`; of the frozen weights.
    """

    def __init__(
        self,
        model: str | Path | Backbone,
        *,
        trainable: str = "lora",
        lora: LoraConfig | None = None,
        temperature: float = TEMPERATURE,
        seed: int = 0,
        adapter: str = "policy",
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        if trainable not in ("lora", "full", "none"):
            raise RLAIFError(f"expected trainable 'lora', 'full' or 'none', found {trainable!r}")
        if not temperature > 0:
            raise RLAIFError(f"expected a sampling temperature above 0, found {temperature}")
        self.reference = model if isinstance(model, Backbone) else backbone(model, device=device, dtype=dtype)
        self._training = False  # whether this is inside `training`
        # what one process does of several that hold the layers together: it has them do their part, by name
        self.together: Callable[[str, Callable[[], Any]], Any] = lambda name, work: work()
        self.temperature = temperature
        self.adapter: str | None = None
        self.backbone, self.parameters = self.reference, list[torch.nn.Parameter]()
        if trainable == "lora":
            self.adapter, lora = self.backbone.free_name(adapter), lora or LoraConfig()
            self.parameters = self.backbone.add_lora(self.adapter, rank=lora.rank, alpha=lora.alpha, seed=seed)
            # the model may outlive the policy; its adapter should not
            weakref.finalize(self, self.backbone.discard_lora, self.adapter)
        elif trainable == "full":
            self.backbone = private_copy(self.reference)
            self.backbone.model.requires_grad_(True)
            self.parameters = list(self.backbone.model.parameters())
        self.tokenizer = self.reference.tokenizer
        self.hidden_size = int(self.reference.model.config.get_text_config().hidden_size)

    @classmethod
    def from_adapter(cls, folder: Path, *, temperature: float = TEMPERATURE) -> Policy:
        """The policy that an adapter makes of its base model; RLAIFError where the folder has none of `rlaif train`."""
        try:
            told = json.loads((folder / "adapter_config.json").read_bytes())
            lora, base = LoraConfig(int(told["r"]), float(told["lora_alpha"])), str(told["base_model_name_or_path"])
            state = load_file(folder / "adapter_model.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RLAIFError(f"expected an adapter as peft writes it in {folder}, found {error!r}") from error
        policy = cls(base, lora=lora, temperature=temperature)
        policy.load_state({name.removeprefix("base_model.model."): tensor for name, tensor in state.items()})
        return policy

    @property
    def exact(self) -> bool:
        """Whether the log-probabilities that it samples with are those it learns with, to float32's rounding.

        In a lower precision they are not: an adapter is folded into the weights to sample, and not to learn.
        """
        return self.backbone.model.dtype in (torch.float32, torch.float64) and not self._autocast

    @property
    def _autocast(self) -> bool:
        """Whether float32 weights learn in bfloat16."""
        return self.adapter is None and self.backbone.device.type == "cuda"

    def sample(
        self, ids: NDArray[np.int64], mask: NDArray[Any], *, uniform: NDArray[np.float64], group_size: int = 1
    ) -> Samples:
        """Sample a response of at most T tokens to each prompt by uniform numbers (n, T) in [0, 1), a row for each.

        K = ``group_size`` consecutive rows hold the same prompt, which is prefilled once; RLAIFError if they differ. As
        many rows at once as there is memory for.
        """
        rows = [row[m.astype(bool)].tolist() for row, m in zip(ids, mask, strict=True)]
        if len(rows) % group_size or any(rows[i] != rows[i - i % group_size] for i in range(len(rows))):
            raise RLAIFError(
                f"expected {group_size} consecutive rows with the same prompt, found others; make the environment with "
                f"group_size={group_size}"
            )
        steps = uniform.shape[1]
        fit = rows_that_fit(self.backbone.model, max(map(len, rows), default=0) + steps)
        size = max(group_size, fit - fit % group_size)
        parts = []
        with self.backbone.merged(self.adapter) as model:
            for start in range(0, max(1, len(rows)), size):
                drawn = sample(
                    model,
                    rows[start : start + size : group_size],
                    max_new_tokens=steps,
                    stop_ids=self.backbone.end_ids,
                    pad_id=self.tokenizer.pad_token_id,
                    uniform=uniform[start : start + size],
                    temperature=self.temperature,
                    samples_per_prompt=group_size,
                )
                parts.append(drawn)
        return Samples.joined(parts)

    @contextmanager
    def training(self) -> Iterator[None]:
        """The policy's weights act and take gradients: its forward and backward passes belong inside."""
        autocast = torch.autocast(self.backbone.device.type, torch.bfloat16, enabled=self._autocast)
        outer, self._training = self._training, True
        try:
            with self.backbone.using(self.adapter), autocast:
                yield
        finally:
            self._training = outer

    def evaluate(
        self,
        ids: Tensor,
        mask: Tensor,
        responses: Tensor,
        response_mask: Tensor,
        *,
        reference: bool = False,
        features: bool = False,
    ) -> Evaluation:
        """Log-probabilities of responses under the policy or, only where that is asked for, under the reference.

        The policy's have a gradient within `training` and none outside it, where a backward pass would find the adapter
        off; the reference's never have one. ``features`` asks for the hidden states too.
        """
        learns = self._training and not reference and torch.is_grad_enabled()
        source, adapter = (self.reference, None) if reference else (self.backbone, self.adapter)
        with source.using(adapter) as model, torch.set_grad_enabled(learns):
            # where layers are sharded, a pass is one run of them in every process
            split = not source.sharded
            hidden = response_states(model, ids, mask, responses, response_mask.long(), split=split)
            real = response_mask.bool()
            values = chunked_logprobs(
                hidden[real],
                responses[real],
                lambda states: head_logits(model, states),
                self.temperature,
                weight=plain_head(model),
                rows=max(1, _LOGITS_HELD // self.reference.logit_width),
            )
            logprobs, entropy = (x.new_zeros(responses.shape).masked_scatter(real, x) for x in values)
        return Evaluation(logprobs, entropy, hidden.detach().float() if features else None)

    def evaluate_alone(self, *inputs: Tensor, reference: bool = False) -> Evaluation:
        """`evaluate` in the process that leads and no other."""
        told: Evaluation = self.together("forward", partial(self.evaluate, *inputs, reference=reference))
        return told

    def idle(self) -> None:
        """Run sharded layers for the sake of other processes, on one token; in `training`, with a gradient of 0."""
        with self.backbone.using(self.adapter if self._training else None) as model:
            token = torch.zeros(1, 1, dtype=torch.long, device=self.backbone.device)
            learns = self._training and torch.is_grad_enabled()
            with torch.set_grad_enabled(learns):
                hidden = trunk_of(model)(input_ids=token, use_cache=False).last_hidden_state
            if learns:
                (0 * hidden).sum().backward()

    def save(self, folder: Path) -> None:
        """Write the policy in plain Hugging Face format, which `from_pretrained` opens.

        An adapter is folded in, and stands in the folder "adapter" by itself, as peft writes it.
        """
        self.together("give", partial(self.backbone.save_merged, self.adapter, folder))
        if self.adapter is not None:
            self.backbone.save_adapter(self.adapter, folder / "adapter")

    def fingerprint(self) -> str:
        """SHA-256 of the policy's weights: the frozen ones and the trained ones."""
        digest = hashlib.sha256(self.reference.fingerprint().encode())
        for name, tensor in sorted(self.state().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def state(self) -> dict[str, Tensor]:
        """The trained values, copied to the CPU."""
        if self.adapter is not None:
            return self.backbone.adapter_state(self.adapter)
        return {name: p.detach().cpu().clone() for name, p in self.backbone.model.named_parameters()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put values back that `state` gave."""
        if self.adapter is not None:
            self.backbone.load_adapter_state(self.adapter, state)
            return
        with torch.no_grad():
            for name, parameter in self.backbone.model.named_parameters():
                parameter.copy_(state[name])
