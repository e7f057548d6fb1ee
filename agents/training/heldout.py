"""A policy on held-out prompts: what it writes, what the reward says, what the gold measure says, how far it moved.

The same prompts and the same random numbers are used each time, however many are answered at once (`agents.answers`),
so that two evaluations can be compared prompt by prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from rlaif_env.duel import Duel
from rlaif_env.records import RunError
from rlaif_env.statistics import Interval, measure_change, measure_mean


@dataclass(frozen=True)
class HeldOut:
    """n responses to n held-out prompts and what is measured on them.

    Attributes:
        prompts: n prompts.
        responses: n responses.
        measures: By name, one value a prompt, float64 (n,); NaN where the judge failed.
        failures: Why it failed, by the prompt's number.
    """

    prompts: list[str]
    responses: list[str]
    measures: Mapping[str, NDArray[np.float64]]
    failures: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> HeldOut:
        """One that was written as JSON; RunError if the file holds something else."""
        row = read_json(file)
        try:
            measures = {name: np.array(values, dtype=np.float64) for name, values in row["measures"].items()}
            failures = {int(i): str(reason) for i, reason in row["failures"].items()}
            return cls(list(row["prompts"]), list(row["responses"]), measures, failures)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"expected an evaluation in {file}, found something else ({error}); remove the file"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it: null where the judge failed."""
        columns = {name: self.nulled(values) for name, values in self.measures.items()}
        failures = {str(i): reason for i, reason in self.failures.items()}
        return {"prompts": self.prompts, "responses": self.responses, "measures": columns, "failures": failures}

    def nulled(self, values: NDArray[np.float64]) -> list[float | None]:
        """A measure's values, None where the judge failed."""
        return [None if i in self.failures and np.isnan(value) else value for i, value in enumerate(values.tolist())]

    def means(self) -> dict[str, float]:
        """Each measure's mean over the prompts that have it; and "unscored", their number, where there are others."""
        means = {name: float(known.mean()) for name, v in self.measures.items() if len(known := v[~np.isnan(v)])}
        return means | ({"unscored": float(len(self.failures))} if self.failures else {})


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
            measures[name] = np.where(final[f"_{name}"], np.asarray(column, dtype=np.float64), np.nan)
    if task.gold is not None:
        measures["gold"] = gold_scores(task, texts)
    measures["length"] = np.asarray(final["response_length"], dtype=np.float64)
    measures["kl"] = response_kl(policy, ids, mask, samples, None if source.exact else policy)
    measures["distinct-2"] = distinct_shares(responses)
    reasons = enumerate(final.get("judge_failed", ()))
    return HeldOut(prompts, responses, measures, {i: str(reason) for i, reason in reasons if reason is not None})


def hold_against(envs: VectorEnv[Any, Any, Any], prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Have a reward that judges groups hold what comes against these responses; another needs none."""
    backend = envs.unwrapped.core.backend  # type: ignore[attr-defined]
    if isinstance(backend, Duel):
        backend.against(prompts, responses)


def changes(before: HeldOut, after: HeldOut, *, seed: int = 0) -> dict[str, tuple[Interval, Interval, Interval]]:
    """Each measure before, after, and the paired change, each mean with its bootstrap 95 % interval over prompts.

    All three are over the prompts that have the measure both times; one that none has is left out.
    """
    found: dict[str, tuple[Interval, Interval, Interval]] = {}
    for name in filter(after.measures.__contains__, before.measures):
        both = ~np.isnan(before.measures[name]) & ~np.isnan(after.measures[name])
        if both.any():
            old, new = before.measures[name][both], after.measures[name][both]
            prompts = [prompt for prompt, there in zip(before.prompts, both, strict=True) if there]
            first, last = (measure_mean(name, values, prompts, seed=seed) for values in (old, new))
            found[name] = first, last, measure_change(name, old, new, prompts, seed=seed)
    return found
