"""What a reward model says of itself: labels, normalisation, reward_model.json, and the model card.

The card is README.md: what the model is, and above all which labels it was trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlaif_env.api import RLAIFError
from rlaif_env.models import refuse_pickled
from rlaif_env.records import write_json
from rlaif_env.tables import count_of, is_number

Provenance = Literal["human", "ai", "mixed"]
"""Who made a reward model's labels."""

BACKENDS = {"human": "human-rm", "ai": "distilled-rm", "mixed": "reward-model"}
MADE_BY = {"human": "people", "ai": "a language model", "mixed": "people and language models together"}

_RECORD, _FORMAT = "reward_model.json", 1


@dataclass(frozen=True)
class LabelRecord:
    """Who made the labels that a reward model was trained on."""

    sources: Mapping[str, int]  # training pairs by source: "human", "ai:<model>", ...

    @property
    def provenance(self) -> Provenance:
        """Who made them: "human" or "ai" where all labels are; else "mixed"."""
        kinds = {source.partition(":")[0] for source in self.sources}
        return "human" if kinds == {"human"} else "ai" if kinds == {"ai"} else "mixed"

    def __str__(self) -> str:
        return ", ".join(f"{count_of(count, 'pair')} from {source!r}" for source, count in self.sources.items())


@dataclass(frozen=True)
class Normalization:
    """How a raw score becomes the reward: (raw - mean) / std over the training responses; 0 and 1 leave it as it is."""

    kind: Literal["none", "standardize"] = "none"  # "none" or "standardize"
    mean: float = 0.0  # mean raw score of the training responses
    std: float = 1.0  # its standard deviation


def write_record(folder: Path, record: Mapping[str, Any], *, whole: bool) -> None:
    """Write the card and, last, reward_model.json; ``whole``: the merged model is there too."""
    (folder / "README.md").write_text(_card(record, whole), encoding="utf-8")
    write_json(folder / _RECORD, {"format": _FORMAT, **record})  # last: what is there before it is no reward model yet


def read_record(folder: Path) -> tuple[Path, dict[str, Any]]:
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
    """Hold a record to the kinds of values that `RewardModel.save` writes, so that nothing else is asked later."""
    base, tokenizer, lora, norm = (record[name] for name in ("base", "tokenizer", "lora", "normalization"))
    kinds: dict[str, bool] = {
        "base": isinstance(base["name"], str) and isinstance(base["fingerprint"], str | None),
        "tokenizer": isinstance(tokenizer["fingerprint"], str) and isinstance(tokenizer["pad_token"], str | None),
        "task": isinstance(record["task"], Mapping),
        "layers": type(record["layers"]) is int and record["layers"] >= 1,
        "max_tokens": type(record["max_tokens"]) is int and record["max_tokens"] >= 2,
        "labels": isinstance(record["labels"], Mapping) and {*map(type, record["labels"].values())} <= {int},
        "normalization": norm.keys() == asdict(Normalization()).keys()
        and (is_number(norm["mean"]) and is_number(norm["std"]) and norm["std"] > 0),
        "lora": lora is None
        or (
            (type(lora["rank"]) is int and is_number(lora["alpha"]) and lora["alpha"] > 0)
            and (isinstance(lora["targets"], list) and {*map(type, lora["targets"])} <= {str})
        ),
    }
    if wrong := [name for name, right in kinds.items() if not right]:
        raise ValueError(f"{', '.join(wrong)} of the wrong kind")


_MERGED = """
Or open the merged model in plain transformers; the tokenizer puts the EOS after each text and pads with another token:

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    raw = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
"""


def _card(record: Mapping[str, Any], whole: bool) -> str:
    labels, task, norm = LabelRecord(record["labels"]), record["task"], record["normalization"]
    backend = BACKENDS[labels.provenance]
    who = MADE_BY[labels.provenance] + (" (no human label among them)" if labels.provenance == "ai" else "")
    made_of = "a linear head"
    if record["base"]["fingerprint"] is None:
        made_of = "all weights trained, with a linear head"
    elif record["lora"] is not None:
        made_of = f"a LoRA adapter of rank {record['lora']['rank']} and a linear head"
    rewards = "The reward is the raw score."
    if norm["kind"] != "none":
        scaled = f"(raw score - {norm['mean']:.4g}) / {norm['std']:.4g}"
        rewards = f"The reward is {scaled}: standardised over the training responses."
    figures = f"\n## Figures\n\n```json\n{json.dumps(record['figures'], indent=2)}\n```\n" if record["figures"] else ""
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model]
---

# Reward model for {task["name"]}

Trained on labels by {who}: {labels}.

It scores {task["criterion"]}. Base model {record["base"]["name"]}, {made_of}, on the state after {record["layers"]} \
layers at the EOS. Texts over {record["max_tokens"]} tokens keep their end. {rewards}

Use it as the backend "{backend}": `rewards.make_reward("{backend}", model="<this folder>")`.
{_MERGED if whole else ""}{figures}"""
