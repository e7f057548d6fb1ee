"""`rlaif rescore`: ask a training's reward again for the responses that it failed on; all else stays byte for byte.

The policy, the metrics and the curves stay as they are: they say what was learned, and from what.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from agents.training.arguments import parsed
from agents.training.config import FREE, TrainConfig, resolved_config, reward_facts
from agents.training.display import report
from agents.training.heldout import HeldOut, read_json
from rlaif_env.api import RLAIFError
from rlaif_env.batches import PROMPTS_AT_ONCE, scored_rows
from rlaif_env.data.tasks import load_task
from rlaif_env.files import replacing
from rlaif_env.keywords import resolve_reward
from rlaif_env.runs import RunFolder, write_json, writing

Told = Mapping[int, dict[str, Any]]
"""The reward, as "reward", and what else the backend tells, by the number of the response asked for."""
Ask = Callable[[Sequence[str], Sequence[str]], Told]


class _Judge:
    """A run's reward, asked for n responses; counts what it was asked, what it answered, and why not all."""

    def __init__(self, config: TrainConfig) -> None:
        self.task = load_task(config.task)
        self._backend = resolve_reward(config.reward, self.task, dict(config.reward_options))
        self.asked = self.answered = 0
        self.reason = ""

    def ask(self, prompts: Sequence[str], responses: Sequence[str]) -> Told:
        """What it tells of those that it can score."""
        told: dict[int, dict[str, Any]] = {}
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            part = slice(start, start + PROMPTS_AT_ONCE)
            rewards, figures, failed = scored_rows(self._backend, prompts[part], responses[part])
            self.reason = next(iter(failed.values()), self.reason)
            told |= {
                start + i: {"reward": float(reward), **figures[i]}
                for i, reward in enumerate(rewards)
                if i not in failed
            }
        self.asked, self.answered = self.asked + len(prompts), self.answered + len(told)
        return told


def rescore(config: TrainConfig, console: Console | None = None) -> int:
    """Ask a run's reward again for every response in its folder that it failed on, and write what it says in place.

    Args:
        config: The run's own, ``out`` its folder.
        console: Where to say what was done.

    Returns:
        How many responses are still without a reward.

    Raises:
        RLAIFError: If the folder is in use, or holds a run of another configuration or reward.
    """
    assert config.out is not None
    console = console or Console(quiet=True)
    with RunFolder.create(config.out, resolved_config(config), command="train", exist=True, free=FREE) as run:
        judge = _Judge(config)
        # what was asked of the reward before it was changed is not a question for the one that is there now
        since = max(map(int, read_json(run.path / "config.json").get("reward_changes", {})), default=0)
        _rescore_samples(run.path / "samples.jsonl", judge.ask, since)
        held = {when: _rescore_held_out(run, when, judge.ask) for when in ("before", "after")}
        if held["before"] is not None and held["after"] is not None:
            report(run, console, judge.task, held["before"], held["after"])
    left = judge.asked - judge.answered
    why = f" ({judge.reason})" if left else ""
    console.print(
        f"{judge.answered} of {judge.asked} responses that the judge had failed on are scored, {left} are left{why}. "
        "The policy, metrics and curves stay as they were learned",
        highlight=False,
        markup=False,
    )
    return left


def _rescore_samples(file: Path, ask: Ask, since: int) -> None:
    """Fill in the rewards of the failed rows of samples.jsonl that come after an update."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    open_rows = {}
    for number, line in enumerate(lines):
        if b'"judge_failed": "' in line and (row := json.loads(line))["reward"] is None and row["step"] > since:
            open_rows[number] = row
    rows = list(open_rows.values())
    told = ask([row["prompt"] for row in rows], [row["response"] for row in rows])
    for i, number in enumerate(open_rows):
        if i in told:
            row = rows[i] | told[i] | {"judge_failed": None}
            lines[number] = (json.dumps(row, default=_plain, allow_nan=False) + "\n").encode()
    if told:
        with writing(file), replacing(file) as stream:
            stream.writelines(lines)


def _rescore_held_out(run: RunFolder, when: str, ask: Ask) -> HeldOut | None:
    """Fill in the failed prompts of before.json or after.json; the evaluation, None where there is none."""
    file = run.path / f"{when}.json"
    if not file.exists():
        return None
    held, facts = HeldOut.read(file), reward_facts(run.config)
    rows = list(held.failures) if read_json(file).get("reward") == facts else []
    told = ask([held.prompts[row] for row in rows], [held.responses[row] for row in rows])
    if told:
        measures = {name: np.array(values) for name, values in held.measures.items()}
        for i, figures in told.items():
            for name in filter(measures.__contains__, figures):
                measures[name][rows[i]] = figures[name]
        scored = {rows[i] for i in told}
        failures = {row: reason for row, reason in held.failures.items() if row not in scored}
        held = replace(held, measures=measures, failures=failures)
        write_json(file, {**held.to_json(), "reward": facts})
    return held


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist()


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif rescore``; returns the exit code: 1 if responses are left without a reward."""
    words = list(argv) if argv is not None else sys.argv[1:]
    known = argparse.ArgumentParser(
        prog="rlaif rescore",
        allow_abbrev=False,
        description="Ask a training's reward again for the responses that it failed on (rlaif train "
        "--on-judge-failure drop-group): those in samples.jsonl, and the held-out prompts before and after. Nothing is "
        "trained again.",
    )
    known.add_argument("folder", type=Path, help="the run's folder")
    known.add_argument(
        "--reward", help="the run's reward again, where it is code of yours: it runs only if you name it"
    )
    known.add_argument_group("reward", "--reward.NAME VALUE: how its server is reached, as in rlaif train")
    given, rest = known.parse_known_args(words)
    record = read_json(given.folder / "config.json")
    if record.get("command") != "train":
        again = shlex.join(["rlaif", *map(str, record.get("command_line", ["", "..."])[1:])])
        raise RLAIFError(
            f"expected the folder of a training, found one of rlaif {record.get('command')} in {given.folder}; label "
            f"and evaluate ask again for what failed when the same command is given with --out {given.folder} "
            f"(it was: {again})"
        )
    named = ["--reward", given.reward] if given.reward else []
    config = parsed(["--resume", str(given.folder), *named, *rest])
    return 1 if rescore(replace(config, resume=None, out=given.folder), Console()) else 0
