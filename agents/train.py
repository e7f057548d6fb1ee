"""`rlaif train`: collect, score, update; evaluate before and after on held-out prompts; leave a run folder behind.

The loop is the whole algorithm: the agent acts, the environment pays, the agent updates. Nothing here knows where the
reward comes from; it is a name handed to `gymnasium.make_vec`.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agents.heldout import HeldOut, changes, evaluate_policy
from agents.reinforce import ReinforceAgent, ReinforceConfig
from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL
from rlaif_env.runs import RunFolder, write_json
from rlaif_env.tasks import Task, load_task

__all__ = ["TrainConfig", "main", "train"]

_HEADLINES = {
    "score": "LLM score",
    "reward": "reward",
    "gold": "gold measure",
    "length": "length (tokens)",
    "kl": "KL to reference (nats)",
    "distinct-2": "distinct-2",
}


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
        out: The run folder; a new one under runs/ where not given.
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
    checkpoint_every: int = 0
    out: Path | None = None
    decay: bool = True
    agent: ReinforceConfig = field(default_factory=ReinforceConfig)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: its folder, its evaluations, and whether it was cut short."""

    folder: Path
    before: HeldOut | None
    after: HeldOut | None
    interrupted: bool


def _environment(config: TrainConfig, num_envs: int, split: str, group_size: int) -> VectorEnv[Any, Any, Any]:
    try:
        settings = json.loads(config.reward_kwargs)
    except ValueError as error:
        raise RLAIFError(
            f"expected reward_kwargs as a JSON object, found {config.reward_kwargs!r} ({error})"
        ) from error
    if not isinstance(settings, dict):
        raise RLAIFError(f"expected reward_kwargs as a JSON object, found {config.reward_kwargs!r}")
    named = {"model": config.reward_model, "llm_url": config.llm_url}
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
    """Run a training to its end, or to Ctrl-C.

    Raises:
        RLAIFError: On bad settings, a failing backend, or numbers that are not finite.
    """
    import rlaif_env  # noqa: F401  (registers the ids)

    console = console or Console(quiet=True)
    for name in ("updates", "prompts_per_update"):
        if getattr(config, name) < 1:
            raise RLAIFError(f"expected {name} of at least 1, found {getattr(config, name)}")
    task = load_task(config.task)
    if config.decay:
        config = replace(config, agent=replace(config.agent, decay_updates=config.updates))
    k = config.agent.group_size
    envs = _environment(config, config.prompts_per_update * k, "train", k)
    held_out = None
    if config.eval_prompts:
        available = len(task.prompts(config.eval_split))
        if config.eval_prompts > available:
            raise RLAIFError(
                f"expected at most {available} eval_prompts, as many as split {config.eval_split!r} of {task.name!r} "
                f"has, found {config.eval_prompts}"
            )
        held_out = _environment(config, config.eval_prompts, config.eval_split, 1)
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
    with RunFolder.create(config.out, asdict(config), command="train") as run:
        dtype = str(agent.policy.reference.model.dtype).removeprefix("torch.")
        console.print(
            f"[bold]{config.model}[/] on {agent.policy.backbone.device} ({dtype}), "
            f"task [bold]{task.name}[/], reward [bold]{config.reward}[/], run folder {run.path}"
        )
        start = {"policy": agent.policy.fingerprint(), "prompts": _fingerprint(task.prompts("train"))}
        write_json(run.path / "start.json", start)  # runs that start alike can be told to have
        before = after = None
        if held_out is not None:
            with console.status(f"before: answering {config.eval_prompts} held-out prompts"):
                before = evaluate_policy(agent.policy, held_out, task, seed=config.seed)
        interrupted = _loop(config, agent, envs, run, console)
        with run.checkpoint(agent.updates) as folder:
            agent.save_state(folder)
        if not interrupted:
            with console.status("saving the policy"):
                agent.policy.save(run.path / "policy")
        if held_out is not None and before is not None and not interrupted:
            with console.status(f"after: answering {config.eval_prompts} held-out prompts"):
                after = evaluate_policy(agent.policy, held_out, task, seed=config.seed)
            _report(run, console, task, before, after)
        run.curves()
        return TrainResult(run.path, before, after, interrupted)


def _fingerprint(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _loop(
    config: TrainConfig, agent: ReinforceAgent, envs: VectorEnv[Any, Any, Any], run: RunFolder, console: Console
) -> bool:
    """The updates; returns whether Ctrl-C ended them early."""
    prompts, _ = envs.reset(seed=config.seed)
    with _display(config, console) as show, _until_interrupted(console) as interrupted:
        for update in range(1, config.updates + 1):
            times = [time.perf_counter()]
            responses = agent.act(prompts)
            times.append(time.perf_counter())
            prompts, rewards, _, _, infos = envs.step(responses)
            times.append(time.perf_counter())
            metrics = agent.update(rewards)
            times.append(time.perf_counter())
            spent = dict(zip(("time/sample", "time/score", "time/update"), np.diff(times).tolist(), strict=True))
            spent["time/tokens_per_second"] = metrics["tokens"] / (times[-1] - times[0])
            final = infos["final_info"]
            parts = {
                name: column
                for name, column in final.items()
                if not name.startswith("_") and name not in ("prompt", "response", "action_mask")
            }
            metrics |= {
                f"reward/{name}": float(np.mean(column))
                for name, column in parts.items()
                if np.asarray(column).dtype.kind == "f"
            }
            run.log(update, metrics | spent)
            run.log_samples(update, list(final["prompt"]), list(final["response"]), rewards, parts)
            best = int(np.argmax(rewards))
            sample = f"{final['prompt'][best]}{final['response'][best]}"
            if update == 1 or update % 5 == 0:
                run.log_text(update, "best response of the update", f"[reward {rewards[best]:+.3f}] {sample}")
            show(update, metrics, spent, sample)
            if interrupted():
                return True
            if config.checkpoint_every and update % config.checkpoint_every == 0:
                with run.checkpoint(update) as folder:
                    agent.save_state(folder)
    return False


@contextmanager
def _until_interrupted(console: Console) -> Iterator[Callable[[], bool]]:
    """Ctrl-C lets the update in hand finish, so that no half-taken step is saved; a second one stops at once."""
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        console.print("[yellow]interrupted: finishing this update, then saving a checkpoint (again: at once)")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _display(config: TrainConfig, console: Console) -> Iterator[Any]:
    """A live bar in a terminal, a line every few updates elsewhere."""
    if not console.is_terminal:

        def line(update: int, metrics: Mapping[str, float], spent: Mapping[str, float], sample: str) -> None:
            if update == 1 or update % 5 == 0 or update == config.updates:
                console.print(f"update {update:4d}/{config.updates}  {_figures(metrics, spent)}", highlight=False)

        yield line
        return
    progress = Progress(
        TextColumn("update"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    bar = progress.add_task("", total=config.updates, figures="")
    latest = Text("", style="dim", overflow="ellipsis", no_wrap=True)
    with Live(Group(progress, latest), console=console, refresh_per_second=4):

        def live(update: int, metrics: Mapping[str, float], spent: Mapping[str, float], sample: str) -> None:
            progress.update(bar, completed=update, figures=_figures(metrics, spent))
            latest.plain = "best: " + " ".join(sample.split())

        yield live


def _figures(metrics: Mapping[str, float], spent: Mapping[str, float]) -> str:
    parts = [f"reward {metrics['reward']:+.3f}"]
    if "reward/score" in metrics:
        parts.append(f"score {metrics['reward/score']:.2f}")
    if "kl" in metrics:
        parts.append(f"KL {metrics['kl']:.2f}")
    parts.append(f"{spent['time/tokens_per_second']:.0f} tokens/s")
    return "  ".join(parts)


def _report(run: RunFolder, console: Console, task: Task, before: HeldOut, after: HeldOut) -> None:
    """Print the table before / after and the samples; write evaluation.json and evaluation.jsonl."""
    found = changes(before, after)
    table = Table(
        title=f"before / after on {len(before.prompts)} held-out prompts",
        title_justify="left",
        caption="change: after - before, mean over prompts, bootstrap interval; no reward sees the gold measure",
        caption_justify="left",
    )
    for column in ("measure", "before", "after", "change, 95 % interval"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, label in _HEADLINES.items():
        if name not in found:
            continue
        old, new, change = found[name]
        shown = f"{label} ({task.gold})" if name == "gold" else label
        table.add_row(
            shown,
            f"{old.estimate:.3f}",
            f"{new.estimate:.3f}",
            f"{change.estimate:+.3f} [{change.low:+.3f}, {change.high:+.3f}]",
        )
    console.print(table)
    samples = Table(title="the same prompts, before and after", title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after"):
        samples.add_column(column, ratio=1)
    for i in range(min(8, len(before.prompts))):
        samples.add_row(Text(before.prompts[i]), Text(before.responses[i].strip()), Text(after.responses[i].strip()))
    console.print(samples)
    write_json(run.path / "evaluation.json", {name: [asdict(i) for i in three] for name, three in found.items()})
    with (run.path / "evaluation.jsonl").open("w", encoding="utf-8") as stream:
        for i, prompt in enumerate(before.prompts):
            row = {"prompt": prompt}
            for when, held in (("before", before), ("after", after)):
                row[when] = {"response": held.responses[i], **{m: float(v[i]) for m, v in held.measures.items()}}  # type: ignore[assignment]
            stream.write(json.dumps(row) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif train``; returns the exit code."""
    import tyro

    config = tyro.cli(TrainConfig, args=list(argv) if argv is not None else sys.argv[1:], prog="rlaif train")
    console = Console()
    started = time.monotonic()
    result = train(config, console)
    minutes = (time.monotonic() - started) / 60
    if result.interrupted:
        console.print(f"ended early after {minutes:.1f} minutes; the checkpoint is in {result.folder / 'checkpoints'}")
        return 130
    console.print(
        f"{minutes:.1f} minutes. Policy in {result.folder / 'policy'}, every response in "
        f"{result.folder / 'samples.jsonl'}, curves in {result.folder / 'curves.png'}; "
        f"tensorboard --logdir {result.folder / 'tensorboard'}"
    )
    return 0
