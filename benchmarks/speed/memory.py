"""Memory of policy, reference, reward model and scorer on one copy of weights: ``python -m benchmarks.speed.memory``.

Each measurement is a fresh process. "held" is what stays resident once everything is loaded, over the process with its
libraries imported; "peak" is the highest point of one cycle: responses sampled, scored by everybody, one update.
Against it stands the policy alone doing the same cycle with a reward that costs nothing: that is the base weights plus
activations.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.speed.one_update import WORDS
from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL
from rlaif_env.tables import Cell, Table

Sizes = dict[str, float]
"""Bytes by name."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
"""Makes glibc give freed memory back at once; else the peak holds what happened not to be given back, +-350 MB."""

_PHASES = ("sample", "score", "update")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both processes and print the ratios; the exit code is 1 where one of them is above the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.memory", description=__doc__)
    parser.add_argument("--model", default=BUILTIN_MODEL, help="name or folder")
    parser.add_argument("--responses", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16, help="longest response")
    parser.add_argument("--limit", type=float, default=1.3)
    options = parser.parse_args(argv)
    what = (options.model, options.responses, options.tokens)
    alone, everybody = (apart(measure, *what, everything) for everything in (False, True))
    held, peak = everybody["held"] / everybody["weights"], everybody["peak"] / alone["peak"]
    ratios = {"held": f"{held:.2f} x weights", "peak": f"{peak:.2f} x policy alone"}
    rows: list[list[Cell]] = []
    for name in ("weights", "held", "peak", *_PHASES):
        rows.append([name, *(f"{side[name] / 2**20:.0f}" for side in (alone, everybody)), ratios.get(name)])
    title = f"{options.model}, {options.responses} responses of {options.tokens} tokens: MB above the libraries"
    columns = ["", "policy alone", "policy, reference, reward model, scorer", "ratio"]
    print(Table(title, columns, rows, "Peaks of a cycle and of its phases.").markdown())
    return int(max(held, peak) > options.limit)


def apart(call: Callable[..., Sizes], *arguments: Any) -> Sizes:
    """What a function measures in a fresh process of its own, whose allocator gives freed memory back at once.

    Raises:
        RLAIFError: If the process ends before the function does.
    """
    os.environ.update(ALLOCATOR)  # read when a process starts
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except BrokenProcessPool as error:
            raise RLAIFError(f"expected the measuring process to end well, found: {error}") from error


def measure(model: str, responses: int, tokens: int, everything: bool) -> Sizes:
    """One cycle of so many responses in this process: bytes of the weights, held, at the peak, at that of each phase.

    With ``everything`` a reward model (with an adapter of its own on all layers) and an LLM scorer are on the same
    weights too.
    """
    import numpy as np
    import peft
    import torch
    from gymnasium.spaces import MultiDiscrete
    from transformers import AutoConfig, AutoModelForCausalLM

    from agents.reinforce import ReinforceAgent
    from rewards.compose import compose
    from rewards.direct_score import DirectLLMScore
    from rewards.language_model.local import LocalLM
    from rewards.reward_model.features import depth_of, lora_targets
    from rewards.reward_model.model import RewardModel
    from rlaif_env.models import backbone, encode, load_tokenizer, pad_rows, resolve

    # The libraries' share: adapters' code, the architecture's code (built without weights), the tokenizer.
    tokenizer = load_tokenizer(model)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve(model)))
        skeleton.add_adapter(peft.LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    libraries = _status("VmRSS")
    base = backbone(model, device="cpu", dtype="float32")
    storages = (p.untyped_storage() for p in base.model.parameters())
    weights = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    envs = SimpleNamespace(group_size=2, single_action_space=MultiDiscrete([base.logit_width] * tokens))
    agent = ReinforceAgent(base, envs=envs)
    parts: dict[str, Any] = {"nothing": (1.0, lambda prompts, answers: [float(len(answer)) for answer in answers])}
    if everything:
        base.add_lora("reward", rank=16, alpha=32.0, targets=lora_targets(base.model, depth_of(base.model)))
        width = int(base.model.config.get_text_config().hidden_size)
        parts["people"] = (1.0, RewardModel(base, torch.ones(width) / width, adapter="reward"))
        parts["scorer"] = (1.0, DirectLLMScore(LocalLM(base), minimum_mass=0.0))
    reward = compose(parts)
    prompts = [" ".join(WORDS[i % 9 : i % 9 + 8]) for i in range(responses // 2) for _ in range(2)]
    ids, mask = pad_rows(encode(tokenizer, prompts), tokenizer.pad_token_id, side="left")
    gc.collect()
    sizes: Sizes = {"weights": weights, "held": _status("VmRSS") - libraries}

    def peak_since(name: str) -> None:
        sizes[name] = peak() - libraries
        reset_peak()

    reset_peak()
    actions = agent.act({"input_ids": ids, "attention_mask": mask})
    peak_since("sample")
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in actions]
    scores = reward.score(prompts, texts)
    peak_since("score")
    agent.update(np.asarray(scores.values))
    peak_since("update")
    return sizes | {"peak": max(sizes[name] for name in _PHASES)}


def _status(name: str) -> int:
    """A size from /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RLAIFError(f"expected {name} in /proc/self/status, found none; this benchmark needs Linux")


def peak() -> int:
    """The highest resident size since `reset_peak`, or since the start where the system cannot reset it."""
    try:
        return _status("VmHWM")
    except RLAIFError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Let `peak` begin anew, on Linux."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    sys.exit(main())
