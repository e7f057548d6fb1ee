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
from agents.training.checkpoints import differing_in
from agents.training.config import FREE, REWARD, TrainConfig, resolved_config, reward_facts
from agents.training.display import report
from agents.training.heldout import HeldOut, read_json
from agents.training.start import restore_scale
from rlaif_env.api import RLAIFError
from rlaif_env.batches import PROMPTS_AT_ONCE, scored_rows
from rlaif_env.data.tasks import load_task
from rlaif_env.files import replacing
from rlaif_env.keywords import resolve_reward
from rlaif_env.records import RunError, write_json, writing
from rlaif_env.runs import OtherRunError, RunFolder

Told = Mapping[int, dict[str, Any]]
"""The reward, as "reward", and what else the backend tells, by the number of the response asked for."""
Ask = Callable[[Sequence[str], Sequence[str]], Told]


class _Judge:
    """A run's reward, asked for n responses; counts what it was asked, what it answered, and why not all."""

    def __init__(self, config: TrainConfig) -> None:
        self.task = load_task(config.task)
        self._backend = resolve_reward(config.reward, self.task, dict(config.reward_options))
        restore_scale(self._backend, config.out or Path())
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
        config: The run's own, ``out`` its folder; with ``change_reward`` its reward may be another than the run's, and
            config.json says under "rescored" which is not what it was.
        console: Where to say what was done.

    Returns:
        How many responses are still without a reward.

    Raises:
        RLAIFError: If the folder is in use, or holds a run of another configuration or reward.
    """
    assert config.out is not None
    console = console or Console(quiet=True)
    with _folder(config) as run:
        judge, record = _Judge(config), read_json(run.path / "config.json")
        asked = reward_facts(record["config"])  # the reward that the evaluations were asked of
        if changed := differing_in(asked, reward_facts(run.config)):
            run.amend((), rescored=changed)
            console.print(f"the reward is not the run's: {changed}", highlight=False, markup=False)
        # what was asked of the reward before it was changed is not a question for the one that is there now
        since = max(map(int, record.get("reward_changes", {})), default=0)
        _rescore_samples(run.path / "samples.jsonl", judge.ask, since)
        held = {when: _rescore_held_out(run, when, judge.ask, asked) for when in ("before", "after")}
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


def _folder(config: TrainConfig) -> RunFolder:
    """The run's folder; an error that says how it is rescored all the same if only the reward is another."""
    free = (*FREE, *(REWARD if config.change_reward else ()))
    try:
        return RunFolder.create(config.out, resolved_config(config), command="train", exist=True, free=free)
    except OtherRunError as error:
        if not all(name.startswith(REWARD) for name in error.settings):
            raise
        raise RunError(f"{error}; with --change-reward the reward that is here is asked, and recorded") from None


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


def _rescore_held_out(run: RunFolder, when: str, ask: Ask, facts: Mapping[str, Any]) -> HeldOut | None:
    """Fill in the failed prompts of before.json or after.json if asked of that reward; None where there is none."""
    file = run.path / f"{when}.json"
    if not file.exists():
        return None
    held = HeldOut.read(file)
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
    known.add_argument(
        "--change-reward",
        action="store_true",
        help="ask the reward that is here, though its code, models or settings are others than the run's; config.json "
        "then says which",
    )
    known.add_argument_group(
        "reward", "--reward.NAME VALUE: how its server is reached; with --change-reward other settings too"
    )
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
    config = replace(config, resume=None, out=given.folder, change_reward=given.change_reward)
    return 1 if rescore(config, Console()) else 0
