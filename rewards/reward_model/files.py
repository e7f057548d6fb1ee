"""Reward models on disk.

    reward_model.json     what the model is: base and tokenizer fingerprints, layers, labels, normalisation, figures
    head.safetensors      the head ("score.weight") and the LoRA adapter, for use on the shared base model
    config.json, model.safetensors, tokenizer files
                          the merged model, whole: `AutoModelForSequenceClassification.from_pretrained` opens it
    README.md             the model card

The merged model scores by the last token that is not padding, so its tokenizer pads with another token than the EOS and
puts the EOS there by itself: ``model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]`` are the raw
scores.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rewards.reward_model.card import model_card
from rewards.reward_model.parts import LabelRecord, Normalization, RewardModelParts
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import Task, load_task
from rlaif_env.models import (
    BUILTIN_MODEL,
    Backbone,
    backbone,
    default_device,
    encode,
    load_tokenizer,
    load_weights,
    refuse_pickled,
    tokenizer_fingerprint,
)
from rlaif_env.runs import write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["load", "save"]

Model = TypeVar("Model", bound=RewardModelParts)

_FORMAT = 1
_RECORD, _HEAD = "reward_model.json", "head.safetensors"
_SCORE = "score.weight"


def save(model: RewardModelParts, folder: Path, *, merged: bool, figures: Mapping[str, Any]) -> None:
    """Write a reward model into a new or empty folder; see the head of this module.

    Raises:
        RLAIFError: If the folder holds files already, or the architecture has no plain sequence-classification form.
    """
    from safetensors.torch import save_file

    if folder.exists() and any(folder.iterdir()):
        raise RLAIFError(f"expected {folder} to be new or empty, found files in it: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not model.owns_weights:
        tensors = {_SCORE: model.weight[None]}
        if model.adapter is not None:
            tensors |= model.backbone.adapter_state(model.adapter)
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors, folder / _HEAD, metadata={"format": "pt"})
    if whole := merged or model.owns_weights:
        _save_merged(model, folder)
    record = _record(model, figures)
    (folder / "README.md").write_text(model_card(record, whole), encoding="utf-8")
    write_json(folder / _RECORD, record)  # last: what is there before it is not yet a reward model


def _record(model: RewardModelParts, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What reward_model.json holds."""
    base = model.backbone
    lora = None
    if model.adapter is not None:
        config = base.model.peft_config[model.adapter]
        lora = {"rank": config.r, "alpha": config.lora_alpha, "targets": sorted(config.target_modules)}
    name = base.name if base.name == BUILTIN_MODEL or not Path(base.name).is_dir() else str(Path(base.name).resolve())
    return {
        "format": _FORMAT,
        "base": {"name": name, "fingerprint": None if model.owns_weights else base.fingerprint()},
        "tokenizer": {"fingerprint": tokenizer_fingerprint(base.tokenizer), "pad_token": base.tokenizer.pad_token},
        "task": {**model.task.to_json(), "source": {}},
        "layers": model.layers,
        "lora": lora,
        "max_tokens": model.max_tokens,
        "labels": dict(model.labels.sources),
        "provenance": model.labels.provenance,
        "normalization": asdict(model.normalization),
        "figures": dict(figures),
    }


def _save_merged(model: RewardModelParts, folder: Path) -> None:
    """Write the first layers, the adapter folded in, and the head as a Hugging Face sequence classifier."""
    import torch
    from transformers import AutoModelForSequenceClassification

    base = model.backbone
    tokenizer = _reward_tokenizer(base.tokenizer)
    config = copy.deepcopy(base.model.config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: model.layers]
    text.num_hidden_layers = model.layers
    config.num_labels, config.problem_type, config.id2label, config.label2id = 1, None, {0: "reward"}, {"reward": 0}
    config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        plain = AutoModelForSequenceClassification.from_config(config)
    trunk, prefix = base.model.base_model, f"{plain.base_model_prefix}."
    expected = {name: tuple(value.shape) for name, value in plain.state_dict().items()}
    heads = [name for name, shape in expected.items() if not name.startswith(prefix)]
    if len(heads) != 1 or expected[heads[0]] != (1, len(model.weight)):
        raise RLAIFError(
            f"expected {type(plain).__name__} to have one linear head without a bias, found {heads}; save with "
            "merged=False"
        )
    with base.merged(model.adapter):
        own = {prefix + name.replace(".base_layer", ""): value for name, value in trunk.state_dict().items()}
        state = {name: own[name] for name in expected if name in own}
        state[heads[0]] = model.weight[None].to(next(iter(state.values())).dtype)
        if missing := sorted(expected.keys() - state.keys()):
            raise RLAIFError(f"expected weights for {missing[0]} in {base.name}, found none; save with merged=False")
        plain.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _reward_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that ends every text in an EOS and pads with another token, for use outside this project.

    Any token but the EOS will do as padding: it only has to be told from the last one that is not.
    """
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer)
    start = encode(tokenizer, [""])[0]
    bos = [tokenizer.bos_token] if start else []
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*bos, str(tokenizer.eos_token)}]
    template = [*bos, "$A", str(tokenizer.eos_token)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        taken = (tokenizer.eos_token, tokenizer.bos_token)
        others = (token for token in tokenizer.all_special_tokens if token not in taken)
        made.pad_token = next(others, None) or tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    made.padding_side = "right"
    return made


def load(
    kind: Callable[..., Model],
    folder: Path,
    *,
    task: str | Path | Task | Mapping[str, Any] | None,
    base: str | Path | Backbone | None,
    device: str | None,
    dtype: str | None,
    standalone: bool,
) -> Model:
    """Make a reward model of this kind from a folder: see `rewards.RewardModel.load`."""
    folder, record = _read_record(folder)
    whole = standalone or record["base"]["fingerprint"] is None
    if whole:
        opened, weight = _open_merged(folder, record, device, dtype)
    else:
        opened, weight = _open_base(folder, record, base, device, dtype), None
    expected = record["tokenizer"]["fingerprint"]
    if (fingerprint := tokenizer_fingerprint(opened.tokenizer)) != expected:
        raise RLAIFError(
            f"expected the tokenizer that the reward model in {folder} was trained with (fingerprint {expected[:12]}), "
            f"found another ({fingerprint[:12]}) with {opened.name}; its token ids would mean something else. Train "
            "the model again"
        )
    trained_for = load_task(record["task"])
    wanted = trained_for if task is None else load_task(task)
    if wanted.kind != trained_for.kind:
        raise RLAIFError(
            f"expected a task of kind {trained_for.kind!r} for the reward model in {folder}, trained for "
            f"{trained_for.name!r}; found {wanted.name!r} of kind {wanted.kind!r}, whose texts are put together in "
            "another way"
        )
    adapter = None
    if weight is None:
        weight, adapter = _attach(folder, record, opened)
    try:
        return kind(
            opened,
            weight,
            wanted,
            layers=None if whole else record["layers"],
            adapter=adapter,
            max_tokens=record["max_tokens"],
            labels=LabelRecord(record["labels"]),
            normalization=Normalization(**record["normalization"]),
            owns_weights=whole,
        )
    except BaseException:
        if adapter is not None:
            opened.remove_lora(adapter)  # the base model is shared: what is not used leaves no trace on it
        raise


def _read_record(folder: Path) -> tuple[Path, dict[str, Any]]:
    """reward_model.json, and the folder it lies in: the one named or the ``model`` in it."""
    if not os.path.isdir(folder):
        raise RLAIFError(
            f"expected the folder of a reward model, found none at {folder}; train one with `rlaif train-rm`"
        )
    if not (folder / _RECORD).is_file() and (folder / "model" / _RECORD).is_file():
        folder = folder / "model"
    file = folder / _RECORD
    refuse_pickled(folder, "train the model again with `rlaif train-rm`")
    if not file.is_file():
        raise RLAIFError(
            f"expected a reward model in {folder}, found no {_RECORD} there: it says which base model, labels and "
            "encoding the weights belong to; train one with `rlaif train-rm`"
        )
    try:
        record = json.loads(file.read_bytes())
        if (version := record["format"]) == _FORMAT:
            _check_record(record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RLAIFError(f"expected {file} to describe a reward model, found something else: {error}") from error
    if version != _FORMAT:
        raise RLAIFError(f"expected {file} in format {_FORMAT}, found {version!r:.60}; use the version that wrote it")
    return folder, record


def _check_record(record: Mapping[str, Any]) -> None:
    """Hold a record to the kinds of values that `_record` writes, so that nothing else is asked of them later."""
    base, tokenizer, lora = record["base"], record["tokenizer"], record["lora"]
    kept, normalization = record["labels"], record["normalization"]
    kinds: dict[str, bool] = {
        "base": isinstance(base["name"], str) and isinstance(base["fingerprint"], str | None),
        "tokenizer": isinstance(tokenizer["fingerprint"], str) and isinstance(tokenizer["pad_token"], str | None),
        "task": isinstance(record["task"], Mapping),
        "layers": type(record["layers"]) is int and record["layers"] >= 1,
        "max_tokens": type(record["max_tokens"]) is int and record["max_tokens"] >= 2,
        "labels": isinstance(kept, Mapping) and all(type(count) is int for count in kept.values()),
        "normalization": normalization.keys() == asdict(Normalization()).keys()
        and math.isfinite(normalization["mean"])
        and math.isfinite(normalization["std"])
        and normalization["std"] > 0,
        "lora": lora is None
        or (
            type(lora["rank"]) is int
            and math.isfinite(lora["alpha"])
            and lora["alpha"] > 0
            and isinstance(lora["targets"], list)
            and all(isinstance(target, str) for target in lora["targets"])
        ),
    }
    if wrong := [name for name, right in kinds.items() if not right]:
        raise ValueError(f"{', '.join(wrong)} of the wrong kind")


def _open_base(
    folder: Path, record: Mapping[str, Any], base: str | Path | Backbone | None, device: str | None, dtype: str | None
) -> Backbone:
    """The base model that a head and an adapter belong on, the copy in memory if there is one."""
    name, expected = record["base"]["name"], record["base"]["fingerprint"]
    instead = "with base=..., or open the merged copy with standalone=True"
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


def _attach(folder: Path, record: Mapping[str, Any], base: Backbone) -> tuple[torch.Tensor, str | None]:
    """Read the head and put the adapter on the base model under a name of its own."""
    file = folder / _HEAD
    tensors = _tensors(file)
    if _SCORE not in tensors:
        raise RLAIFError(
            f"expected a head ({_SCORE}) in {file}, found {', '.join(sorted(tensors)[:3]) or 'nothing'}; "
            "without it the model has no scores. Train it again with `rlaif train-rm`"
        )
    weight = tensors.pop(_SCORE)
    if weight.ndim != 2 or weight.shape[0] != 1 or not weight.is_floating_point():
        raise RLAIFError(f"expected a head of shape (1, H) in {file}, found {tuple(weight.shape)} of {weight.dtype}")
    if (lora := record["lora"]) is None:
        return weight[0], None
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
    return weight[0], adapter


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except FileNotFoundError:
        raise RLAIFError(
            f"expected the head of the reward model at {file}, found no such file; train the model again with `rlaif "
            "train-rm`"
        ) from None
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise RLAIFError(f"expected safetensors in {file}, found something else: {error}") from error


def _open_merged(
    folder: Path, record: Mapping[str, Any], device: str | None, dtype: str | None
) -> tuple[Backbone, torch.Tensor]:
    """The whole model of its own, and its head."""
    from transformers import AutoModelForSequenceClassification

    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise RLAIFError(
            f"expected a merged model (config.json, model.safetensors) in {folder}, found none; save it with "
            "merged=True"
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
    tokenizer.pad_token = record["tokenizer"]["pad_token"]
    heads = [value for name, value in model.state_dict().items() if not name.startswith(f"{model.base_model_prefix}.")]
    return Backbone(model.to(device or default_device()), tokenizer, name=record["base"]["name"]), heads[0][0]
