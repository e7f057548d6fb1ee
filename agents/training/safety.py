"""What makes a training survive, around its loop: checkpoints, signals, failures, and going on from where it was.

After each update everything that decides how it goes on is put aside as plain values; the weights themselves change
only in the optimiser's step. So a checkpoint of the last whole update can be written at any other moment: every few
updates, on SIGTERM, and when something fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from agents.passes import is_out_of_memory
from agents.reinforce import ReinforceAgent
from agents.rollout import NonFiniteError, plain
from agents.training import checkpoints
from agents.training.config import REWARD, TrainConfig, reward_facts
from agents.training.heldout import evaluate_policy, hold_against, read_json
from agents.training.interrupts import Interrupts
from agents.training.log import Log
from agents.watch import Alarm
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.data.tasks import Task
from rlaif_env.records import write_json
from rlaif_env.runs import RunFolder

Observations = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Parts:
    """What a training is made of; held_out and validation where there are such evaluations."""

    task: Task
    envs: VectorEnv[Any, Any, Any]
    held_out: VectorEnv[Any, Any, Any] | None
    validation: VectorEnv[Any, Any, Any] | None
    agent: ReinforceAgent


class Attempt:
    """An update in the making: its number, its rewards (n,), once they are known, and the seconds of each phase."""

    def __init__(self, number: int) -> None:
        self.number, self.rewards = number, cast(Any, None)
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """A phase has ended."""
        now = time.perf_counter()
        self.seconds[phase], self._since = now - self._since, now


class Safety:
    """Keeps a run such that it can go on from its last whole update; it begins with a fresh agent and environments."""

    def __init__(self, config: TrainConfig, parts: Parts, run: RunFolder, log: Log, interrupts: Interrupts) -> None:
        self.config, self.agent, self.envs, self.parts = config, parts.agent, parts.envs, parts
        self.run, self.log, self.interrupts = run, log, interrupts
        self._best: dict[str, float] | None = None
        self._validated = -1  # the update after which it was done last
        self._whole: dict[str, Any] = {}  # all values as of the last whole update
        self._saved: dict[str, Any] | None = None  # those of the last checkpoint
        self._reward = reward_facts(run.config)
        self.before: Callable[[], dict[str, Any]] = dict
        """Environment and generator before a batch that is in the making (`agents.training.overlap`)."""
        self.wait: Callable[[], None] = lambda: None
        """Waits until nothing is at work beside this."""

    def begin(self, chosen: Path | None) -> Observations:
        """Bring agent, environments and files to the chosen checkpoint, else the newest whole one, else the start."""
        checkpoint, damaged = checkpoints.newest(self.run.path) if chosen is None else (checkpoints.read(chosen), [])
        for message in damaged:
            self.log.tell(f"{message}; going on from the checkpoint before it")
        prompts = self._start() if checkpoint is None else self._restore(checkpoint)
        self.interrupts.save = self.save
        return prompts

    def _start(self) -> Observations:
        if (self.run.path / "metrics.jsonl").exists():
            self.log.tell("no checkpoint was saved before this run ended: beginning again")
        checkpoints.cut_back(self.run.path, {})
        self._record_reward(0, "")
        prompts: Observations = self.envs.reset(seed=self.config.seed)[0]
        self._settled()
        return prompts

    def _restore(self, checkpoint: checkpoints.Checkpoint) -> Observations:
        values, rows = checkpoint.values, self.agent.config.micro_batch
        checkpoints.cut_back(self.run.path, values["position"])
        for name in ("finished.json", "after.json"):
            (self.run.path / name).unlink(missing_ok=True)
        checkpoints.load_agent(self.agent, checkpoint.tensors, values["agent"])
        self.agent.passes.ranks.tell("load", values["agent"])
        self.agent.passes.ranks.share(checkpoint.tensors)
        prompts: Observations = self.envs.unwrapped.set_state(values["environment"])  # type: ignore[attr-defined]
        if values["numerics"]["agent.micro_batch"] != rows:
            self.agent.passes.micro_batch = rows
        self._validated = values["validated"]
        self.log.dropped.set_state(values["dropped"])
        if not (changed := checkpoints.differing_in(values["reward"], self._reward)):
            self.log.watch.set_state(values["watch"])
            self.log.validations.set_state(values["validations"])
            if (validation := self.parts.validation) is not None and (first := self.log.validations.first):
                prompts_there = validation.unwrapped.core.prompts[: validation.num_envs]  # type: ignore[attr-defined]
                hold_against(validation, list(dict.fromkeys(prompts_there)), first)
            self._best = values["best"]
        self._settled()
        self._saved = self._whole
        self._tidy()
        self.log.tell(f"going on after update {checkpoint.update} of {self.config.updates}")
        self._record_reward(checkpoint.update, changed)
        differing = checkpoints.differing_in(values["numerics"], checkpoints.numerics(self.agent))
        if self.config.overlap:
            differing = "; ".join(filter(None, [differing, "the batch in the making is drawn anew (overlap)"]))
        if differing:
            text = (
                f"from update {checkpoint.update + 1} on, figures and weights are no longer bit-identical to those of "
                f"a run that was not cut short: {differing}"
            )
            self.log.warn(Alarm("not-identical", checkpoint.update, text))
        return prompts

    def _record_reward(self, update: int, changed: str) -> None:
        """Have config.json say what the reward is from an update on, and each update after which it became another."""
        record = read_json(self.run.path / "config.json")
        known = record.get("reward_changes", {})
        changes = {after: what for after, what in known.items() if int(after) < update}
        if changed and update:
            changes[str(update)] = changed
            text = f"from update {update + 1} on, rewards are not what they were before: {changed}"
            self.log.warn(Alarm("reward-changed", update, text))
        if changes != known or reward_facts(record["config"]) != self._reward:
            self.run.amend(REWARD, reward_changes=changes)

    def _settled(self) -> None:
        """Weights and files agree: an update is whole. The other processes can write its checkpoint from here on."""
        self._whole = self._values()
        if (ranks := self.agent.passes.ranks).size > 1:
            ranks.tell("whole", self._whole | self._facts(synced=False))

    def _facts(self, synced: bool = True) -> dict[str, Any]:
        return {
            "position": checkpoints.position(self.run, synced),
            "numerics": checkpoints.numerics(self.agent),
            "reward": self._reward,
        }

    def _values(self) -> dict[str, Any]:
        before, agent = self.before(), checkpoints.agent_values(self.agent)
        return {
            "agent": agent | ({"generator": before["generator"]} if before else {}),
            "environment": before.get("environment") or self.envs.unwrapped.state(),  # type: ignore[attr-defined]
            "watch": self.log.watch.state(),
            "validations": self.log.validations.state(),
            "dropped": self.log.dropped.state(),
            "best": self._best,
            "validated": self._validated,
        }

    def goes_on(self) -> bool:
        """Validate and save what is due; whether there is an update to come."""
        c, done, improved = self.config, self.agent.updates, False
        if c.validate_every and done % c.validate_every == 0 and self._validated < done:
            improved = self._validate(done)
        due = c.checkpoint_every and done and done % c.checkpoint_every == 0
        ends = done >= c.updates or self.interrupts.stop
        if due or improved or ends:
            with self.interrupts.held():
                self.save()
        if ends:
            self.interrupts.save = None
        return not ends

    def another(self) -> bool:
        """Whether, for all that is known, an update comes after the one in hand."""
        return self.agent.updates + 1 < self.config.updates and not self.interrupts.stop

    def _validate(self, update: int) -> bool:
        """Evaluate on the validation split; whether this is the best policy of an update so far, by its mean reward."""
        self.wait()
        parts, agent, seed = self.parts, self.agent, self.config.seed
        assert parts.validation is not None
        held = evaluate_policy(agent.policy, parts.validation, parts.task, seed=seed, sampler=agent.sampler)
        with self.interrupts.held():
            reward = self.log.validated(update, held).get("reward")
            improved = False
            if update and reward is not None and (self._best is None or reward > self._best["reward"]):
                self._best, improved = {"step": update, "reward": reward}, True
            self._validated = update
            self._settled()
        return improved

    def save(self) -> bool:
        """Write a checkpoint of the last whole update, unless it is written; False if the weights are beyond it."""
        done = self._whole["agent"]["updates"]
        if self.agent.updates != done:
            return False
        if self._saved is not self._whole:
            tensors = checkpoints.agent_tensors(self.agent)
            with self.run.checkpoint(done) as folder:
                checkpoints.write(folder, tensors, self._whole | self._facts())
            self._saved = self._whole
            self._tidy()
        return True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """When this block fails, the last whole update is saved, if that can be done."""
        try:
            yield
        except Exception:
            with suppress(RLAIFError, OSError):
                self.save()
            raise

    def _tidy(self) -> None:
        best = None if self._best is None else int(self._best["step"])
        checkpoints.prune(self.run.path, self.config.keep_checkpoints, best, self.agent.updates)
        if best is not None:
            write_json(self.run.path / "checkpoints" / "best.json", self._best)

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Try an update; when it fails, what it was to learn from is kept, and the error says where."""
        attempt = Attempt(self.agent.updates + 1)
        try:
            yield attempt
        except Exception as error:
            if is_out_of_memory(error):
                raise RLAIFError(
                    f"expected memory to sample and score {self.envs.num_envs} responses at once, found too little "
                    f"({error}); lower prompts_per_update or group_size"
                ) from error
            if not isinstance(error, NonFiniteError | BackendError):
                raise
            file = self.run.path / f"failed-update-{attempt.number:06d}.json"
            rewards = None if attempt.rewards is None else plain(attempt.rewards)
            dump = {
                "update": attempt.number,
                "error": str(error),
                "rows": list(error.rows),
                "batch": self.agent.batch(),
            }
            write_json(file, dump | {"rewards": rewards})
            raise type(error)(
                f"{error}; prompts, responses, log-probabilities and rewards are in {file}", error.rows
            ) from error

    @contextmanager
    def commit(self) -> Iterator[None]:
        """Write what belongs to a batch that is done: weights and files agree again at the end of this block.

        Raises:
            BackendError: If the judge failed on too much of what it was asked; the batch is saved.
        """
        with self.interrupts.held():
            yield
            before, now = self._whole["agent"]["micro_batch"], self.agent.passes.micro_batch
            if now != before:
                text = f"out of memory: {now} rows in a gradient pass from here on, not {before}"
                self.log.warn(Alarm("memory", self.agent.updates, text))
            self._settled()
            if self.log.stop:
                self.save()
        if self.log.stop:
            raise BackendError(self.log.stop)
