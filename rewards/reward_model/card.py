"""A reward model's README.md: what it is, and above all which labels it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rewards.reward_model.parts import BACKENDS, MADE_BY, LabelRecord

__all__ = ["model_card"]

_MERGED = """
Or open the merged model in plain transformers; the tokenizer puts the EOS after each text and pads with another token:

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    raw = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
"""


def model_card(record: Mapping[str, Any], whole: bool) -> str:
    """The text of the card of a model that reward_model.json describes; ``whole``: the merged model is there too."""
    labels, task, norm = LabelRecord(record["labels"]), record["task"], record["normalization"]
    backend = BACKENDS[labels.provenance]
    who = MADE_BY[labels.provenance] + (" (no human label among them)" if labels.provenance == "ai" else "")
    made_of = (
        "a linear head"
        if (lora := record["lora"]) is None
        else f"a LoRA adapter of rank {lora['rank']} and a linear head"
    )
    if record["base"]["fingerprint"] is None:
        made_of = "all weights trained, with a linear head"
    rewards = "The reward is the raw score."
    if norm["kind"] != "none":
        rewards = (
            f"The reward is (raw score - {norm['mean']:.4g}) / {norm['std']:.4g}: standardised over the training "
            "responses."
        )
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
