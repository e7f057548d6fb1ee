"""`rlaif train`: collect, score, update; evaluate before and after on held-out prompts; leave a run folder behind.

The loop is the whole algorithm: the agent acts, the environment pays, the agent updates. Nothing here knows where the
reward comes from; it is a name handed to `gymnasium.make_vec`. `agents.training.loop` runs it so that nothing is lost
when the process is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv
from rich.console import Console

from agents.reinforce import ReinforceAgent, ReinforceConfig
from agents.training.heldout import HeldOut
from agents.training.loop import Parts, Training, finished
from rlaif_env.api import RLAIFError
from rlaif_env.data.jsonl import json_object
from rlaif_env.data.tasks import load_task
from rlaif_env.models import BUILTIN_MODEL
from rlaif_env.runs import RunFolder

__all__ = ["TrainConfig", "TrainResult", "main", "train"]

_FREE = ("out", "resume", "checkpoint_every", "keep_checkpoints", "agent.micro_batch")
"""Settings that may be others when a run is gone on with: they do not change what is learned."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a policy with REINFORCE on any reward.

    Attributes:
        task: A built-in task or a TOML file.
        reward: Where the reward comes from: "direct-llm", "human-rm", "distilled-rm", or an installed backend.
        reward_model: The model behind the reward: a reward model's folder, or the scorer's name; the backend's own
            default where not given.
        llm_url: Base URL of an OpenAI-compatible server that runs the scorer, for "direct-llm".
        reward_kwargs: The backend's other settings as JSON, such as '{"scale": [1, 10]}'.
        model: The initial policy: the built-in model, a folder, or a Hugging Face id.
        updates: REINFORCE steps.
        prompts_per_update: Prompts in a batch; each gets agent.group_size samples.
        eval_prompts: Held-out prompts answered before and after; 0 is no evaluation.
        eval_split: The split they come from.
        seed: Of prompts, sampling and initial adapter.
        checkpoint_every: Updates between checkpoints; 0 is none but the last.
        keep_checkpoints: How many of the last stay, the best by validation beside them.
        validate_every: Updates between evaluations on the validation split, which find the best checkpoint; 0 is none.
        validation_prompts: Prompts in each of these.
        out: The run folder; a new one under runs/ where not given. One that holds an unfinished run of this
            configuration is gone on with; of a finished one the result is given.
        resume: "latest" (of the folder out, or of the newest run under runs/), a run folder, or one of its checkpoints
            to go back to. On the command line, settings that are not given are then that run's.
        decay: Let the learning rate fall linearly to 0 over the run (sets agent.decay_updates).
        agent: The algorithm's settings.

    The models are put on the GPU where there is one (bfloat16), else on the CPU (float32); the environment variables
    RLAIF_DEVICE and RLAIF_DTYPE say otherwise.
    """

    task: str = "movie-review"
    reward: str = "direct-llm"
    reward_model: str | None = None
    llm_url: str | None = None
    reward_kwargs: str = "{}"
    model: str = BUILTIN_MODEL
    updates: int = 50
    prompts_per_update: int = 4
    eval_prompts: int = 128
    eval_split: str = "test"
    seed: int = 0
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    validate_every: int = 0
    validation_prompts: int = 32
    out: Path | None = None
    resume: str | None = None
    decay: bool = True
    agent: ReinforceConfig = field(default_factory=ReinforceConfig)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: its folder, its evaluations, and whether Ctrl-C cut it short."""

    folder: Path
    before: HeldOut | None
    after: HeldOut | None
    interrupted: bool


def _environment(config: TrainConfig, num_envs: int, split: str, group_size: int) -> VectorEnv[Any, Any, Any]:
    try:
        settings = json_object(config.reward_kwargs)
    except RLAIFError as error:
        raise RLAIFError(
            f"expected reward_kwargs as a JSON object, found {config.reward_kwargs!r:.200} ({error})"
        ) from error
    named = {"model": config.reward_model, "url": config.llm_url}
    settings |= {name: value for name, value in named.items() if value is not None}
    return gym.make_vec(
        "RLAIF/TextGeneration-v0",
        num_envs=num_envs,
        task=config.task,
        reward=config.reward,
        reward_kwargs=settings,
        tokenizer=config.model,
        split=split,
        group_size=group_size,
    )


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Run a training to its end, or to Ctrl-C; go on with one that was cut short; give the result of a finished one.

    SIGTERM saves a checkpoint of the last whole update and raises SystemExit(143).

    Raises:
        RLAIFError: On bad settings, a failing backend, numbers that are not finite, files that cannot be written, or a
            folder that holds a run of another configuration.
    """
    import rlaif_env  # noqa: F401  (registers the ids)

    console = console or Console(quiet=True)
    for name in ("updates", "prompts_per_update", "keep_checkpoints"):
        if getattr(config, name) < 1:
            raise RLAIFError(f"expected {name} of at least 1, found {getattr(config, name)}")
    if config.decay:
        config = replace(config, agent=replace(config.agent, decay_updates=config.updates))
    config, chosen = _resumed(config)
    with ExitStack() as stack:
        run = None
        if config.out is not None and (config.out / "config.json").exists():  # refuse before models are loaded
            run = stack.enter_context(_folder(config))
            if chosen is None and (ended := finished(run, console, load_task(config.task))) is not None:
                return TrainResult(run.path, *ended, interrupted=False)
        parts = _parts(config)
        if run is None:
            run = stack.enter_context(_folder(config))
        dtype = str(parts.agent.policy.reference.model.dtype).removeprefix("torch.")
        console.print(
            f"[bold]{config.model}[/] on {parts.agent.policy.backbone.device} ({dtype}), "
            f"task [bold]{parts.task.name}[/], reward [bold]{config.reward}[/], run folder {run.path}"
        )
        training = Training(
            parts,
            run,
            console,
            updates=config.updates,
            seed=config.seed,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            validate_every=config.validate_every,
        )
        before, after = training.finish(chosen)
        return TrainResult(run.path, before, after, training.interrupts.stop)


def _folder(config: TrainConfig) -> RunFolder:
    return RunFolder.create(config.out, asdict(config), command="train", exist=True, free=_FREE)


def _parts(config: TrainConfig) -> Parts:
    """Environments and agent."""
    task, k = load_task(config.task), config.agent.group_size
    envs = _environment(config, config.prompts_per_update * k, "train", k)
    held_out = _held_out(config, "eval_prompts", config.eval_split)
    validation = _held_out(config, "validation_prompts", "validation") if config.validate_every else None
    agent = ReinforceAgent(
        config.model,
        config.agent,
        max_new_tokens=int(envs.action_space.shape[-1]),  # type: ignore[index]
        seed=config.seed,
    )
    width = int(envs.single_action_space.nvec[0])  # type: ignore[attr-defined]
    if width != agent.policy.backbone.logit_width:
        raise RLAIFError(
            f"expected an environment of {agent.policy.backbone.logit_width} token ids, the policy's logit width, "
            f"found {width}"
        )
    return Parts(task, envs, held_out, validation, agent)


def _held_out(config: TrainConfig, setting: str, split: str) -> VectorEnv[Any, Any, Any] | None:
    """An environment of the first prompts of a split, as many as the setting says; None for none."""
    wanted = getattr(config, setting)
    if not wanted:
        return None
    task = load_task(config.task)
    available = len(task.prompts(split))
    if wanted > available:
        raise RLAIFError(
            f"expected at most {available} {setting}, as many as split {split!r} of {task.name!r} has, found {wanted}"
        )
    return _environment(config, wanted, split, 1)


def _resumed(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """The configuration with the folder that ``resume`` means, and the checkpoint where it names one."""
    if config.resume is None:
        return config, None
    chosen = None
    if config.resume == "latest":
        folder = config.out or _newest_run(Path("runs"))
    else:
        folder = Path(config.resume)
        if folder.absolute().parent.name == "checkpoints":
            folder, chosen = folder.absolute().parent.parent, folder
    if not (folder / "config.json").is_file():
        raise RLAIFError(f"expected a training to go on with in {folder}, found none; check resume and out")
    if config.out is not None and config.out.resolve() != folder.resolve():
        raise RLAIFError(f"expected out to be the folder to resume, {folder}, found {config.out}; leave out away")
    return replace(config, out=folder), chosen


def _newest_run(parent: Path) -> Path:
    """The training run under a folder that was written to last."""
    runs = [file.parent for file in parent.glob("*/config.json") if (file.parent / "start.json").is_file()]
    if not runs:
        raise RLAIFError(f"expected a training to go on with under {parent.absolute()}, found none; name its folder")
    return max(runs, key=lambda run: max(file.stat().st_mtime for file in run.iterdir()))


def _recorded(folder: Path) -> TrainConfig:
    """The configuration of the run in a folder.

    Raises:
        RLAIFError: If config.json cannot be read or is not one of this version's training runs.
    """
    try:
        values = json.loads((folder / "config.json").read_bytes())["config"]
        known = {entry.name for entry in fields(TrainConfig)}
        agent = ReinforceConfig(**values["agent"])
        return TrainConfig(**{k: v for k, v in values.items() if k in known} | {"agent": agent, "out": folder})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RLAIFError(
            f"expected {folder / 'config.json'} to be a training's configuration, found: {error}"
        ) from error


def _arguments(argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration that the command line changes, and the arguments that change it, ``--resume`` taken out."""
    import argparse

    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--resume", nargs="?", const="latest")
    known.add_argument("--out", type=Path)
    found, rest = known.parse_known_args(argv)
    config = TrainConfig(out=found.out, resume=found.resume)
    if found.resume is not None:
        given, _ = _resumed(config)
        if given.out is not None:
            config = replace(_recorded(given.out), resume=found.resume)
    return config, rest


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif train``; returns the exit code."""
    import tyro

    default, rest = _arguments(list(argv) if argv is not None else sys.argv[1:])
    config = tyro.cli(TrainConfig, args=rest, default=default, prog="rlaif train")
    console = Console()
    started = time.monotonic()
    result = train(config, console)
    minutes = (time.monotonic() - started) / 60
    if result.interrupted:
        console.print(
            f"ended early after {minutes:.1f} minutes; `rlaif train --resume {result.folder}` goes on from the "
            "checkpoint"
        )
        return 130
    console.print(
        f"{minutes:.1f} minutes. Policy in {result.folder / 'policy'}, every response in "
        f"{result.folder / 'samples.jsonl'}, curves in {result.folder / 'curves.png'}; "
        f"tensorboard --logdir {result.folder / 'tensorboard'}"
    )
    return 0
