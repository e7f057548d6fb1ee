"""Causal language models: loaded once, shared by everybody, with LoRA adapters switched by name.

A `Backbone` is one model and its tokenizer in memory. The policy (its adapter on), the SFT reference (adapters off),
an LLM scorer and reward models (their own adapters and heads) that start from the same checkpoint share it, so that
a run needs one copy of the weights. `backbone(name)` returns the copy that this process already has, if any.

This is the only module that loads weights, encodes and pads. torch is imported inside the functions that need it, so
that an environment that only wants a tokenizer does not pay for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import RLAIFError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BUILTIN_MODEL",
    "Backbone",
    "backbone",
    "default_device",
    "default_dtype",
    "encode",
    "head_logits",
    "load_tokenizer",
    "logit_width",
    "pad_rows",
    "plain_head",
    "tokenizer_fingerprint",
]

BUILTIN_MODEL = "smollm2-135m-instruct"
"""Name of the model that needs no hub: see `rlaif_env.assets`."""

_loaded: weakref.WeakValueDictionary[tuple[str, str, str], Backbone] = weakref.WeakValueDictionary()


def resolve(name: str | Path) -> str:
    """The folder or hub id behind a model name; the built-in model is fetched on first use.

    Raises:
        RLAIFError: If a folder holds no Hugging Face model, or only pickled weights.
    """
    if str(name) == BUILTIN_MODEL:
        from rlaif_env.assets import model_folder

        return str(model_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RLAIFError(f"expected a model folder with a config.json, found none in {folder}")
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickled and not any(folder.glob("*.safetensors")):
            raise RLAIFError(
                f"expected safetensors weights in {folder}, found only pickled ones ({', '.join(pickled[:3])}), which "
                "can run code when opened; convert them on a machine you trust with model.save_pretrained(folder)"
            )
        return str(folder.resolve())
    if folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise RLAIFError(f"expected a model folder, found nothing at {folder}")
    return str(name)


def _unknown_model(name: str | Path, error: Exception) -> RLAIFError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if not first or not isinstance(error, OSError | ValueError | KeyError):
        first = f"{type(error).__name__}: {first}".rstrip(": ")
    return RLAIFError(
        f"unknown model {str(name)!r}: expected {BUILTIN_MODEL!r} (built in), a model folder, or a Hugging Face id "
        f"that can be reached ({first})"
    )


def load_tokenizer(name: str | Path = BUILTIN_MODEL) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a pad token pads with EOS (every room carries explicit masks).

    Raises:
        RLAIFError: If the model is unknown or the tokenizer has no EOS token.
    """
    from transformers import AutoTokenizer

    path = resolve(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        math.isfinite(tokenizer.model_max_length)  # a number, as everybody who encodes takes for granted
    except Exception as error:  # a damaged file shows as any of a dozen kinds
        raise _unknown_model(name, error) from error
    if tokenizer.eos_token_id is None:
        raise RLAIFError(
            f"expected the tokenizer of {str(name)!r} to have an EOS token, found none; set tokenizer.eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def logit_width(name: str | Path = BUILTIN_MODEL) -> int:
    """V: how many logits the model has, which may be more than its tokenizer knows."""
    from transformers import AutoConfig

    path = resolve(name)
    try:
        return int(AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().vocab_size)
    except Exception as error:
        raise _unknown_model(name, error) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does to text: its vocabulary and special tokens."""
    facts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of n texts, with the BOS token where the tokenizer adds one, never an EOS, never truncated."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None and _adds_bos(tokenizer):
        rows = [[tokenizer.bos_token_id, *row] for row in rows]
    return rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers while it reads or writes weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    with_special = tokenizer("a")["input_ids"]
    return bool(with_special) and with_special[0] == tokenizer.bos_token_id


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, *, side: str = "right", width: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad n rows of ids to one width: ids (n, L) and mask (n, L), 1 where real."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise RLAIFError(f"expected at most {width} tokens, found {len(row)} in row {i}")
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = row
        mask[i, where] = 1
    return ids, mask


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


def default_device() -> str:
    """RLAIF_DEVICE, else the GPU where there is one."""
    import torch

    return os.environ.get("RLAIF_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: str) -> str:
    """RLAIF_DTYPE, else bfloat16 on a GPU that has it and float32 elsewhere."""
    import torch

    fast = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return os.environ.get("RLAIF_DTYPE") or ("bfloat16" if fast else "float32")


def backbone(
    name: str | Path = BUILTIN_MODEL,
    *,
    device: str | None = None,
    dtype: str | None = None,
    shared: bool = True,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load a causal LM, or return the copy already in memory.

    Args:
        name: `BUILTIN_MODEL`, a folder, or a Hugging Face id.
        device: "cpu", "cuda", ...; None is `default_device`.
        dtype: "float32", "bfloat16" or "float16"; None is `default_dtype`.
        shared: False loads a second copy of the weights (full fine-tuning wants its own).
        trust_remote_code: Whether code that comes with a hub model may run.

    Raises:
        RLAIFError: If the model is unknown, has pickled weights only, or has fewer logits than its tokenizer ids.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = device or default_device()
    dtype = dtype or default_dtype(device)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise RLAIFError(f"expected dtype 'float32', 'bfloat16' or 'float16', found {dtype!r}")
    path = resolve(name)
    key = (path, device, dtype)
    if shared and (found := _loaded.get(key)) is not None:
        return found
    tokenizer = load_tokenizer(name)
    try:
        with _quiet():
            model, said = cast(Any, AutoModelForCausalLM).from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:
        raise _unknown_model(name, error) from error
    if missing := sorted(said["missing_keys"]):  # transformers would go on with random values in their place
        raise RLAIFError(
            f"expected the weights of the whole model in {path}, found no {', '.join(missing[:3])}"
            f"{f' (and {len(missing) - 3} more)' if len(missing) > 3 else ''}; its config.json is of another model, or "
            "the download was cut short"
        )
    made = Backbone(model.to(device), tokenizer, name=str(name))
    if shared:
        _loaded[key] = made
    return made


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
            raise RLAIFError(
                f"expected a tokenizer with pad and EOS tokens, found no {lacks} token; "
                f"set tokenizer.{lacks.lower()}_token"
            )
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
        config = LoraConfig(
            r=rank,
            lora_alpha=cast(int, alpha),
            target_modules=wanted,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
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
        if adapter == before:
            yield self.model
            return
        self._switch(adapter)
        try:
            yield self.model
        finally:
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
        found = {name: tuple(v.shape) for name, v in state.items()}
        expected = {name: tuple(p.shape) for name, p in parameters.items()}
        if found != expected:
            odd = sorted(set(found.items()) ^ set(expected.items()))[:2]
            raise RLAIFError(f"expected the parameters of adapter {adapter!r}, found others: {odd}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])

    def save_merged(self, adapter: str | None, folder: Path) -> None:
        """Write the model, with an adapter folded in, and its tokenizer in plain Hugging Face format (safetensors)."""
        from transformers import AutoModelForCausalLM

        with self.merged(adapter), _quiet():
            state = {
                name.replace(".base_layer", ""): tensor
                for name, tensor in self.model.state_dict().items()
                if "lora_" not in name
            }
            import torch

            with torch.device("meta"):
                plain = AutoModelForCausalLM.from_config(self.model.config)
            if self.model.config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            plain.generation_config = self.model.generation_config
            plain.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
