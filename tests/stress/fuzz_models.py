"""Readers of weights, tried on a tiny model: reward-model folders, checkpoints of a training, whole model folders."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.stress.fuzz_inputs import damaged, json_input, safetensors_input
from tests.stress.fuzz_readers import Read, Reader, same

if TYPE_CHECKING:
    from rlaif_env.models import Backbone

__all__ = ["MODEL_READERS", "tiny_backbone"]


def tiny_backbone() -> Backbone:
    """The smallest of `tests.tiny`."""
    from tests import tiny  # here: the other readers need no torch

    return tiny.tiny_backbone(**tiny.SMALLEST)


def _reward_model(base: Backbone, *, adapter: bool) -> Any:
    import torch

    from rewards.reward_model.features import lora_targets
    from rewards.reward_model.model import RewardModel
    from rewards.reward_model.record import LabelRecord

    name = None
    if adapter:
        name = base.free_name("seed")
        base.add_lora(name, rank=2, alpha=4.0, targets=lora_targets(base.model, 1))
    weight = torch.linspace(-1, 1, 8)
    return RewardModel(base, weight, layers=1, adapter=name, labels=LabelRecord({"human": 3}))


def _either(rng: random.Random) -> bytes:
    """A number that decides which file is damaged and how; the reader has the whole files."""
    return rng.randbytes(8)


def _changed(rng: random.Random, name: str, data: bytes) -> bytes:
    if name.endswith(".json") and rng.random() < 0.7:
        return json_input(rng, [json.loads(data)])
    return safetensors_input(rng, [data]) if name.endswith(".safetensors") else damaged(rng, data)


def _rm_folder(folder: Path) -> Read:
    """A reward model on a base model in memory: reward_model.json or head.safetensors changed."""
    import numpy as np

    from rewards.reward_model.model import RewardModel

    base = tiny_backbone()
    for adapter in (False, True):
        made = _reward_model(base, adapter=adapter)
        made.save(folder / f"seed-{adapter}", merged=False)
        if made.adapter:
            base.remove_lora(made.adapter)

    def read(data: bytes) -> None:
        rng = random.Random(data)
        seed, rm = folder / f"seed-{rng.random() < 0.5}", folder / "rm"
        _copied_and_changed(rng, seed, rm, ("reward_model.json", "head.safetensors"))
        before = len(base.adapters)
        made = None
        try:
            made = RewardModel.load(rm, base=base)
            scores = made.score(["a film"], [" was good."])
            same(True, bool(np.isfinite(scores.info["raw_score"]).all()), "finite raw scores")
        finally:
            if made is not None and made.adapter is not None:
                base.remove_lora(made.adapter)
            same(before, len(base.adapters), "adapters on the shared model")

    return read


def _rm_merged(folder: Path) -> Read:
    """A merged reward model, opened by transformers: any of its files changed."""
    from rewards.reward_model.model import RewardModel

    _reward_model(tiny_backbone(), adapter=False).save(folder / "seed", merged=True)

    def read(data: bytes) -> None:
        _copied_and_changed(random.Random(data), folder / "seed", folder / "rm", but=("README.md", "head.safetensors"))
        RewardModel.load(folder / "rm", standalone=True, device="cpu").score(["a"], ["b"])

    return read


def _model_folder(folder: Path) -> Read:
    """A policy's folder, opened by transformers: any of its files changed."""
    from rlaif_env.models import backbone, logit_width

    tiny_backbone().save_merged(None, folder / "seed")

    def read(data: bytes) -> None:
        _copied_and_changed(random.Random(data), folder / "seed", folder / "model")
        logit_width(folder / "model")
        made = backbone(folder / "model", device="cpu", dtype="float32", shared=False)
        same(True, made.logit_width > 0, "a vocabulary")

    return read


def _copied_and_changed(
    rng: random.Random, seed: Path, to: Path, names: Sequence[str] = (), but: Sequence[str] = ()
) -> tuple[str, bool]:
    """Copy a folder and change one of its files, of these names if any are given: its name, and whether it differs."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(seed, to)
    name = rng.choice(names or sorted(p.name for p in to.iterdir() if p.name not in but))
    whole = (to / name).read_bytes()
    (to / name).write_bytes(changed := _changed(rng, name, whole))
    return name, changed != whole


def _checkpoint(folder: Path) -> Read:
    """A checkpoint of a training: a file changed; in half of them the manifest made to fit, as an attacker would."""
    from agents import ReinforceAgent, ReinforceConfig
    from agents.training import checkpoints
    from rlaif_env.models import LoraConfig
    from tests.tiny import shape_of

    model = tiny_backbone()
    agent = ReinforceAgent(model, ReinforceConfig(baseline="value", lora=LoraConfig(2)), envs=shape_of(model))
    seed, there = folder / "seed", folder / "000001"
    seed.mkdir()
    tensors = checkpoints.agent_tensors(agent)
    checkpoints.write(seed, tensors, {"agent": checkpoints.agent_values(agent), "position": {"metrics.jsonl": 0}})

    def read(data: bytes) -> None:
        rng = random.Random(data)
        name, differs = _copied_and_changed(rng, seed, there)
        fits = rng.random() < 0.5 and name != "manifest.json"
        if fits:
            _refit(there)
        found = checkpoints.read(there)
        same(False, differs and not fits, f"{name}: that another byte was not noticed")
        checkpoints.load_agent(agent, found.tensors, found.values.get("agent", {}))

    return read


def _refit(folder: Path) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    file.write_text(json.dumps(manifest, indent=2) + "\n")


MODEL_READERS: dict[str, Reader] = {
    "reward-model": Reader(_either, _rm_folder),
    "checkpoint": Reader(_either, _checkpoint),
    "merged-reward-model": Reader(_either, _rm_merged),
    "model-folder": Reader(_either, _model_folder),
}
"""The readers that need a model. The last two go through transformers and take about 20 ms an input."""
