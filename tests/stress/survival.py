"""Does a killed training lose anything: ``python -m tests.stress.survival --kills 30``.

A real training of a tiny model runs to its end. Then it is started again and again in folders of its own, killed with
SIGKILL after a random time (of the processor's, so that a busy machine changes nothing), started once more with the
same configuration, and compared bit by bit with the first: metrics (without the times), samples, validation,
evaluation, TensorBoard's scalars, the last checkpoint and the final weights. Every run is a process forked from this
one, which has the libraries loaded and has computed nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_env.api import RLAIFError
from rlaif_env.records import read_metrics

__all__ = ["differences", "main", "prepared", "started", "survival"]

PHASES = ("start", "evaluation", "sampling", "scoring", "update", "checkpoint", "between", "finished")
"""Where a process can be when it is killed; "between" is logging and the rest of the loop."""

_TASK = """
name = "letters"
kind = "continuation"
criterion = "how positive it is"
max_prompt_tokens = 12
max_response_tokens = 6
gold = "vader"
[source.prompts]
train = ["A good film", "bad acting", "The plot", "I love", "so dull", "nice"]
validation = ["We saw", "great"]
test = ["A bad film", "good acting", "I hate", "fun"]
gold = ["none"]
"""


def prepared(folder: Path) -> Path:
    """Make a tiny model and a task file in a folder."""
    from tests.tiny import save_tiny

    save_tiny(folder / "model", max_position_embeddings=1024)
    (folder / "task.toml").write_text(_TASK, encoding="utf-8")
    return folder


def settings(folder: Path, out: Path, updates: int, checkpoint_every: int) -> Any:
    """The training of the prepared model in a run folder."""
    from agents.settings import ReinforceConfig
    from agents.training.config import TrainConfig
    from rlaif_env.models import LoraConfig

    model = str(folder / "model")
    return TrainConfig(
        task=str(folder / "task.toml"),
        model=model,
        reward_options={"model": model, "minimum_mass": 0.0},
        updates=updates,
        prompts_per_update=2,
        group_size=3,
        eval_prompts=4,
        checkpoint_every=checkpoint_every,
        validate_every=2 * checkpoint_every,
        validation_prompts=2,
        out=out,
        agent=ReinforceConfig(lora=LoraConfig(4), learning_rate=1e-2, micro_batch=4, baseline="value"),
    )


def paid_by(code: str, folder: Path, **settings: Any) -> Callable[..., Any]:
    """Make a tiny model, a task and code's ``make`` as the reward; trainings of six updates with them, by run folder.

    The settings, and those that a configuration is asked for with, stand in place of the usual ones.
    """
    from agents.settings import ReinforceConfig
    from agents.training.config import TrainConfig
    from rlaif_env.models import LoraConfig

    prepared(folder)
    (folder / "judge.py").write_text(code, encoding="utf-8")
    usual: dict[str, Any] = {
        "task": str(folder / "task.toml"),
        "model": str(folder / "model"),
        "reward": f"{folder / 'judge.py'}:make",
        "updates": 6,
        "prompts_per_update": 3,
        "group_size": 2,
        "checkpoint_every": 2,
        "agent": ReinforceConfig(lora=LoraConfig(2), learning_rate=1e-2),
        **settings,
    }
    return lambda out, **changed: TrainConfig(**{**usual, "out": out, **changed})


def samples(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's samples.jsonl."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def started(config: Any, phase: mmap.mmap | None = None, prepare: Callable[[], object] | None = None) -> int:
    """Fork a process that trains as a `TrainConfig` says; its id. It exits with 0, a command's code, or 1 after errors.

    The process notes where it is in the shared byte ``phase``, and calls ``prepare`` first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        from agents.training.command import train

        if phase is not None:
            _mark(phase)
        if prepare is not None:
            prepare()
        train(config)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of the parent's may run twice
    raise AssertionError("not reached")


def _mark(phase: mmap.mmap) -> None:
    """Have the parts of a training note in the shared byte when they are at work."""
    from agents.reinforce import ReinforceAgent
    from agents.training import checkpoints, command, safety
    from rlaif_env.envs.core import Core

    def mark(owner: Any, name: str, number: int) -> None:
        inner = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            before, phase[0] = phase[0], number
            try:
                return inner(*arguments, **named)
            finally:
                phase[0] = before if before != PHASES.index("start") else PHASES.index("between")

        setattr(owner, name, call)

    for owner, name, what in (
        (ReinforceAgent, "act", "sampling"),
        (Core, "score", "scoring"),
        (ReinforceAgent, "update", "update"),
        (safety.Safety, "save", "checkpoint"),
        (checkpoints, "read", "checkpoint"),
        (command, "evaluate_policy", "evaluation"),
        (safety, "evaluate_policy", "evaluation"),
    ):
        mark(owner, name, PHASES.index(what))


def ended(child: int) -> tuple[int, float]:
    """Wait for a process: its exit code, negative for a signal, and the processor's seconds it took."""
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def kill_after(child: int, seconds: float) -> None:
    """SIGKILL a process once it has had so many of the processor's seconds, or has ended."""
    ticks = os.sysconf("SC_CLK_TCK")
    while True:
        state, *fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        if state == "Z" or (int(fields[10]) + int(fields[11])) / ticks >= seconds:
            break
        time.sleep(0.002)
    time.sleep(float(seconds * 1e4 % 1) / ticks)  # somewhere between two ticks
    os.kill(child, signal.SIGKILL)  # one that has ended but was not waited for still has its id


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: names of files, each where it is not bit by bit the same."""
    last = max(p.name for p in (one / "checkpoints").glob("[0-9]*"))
    names = ["samples.jsonl", "validation.jsonl", "warnings.jsonl", "evaluation.json", "evaluation.jsonl"]
    names += ["policy/model.safetensors", "checkpoints/best.json", f"checkpoints/{last}/agent.safetensors"]

    def content(run: Path, name: str) -> bytes | None:
        return (run / name).read_bytes() if (run / name).exists() else None

    odd = [name for name in names if content(one, name) != content(other, name)]
    odd += ["metrics.jsonl"] * (_metrics(one) != _metrics(other))
    return odd + ["tensorboard"] * (_scalars(one) != _scalars(other))


def _metrics(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run)]


def _scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that TensorBoard's files hold, by name, as it stands there: a step twice would be seen twice."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]

    scalars = defaultdict(list)
    parts = {file: file.name.split(".") for file in (run / "tensorboard").iterdir()}  # second, host, process, number
    for file in sorted(parts, key=lambda file: [int(p) if p.isdigit() else p for p in parts[file]]):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if not value.tag.startswith("time/") and value.tensor.float_val:
                    scalars[value.tag].append((event.step, value.tensor.float_val[0]))
    return scalars


def survival(kills: int, seed: int, updates: int, checkpoint_every: int, folder: Path) -> dict[str, Any]:
    """Kill so many runs at random moments, uniform over the time an uninterrupted run takes, resume each, and compare.

    It works in an empty folder and returns the figures, JSON-able.

    Raises:
        RLAIFError: If a run that is not killed fails.
    """
    import torch

    torch.set_num_threads(1)
    _load_libraries()
    prepared(folder)
    rng = np.random.default_rng(seed)
    phase = mmap.mmap(-1, 1)

    def run(name: str, moment: float | None = None) -> tuple[float, int, str]:
        """The processor's seconds it took, its exit code and where it then was."""
        phase[0] = 0
        child = started(settings(folder, folder / name, updates, checkpoint_every), phase)
        if moment is not None:
            kill_after(child, moment)
        code, seconds = ended(child)
        if code not in (0, -signal.SIGKILL):
            raise RLAIFError(f"expected run {name!r} to end well, found exit code {code}")
        return seconds, code, PHASES[-1] if code == 0 else PHASES[phase[0]]

    whole = (run("whole")[0] + run("again")[0]) / 2
    unequal = differences(folder / "whole", folder / "again")
    lost: list[float] = []
    hits: Counter[str] = Counter()
    odd = []
    while len(lost) < kills:
        name = f"run-{len(lost)}"
        moment = float(rng.uniform(0, whole))
        before, code, where = run(name, moment)
        if code == 0:  # it was quicker than the others; its folder is that of a finished run
            shutil.rmtree(folder / name)
            continue
        after, _, _ = run(name)
        hits[where] += 1
        lost.append(before + after - whole)
        if different := differences(folder / "whole", folder / name):
            odd.append({"run": name, "cpu_seconds": moment, "where": where, "differs": different})
        else:
            shutil.rmtree(folder / name)
    return {
        "updates": updates,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
        "cpu_seconds_uninterrupted": round(whole, 2),
        "two_uninterrupted_runs_differ_in": unequal,
        "kills": kills,
        "identical": kills - len(odd),
        "different": odd,
        "killed_in": dict(sorted(hits.items())),
        "cpu_seconds_lost_per_kill": {"mean": round(float(np.mean(lost)), 2), "max": round(float(np.max(lost)), 2)},
    }


def _load_libraries() -> None:
    """Import what the forked processes need, once."""
    libraries = ("matplotlib.figure", "peft", "torch.utils.tensorboard", "vaderSentiment.vaderSentiment")
    for name in (*libraries, "transformers.models.llama.modeling_llama", "agents.training.command", "rewards"):
        importlib.import_module(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures as JSON; the exit code is 1 where a run was not identical."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.survival", description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--checkpoint-every", type=int, default=3)
    options = parser.parse_args(argv)
    os.environ["RLAIF_DEVICE"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        figures = survival(folder=Path(folder), **vars(options))
    print(json.dumps(figures, indent=2))
    return int(bool(figures["different"] or figures["two_uninterrupted_runs_differ_in"]))


if __name__ == "__main__":
    sys.exit(main())
