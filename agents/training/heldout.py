"""A policy on held-out prompts: what it writes, what the reward says, what the gold measure says, how far it moved.

The same prompts and the same random numbers are used each time, however many are answered at once (`agents.answers`),
so that two evaluations can be compared prompt by prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from agents.answers import answer, response_kl
from agents.policy import Policy
from agents.sampler import Sampler
from rlaif_env.batches import PROMPTS_AT_ONCE
from rlaif_env.data.jsonl import json_object
from rlaif_env.data.tasks import Task, gold_scores
from rlaif_env.runs import RunError
from rlaif_env.statistics import Interval, measure_change, measure_mean


@dataclass(frozen=True)
class HeldOut:
    """n responses to n held-out prompts and what is measured on them: by name, one value a prompt, float64 (n,)."""

    prompts: list[str]
    responses: list[str]
    measures: Mapping[str, NDArray[np.float64]]

    @classmethod
    def read(cls, file: Path) -> HeldOut:
        """One that was written as JSON; RunError if the file holds something else."""
        row = read_json(file)
        try:
            measures = {name: np.array(values, dtype=np.float64) for name, values in row["measures"].items()}
            return cls(list(row["prompts"]), list(row["responses"]), measures)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"expected an evaluation in {file}, found something else ({error}); remove the file"
            ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a run; RunError if there is none."""
    try:
        return json_object(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"expected a JSON object in {file}, found something else ({error})") from error


def distinct_shares(texts: Sequence[str], order: int = 2) -> NDArray[np.float64]:
    """Each text's share in distinct-n, so that the mean over texts is the share of distinct n-grams among all.

    A text's share is the sum over its n-grams of 1 / (how often the n-gram occurs in all texts), divided by the mean
    number of n-grams in a text. (n,), 0 where no text has an n-gram.
    """
    grams = [
        list(zip(*(words[i:] for i in range(order)), strict=False)) for words in (t.lower().split() for t in texts)
    ]
    counts = Counter(gram for row in grams for gram in row)
    total = sum(counts.values())
    if total == 0:
        return np.zeros(len(texts))
    return np.array([sum(1 / counts[gram] for gram in row) for row in grams]) * len(texts) / total


def evaluate_policy(
    policy: Policy,
    envs: VectorEnv[Any, Any, Any],
    task: Task,
    *,
    seed: int,
    batch: int = PROMPTS_AT_ONCE,
    sampler: Sampler | None = None,
) -> HeldOut:
    """Let the policy answer the first prompts of a `RLAIF/TextGeneration-v0` vector, one a row, ``batch`` at once.

    The responses are written by its sampler, where it has one.

    Returns:
        Measures: "reward" and what the backend tells beside it, "gold" where the task has one, "length" (tokens, EOS
        included), "kl" (nats per response, one sample's log pi - log pi_SFT), "distinct-2" (see `distinct_shares`).
    """
    observations, _ = envs.reset(seed=seed, options={"prompt_index": np.arange(envs.num_envs)})
    ids, mask = observations["input_ids"], observations["attention_mask"]
    steps = int(envs.action_space.shape[-1])  # type: ignore[index]
    source = sampler or policy
    samples = answer(source, ids, mask, max_new_tokens=steps, seed=seed, batch=batch)
    _, rewards, _, _, infos = envs.step(samples.ids)
    final = infos["final_info"]
    prompts, responses = [str(p) for p in final["prompt"]], [str(r) for r in final["response"]]
    texts = [task.judged(p, r) for p, r in zip(prompts, responses, strict=True)]
    measures = {"reward": np.asarray(rewards, dtype=np.float64)}
    for name, column in final.items():
        kept = not name.startswith("_") and name not in ("prompt_index", "response_length")
        if kept and np.asarray(column).dtype.kind in "fiu":
            measures[name] = np.asarray(column, dtype=np.float64)
    if task.gold is not None:
        measures["gold"] = gold_scores(task, texts)
    measures["length"] = np.asarray(final["response_length"], dtype=np.float64)
    measures["kl"] = response_kl(policy, ids, mask, samples, None if source.exact else policy)
    measures["distinct-2"] = distinct_shares(responses)
    return HeldOut(prompts, responses, measures)


def changes(before: HeldOut, after: HeldOut, *, seed: int = 0) -> dict[str, tuple[Interval, Interval, Interval]]:
    """Each measure before, after, and the paired change, each mean with its bootstrap 95 % interval over prompts."""
    return {
        name: (
            measure_mean(name, old, before.prompts, seed=seed),
            measure_mean(name, after.measures[name], before.prompts, seed=seed),
            measure_change(name, old, after.measures[name], before.prompts, seed=seed),
        )
        for name, old in before.measures.items()
        if name in after.measures
    }
