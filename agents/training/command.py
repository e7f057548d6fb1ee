"""`rlaif train`: evaluate, learn, save the policy, evaluate again on the same held-out prompts; leave a run folder.

The reward is a name handed to `gymnasium.make_vec`; the algorithm is `agents.training.loop`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv
from rich.console import Console
from safetensors import SafetensorError

from agents.policy import Policy
from agents.reinforce import ReinforceAgent
from agents.sampler import make_sampler
from agents.training.arguments import parsed, resumed
from agents.training.config import FREE, REWARD, TrainConfig, resolved_config, reward_code, reward_facts
from agents.training.display import display, report
from agents.training.heldout import HeldOut, evaluate_policy, read_json
from agents.training.interrupts import Interrupts
from agents.training.log import Log
from agents.training.loop import learn
from agents.training.safety import Parts, Safety, check_room, check_start
from rlaif_env.api import BackendError
from rlaif_env.data.tasks import EVAL_PROMPTS, Task, held_out_prompts, load_task
from rlaif_env.data.templates import template_for
from rlaif_env.runs import OtherRunError, RunError, RunFolder, write_json

_HELD_OUT = {"eval_prompts": EVAL_PROMPTS, "validation_prompts": 32}  # where not given and there are as many


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: its folder, its evaluations, and whether Ctrl-C cut it short."""

    folder: Path
    before: HeldOut | None
    after: HeldOut | None
    interrupted: bool


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Run a training to its end, or to Ctrl-C; go on with one that was cut short; give the result of a finished one.

    SIGTERM saves a checkpoint of the last whole update and raises SystemExit(143).

    Raises:
        RLAIFError: On bad settings, a failing backend, numbers that are not finite, files that cannot be written, or a
            folder that holds a run of another configuration.
    """
    import rlaif_env  # noqa: F401  (registers the ids)

    console = console or Console(quiet=True)
    config, chosen = resumed(config)
    task = load_task(config.task)
    config = _counted(config, task, console)
    with ExitStack() as stack:
        run = None
        if config.out is not None and (config.out / "config.json").exists():  # refuse before models are loaded
            run = stack.enter_context(_folder(config, chosen))
            if chosen is None and (run.path / "finished.json").exists():
                return _finished(run, console, task)
        parts = _parts(config, task)
        agent = parts.agent
        run = run or stack.enter_context(_folder(config, chosen))
        stack.enter_context(_mendable(_again(config, run.path)))
        dtype = str(agent.policy.reference.model.dtype).removeprefix("torch.")
        console.print(
            f"[bold]{config.model}[/] on {agent.policy.backbone.device} ({dtype}), task [bold]{task.name}[/], reward "
            f"[bold]{config.reward}[/], run folder {run.path}"
        )
        if (template := template_for(task, agent.policy.tokenizer)) != "plain":
            plain = ' (template = "plain" in the task would have it read them as they are)'
            named = "the model's chat template" if template == "chat" else f"the template {template}"
            console.print(f"prompts are put in {named}{plain if template == 'chat' else ''}", highlight=False)
        interrupts = Interrupts(console)
        stack.enter_context(interrupts.handled())
        check_room(agent, parts.envs)
        check_start(run, agent, task)
        before = _evaluation("before", config, parts, run, console)
        with display(config.updates, console) as show:
            log = Log(run, console, task, config.group_size, show)
            safety = Safety(config, parts, run, log, interrupts)
            learn(agent, parts.envs, safety.begin(chosen), safety, log)
        run.curves()
        if interrupts.stop:
            return TrainResult(run.path, before, None, interrupted=True)
        _save_policy(agent.policy, run.path, console)
        after = _evaluation("after", config, parts, run, console)
        if before is not None and after is not None:
            report(run, console, task, before, after)
        write_json(run.path / "finished.json", {"updates": agent.updates})
        return TrainResult(run.path, before, after, interrupted=False)


def _folder(config: TrainConfig, chosen: Path | None) -> RunFolder:
    """The run's folder; an error that says how to go on if only the reward is another than that of the run there."""
    finished = chosen is None and config.out is not None and (config.out / "finished.json").exists()
    free = (*FREE, *(REWARD if config.change_reward and not finished else ()))
    try:
        return RunFolder.create(config.out, resolved_config(config), command="train", exist=True, free=free)
    except OtherRunError as error:
        if finished or not all(name.startswith(REWARD) for name in error.settings):
            raise
        raise RunError(
            f"{error}; with --change-reward it goes on with the reward that is here, and records it"
        ) from None


def _again(config: TrainConfig, run: Path) -> str:
    """The command that goes on with a run; a reward that is code has to be named."""
    return f"rlaif train --resume {run}" + "".join(
        f" --reward {code}" for code in {config.reward} & {*reward_code(config)}
    )


@contextmanager
def _mendable(again: str) -> Iterator[None]:
    """Say of a reward that fails how the run goes on."""
    try:
        yield
    except BackendError as error:
        raise type(error)(
            f"{error}. `{again}` asks again from the last checkpoint on; `{again} --change-reward --reward.NAME VALUE` "
            "goes on with another setting of the reward",
            error.rows,
        ) from error


def _finished(run: RunFolder, console: Console, task: Task) -> TrainResult:
    """What a run came to that was finished before, shown again."""
    files = [run.path / f"{when}.json" for when in ("before", "after")]
    before, after = (HeldOut.read(file) if file.exists() else None for file in files)
    console.print(f"{run.path} is finished; this is its result")
    if before is not None and after is not None:
        report(run, console, task, before, after)
    return TrainResult(run.path, before, after, interrupted=False)


def _parts(config: TrainConfig, task: Task) -> Parts:
    """Environments and agent."""
    k, decay = config.group_size, config.updates if config.decay else 0
    envs = _environment(config, config.prompts_per_update * k, "train", k)
    held_out = _environment(config, config.eval_prompts, config.eval_split, 1) if config.eval_prompts else None
    validating = config.validation_prompts if config.validate_every else 0
    validation = _environment(config, validating, "validation", 1) if validating else None
    sampler = partial(make_sampler, config.sampler)
    agent = ReinforceAgent(
        config.model, config.agent, envs=envs, total_updates=decay, seed=config.seed, sampler=sampler
    )
    return Parts(task, envs, held_out, validation, agent)


def _environment(config: TrainConfig, num_envs: int, split: str, group_size: int) -> VectorEnv[Any, Any, Any]:
    return gym.make_vec(
        "RLAIF/TextGeneration-v0",
        num_envs=num_envs,
        task=config.task,
        reward=config.reward,
        reward_kwargs=dict(config.reward_options),
        tokenizer=config.model,
        split=split,
        group_size=group_size,
    )


def _counted(config: TrainConfig, task: Task, console: Console) -> TrainConfig:
    """The configuration with the numbers of held-out prompts, as many as there are where not given.

    RLAIFError if there are fewer than asked for.
    """
    splits = {"eval_prompts": config.eval_split} | (
        {"validation_prompts": "validation"} if config.validate_every else {}
    )
    counts: dict[str, Any] = {}
    for setting, split in splits.items():
        wanted, usual = getattr(config, setting), _HELD_OUT[setting]
        if wanted == 0:
            continue
        option = "--" + setting.replace("_", "-")
        count = len(held_out_prompts(task, split, wanted, most=usual, option=option))
        if wanted is None and count < usual:
            console.print(f"{setting}: {count}, all that split {split!r} has (by default {usual})", highlight=False)
        counts[setting] = count
    return replace(config, **counts)


def _evaluation(when: str, config: TrainConfig, parts: Parts, run: RunFolder, console: Console) -> HeldOut | None:
    """The evaluation before or after the training, the one before from its file if it was made."""
    if parts.held_out is None:
        return None
    file = run.path / f"{when}.json"
    reward = reward_facts(run.config)
    if when == "before" and file.exists() and read_json(file).get("reward") == reward:
        return HeldOut.read(file)
    with console.status(f"{when}: answering {parts.held_out.num_envs} held-out prompts"):
        agent, seed = parts.agent, config.seed
        evaluation = evaluate_policy(agent.policy, parts.held_out, parts.task, seed=seed, sampler=agent.sampler)
    write_json(file, {**vars(evaluation), "reward": reward})
    return evaluation


def _save_policy(policy: Policy, run: Path, console: Console) -> None:
    """Write the final policy aside and put it in its place whole."""
    final, aside = run / "policy", run / ".policy-unfinished"
    try:
        for folder in (final, aside):
            if folder.exists():
                shutil.rmtree(folder)
        with console.status("saving the policy"):
            policy.save(aside)
        aside.rename(final)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot write {final}: {getattr(error, 'strerror', None) or error}. Make room and start the same command "
            "again: the training itself is saved"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif train``; returns the exit code."""
    config = parsed(list(argv) if argv is not None else sys.argv[1:])
    console, started = Console(), time.monotonic()
    result = train(config, console)
    minutes = (time.monotonic() - started) / 60
    if result.interrupted:
        console.print(
            f"ended early after {minutes:.1f} minutes; `{_again(config, result.folder)}` goes on from the checkpoint"
        )
        return 130
    console.print(
        f"{minutes:.1f} minutes. Policy in {result.folder / 'policy'}, every response in "
        f"{result.folder / 'samples.jsonl'}, curves in {result.folder / 'curves.png'}; "
        f"tensorboard --logdir {result.folder / 'tensorboard'}"
    )
    return 0
