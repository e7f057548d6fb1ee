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
from agents.served import ServedSampler
from agents.training.arguments import parsed, resumed
from agents.training.config import FREE, REWARD, TrainConfig, resolved_config, reward_code, reward_facts
from agents.training.display import display, report
from agents.training.follow import follow, make_agent
from agents.training.heldout import HeldOut, evaluate_policy, hold_against, read_json
from agents.training.interrupts import Interrupts
from agents.training.log import Log
from agents.training.loop import learn
from agents.training.overlap import check_overlap, learn_overlapped
from agents.training.safety import Parts, Safety
from agents.training.start import calibrate, check_room, check_start
from rlaif_env.api import BackendError, RewardBackend, RLAIFError, judges_groups
from rlaif_env.data.tasks import EVAL_PROMPTS, Task, held_out_prompts, load_task
from rlaif_env.data.templates import template_for
from rlaif_env.duel import Duel
from rlaif_env.ranks import LostRankError, Ranks, facts_of
from rlaif_env.records import RunError, write_json
from rlaif_env.runs import OtherRunError, RunFolder
from rlaif_env.tables import count_of

_HELD_OUT = {"eval_prompts": EVAL_PROMPTS, "validation_prompts": 32}  # where not given and there are as many


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: its folder, its evaluations, whether Ctrl-C cut it short, how many groups were dropped."""

    folder: Path
    before: HeldOut | None
    after: HeldOut | None
    interrupted: bool
    dropped: int = 0


def train(config: TrainConfig, console: Console | None = None, ranks: Ranks | None = None) -> TrainResult:
    """Run a training to its end, or to Ctrl-C; go on with one that was cut short; give the result of a finished one.

    SIGTERM saves a checkpoint of the last whole update and raises SystemExit(143). Of several processes this is the
    leader's part, and Ctrl-C does the same (130); the others follow (`agents.training.follow`).

    Raises:
        RLAIFError: On bad settings, a failing backend, numbers that are not finite, files that cannot be written, or a
            folder that holds a run of another configuration.
    """
    import rlaif_env  # noqa: F401  (registers the ids)

    console = console or Console(quiet=True)
    config, chosen = resumed(config)
    ranks = ranks or Ranks()
    if config.shard and ranks.size == 1:
        raise RLAIFError(
            "expected several processes to divide the layers over, found one; start it with torchrun (docs/scale.md), "
            "or leave --shard away (--no-shard)"
        )
    task = load_task(config.task)
    config = _counted(config, task, console)
    with ExitStack() as stack:
        run = None
        if config.out is not None and (config.out / "config.json").exists():  # refuse before models are loaded
            run = stack.enter_context(_folder(config, chosen))
            if chosen is None and (run.path / "finished.json").exists():
                return _finished(run, console, task)
        parts = _parts(config, task, ranks)
        agent = parts.agent
        run = run or stack.enter_context(_folder(config, chosen))
        agent.passes.ranks.tell("run", run.path.absolute(), run.config, config.keep_checkpoints)
        stack.enter_context(_mendable(_again(config, run.path), config.drops))
        dtype = str(agent.policy.reference.model.dtype).removeprefix("torch.")
        several = f", {ranks.size} processes" if ranks.size > 1 else ""
        console.print(
            f"[bold]{config.model}[/] on {agent.policy.backbone.device} ({dtype}){several}, task [bold]{task.name}[/], "
            f"reward [bold]{config.reward}[/], run folder {run.path}"
        )
        if (template := template_for(task, agent.policy.tokenizer)) != "plain":
            plain = ' (template = "plain" in the task would have it read them as they are)'
            named = "the model's chat template" if template == "chat" else f"the template {template}"
            console.print(f"prompts are put in {named}{plain if template == 'chat' else ''}", highlight=False)
        interrupts = Interrupts(console, ranks)
        stack.enter_context(interrupts.handled())
        check_room(agent, parts.envs)
        check_start(run, agent, task)
        if config.overlap:
            check_overlap(agent, parts.envs)
        if isinstance(agent.sampler, ServedSampler):
            stack.callback(agent.sampler.close)
            _open_sampler(agent.sampler, config, parts, run, console)
        calibrate(parts, run, config.seed)
        before = _evaluation("before", config, parts, run, console)
        with display(config.updates, console) as show:
            log = Log(run, console, task, config.group_size, show, config.max_dropped if config.drops else None)
            safety = Safety(config, parts, run, log, interrupts)
            prompts = safety.begin(chosen)
            with safety.kept():
                (learn_overlapped if config.overlap else learn)(agent, parts.envs, prompts, safety, log)
        run.curves()
        if interrupts.stop:
            return TrainResult(run.path, before, None, interrupted=True, dropped=log.dropped.total)
        _save_policy(agent.policy, run.path, console)
        after = _evaluation("after", config, parts, run, console)
        if before is not None and after is not None:
            report(run, console, task, before, after)
        dropped = log.dropped.total
        write_json(run.path / "finished.json", {"updates": agent.updates, "dropped_groups": dropped})
        return TrainResult(run.path, before, after, interrupted=False, dropped=dropped)


def _open_sampler(sampler: ServedSampler, config: TrainConfig, parts: Parts, run: RunFolder, console: Console) -> None:
    """Have servers sample the run's responses."""
    core: Any = parts.envs.unwrapped.core  # type: ignore[attr-defined]
    folder = Path(config.sampler.adapters) if config.sampler.adapters else run.path / "adapters"
    if not config.sampler.adapters:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    console.print(
        f"responses are sampled by {', '.join(config.sampler.url)}: figures are not bit for bit those of another run, "
        "nor of this one when it is gone on with",
        highlight=False,
    )
    tokens, tell = int(core.prompt_lengths.max()) + core.T, partial(console.print, highlight=False)
    sampler.open(folder, name=run.path.resolve().name, tokens=tokens, tell=tell)


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
def _mendable(again: str, drops: bool) -> Iterator[None]:
    """Say of a reward that fails, or a process that is gone, how the run goes on."""
    other = "--max-dropped 1` drops as many as it takes" if drops else "--on-judge-failure drop-group` without these"
    try:
        yield
    except LostRankError as error:
        raise LostRankError(f"{error}. `{again}` goes on from the last whole update") from error
    except BackendError as error:
        raise type(error)(
            f"{error}. `{again}` asks again from the last checkpoint on; `{again} --change-reward --reward.NAME VALUE` "
            f"goes on with another setting of the reward; `{again} {other}",
            error.rows,
        ) from error


def _finished(run: RunFolder, console: Console, task: Task) -> TrainResult:
    """What a run came to that was finished before, shown again."""
    files = [run.path / f"{when}.json" for when in ("before", "after")]
    before, after = (HeldOut.read(file) if file.exists() else None for file in files)
    console.print(f"{run.path} is finished; this is its result")
    if before is not None and after is not None:
        report(run, console, task, before, after)
    dropped = read_json(run.path / "finished.json").get("dropped_groups", 0)
    return TrainResult(run.path, before, after, interrupted=False, dropped=dropped)


def _parts(config: TrainConfig, task: Task, ranks: Ranks) -> Parts:
    """Environments and agent."""
    k = config.group_size
    envs = _environment(config, config.prompts_per_update * k, "train", k)
    backend = envs.unwrapped.core.backend  # type: ignore[attr-defined]
    alone = partial(_environment, config, backend=backend if judges_groups(backend) else None)
    held_out = alone(config.eval_prompts, config.eval_split) if config.eval_prompts else None
    validating = config.validation_prompts if config.validate_every else 0
    validation = alone(validating, "validation") if validating else None
    ranks.tell("train", config, k, envs.single_action_space)
    return Parts(task, envs, held_out, validation, make_agent(config, envs, ranks))


def _environment(
    config: TrainConfig, num_envs: int, split: str, group_size: int = 1, backend: RewardBackend | None = None
) -> VectorEnv[Any, Any, Any]:
    """Prompts of a split, each in groups; with a backend that judges groups each response against the start's."""
    reward: Any = (config.reward, dict(config.reward_options)) if backend is None else (Duel(backend), None)
    return gym.make_vec(
        "RLAIF/TextGeneration-v0",
        num_envs=num_envs,
        task=config.task,
        reward=reward[0],
        reward_kwargs=reward[1],
        tokenizer=config.model,
        split=split,
        group_size=group_size,
        on_failure="mark" if config.drops else "raise",
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
        held = HeldOut.read(file)
        hold_against(parts.held_out, held.prompts, held.responses)
        return held
    with console.status(f"{when}: answering {count_of(parts.held_out.num_envs, 'held-out prompt')}"):
        agent, seed = parts.agent, config.seed
        evaluation = evaluate_policy(agent.policy, parts.held_out, parts.task, seed=seed, sampler=agent.sampler)
    if len(evaluation.failures) == len(evaluation.prompts):
        raise BackendError(
            f"expected the judge to score some of {len(evaluation.prompts)} held-out prompts, found that it failed on "
            f"all ({evaluation.failures[0]})"
        )
    write_json(file, {**evaluation.to_json(), "reward": reward})
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
    argv = list(argv) if argv is not None else sys.argv[1:]
    console, started = Console(), time.monotonic()
    with Ranks.started() as ranks:
        if not ranks.leader:
            return follow(ranks, argv)
        ranks.check_same(facts_of(argv))
        config = parsed(argv)
        result = train(config, console, ranks)
    minutes = (time.monotonic() - started) / 60
    if result.interrupted:
        console.print(
            f"ended early after {minutes:.1f} minutes; `{_again(config, result.folder)}` goes on from the checkpoint"
        )
        return 130
    if result.dropped:
        console.print(
            f"{count_of(result.dropped, 'group')} left out because the judge failed on a response of theirs; "
            f"`rlaif rescore {result.folder}` asks again",
            highlight=False,
        )
    console.print(
        f"{minutes:.1f} minutes. Policy in {result.folder / 'policy'}, every response in "
        f"{result.folder / 'samples.jsonl'}, curves in {result.folder / 'curves.png'}; "
        f"tensorboard --logdir {result.folder / 'tensorboard'}"
    )
    return 0
