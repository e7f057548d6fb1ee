"""Causal language models by name: found, checked, loaded once and shared by everybody.

`backbone(name)` returns the copy that this process already has, if any. torch is imported inside the functions that
need it, so that an environment that only wants a tokenizer does not pay for it.
"""

from __future__ import annotations

import math
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_env.api import RLAIFError
from rlaif_env.models.adapters import Backbone, quiet
from rlaif_env.models.architecture import end_ids
from rlaif_env.models.assets import BUILTIN_MODEL, MODELS, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_loaded: weakref.WeakValueDictionary[tuple[str, str, str], Backbone] = weakref.WeakValueDictionary()


def resolve(name: str | Path) -> str:
    """The folder or hub id behind a model name; a model of `rlaif_env.models.assets.MODELS` is fetched on first use.

    Raises:
        RLAIFError: If such a model cannot be fetched (its terms may have to be accepted first), or a folder holds no
            Hugging Face model, or only pickled weights.
    """
    if str(name) in MODELS:
        return str(model_folder(str(name)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RLAIFError(f"expected a model folder with a config.json, found none in {folder}")
        refuse_pickled(folder, "convert them on a machine you trust with model.save_pretrained(folder)")
        return str(folder.resolve())
    if folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise RLAIFError(f"expected a model folder, found nothing at {folder}")
    return str(name)


def refuse_pickled(folder: Path, mend: str) -> None:
    """An error that says how to mend it if a folder's only weights are pickled."""
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise RLAIFError(
            f"expected safetensors weights in {folder}, found only pickled ones ({', '.join(pickled[:3])}), which can "
            f"run code when opened; {mend}"
        )


def load_weights(kind: Any, path: str | Path, dtype: str, *, trust_remote_code: bool = False) -> tuple[Any, list[str]]:
    """A model of an auto class of transformers from safetensors, and the weights it would fill with random values."""
    import torch

    with quiet():
        model, info = kind.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    return model, sorted(info["missing_keys"])


def _unknown_model(name: str | Path, error: Exception) -> RLAIFError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if not first or not isinstance(error, OSError | ValueError | KeyError):
        first = f"{type(error).__name__}: {first}".rstrip(": ")
    return RLAIFError(
        f"unknown model {str(name)!r}: expected {' or '.join(map(repr, MODELS))} (built in), a model folder, or a "
        f"Hugging Face id that can be reached ({first})"
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


def model_end_ids(name: str | Path = BUILTIN_MODEL) -> list[int]:
    """The tokens that end a response of a model: its tokenizer's EOS, and those of its generation config if it has one.

    Raises:
        RLAIFError: If the model is unknown or its generation config is damaged.
    """
    from transformers import GenerationConfig

    path = resolve(name)
    try:
        config = GenerationConfig.from_pretrained(path)
    except Exception as error:
        if not isinstance(error, OSError) or (Path(path) / "generation_config.json").is_file():
            raise _unknown_model(name, error) from error
        config = None  # it has none
    return end_ids(load_tokenizer(name), config)


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
        name: One of `rlaif_env.models.assets.MODELS`, a folder, or a Hugging Face id.
        device: "cpu", "cuda", ...; None is `default_device`.
        dtype: "float32", "bfloat16" or "float16"; None is `default_dtype`.
        shared: False loads a second copy of the weights (full fine-tuning wants its own).
        trust_remote_code: Whether code that comes with a hub model may run.

    Raises:
        RLAIFError: If the model is unknown, has pickled weights only, or has fewer logits than its tokenizer ids.
    """
    from transformers import AutoModelForCausalLM

    device = device or default_device()
    dtype = dtype or default_dtype(device)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise RLAIFError(f"expected dtype 'float32', 'bfloat16' or 'float16', found {dtype!r}")
    path = resolve(name)
    key = (path, device, dtype)
    if shared and (loaded := _loaded.get(key)) is not None:
        return loaded
    tokenizer = load_tokenizer(name)
    try:
        model, missing = load_weights(AutoModelForCausalLM, path, dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unknown_model(name, error) from error
    if missing:
        raise RLAIFError(
            f"expected the weights of the whole model in {path}, found no {', '.join(missing[:3])}"
            f"{f' (and {len(missing) - 3} more)' if len(missing) > 3 else ''}; its config.json is of another model, or "
            "the download was cut short"
        )
    made = Backbone(model.to(device), tokenizer, name=str(name))
    if shared:
        _loaded[key] = made
    return made
