"""How fast the parts are, each as a ratio measured side by side: ``python -m benchmarks.speed.throughput PART``.

Parts: env (the environments beside SyncVectorEnv), score (direct scores beside plain batches), sample (beside
`generate`), groups (groups judged in pairs with and without their shared beginning), precision (updates with responses
drawn in bfloat16 beside float32), floor (each phase over the least time the machine allows), overhead (environment and
logging in an update).

Contenders take turns in short blocks, so that all of them see the same machine; figures are medians over single steps,
with the quartiles. The reward of the environment's measurements costs nothing, and the tokenizer is a table of words:
what is measured is the environment.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from benchmarks.speed import model_speed
from benchmarks.speed.one_update import bare_task
from benchmarks.speed.timing import alternate
from rlaif_env.records import write_json
from rlaif_env.statistics import interval_text
from rlaif_env.tables import Cell, Table

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


def _free(prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float32]:
    return np.zeros(len(responses), dtype=np.float32)


def microseconds(contenders: Mapping[str, Callable[[], Any]], *, steps: int, blocks: int) -> list[dict[str, Any]]:
    """Time steps of several contenders in turn, so many blocks of so many steps.

    Returns:
        For each its name, median and quartiles in microseconds a step, and how many times the first one's median.
    """
    times = alternate(contenders, repetitions=blocks, warmup=0, calls=steps)
    base = next(iter(times.values())).median
    figures = []
    for name, side in times.items():
        low, high = (float(q) for q in np.percentile(np.array(side.wall) * 1e6, [25, 75]))
        ratio = side.median / base
        figures.append({"name": name, "median_us": side.median * 1e6, "quartiles_us": [low, high], "ratio": ratio})
    return figures


def _keywords(prompt_tokens: int, response_tokens: int) -> dict[str, Any]:
    task = bare_task(("the film was", "a long story", "good and bad"), prompt_tokens, response_tokens)
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
    """Time a step of the environments, in blocks of so many steps, and watch their memory over ``memory_steps``.

    Observations of the token environment have P+T columns.

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

    by_token = {
        "vector, SAME_STEP": vector(token),
        "vector, NEXT_STEP": vector(token, autoreset_mode="NextStep"),
        "vector, DISABLED": vector(token, autoreset_mode="Disabled"),
        "vector, SAME_STEP, action masks": vector(token, action_mask=True),
        "SyncVectorEnv": sync(token),
    }
    whole = {"vector": vector(text), "SyncVectorEnv": sync(text)}
    return {
        "rows": rows,
        "columns": prompt_tokens + response_tokens,
        "token": microseconds(by_token, steps=steps, blocks=blocks),
        "text": microseconds(whole, steps=max(steps // 20, 1), blocks=blocks),
        "memory": {"steps": memory_steps, "grown_bytes": _growth(vector(token), memory_steps)},
    }


def _growth(step: Callable[[], Any], steps: int) -> int:
    """By how much the process's largest size grew over steps, after a tenth of them to warm up."""
    for _ in range(steps // 10):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(steps):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _environment_tables(figures: Mapping[str, Any]) -> list[Table]:
    tables = []
    grown = f"Memory grown over {figures['memory']['steps']} token steps: {figures['memory']['grown_bytes']} bytes."
    parts = (("token", f"{figures['columns']} tokens", grown), ("text", "whole responses of 16 tokens", ""))
    for part, width, caption in parts:
        title = f"RLAIF/{part.title()}Generation-v0, {figures['rows']} rows x {width}, reward call excluded"
        rows: list[list[Cell]] = []
        for row in figures[part]:
            low, high = row["quartiles_us"]
            rows.append([row["name"], f"{row['median_us']:.1f}", f"[{low:.1f}, {high:.1f}]", f"x {row['ratio']:.1f}"])
        tables.append(Table(title, ["", "µs a step", "quartiles", "over the first"], rows, caption))
    return tables


def _pair_table(figures: Mapping[str, Any]) -> list[Table]:
    rows: list[list[Cell]] = []
    for part in figures["parts"]:
        if other := part.get("plain"):
            name = f"score {figures['texts']} snippets, {part['exemplars']} exemplars"
        else:
            other, all_ = part["generate"], f"all {figures['response']}"
            ends = f"ends at {figures['shortest']} to {figures['response']}" if part["early"] else all_
            name = f"sample {figures['rows']} rows, {part['samples_per_prompt']} a prompt, {ends}"
        low, high = part["ratio_quartiles"]
        ratio = f"x {part['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        times = (f"{side['median_s']:.2f}" for side in (part["ours"], other))
        rows.append([name, *times, ratio, f"x {part['ratio_cpu']:.2f}"])
    columns = ["", "this project, s", "plain, or generate, s", "ratio (quartiles)", "by CPU time"]
    return [Table("Side by side", columns, rows)]


def _group_table(figures: Mapping[str, Any]) -> list[Table]:
    times = (f"{figures[side]['median_cpu_s']:.1f}" for side in ("shared", "whole"))
    pairs = figures["group"] * (figures["group"] - 1) // 2
    name = f"{figures['model']}, groups of {figures['group']}, {pairs} pairs in both orders"
    columns = ["", "shared beginning, processor s", "without, processor s", "ratio, 95 % over groups"]
    return [Table("A judge of groups", columns, [[name, *times, interval_text(figures["ratio"], ".2f", units=True)]])]


def _precision_table(figures: Mapping[str, Any]) -> list[Table]:
    rows: list[list[Cell]] = []
    for part in figures["parts"]:
        times = (f"{part[dtype]['median_s']:.2f}" for dtype in ("bfloat16", "float32"))
        low, high = part["ratio_quartiles"]
        rows.append(
            [part["part"], *times, f"x {part['ratio']:.2f} [{low:.2f}, {high:.2f}]", f"x {part['ratio_cpu']:.2f}"]
        )
    columns = ["", "drawn in bfloat16, s", "in float32, s", "ratio (quartiles)", "by CPU time"]
    return [Table("Sampling in lower precision", columns, rows)]


def _floor_table(figures: Mapping[str, Any]) -> list[Table]:
    rows: list[list[Cell]] = []
    for part in figures["parts"]:
        times = (f"{seconds:.2f}" for seconds in (part["took"]["median_s"], part["floor_s"]))
        rates = (f"{part['gigaflop']:.0f}", f"{part['gigaflops']:.0f}", f"{part['gigabytes']:.1f}")
        rows.append([part["phase"], *times, *rates, f"x {part['over_floor']:.2f}"])
    columns = ["phase", "took, s", "floor, s", "GFLOP", "GFLOP/s reached", "GB/s copied", "over the floor"]
    return [Table("Over the least time that the machine allows", columns, rows)]


def _overhead_table(figures: Mapping[str, Any]) -> list[Table]:
    times = (f"{figures['around_s'] * 1e3:.1f}", f"{figures['update_s']:.1f}", f"{figures['share']:.3%}")
    columns = ["updates", "environment and logging, ms", "updates, s", "share"]
    return [Table("Around the update", columns, [[figures["updates"], *times]])]


PARTS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[Mapping[str, Any]], list[Table]]]] = {
    "groups": (model_speed.judging, _group_table),
    "env": (environments, _environment_tables),
    "floor": (model_speed.floors, _floor_table),
    "overhead": (model_speed.overhead, _overhead_table),
    "precision": (model_speed.precision, _precision_table),
    "sample": (model_speed.sampling, _pair_table),
    "score": (model_speed.scoring, _pair_table),
}
"""What is measured, and its figures as tables."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m benchmarks.speed.throughput``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.throughput", description=__doc__)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--model", help="a name or folder, for the parts that run one (default: the built-in model)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    measure, tables = PARTS[arguments.part]
    if arguments.model and arguments.part == "env":
        parser.error("expected --model with a part that runs a model, found it with env")
    figures = measure(**({"model": arguments.model} if arguments.model else {}))
    if arguments.out:
        write_json(arguments.out, figures)
    shown = (table.markdown() for table in tables(figures))
    print(json.dumps(figures, indent=1) if arguments.json else "\n\n".join(shown))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
