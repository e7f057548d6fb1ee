"""What a training begins with: room for its texts, the weights and prompts it began with, the scale of its reward."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from agents.answers import answer
from agents.reinforce import ReinforceAgent
from agents.training.config import reward_facts
from agents.training.heldout import read_json
from agents.training.safety import Parts
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import Task
from rlaif_env.models import check_longest, context_of
from rlaif_env.records import write_json
from rlaif_env.runs import RunFolder


def check_room(agent: ReinforceAgent, envs: VectorEnv[Any, Any, Any]) -> None:
    """Raise RLAIFError if a prompt and a response do not fit into the policy's or judge's context, or into memory."""
    core: Any = envs.unwrapped.core  # type: ignore[attr-defined]
    longest_prompt = int(core.prompt_lengths.max())
    longest, context = longest_prompt + core.T, context_of(agent.policy.backbone.model)
    lower = "the task's max_prompt_tokens (with truncate_prompts) or max_response_tokens"
    if context is not None and longest > context:
        raise RLAIFError(
            f"expected prompts and responses of at most {context} tokens, the policy's context, found prompts of up to "
            f"{longest_prompt} and responses of {core.T}; lower {lower}"
        )
    if callable(of_judge := getattr(core.backend, "check_room", None)):
        of_judge(core.prompts, core.T)
    check_longest(agent.policy.backbone.model, longest, lower)


def check_start(run: RunFolder, agent: ReinforceAgent, task: Task) -> None:
    """Record what the run begins with, or raise RLAIFError if the weights or prompts are not those it began with."""
    facts = [task.template, task.system, *task.prompts("train")]
    prompts = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    start, file = {"policy": agent.policy.fingerprint(), "prompts": prompts}, run.path / "start.json"
    if not file.exists():
        write_json(file, start)
        return
    recorded = read_json(file)
    if odd := [name for name in start if recorded.get(name) != start[name]]:
        raise RLAIFError(
            f"expected the {' and '.join(odd)} this run began with (fingerprints in {file}), found others: put back "
            "the model and task files it was started with, or name another folder"
        )


def calibrate(parts: Parts, run: RunFolder, seed: int) -> None:
    """Give a reward that asks for them samples of the policy as it is before training, the same each time.

    A backend asks by ``calibration_samples``, a number above 0; ``calibrate(prompts, responses)`` then sets its
    ``moments``, which JSON can hold. They stay in the run folder (calibration.json): a run that is gone on with has
    them from there, and so has the backend of each of its environments. Samples answer the first training prompts,
    each K times in a row as in training, at least as many as asked for.

    Raises:
        BackendError: If the reward cannot be calibrated on them.
    """
    core: Any = parts.envs.unwrapped.core  # type: ignore[attr-defined]
    if not (wanted := getattr(core.backend, "calibration_samples", 0)):
        return
    file, reward, k = run.path / "calibration.json", reward_facts(run.config), parts.agent.group_size
    if not file.exists() or read_json(file).get("reward") != reward:
        at = np.arange(-(-wanted // k)).repeat(k) % len(core.prompts)  # (n,) numbers of prompts
        ids, mask = np.zeros((len(at), core.P), dtype=np.int64), np.zeros((len(at), core.P), dtype=np.int8)
        for row, prompt in enumerate(at.tolist()):
            core.write_prompt(prompt, ids[row], mask[row])
        samples = answer(parts.agent.sampler, ids, mask, max_new_tokens=core.T, seed=seed)
        prompts = [core.prompts[prompt] for prompt in at]
        texts = zip(at.tolist(), samples.ids, strict=True)
        responses = [core.decode(prompt, core.split_response(row)[0]) for prompt, row in texts]
        core.backend.calibrate(prompts, responses)
        rows = [{"prompt": p, "response": r} for p, r in zip(prompts, responses, strict=True)]
        write_json(file, {"reward": reward, "moments": core.backend.moments, "samples": rows})
    for envs in filter(None, (parts.envs, parts.held_out, parts.validation)):
        restore_scale(envs.unwrapped.core.backend, run.path)  # type: ignore[attr-defined]


def restore_scale(backend: Any, run: Path) -> None:
    """Give a reward the moments that `calibrate` found in a run, if it is one that has some."""
    if getattr(backend, "calibration_samples", 0):
        backend.moments = read_json(run / "calibration.json")["moments"]
