"""A reward model's weights on disk: head.safetensors for use on the shared base model, and the merged model, whole.

The merged model scores by the last token that is not padding, so its tokenizer pads with another token than the EOS and
puts the EOS there by itself: ``model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]`` are the raw
scores.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlaif_env.api import RLAIFError
from rlaif_env.models import Backbone, backbone, default_device, encode, load_tokenizer, load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD = "head.safetensors"
_SCORE = "score.weight"


def save_head(folder: Path, base: Backbone, weight: torch.Tensor, adapter: str | None) -> None:
    """Write the head, (H,), and the adapter."""
    tensors = {_SCORE: weight[None], **({} if adapter is None else base.adapter_state(adapter))}
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / _HEAD, metadata={"format": "pt"})


def read_head(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The head, (H,), and the adapter's values."""
    file = folder / _HEAD
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise RLAIFError(
            f"expected the head of the reward model at {file}, found no such file; train the model again with `rlaif "
            "train-rm`"
        ) from None
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise RLAIFError(f"expected safetensors in {file}, found something else: {error}") from error
    if _SCORE not in tensors:
        raise RLAIFError(
            f"expected a head ({_SCORE}) in {file}, found {', '.join(sorted(tensors)[:3]) or 'nothing'}; without it "
            "the model has no scores. Train it again with `rlaif train-rm`"
        )
    weight = tensors.pop(_SCORE)
    if weight.ndim != 2 or weight.shape[0] != 1 or not weight.is_floating_point():
        raise RLAIFError(f"expected a head of shape (1, H) in {file}, found {tuple(weight.shape)} of {weight.dtype}")
    return weight[0], tensors


def attach_adapter(folder: Path, base: Backbone, lora: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Put an adapter on the base model under a name of its own; one that does not fit leaves no trace on it."""
    file = folder / _HEAD
    ranks = {value.shape[0] if value.ndim else 0 for name, value in tensors.items() if "lora_A" in name}
    if ranks != {lora["rank"]}:  # also: nothing larger than what is in the file gets allocated
        raise RLAIFError(f"expected an adapter of rank {lora['rank']} in {file}, found {sorted(ranks)}")
    adapter = base.free_name("reward")
    try:
        base.add_lora(adapter, rank=lora["rank"], alpha=lora["alpha"], targets=lora["targets"])
        base.load_adapter_state(adapter, tensors)
    except (ValueError, RuntimeError, TypeError) as error:
        base.remove_lora(adapter)
        raise RLAIFError(f"expected an adapter for {base.name} in {file}, found another: {error}") from error
    return adapter


def open_base(
    folder: Path, name: str, expected: str, base: str | Path | Backbone | None, device: str | None, dtype: str | None
) -> Backbone:
    """The base model that a head and an adapter belong on, the copy in memory if there is one."""
    instead = "with base=... (--reward.base), or open the merged copy with standalone=True (--reward.standalone)"
    if not isinstance(base, Backbone):
        try:
            base = backbone(base or name, device=device, dtype=dtype)
        except RLAIFError as error:
            raise RLAIFError(
                f"expected the base model of the reward model in {folder}, found: {error}. Say where it is {instead}"
            ) from error
    if (fingerprint := base.fingerprint()) != expected:
        raise RLAIFError(
            f"expected the base model that the reward model in {folder} was trained on ({name}, fingerprint "
            f"{expected[:12]}), found another ({base.name}, {fingerprint[:12]}); its states would mean something else. "
            f"Name the right one {instead}"
        )
    return base


def check_classifier(base: Backbone) -> None:
    """Raise RLAIFError if transformers has no sequence classifier of a model's architecture to save it as."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

    if type(base.model.config) not in CLASSIFIERS:
        raise RLAIFError(
            f"expected an architecture with a sequence classifier in transformers, found {base.name}, "
            f"{base.model.config.model_type!r}, which has none; keep head and adapter on their base model with "
            "merged=False (--no-merged)"
        )


def save_merged(folder: Path, base: Backbone, weight: torch.Tensor, layers: int, adapter: str | None) -> None:
    """Write the first layers, the adapter folded in, and the head as a Hugging Face sequence classifier."""
    from transformers import AutoModelForSequenceClassification

    check_classifier(base)
    tokenizer = _reward_tokenizer(base.tokenizer)
    config = copy.deepcopy(base.model.config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    if kinds := getattr(text, "attention_layers", None):  # GPT-Neo's, which it reads from a list of repetitions
        text.attention_layers, text.attention_types = kinds[:layers], [[kinds[:layers], 1]]
    text.num_hidden_layers = layers
    config.num_labels, config.problem_type, config.id2label, config.label2id = 1, None, {0: "reward"}, {"reward": 0}
    config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        plain = AutoModelForSequenceClassification.from_config(config)
    prefix, expected = f"{plain.base_model_prefix}.", plain.state_dict()
    heads = [name for name in expected if not name.startswith(prefix)]
    if len(heads) != 1 or expected[heads[0]].shape != (1, len(weight)):
        raise RLAIFError(
            f"expected {type(plain).__name__} to have one linear head without a bias, found {heads}; save with "
            "merged=False (--no-merged)"
        )
    with base.merged(adapter):
        whole = base.model.base_model
        trunk = (base.model.model if whole is base.model else whole).state_dict()
        own = {prefix + name.replace(".base_layer", ""): value for name, value in trunk.items()}
        state = {name: own[name] for name in expected if name in own}
        state[heads[0]] = weight[None].to(next(iter(state.values())).dtype)
        if missing := sorted(expected.keys() - state.keys()):
            raise RLAIFError(f"expected weights for {missing[0]} in {base.name}, found none; save with --no-merged")
        plain.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _reward_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that ends every text in an EOS and pads with another token, for use outside this project.

    Any token but the EOS will do as padding: it only has to be told from the last one that is not.
    """
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer)
    bos = [tokenizer.bos_token] if encode(tokenizer, [""])[0] else []
    template = [*bos, "$A", str(tokenizer.eos_token)]
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*template} - {"$A"}]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        taken = (tokenizer.eos_token, tokenizer.bos_token)
        others = (token for token in tokenizer.all_special_tokens if token not in taken)
        made.pad_token = next(others, None) or tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    made.padding_side = "right"
    return made


def open_merged(
    folder: Path, name: str, pad_token: str | None, device: str | None, dtype: str | None
) -> tuple[Backbone, torch.Tensor]:
    """The whole model of its own, padding as in training, and its head, (H,)."""
    from transformers import AutoModelForSequenceClassification

    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise RLAIFError(
            f"expected a merged model (config.json, model.safetensors) in {folder}, found none; save it with "
            "merged=True (--merged)"
        )
    try:
        model, missing = load_weights(AutoModelForSequenceClassification, folder, dtype or "float32")
    except Exception as error:  # a damaged config.json or model.safetensors shows as any of a dozen kinds
        raise RLAIFError(
            f"expected a merged model in {folder}, found one that cannot be opened ({type(error).__name__}: "
            f"{str(error)[:200]}); train it again with `rlaif train-rm`"
        ) from error
    if missing:
        raise RLAIFError(
            f"expected the weights of the whole model in {folder}, found no {', '.join(missing[:3])}; without its head "
            "a model has no scores. Train it again with `rlaif train-rm`"
        )
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = pad_token
    heads = [value for key, value in model.state_dict().items() if not key.startswith(f"{model.base_model_prefix}.")]
    return Backbone(model.to(device or default_device()), tokenizer, name=name), heads[0][0]
