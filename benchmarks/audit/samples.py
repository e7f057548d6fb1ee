"""A policy's samples for audits: drawn once for a policy, task, seed and number, kept in a folder that they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.audit.api import NotMeasured
from benchmarks.audit.materials import SPLIT, SampledPrompt
from benchmarks.evaluation.systems import Source, find_source, sampled_responses
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.data.forms import response_of
from rlaif_env.data.jsonl import read_jsonl, write_jsonl
from rlaif_env.data.rows import parsed
from rlaif_env.data.tasks import Task


def sampler(
    policy: str, task: Task, *, prompts: int, samples: int, seed: int, folder: Path
) -> Callable[[], Sequence[SampledPrompt]]:
    """What draws samples of a policy, or reads those that another audit drew, when it is called.

    Args:
        policy: As `benchmarks.evaluation.systems.find_source` takes it; of a file of responses those are taken that
            are there, for all its prompts.
        task: Whose prompts: an even choice of the split "test".
        prompts: How many.
        samples: N of each.
        seed: Of the sampling.
        folder: Keeps the samples, in a file for each policy, task, seed and number.

    Raises:
        RLAIFError: If there is no such policy.
    """
    source = find_source(policy)
    if source.kind == "file":
        return partial(_of_file, source.path)
    if prompts < 1 or samples < 2:
        raise RLAIFError(f"expected at least 1 prompt and 2 samples of each, found {prompts} and {samples}")
    return partial(_drawn, source, task, prompts, samples, seed, folder)


def _of_file(path: str) -> list[SampledPrompt]:
    given: dict[str, list[str]] = {}
    for prompt, response in parsed(path, response_of, "response"):
        given.setdefault(prompt, []).append(response)
    return [SampledPrompt(prompt, tuple(responses)) for prompt, responses in given.items()]


def _drawn(source: Source, task: Task, prompts: int, samples: int, seed: int, folder: Path) -> list[SampledPrompt]:
    try:
        known = task.prompts(SPLIT)
    except DataError:
        raise
    except RLAIFError as error:
        raise NotMeasured(f"the task {task.name!r} has no prompts to sample responses to: {error}") from error
    chosen = [known[i] for i in np.linspace(0, len(known), min(prompts, len(known)), endpoint=False).astype(int)]
    facts = [source.content, source.temperature, task.to_json(), chosen, samples, seed]
    digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:12]
    file = folder / f"samples-{digest}.jsonl"
    if not file.is_file():
        repeated = [prompt for prompt in chosen for _ in range(samples)]
        responses = sampled_responses(source, task, repeated, seed=seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, _rows(chosen, responses, samples))
    return list(read_jsonl(file, lambda row: SampledPrompt(row["prompt"], tuple(row["responses"]))))


def _rows(prompts: Sequence[str], responses: Sequence[str], samples: int) -> Iterable[dict[str, object]]:
    for place, prompt in enumerate(prompts):
        yield {"prompt": prompt, "responses": list(responses[place * samples : (place + 1) * samples])}
