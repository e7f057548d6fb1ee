"""One causal LM in memory and the LoRA adapters on it, switched by name.

The policy (its adapter on), the SFT reference (adapters off), an LLM scorer and reward models (their own adapters and
heads) that start from the same checkpoint share it, so that a run needs one copy of the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlaif_env.api import RLAIFError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers while it reads or writes weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of last hidden states: (m, H) -> (m, V), with the scale and soft cap that some architectures put on them.

    Two-dimensional on purpose: a matrix product of a slice of (n, L, H) would copy the V x H head each time.
    """
    config = model.config.get_text_config()
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = (logits / cap).tanh() * cap
    return logits


def plain_head(model: Any) -> torch.Tensor | None:
    """The head's matrix (V, H), where `head_logits` is nothing but the product with it; else None."""
    import torch

    config, head = model.config.get_text_config(), model.get_output_embeddings()
    altered = any(getattr(config, a, None) for a in ("logit_scale", "logits_scaling", "final_logit_softcapping"))
    plain = type(head) is torch.nn.Linear and getattr(head, "bias", None) is None and not altered
    return head.weight if plain else None


class Backbone:
    """One causal LM in memory and the adapters on it.

    Whoever runs the model says which adapter it wants with `using`; outside every `using` the plain weights act.
    A live backbone is never cloned: `copy.deepcopy` returns itself.

    Attributes:
        model: The Hugging Face model, in eval mode (no dropout), base weights frozen.
        tokenizer: Its tokenizer, with pad and EOS.
        name: What it was asked for as.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "live") -> None:
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            lacks = "EOS" if tokenizer.eos_token_id is None else "pad"
            mend = f"set tokenizer.{lacks.lower()}_token"
            raise RLAIFError(f"expected a tokenizer with pad and EOS tokens, found no {lacks} token; {mend}")
        width = int(model.config.get_text_config().vocab_size)
        if len(tokenizer) > width:
            raise RLAIFError(
                f"expected a tokenizer of at most {width} ids, the model's logit width, found {len(tokenizer)}; "
                "use the model's own tokenizer or resize its embeddings"
            )
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.logit_width = width
        self.adapters: list[str] = []
        self._active: str | None = None
        self._fingerprint: str | None = None

    def __deepcopy__(self, memo: object) -> Backbone:
        """A live model is shared, never cloned."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def fingerprint(self) -> str:
        """SHA-256 of the base weights' values, whatever adapters are on the model."""
        if self._fingerprint is None:
            import torch

            digest = hashlib.sha256()
            for name, tensor in sorted(self.model.state_dict().items()):
                if "lora_" not in name:
                    digest.update(name.replace(".base_layer", "").encode())
                    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def add_lora(
        self, adapter: str, *, rank: int, alpha: float, targets: str | Sequence[str] = "all-linear", seed: int = 0
    ) -> list[torch.nn.Parameter]:
        """Put a new LoRA adapter on the model; with B = 0 it changes nothing yet.

        Args:
            adapter: Its name; several adapters can share the model.
            rank: r of the update B·A.
            alpha: The update is scaled by alpha / rank.
            targets: Names of the linear modules, or "all-linear".
            seed: Of the initial A.

        Returns:
            Its parameters, float32, trainable while `using(adapter)`.

        Raises:
            RLAIFError: If the name is taken.
        """
        import torch
        from peft import LoraConfig

        if adapter in self.adapters:
            raise RLAIFError(f"expected a new adapter name, found {adapter!r} already on {self.name}")
        wanted = targets if isinstance(targets, str) else list(targets)
        config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=wanted, task_type="CAUSAL_LM")
        self.fingerprint()  # of the weights before anything is attached to them
        try:
            with torch.random.fork_rng():  # peft draws initial values, which are drawn again below
                self.model.add_adapter(config, adapter_name=adapter)
        except Exception:  # half an adapter must not stay on a model that others use
            if adapter in getattr(self.model, "peft_config", {}):
                self.model.delete_adapter(adapter)
            elif not self.adapters:
                self.model._hf_peft_config_loaded = False
            raise
        self.adapters.append(adapter)
        generator = torch.Generator().manual_seed(seed)
        parameters = self.lora_parameters(adapter)
        for name, parameter in parameters.items():
            parameter.data = parameter.data.float()
            if ".lora_A." in name:  # as peft does: uniform with a = sqrt(5), but from a generator of its own
                bound = 1 / parameter.shape[1] ** 0.5
                parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        self._switch(self._active)
        return list(parameters.values())

    def free_name(self, wanted: str) -> str:
        """An adapter name that is not taken: the wanted one, or with a number behind it."""
        names = (wanted if i == 1 else f"{wanted}-{i}" for i in itertools.count(1))
        return next(name for name in names if name not in self.adapters)

    def remove_lora(self, adapter: str) -> None:
        """Take an adapter off the model; one that is not on it is no error."""
        if adapter in self.adapters:
            self.adapters.remove(adapter)
            self.model.delete_adapter(adapter)
            self._switch(None if self._active == adapter else self._active)

    def lora_parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        """An adapter's parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name and f".{adapter}." in name}

    def _switch(self, adapter: str | None) -> None:
        self._active = adapter
        if not self.adapters:
            return
        if adapter is None:
            self.model.disable_adapters()
        else:
            self.model.enable_adapters()
            self.model.set_adapter(adapter)

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[Any]:
        """Run the model with one adapter, or with none; the backward pass belongs inside too.

        Raises:
            RLAIFError: If there is no such adapter.
        """
        if adapter is not None and adapter not in self.adapters:
            raise RLAIFError(f"expected one of the adapters {self.adapters}, found {adapter!r}")
        before = self._active
        try:
            if adapter != before:
                self._switch(adapter)
            yield self.model
        finally:
            if adapter != before:
                self._switch(before)

    @contextlib.contextmanager
    def merged(self, adapter: str | None) -> Iterator[Any]:
        """Run the model with an adapter folded into the weights, for many small forward passes without gradient.

        Costs a temporary copy of the adapted matrices; the originals come back exactly (they are put aside, not
        recomputed).
        """
        if adapter is None:
            with self.using(None) as model:
                yield model
            return
        import torch
        from peft.tuners.lora import LoraLayer

        put_aside: list[tuple[Any, torch.Tensor]] = []
        with self.using(None):
            try:
                with torch.no_grad():
                    for module in self.model.modules():
                        if isinstance(module, LoraLayer) and adapter in module.lora_A:
                            weight: Any = module.get_base_layer().weight
                            put_aside.append((weight, weight.data))
                            a, b = (cast(Any, part[adapter]).weight for part in (module.lora_A, module.lora_B))
                            whole = torch.addmm(weight.data.to(b.dtype), b, a, alpha=module.scaling[adapter])
                            weight.data = whole.to(weight.dtype)
                yield self.model
            finally:
                for weight, original in put_aside:
                    weight.data = original

    def adapter_state(self, adapter: str) -> dict[str, torch.Tensor]:
        """An adapter's values by parameter name (without the adapter's own), copied to the CPU."""
        parameters = self.lora_parameters(adapter).items()
        return {name.replace(f".{adapter}.", "."): p.detach().cpu().clone() for name, p in parameters}

    def load_adapter_state(self, adapter: str, state: dict[str, torch.Tensor]) -> None:
        """Put values back that `adapter_state` gave.

        Raises:
            RLAIFError: If the names or shapes differ.
        """
        import torch

        parameters = {n.replace(f".{adapter}.", "."): p for n, p in self.lora_parameters(adapter).items()}
        given, expected = ({(name, tuple(v.shape)) for name, v in values.items()} for values in (state, parameters))
        if given != expected:
            odd = sorted(given ^ expected)[:2]
            raise RLAIFError(f"expected the parameters of adapter {adapter!r}, found others: {odd}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])

    def save_merged(self, adapter: str | None, folder: Path) -> None:
        """Write the model, with an adapter folded in, and its tokenizer in plain Hugging Face format (safetensors)."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(self.model.config)
        with self.merged(adapter), quiet():
            tensors = {name: tensor for name, tensor in self.model.state_dict().items() if "lora_" not in name}
            state = {name.replace(".base_layer", ""): tensor for name, tensor in tensors.items()}
            if self.model.config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            plain.generation_config = self.model.generation_config
            plain.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
