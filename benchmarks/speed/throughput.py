"""How fast the parts are, each as a ratio measured side by side: ``python -m benchmarks.speed.throughput PART``.

Parts: env (the environments beside SyncVectorEnv), score (direct scores beside plain batches), sample (beside
`generate`), floor (each phase over the least time the machine allows), overhead (environment and logging in an update).

Contenders take turns in short blocks, so that all of them see the same machine; figures are medians over single steps,
with the quartiles. The reward of the environment's measurements costs nothing, and the tokenizer is a table of words:
what is measured is the environment.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import rlaif_env
from benchmarks.speed import model_speed
from rlaif_env.runs import write_json

WORDS = "a the film story was is good bad long short and not".split()


class WordTable:
    """The least tokenizer there is: ids 0 pad, 1 EOS, then words."""

    pad_token_id, eos_token_id = 0, 1

    def __len__(self) -> int:
        return len(WORDS) + 2

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of the words."""
        return [WORDS.index(word) + 2 for word in text.split()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The words."""
        return " ".join(WORDS[i - 2] for i in token_ids if i > 1)


@dataclass(frozen=True)
class Figure:
    """One contender's time.

    Attributes:
        name: What was measured.
        median_us: Median microseconds a step.
        quartiles_us: The first and third quartile.
        ratio: How many times the first contender's median.
    """

    name: str
    median_us: float
    quartiles_us: tuple[float, float]
    ratio: float


def _free(prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float32]:
    return np.zeros(len(responses), dtype=np.float32)


def side_by_side(contenders: Mapping[str, Callable[[], Any]], *, steps: int, blocks: int) -> list[Figure]:
    """Time calls of several functions, taking turns.

    Args:
        contenders: What to call, by name; the first is what the others are compared with.
        steps: Calls in a block.
        blocks: Blocks of each.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(blocks):
        for name, call in contenders.items():
            for _ in range(steps):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    quartiles = {name: np.percentile(np.array(found) * 1e6, [25, 50, 75]) for name, found in times.items()}
    base = next(iter(quartiles.values()))[1]
    return [Figure(name, float(q[1]), (float(q[0]), float(q[2])), float(q[1] / base)) for name, q in quartiles.items()]


def _keywords(prompt_tokens: int, response_tokens: int) -> dict[str, Any]:
    prompts = ("the film was", "a long story", "good and bad")
    task = rlaif_env.Task(
        name="throughput",
        kind="continuation",
        criterion="nothing",
        max_prompt_tokens=prompt_tokens,
        max_response_tokens=response_tokens,
        source=rlaif_env.PromptSource(prompts={"train": prompts}),
    )
    return {"task": task, "reward": _free, "tokenizer": WordTable(), "vocab_size": 49_152}


def _stepper(envs: Any) -> Callable[[], Any]:
    """A function that takes one step, without an EOS, and begins the next wave where that is the caller's business."""
    envs.reset(seed=0)
    actions = np.full(envs.action_space.shape, 5)
    waves = envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED

    def step() -> None:
        terminated = envs.step(actions)[2]
        if waves and terminated.all():
            envs.reset()

    return step


def environments(
    *,
    rows: int = 64,
    prompt_tokens: int = 128,
    response_tokens: int = 512,
    steps: int = 200,
    blocks: int = 10,
    memory_steps: int = 100_000,
) -> dict[str, Any]:
    """Time a step of the environments, and watch their memory.

    Args:
        rows: n.
        prompt_tokens: P.
        response_tokens: T; observations of the token environment have P+T columns.
        steps: Steps in a block.
        blocks: Blocks of each contender.
        memory_steps: Steps over which the process's size is watched.

    Returns:
        "token" and "text": figures of the vector environments beside `SyncVectorEnv`, those of "text" with responses of
        16 tokens, decoded; "memory": bytes by which the process grew over the token steps.
    """
    token, text = "RLAIF/TokenGeneration-v0", "RLAIF/TextGeneration-v0"
    keywords = {token: _keywords(prompt_tokens, response_tokens), text: _keywords(32, 16)}

    def vector(id: str, **more: Any) -> Callable[[], Any]:
        return _stepper(gym.make_vec(id, num_envs=rows, **keywords[id], **more))

    def sync(id: str) -> Callable[[], Any]:
        return vector(id, vectorization_mode="sync", vector_kwargs={"autoreset_mode": "SameStep"})

    tokens = side_by_side(
        {
            "vector, SAME_STEP": vector(token),
            "vector, NEXT_STEP": vector(token, autoreset_mode="NextStep"),
            "vector, DISABLED": vector(token, autoreset_mode="Disabled"),
            "vector, SAME_STEP, action masks": vector(token, action_mask=True),
            "SyncVectorEnv": sync(token),
        },
        steps=steps,
        blocks=blocks,
    )
    texts = side_by_side(
        {"vector": vector(text), "SyncVectorEnv": sync(text)}, steps=max(steps // 20, 1), blocks=blocks
    )
    return {
        "rows": rows,
        "columns": prompt_tokens + response_tokens,
        "token": [asdict(figure) for figure in tokens],
        "text": [asdict(figure) for figure in texts],
        "memory": {"steps": memory_steps, "grown_bytes": _growth(vector(token), memory_steps)},
    }


def _growth(step: Callable[[], Any], steps: int) -> int:
    """By how much the process's largest size grew over steps, after a tenth of them to warm up."""
    for _ in range(steps // 10):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(steps):
        step()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return kilobytes * 1024


def _print_environments(found: Mapping[str, Any]) -> None:
    for part in ("token", "text"):
        width = f"{found['columns']} tokens" if part == "token" else "whole responses of 16 tokens"
        print(f"RLAIF/{part.title()}Generation-v0, {found['rows']} rows x {width}, reward call excluded:")
        for figure in found[part]:
            low, high = figure["quartiles_us"]
            print(
                f"  {figure['name']:34s} {figure['median_us']:9.1f} µs a step  "
                f"({low:.1f} to {high:.1f})  x {figure['ratio']:.1f}"
            )
    print(f"memory grown over {found['memory']['steps']} token steps: {found['memory']['grown_bytes']} bytes")


def _print_pairs(found: Mapping[str, Any]) -> None:
    for part in found["parts"]:
        other = "plain" if "plain" in part else "generate"
        if other == "plain":
            name = f"score {found['texts']} snippets, {part['exemplars']} exemplars"
        else:
            name = f"sample {found['rows']} rows, {part['samples_per_prompt']} a prompt, " + (
                f"ends at {found['shortest']} to {found['response']}" if part["early"] else f"all {found['response']}"
            )
        low, high = part["ratio_quartiles"]
        print(
            f"{name:48s} ours {part['ours']['median_s']:7.2f} s  {other} {part[other]['median_s']:7.2f} s  "
            f"x {part['ratio']:.2f} ({low:.2f} to {high:.2f}; by CPU time {part['ratio_cpu']:.2f})"
        )


def _print_floors(found: Mapping[str, Any]) -> None:
    for part in found["parts"]:
        print(
            f"{part['phase']:44s} {part['took']['median_s']:7.2f} s  floor {part['floor_s']:6.2f} s "
            f"({part['gigaflop']:.0f} GFLOP at {part['gigaflops']:.0f} a second, copy {part['gigabytes']:.1f} GB/s)  "
            f"x {part['over_floor']:.2f}"
        )


def _print_overhead(found: Mapping[str, Any]) -> None:
    print(
        f"environment and logging: {found['around_s'] * 1e3:.1f} ms in {found['updates']} updates of "
        f"{found['update_s']:.1f} s together: {found['share']:.3%}"
    )


PARTS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Mapping[str, Any]], None]]] = {
    "env": (environments, _print_environments),
    "floor": (model_speed.floors, _print_floors),
    "overhead": (model_speed.overhead, _print_overhead),
    "sample": (model_speed.sampling, _print_pairs),
    "score": (model_speed.scoring, _print_pairs),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m benchmarks.speed.throughput``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.throughput", description=__doc__)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    measure, show = PARTS[arguments.part]
    found = measure()
    if arguments.out:
        write_json(arguments.out, found)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
