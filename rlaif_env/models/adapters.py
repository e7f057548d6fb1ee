"""One causal LM in memory and the LoRA adapters on it, switched by name.

The policy (its adapter on), the SFT reference (adapters off), an LLM scorer and reward models (their own adapters and
heads) that start from the same checkpoint share it, so that a run needs one copy of the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlaif_env.api import RLAIFError
from rlaif_env.models.architecture import check_architecture, end_ids, linear_modules

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


class Backbone:
    """One causal LM in memory and the adapters on it.

    Whoever runs the model says which adapter it wants with `using`; outside every `using` the plain weights act.
    A live backbone is never cloned: `copy.deepcopy` returns itself.

    Attributes:
        model: The Hugging Face model, in eval mode (no dropout), base weights frozen.
        tokenizer: Its tokenizer, with pad and EOS.
        name: What it was asked for as.
        end_ids: The tokens that end a response: the EOS, and those of the model's generation config.
        sharded: Whether its layers are divided over processes (`rlaif_env.models.sharding`), which then all run it as
            often.
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
        if self.model.get_output_embeddings() is not None:  # a classifier has its own head
            check_architecture(self.model, name)
        self.tokenizer = tokenizer
        self.name = name
        self.end_ids = end_ids(tokenizer, getattr(model, "generation_config", None))
        self.logit_width = width
        self.adapters: list[str] = []
        self.sharded = False
        self._active: str | None = None
        self._discarded: list[str] = []  # adapters to be removed when no other is being put on
        self._adding = False
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
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def add_lora(
        self, adapter: str, *, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0
    ) -> list[torch.nn.Parameter]:
        """Put a new LoRA adapter on the model; with B = 0 it changes nothing yet.

        Args:
            adapter: Its name; several adapters can share the model.
            rank: r of the update B·A.
            alpha: The update is scaled by alpha / rank.
            targets: Full names of the linear modules; by default all but the head.
            seed: Of the initial A.

        Returns:
            Its parameters, float32, trainable while `using(adapter)`.

        Raises:
            RLAIFError: If the name is taken, or peft cannot put an adapter there.
        """
        import torch
        from peft import LoraConfig
        from transformers.pytorch_utils import Conv1D

        self._sweep()
        if adapter in self.adapters:
            raise RLAIFError(f"expected a new adapter name, found {adapter!r} already on {self.name}")
        wanted = list(targets) or linear_modules(self.model)
        config = LoraConfig(
            r=rank,
            lora_alpha=cast(int, alpha),
            target_modules=wanted,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in self.model.modules()),  # transposed weights
            task_type="CAUSAL_LM",
        )
        self.fingerprint()  # of the weights before anything is attached to them
        self._adding = True
        try:
            with torch.random.fork_rng():  # peft draws initial values, which are drawn again below
                self.model.add_adapter(config, adapter_name=adapter)
        except Exception as error:  # half an adapter must not stay on a model that others use
            if adapter in getattr(self.model, "peft_config", {}):
                self.model.delete_adapter(adapter)
            elif not self.adapters:
                self.model._hf_peft_config_loaded = False
            raise RLAIFError(f"expected modules of {self.name} that take a LoRA adapter, found: {error}") from error
        finally:
            self._adding = False
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

    def discard_lora(self, adapter: str) -> None:
        """As `remove_lora`, for a finaliser, which any thread may run amid anything: later where it cannot be now."""
        self._discarded.append(adapter)
        if not self._adding and threading.current_thread() is threading.main_thread():
            self._sweep()

    def _sweep(self) -> None:
        while self._discarded:
            self.remove_lora(self._discarded.pop())

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
        put_aside: list[tuple[Any, torch.Tensor]] = []
        with self.using(None):
            try:
                for _, weight, whole in self.folded(adapter):
                    put_aside.append((weight, weight.data))
                    weight.data = whole.to(weight.dtype)
                yield self.model
            finally:
                for weight, original in put_aside:
                    weight.data = original

    def folded(self, adapter: str) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
        """Every adapted matrix: its module's name, its weights, and these with an adapter folded in, float32."""
        import torch
        from peft.tuners.lora import LoraLayer

        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer) and adapter in module.lora_A:
                weight: Any = module.get_base_layer().weight
                with torch.no_grad():
                    a, b = (cast(Any, part[adapter]).weight for part in (module.lora_A, module.lora_B))
                    if cast(Any, module).fan_in_fan_out:  # Conv1D holds its weights transposed
                        a, b = b.t(), a.t()
                    whole = torch.addmm(_whole(weight.data).to(b.dtype), b, a, alpha=module.scaling[adapter])
                yield name, weight, whole

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

    def save_adapter(self, adapter: str, folder: Path) -> None:
        """Write an adapter as peft does; `peft.PeftModel.from_pretrained(base model, folder)` opens it."""
        with self.using(adapter) as model, quiet():
            model.save_pretrained(folder)

    def save_merged(self, adapter: str | None, folder: Path) -> None:
        """Write the model, with an adapter folded in, and its tokenizer in plain Hugging Face format (safetensors)."""
        import torch
        from transformers import AutoModelForCausalLM

        state = dict(self.plain_state(adapter))
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(self.model.config)
        with quiet():
            if self.model.config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            plain.generation_config = self.model.generation_config
            plain.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)

    def plain_state(self, adapter: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights under the names they have without adapters; then again those that an adapter is folded into.

        Of a sharded model on the CPU, one after the other: every process takes part.
        """
        for name, tensor in self.model.state_dict().items():
            if "lora_" not in name:
                yield name.replace(".base_layer", ""), _whole(tensor).cpu() if self.sharded else tensor
        for name, weight, whole in self.folded(adapter) if adapter is not None else ():
            folded = whole.to(weight.dtype)
            yield f"{name}.weight", folded.cpu() if self.sharded else folded


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered from all processes where it is divided over them."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else cast("torch.Tensor", gather())
