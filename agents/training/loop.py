"""A training that survives: what `agents.training.command` runs in its folder, from the start or from a checkpoint.

After each update everything that decides how it goes on is put aside as plain values; the weights themselves change
only in the optimiser's step. So a checkpoint of the last whole update can be written at any other moment: every few
updates, on SIGTERM, and when something fails.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from agents.guards import Alarm, NonFiniteError, Watch, is_out_of_memory, plain
from agents.reinforce import ReinforceAgent
from agents.training import checkpoints
from agents.training.display import Show, display, report
from agents.training.heldout import HeldOut, evaluate_policy
from agents.training.interrupts import Interrupts
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.data.tasks import Task, gold_scores
from rlaif_env.runs import RunError, RunFolder, write_json

__all__ = ["Parts", "Training", "finished"]


@dataclass(frozen=True)
class Parts:
    """What a training is made of; held_out and validation where there are such evaluations."""

    task: Task
    envs: VectorEnv[Any, Any, Any]
    held_out: VectorEnv[Any, Any, Any] | None
    validation: VectorEnv[Any, Any, Any] | None
    agent: ReinforceAgent


class Training:
    """The updates of a run and all that is written about them.

    Args:
        parts: Environments and a fresh agent.
        run: The run folder, new or with an unfinished run of the same configuration.
        console: Where to tell.
        updates: How many.
        seed: Of prompts and evaluations.
        checkpoint_every: Updates between checkpoints; 0 is none but the last.
        keep_checkpoints: How many stay.
        validate_every: Updates between validations; 0 is none.
    """

    def __init__(
        self,
        parts: Parts,
        run: RunFolder,
        console: Console,
        *,
        updates: int,
        seed: int,
        checkpoint_every: int,
        keep_checkpoints: int,
        validate_every: int,
    ) -> None:
        self.task, self.envs, self.agent = parts.task, parts.envs, parts.agent
        self.parts, self.run, self.console = parts, run, console
        self.updates, self.seed = updates, seed
        self.checkpoint_every, self.keep, self.validate_every = checkpoint_every, keep_checkpoints, validate_every
        self.interrupts = Interrupts(console)
        self._watch = Watch(self.agent.config.group_size)
        self._best: dict[str, float] | None = None
        self._validated = 0  # the update after which it was done last
        self._prompts: Any = None
        self._whole: dict[str, Any] = {}  # all values as of the last whole update
        self._saved: dict[str, Any] | None = None  # those of the last checkpoint

    def finish(self, chosen: Path | None = None) -> tuple[HeldOut | None, HeldOut | None]:
        """Everything that is still to be done: the evaluations before and after, each None where there is none.

        Args:
            chosen: The checkpoint to go on from; None is the newest that is whole, or the start.
        """
        with self.interrupts.handled():
            self._check_start()
            before = self._evaluation("before")
            self._begin(chosen)
            with display(self.updates, self.console) as show:
                self.interrupts.save = self.save
                self._loop(show)
                self.interrupts.save = None
            self.run.curves()
            if self.interrupts.stop:
                return before, None
            self._save_policy()
            after = self._evaluation("after")
            if before is not None and after is not None:
                report(self.run, self.console, self.task, before, after)
            write_json(self.run.path / "finished.json", {"updates": self.agent.updates})
            return before, after

    def save(self) -> bool:
        """Write a checkpoint of the last whole update, unless it is written; False if the weights are beyond it."""
        done = self._whole["agent"]["updates"]
        if self.agent.updates != done:
            return False
        if self._saved is not self._whole:
            tensors = checkpoints.agent_tensors(self.agent)
            further = {"position": checkpoints.position(self.run), "numerics": checkpoints.numerics(self.agent)}
            with self.run.checkpoint(done) as folder:
                checkpoints.write(folder, tensors, self._whole | further)
            self._saved = self._whole
            self._tidy()
        return True

    def _tidy(self) -> None:
        best = None if self._best is None else int(self._best["step"])
        checkpoints.prune(self.run.path, self.keep, best, self.agent.updates)
        if best is not None:
            write_json(self.run.path / "checkpoints" / "best.json", self._best)

    def _check_start(self) -> None:
        """Runs that start alike can be told to have; one that is gone on with must start from the same."""
        prompts = hashlib.sha256(json.dumps(list(self.task.prompts("train"))).encode()).hexdigest()
        start = {"policy": self.agent.policy.fingerprint(), "prompts": prompts}
        file = self.run.path / "start.json"
        if not file.exists():
            write_json(file, start)
            return
        recorded = _read_json(file)
        if odd := [name for name in start if recorded.get(name) != start[name]]:
            raise RLAIFError(
                f"expected the {' and '.join(odd)} this run began with (fingerprints in {file}), found others: put "
                "back the model and task files it was started with, or name another folder"
            )

    def _evaluation(self, when: str) -> HeldOut | None:
        """The evaluation before or after the training, from its file if it was made."""
        if self.parts.held_out is None:
            return None
        file = self.run.path / f"{when}.json"
        if when == "before" and file.exists():
            return _held_out(file)
        with self.console.status(f"{when}: answering {self.parts.held_out.num_envs} held-out prompts"):
            found = evaluate_policy(self.agent.policy, self.parts.held_out, self.task, seed=self.seed)
        write_json(file, found)
        return found

    def _begin(self, chosen: Path | None) -> None:
        """Bring agent, environments and files to where the run was, or to the start."""
        if chosen is None:
            checkpoint, told = checkpoints.newest(self.run.path)
        else:
            checkpoint, told = checkpoints.read(chosen), []
        for message in told:
            self._say(f"{message}; going on from the checkpoint before it")
        if checkpoint is None:
            if (self.run.path / "metrics.jsonl").exists():
                self._say("no checkpoint was saved before this run ended: beginning again")
            checkpoints.cut_back(self.run.path, {})
            self._prompts, _ = self.envs.reset(seed=self.seed)
            self._whole = self._values()
            return
        values = checkpoint.values
        checkpoints.cut_back(self.run.path, values["position"])
        for name in ("finished.json", "after.json"):
            (self.run.path / name).unlink(missing_ok=True)
        checkpoints.load_agent(self.agent, checkpoint.tensors, values["agent"])
        self._prompts = self.envs.unwrapped.set_state(values["environment"])  # type: ignore[attr-defined]
        self._watch.set_state(values["watch"])
        self._best, self._validated = values["best"], values["validated"]
        self._whole = self._saved = self._values()
        self._tidy()
        self._say(f"going on after update {checkpoint.update} of {self.updates}")
        now = checkpoints.numerics(self.agent)
        if differing := checkpoints.not_identical(values["numerics"], now):
            if values["numerics"]["agent.micro_batch"] != self.agent.config.micro_batch:
                self.agent.micro_batch = self.agent.config.micro_batch
            text = (
                f"from update {checkpoint.update + 1} on, figures and weights are no longer bit-identical to those of "
                f"a run that was not cut short: {differing}"
            )
            self._warn(Alarm("not-identical", checkpoint.update, text))

    def _values(self) -> dict[str, Any]:
        return {
            "agent": checkpoints.agent_values(self.agent),
            "environment": self.envs.unwrapped.state(),  # type: ignore[attr-defined]
            "watch": self._watch.state(),
            "best": self._best,
            "validated": self._validated,
        }

    def _loop(self, show: Show) -> None:
        while True:
            done, improved = self.agent.updates, False
            if self.validate_every and done and done % self.validate_every == 0 and self._validated < done:
                improved = self._validate(done)
            due = self.checkpoint_every and done and done % self.checkpoint_every == 0
            ends = done >= self.updates or self.interrupts.stop
            if due or improved or ends:
                with self.interrupts.held():
                    self.save()
            if ends:
                return
            self._update(show)

    def _update(self, show: Show) -> None:
        update, micro_batch = self.agent.updates + 1, self.agent.micro_batch
        times = [time.perf_counter()]
        rewards = None
        try:
            responses = self.agent.act(self._prompts)
            times.append(time.perf_counter())
            prompts, rewards, _, _, infos = self.envs.step(responses)
            times.append(time.perf_counter())
            metrics = self.agent.update(rewards)
        except Exception as error:
            raise self._failed(error, update, rewards) from error
        times.append(time.perf_counter())
        with self.interrupts.held():  # weights and files agree again at its end
            self._log(update, metrics, rewards, infos["final_info"], times, show)
            if self.agent.micro_batch != micro_batch:
                text = (
                    f"out of memory: {self.agent.micro_batch} rows in a gradient pass from here on, not {micro_batch}"
                )
                self._warn(Alarm("memory", update, text))
            self._prompts = prompts
            self._whole = self._values()

    def _log(
        self,
        update: int,
        metrics: dict[str, float],
        rewards: NDArray[np.float64],
        final: dict[str, Any],
        times: Sequence[float],
        show: Show,
    ) -> None:
        spent = dict(zip(("time/sample", "time/score", "time/update"), np.diff(times).tolist(), strict=True))
        spent["time/tokens_per_second"] = metrics["tokens"] / (times[-1] - times[0])
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
        gold = None
        if self.task.gold is not None:
            pairs = zip(final["prompt"], final["response"], strict=True)
            gold = gold_scores(self.task, [self.task.judged(str(p), str(r)) for p, r in pairs])
            metrics["gold"] = float(gold.mean())
            parts = {"gold": gold} | parts
        self.run.log(update, metrics | spent)
        self.run.log_samples(update, list(final["prompt"]), list(final["response"]), rewards, parts)
        best = int(np.argmax(rewards))
        sample = f"{final['prompt'][best]}{final['response'][best]}"
        if update == 1 or update % 5 == 0:
            self.run.log_text(update, "best response of the update", f"[reward {rewards[best]:+.3f}] {sample}")
        for alarm in self._watch.observe(update, metrics, rewards, gold):
            self._warn(alarm)
        show(update, metrics, spent, sample)

    def _validate(self, update: int) -> bool:
        """Evaluate on the validation split; whether this is the best policy so far, by its mean reward."""
        assert self.parts.validation is not None
        held = evaluate_policy(self.agent.policy, self.parts.validation, self.task, seed=self.seed)
        means = {name: float(values.mean()) for name, values in held.measures.items()}
        with self.interrupts.held():
            self.run.record("validation.jsonl", {"step": update, **means})
            improved = self._best is None or means["reward"] > self._best["reward"]
            if improved:
                self._best = {"step": update, "reward": means["reward"]}
            self._validated = update
            self._whole = self._values()
        return improved

    def _failed(self, error: Exception, update: int, rewards: Any) -> Exception:
        """What to raise after an update that failed, once all that can be kept is."""
        with suppress(RLAIFError, OSError):
            self.save()
        said = str(error)
        if is_out_of_memory(error):
            n = self.envs.num_envs
            return RLAIFError(
                f"expected memory to sample and score {n} responses at once, found too little ({said}); lower "
                "prompts_per_update or agent.group_size"
            )
        if not isinstance(error, NonFiniteError | BackendError):
            return error
        file = self.run.path / f"failed-update-{update:06d}.json"
        dump = {"update": update, "error": said, "rows": list(error.rows), "batch": self.agent.batch()}
        write_json(file, dump | {"rewards": None if rewards is None else plain(rewards)})
        return type(error)(f"{said}; prompts, responses, log-probabilities and rewards are in {file}", error.rows)

    def _warn(self, alarm: Alarm) -> None:
        self.run.record("warnings.jsonl", asdict(alarm))
        self.run.log_text(alarm.step, f"warning: {alarm.kind}", alarm.text)
        self._say(f"warning (update {alarm.step}): {alarm.text}")

    def _say(self, text: str) -> None:
        self.console.print(f"[yellow]{escape(text)}", highlight=False)

    def _save_policy(self) -> None:
        """Write the final policy aside and put it in its place whole."""
        final, aside = self.run.path / "policy", self.run.path / ".policy-unfinished"
        try:
            for folder in (final, aside):
                if folder.exists():
                    shutil.rmtree(folder)
            with self.console.status("saving the policy"):
                self.agent.policy.save(aside)
            aside.rename(final)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"cannot write {final}: {getattr(error, 'strerror', None) or error}. Make room and start the same "
                "command again: the training itself is saved"
            ) from error


def finished(run: RunFolder, console: Console, task: Task) -> tuple[HeldOut | None, HeldOut | None] | None:
    """The evaluations of a run that was finished before, shown again; None if it was not."""
    if not (run.path / "finished.json").exists():
        return None
    files = [run.path / f"{when}.json" for when in ("before", "after")]
    before, after = (_held_out(file) if file.exists() else None for file in files)
    console.print(f"{run.path} is finished; this is its result")
    if before is not None and after is not None:
        report(run, console, task, before, after)
    return before, after


def _held_out(file: Path) -> HeldOut:
    found = _read_json(file)
    try:
        measures = {name: np.array(values, dtype=np.float64) for name, values in found["measures"].items()}
        return HeldOut(list(found["prompts"]), list(found["responses"]), measures)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"expected an evaluation in {file}, found something else ({error}); remove the file") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"found {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"expected a JSON object in {file}, found something else ({error})") from error
    return found
