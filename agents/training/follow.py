"""Training in several processes: what all of them hold, and what those do that do not lead.

The leader runs the loop as a process alone does. A follower has the policy, its optimiser and nothing else: it samples
its share of the rows, computes its share of the gradient, and takes the optimiser's step when the leader says that the
update is whole. So when the leader is killed the others have the weights of the last whole update and know what its
checkpoint says beside them, and one of them writes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.policy import Policy
from agents.reinforce import ReinforceAgent
from agents.rollout import Rollout
from agents.sampler import Sampler, make_sampler
from agents.training import checkpoints
from agents.training.config import FREE, REWARD, TrainConfig
from rlaif_env.api import RLAIFError
from rlaif_env.batches import shares
from rlaif_env.models import Backbone, Samples, backbone, default_device, default_dtype, shard
from rlaif_env.ranks import LostRankError, Ranks, facts_of
from rlaif_env.runs import RunFolder


class DividedSampler:
    """Divides what a sampler is asked for over the processes: whole groups, by the tokens of their prompts."""

    def __init__(self, sampler: Sampler, ranks: Ranks) -> None:
        self._sampler, self._ranks = sampler, ranks

    @property
    def exact(self) -> bool:
        """As of the sampler."""
        return self._sampler.exact

    def sample(
        self, ids: NDArray[np.int64], mask: NDArray[Any], *, uniform: NDArray[np.float64], group_size: int = 1
    ) -> Samples:
        """All rows' samples, on every process: the leader's call has the followers make it too."""
        self._ranks.tell("sample", ids, mask, uniform, group_size)
        prompts, steps = mask.sum(1).tolist(), [uniform.shape[1]] * len(ids)
        parts = shares(prompts, steps, group_size, self._ranks.size, whole=True)
        own = parts[self._ranks.rank]

        def sampled() -> Samples | None:
            if not own:
                return None
            return self._sampler.sample(ids[own], mask[own], uniform=uniform[own], group_size=group_size)

        joined = Samples.joined([part for part in self._ranks.gather(sampled) if part is not None])
        order = np.argsort(np.concatenate([rows for rows in parts if rows]))
        return Samples(joined.ids[order], joined.lengths[order], joined.logprobs[order])


def make_agent(config: TrainConfig, envs: Any, ranks: Ranks) -> ReinforceAgent:
    """The agent that a configuration says, the same on every process.

    Raises:
        RLAIFError: If it cannot be made, or not the same, on some process.
    """
    decay = config.updates if config.decay else 0
    device = default_device()
    model: str | Backbone = config.model
    if config.shard:  # read where there is room, and nobody else's: a judge runs it in one process
        load = partial(backbone, config.model, device="cpu", dtype=default_dtype(device), shared=False)
        model = ranks.agree(load)

    def together(name: str, work: Callable[[], Any]) -> Any:
        ranks.tell(name)
        return ranks.bound(work)

    def sampler(policy: Policy) -> Sampler:
        if config.shard:  # before anything is made for where the policy's weights are
            shard(policy.backbone, device)
            policy.together = together
        made = make_sampler(config.sampler, policy)
        return made if ranks.size == 1 or config.sampler.url else DividedSampler(made, ranks)  # servers: the leader

    agent = ranks.agree(
        lambda: ReinforceAgent(
            model,
            config.agent,
            envs=envs,
            total_updates=decay,
            seed=config.seed,
            sampler=sampler,
            ranks=ranks,
        )
    )
    agent.exact = agent.exact and not config.overlap
    if ranks.size > 1:
        held = agent.policy.reference.model
        facts = {"dtype": held.dtype, "device": held.device.type, "policy": agent.policy.fingerprint()}
        ranks.check_same(facts)
    return agent


def follow(ranks: Ranks, argv: Sequence[str]) -> int:
    """Do what the leader tells until it ends; the exit code."""

    def work() -> int:
        ranks.check_same(facts_of(argv))
        follower = Follower(ranks)
        try:
            while True:
                name, *arguments = ranks.hear()
                getattr(follower, name)(*arguments)
        except LostRankError as error:
            raise LostRankError(f"{error}; {follower.save()}") from error

    return ranks.follow(work)


class Follower:
    """A process that another leads; its methods are the messages it is sent."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._agent: Any = None
        self._run: tuple[Path, dict[str, Any], int] | None = None  # folder, configuration, checkpoints to keep
        self._whole: dict[str, Any] = {}  # what the checkpoint of the last whole update says beside the weights

    def train(self, config: TrainConfig, group_size: int, single_action_space: Any) -> None:
        """Make the agent."""
        self._agent = make_agent(config, _Shape(group_size, single_action_space), self._ranks)
        self._agent.before_step = self._await_whole

    def run(self, path: Path, config: dict[str, Any], keep: int) -> None:
        """Where the leader writes, and as which run."""
        self._run = (path, config, keep)

    def load(self, values: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken."""
        checkpoints.load_agent(self._agent, self._ranks.share({}), values)

    def forward(self) -> None:
        """Run the sharded layers because the leader does."""
        self._ranks.bound(self._agent.policy.idle)

    def give(self) -> None:
        """Have the leader gather the sharded weights."""
        policy = self._agent.policy
        self._ranks.bound(lambda: deque(policy.backbone.plain_state(policy.adapter), maxlen=0))

    def sample(self, ids: Any, mask: Any, uniform: Any, group_size: int) -> None:
        """Sample a share of the rows."""
        self._agent.sampler.sample(ids, mask, uniform=uniform, group_size=group_size)

    def update(self, rollout: Rollout, rewards: NDArray[Any]) -> None:
        """Compute a share of the update."""
        self._agent.learn_from(rollout.on(self._agent.policy.backbone.device))
        self._agent.update(rewards)

    def whole(self, values: dict[str, Any]) -> None:
        """An update is whole."""
        self._whole = values

    def _await_whole(self) -> None:
        """Take no step before the leader has: its files and these weights are then of one update."""
        name, values = self._ranks.hear()
        assert name == "whole"
        self._whole = values

    def save(self) -> str:
        """Write the checkpoint of the last whole update for a leader that is gone; says what was done."""
        done = self._whole["agent"]["updates"] if self._whole else 0
        if self._run is None or not done:
            return "no update was whole yet"
        path, config, keep = self._run
        if not (path / "config.json").exists():
            return f"the run folder {path} cannot be seen from here: it goes on from the last checkpoint in it"
        try:
            with RunFolder.create(path, config, command="train", exist=True, free=(*FREE, *REWARD)) as run:
                if not (path / "checkpoints" / f"{done:06d}").exists():
                    with run.checkpoint(done) as folder:
                        checkpoints.write(folder, checkpoints.agent_tensors(self._agent), self._whole)
                    best = self._whole["best"]
                    checkpoints.prune(path, keep, None if best is None else int(best["step"]), done)
        except (RLAIFError, OSError) as error:
            return f"the last whole update, {done}, is not saved here: {error}"
        return f"a checkpoint of the last whole update, {done}, is saved in {path}"


class _Shape:
    """What an agent reads of its environments."""

    def __init__(self, group_size: int, single_action_space: Any) -> None:
        self.group_size, self.single_action_space = group_size, single_action_space
