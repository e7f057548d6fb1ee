"""What the vector environments share: rows and their states, autoreset, waves, one reward call a step.

A subclass says what the actions do to the rows and where a row's response is. What comes out equals, bit for bit, what
`gymnasium.vector.SyncVectorEnv` makes of n single environments; in mode DISABLED it differs in that ended rows wait for
the others (see `PromptVectorEnv.step`).

Notation: n rows (``num_envs``), K rows a prompt (``group_size``), V vocabulary, W observation width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from gymnasium import error
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rlaif_env.api import RLAIFError, judges_groups
from rlaif_env.envs.core import PromptOrder, Response
from rlaif_env.envs.episodes import Episodes, Observation

if TYPE_CHECKING:
    from rlaif_env.envs.rendering import Scene

Bools = NDArray[np.bool_]

UNSTARTED, RUNNING, WAITING, DONE = range(4)
"""A row's state. WAITING: its episode is over but not paid yet (mode DISABLED). DONE: over and paid."""

_COLUMNS = ("prompt", "state", "elapsed", "finished", "cut", "ids", "mask")
"""The arrays that hold what the rows are at, without their underscore."""


class PromptVectorEnv(Episodes, VectorEnv[Observation, Any, NDArray[Any]]):
    """n episodes at once, each answering a prompt. The base of the vector environments.

    Row i draws its prompts as the single environment seeded ``seed + i // group_size`` does, so the K rows of a group
    answer the same prompts in the same order. An agent reads K, T and V from the environment, through any wrapper:
    ``envs.unwrapped.group_size`` and ``envs.single_action_space``.

    Args:
        num_envs: n.
        group_size: K; n must be a multiple.
        autoreset_mode: "SameStep": an ended row shows its next prompt at once. "NextStep": with the next step.
            "Disabled": ended rows wait, ignore their actions and are not ``info["active"]``, until the last row has
            ended; then the whole wave is scored in one call and terminates, and `reset` begins the next. Or Gymnasium's
            enum.
        max_episode_steps: Truncate episodes, as `gymnasium.wrappers.TimeLimit` does; None: never.
        render_mode: As in `PromptEnv`.
        action_mask: As in `PromptEnv`.
        **settings: See `rlaif_env.envs.core.Core`.

    Raises:
        RLAIFError: If a keyword cannot be used; the message says what was expected.
        gymnasium.error.UnsupportedMode: If there is no such render mode.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        group_size: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        action_mask: bool = False,
        **settings: Any,
    ) -> None:
        self._set_up(render_mode, action_mask, settings)
        if num_envs < 1 or group_size < 1 or num_envs % group_size:
            raise RLAIFError(
                f"expected num_envs to be a positive multiple of group_size, found {num_envs} and {group_size}"
            )
        self._check_groups(group_size)
        self.num_envs, self.group_size = num_envs, group_size
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        if judges_groups(self.core.backend) and self._apart and self.autoreset_mode != AutoresetMode.DISABLED:
            raise RLAIFError(
                f"expected the rows of a group to be judged together by {self.core.backend.name!r}, found a mode in "
                'which each is judged when it ends; give autoreset_mode="Disabled"'
            )
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        observation, action = self._spaces()
        self.single_observation_space, self.single_action_space = observation, action
        self.observation_space, self.action_space = batch_space(observation, num_envs), batch_space(action, num_envs)
        shape = (num_envs, *observation["input_ids"].shape)
        self._max_steps = max_episode_steps
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._seeds = [-1] * num_envs
        self._orders = [PromptOrder(len(self.core.prompts)) for _ in range(num_envs)]
        self._prompt = np.full(num_envs, -1, dtype=np.int64)
        self._state = np.full(num_envs, UNSTARTED, dtype=np.int8)
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._finished: Bools = np.zeros(num_envs, dtype=np.bool_)  # the response is complete
        self._cut: Bools = np.zeros(num_envs, dtype=np.bool_)  # max_episode_steps is reached
        self._ids, self._mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int8)
        self._ended_scenes: dict[int, Scene] = {}

    _apart = False
    """Whether rows that began together may end in different steps."""

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator | None, ...]:  # type: ignore[override]
        """The rows' generators; None before the first reset."""
        return tuple(self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The rows' seeds; -1 before the first reset."""
        return tuple(self._seeds)

    def _advance(self, ids: NDArray[np.int64], acting: Bools) -> Bools:
        """Note the actions of the rows that act; return which of these have now completed their response.

        Must give the same when called again before the step is committed: a failed reward call can be tried again.
        """
        raise NotImplementedError

    def _response_ids(self, row: int, length: int) -> NDArray[np.int64]:
        """Token ids of a row's response after that many steps."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode in every row, or in those of a mask.

        Args:
            seed: Row i is seeded ``seed + i // group_size``; a sequence gives each row its own.
            options: ``"prompt_index"``, one integer for all rows or one each, and ``"reset_mask"``, bool (n,): the rows
                to reset, the others go on. Never changed.

        Returns:
            Observations (n, W) and infos.

        Raises:
            RLAIFError: If the mask, a prompt index or the number of seeds is wrong.
            gymnasium.error.ResetNeeded: If the first reset leaves rows out.
            gymnasium.error.ClosedEnvironmentError: After `close`.
        """
        self._check_open()
        rows = self._rows_to_reset((options or {}).get("reset_mask"))
        chosen = self._chosen_prompts((options or {}).get("prompt_index"))
        self._reseed(rows, self._row_seeds(seed))
        infos: dict[str, Any] = {}
        for row in rows:
            infos = self._add_info(infos, self._begin(row, chosen[row]), row)
            self._ended_scenes.pop(row, None)
        return self._observation(), self._with_active(infos)

    def step(self, actions: Any) -> tuple[Observation, NDArray[np.float64], Bools, Bools, dict[str, Any]]:
        """Take an action in every row; at most one call of the reward backend.

        Returns:
            Observations (n, W), rewards float64 (n,), terminated and truncated bool (n,), infos. In mode SAME_STEP an
            ended row shows its next prompt, and its end is in ``final_obs`` and ``final_info``. In NEXT_STEP the next
            step begins its next episode and ignores its action. In DISABLED it waits, its actions ignored, until all
            rows have ended; then all are paid at once. ``info["active"]`` tells there who will act.

        Raises:
            gymnasium.error.InvalidAction: If the actions have the wrong shape or dtype, or an acting row's an id
                outside 0…V-1.
            gymnasium.error.ResetNeeded: Before the first reset, or when every row has ended in mode DISABLED.
            gymnasium.error.ClosedEnvironmentError: After `close`.
            BackendError: If the reward fails (and ``on_failure`` is "raise"); nothing has changed then, and the step
                can be tried again.
        """
        acting = self._acting()
        ids = self.core.checked_action(actions, self.action_space.shape or (), acting)
        elapsed = self._elapsed + acting
        finished = self._finished | self._advance(ids, acting)
        cut = self._cut if self._max_steps is None else self._cut | (acting & (elapsed >= self._max_steps))
        over = acting & (finished | cut)
        ending = self._ending(acting, over)
        rewards, row_infos = self._pay(np.flatnonzero(ending & finished).tolist(), elapsed)
        # From here on nothing can fail: commit.
        next_step = self.autoreset_mode == AutoresetMode.NEXT_STEP
        beginning = np.flatnonzero(self._state == DONE).tolist() if next_step else []
        self._finished, self._cut, self._elapsed = finished, cut, elapsed
        self._state[over] = WAITING
        self._state[ending] = DONE
        terminated, truncated = ending & finished, ending & cut
        infos = self._conclude(np.flatnonzero(ending).tolist(), row_infos, rewards)
        for row in beginning:
            infos = self._add_info(infos, self._begin(row), row)
        if self._with_mask:
            for row in np.flatnonzero(acting & ~ending).tolist():
                infos = self._add_info(infos, self._mask_info(), row)
        return self._observation(), rewards, terminated, truncated, self._with_active(infos)

    def render(self) -> Any:
        """What `PromptEnv.render` gives, for each row; one that ended in the last step shows that episode."""
        self._check_started(self._state[0] != UNSTARTED, "render")
        if not self._draws():
            return None
        return tuple(self._frame(self._ended_scenes.get(row) or self._scene(row)) for row in range(self.num_envs))

    def state(self) -> dict[str, Any]:
        """Everything that decides what comes next, as JSON can hold it: for `set_state`, in another process too.

        Rows whose generator and order are alike, such as a group's, share an entry. Actions of `TextGeneration` and
        scenes are not part of it: they decide nothing after their step.
        """
        streams: list[dict[str, Any]] = []
        of_row = []
        for row, generator in enumerate(self._generators):
            drawing = None if generator is None else generator.bit_generator.state
            stream = {"seed": self._seeds[row], "generator": drawing, "order": self._orders[row].state()}
            if stream not in streams:
                streams.append(stream)
            of_row.append(streams.index(stream))
        columns = {name: getattr(self, f"_{name}").tolist() for name in _COLUMNS}
        return {"prompts": len(self.core.prompts), "streams": streams, "stream": of_row, **columns}

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """Go on exactly where `state` was taken.

        Returns:
            The observations (n, W) that the next actions answer.

        Raises:
            RLAIFError: If the state is not one of such a vector: other keys, rows, width or number of prompts.
        """
        self._check_open()
        try:
            of_row, streams = state["stream"], state["streams"]
            columns = {name: np.array(state[name], getattr(self, f"_{name}").dtype) for name in _COLUMNS}
            actual = (state["prompts"], len(of_row), {name: column.shape for name, column in columns.items()})
            expected = {name: getattr(self, f"_{name}").shape for name in _COLUMNS}
            if actual != (len(self.core.prompts), self.num_envs, expected):
                raise RLAIFError(
                    f"expected a state of {self.num_envs} rows over {len(self.core.prompts)} prompts, shapes "
                    f"{expected}, found {actual}; it was taken from other environments"
                )
            generators = [_generator(streams[number]["generator"]) for number in of_row]
            orders = [PromptOrder(len(self.core.prompts), streams[number]["order"]) for number in of_row]
            seeds = [int(streams[number]["seed"]) for number in of_row]
        except RLAIFError:
            raise
        except (KeyError, TypeError, IndexError, ValueError) as problem:
            raise RLAIFError(f"expected a state that these environments gave, found another: {problem!r}") from problem
        self._generators, self._orders, self._seeds = list(generators), orders, seeds
        for name, column in columns.items():
            getattr(self, f"_{name}")[:] = column
        self._ended_scenes = {}
        return self._observation()

    def _acting(self) -> Bools:
        """The rows whose action counts."""
        self._check_open()
        acting: Bools = self._state == RUNNING
        if not acting.any():
            self._check_started(self._state[0] != UNSTARTED, "step")
            if self.autoreset_mode == AutoresetMode.DISABLED:
                raise error.ResetNeeded("expected reset after the end of every episode, found a step; call reset()")
        return acting

    def _ending(self, acting: Bools, over: Bools) -> Bools:
        """The rows whose episode ends with this step; in mode DISABLED a whole wave at once."""
        if self.autoreset_mode != AutoresetMode.DISABLED:
            return over
        return np.zeros_like(over) if (acting & ~over).any() else over | (self._state == WAITING)

    def _pay(
        self, rows: Sequence[int], elapsed: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], dict[int, dict[str, Any]]]:
        """Rewards (n,) and infos of the rows whose response is complete, from one call of the backend."""
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        if not rows:
            return rewards, {}
        texts = [self.core.split_response(self._response_ids(row, int(elapsed[row]))) for row in rows]
        responses = [Response(row, int(self._prompt[row]), *text) for row, text in zip(rows, texts, strict=True)]
        rewards[rows], infos = self.core.score(responses)
        return rewards, dict(zip(rows, infos, strict=True))

    def _conclude(
        self, rows: Sequence[int], row_infos: Mapping[int, dict[str, Any]], rewards: NDArray[np.float64]
    ) -> dict[str, Any]:
        """Infos of the rows that ended, which begin anew in mode SAME_STEP."""
        infos: dict[str, Any] = {}
        self._ended_scenes = {}
        for row in rows:
            info = row_infos.get(row, {})
            if self.render_mode is not None:
                self._ended_scenes[row] = scene = self._scene(row, (info, float(rewards[row])) if info else None)
                if self._terminal is not None:
                    self._terminal.show(scene)
            info = {**info, **self._mask_info()}
            if self.autoreset_mode == AutoresetMode.SAME_STEP:
                final = {"input_ids": self._ids[row].copy(), "attention_mask": self._mask[row].copy()}
                infos = self._add_info(infos, {"final_obs": final, "final_info": info}, row)
                info = self._begin(row)
            infos = self._add_info(infos, info, row)
        return infos

    def _begin(self, row: int, index: int | None = None) -> dict[str, Any]:
        """Start a row's next episode, with a prompt of the caller's choice or the next in order; its reset info."""
        if index is None:
            generator = self._generators[row]
            assert generator is not None, "a row is reset, and so seeded, before it begins"
            index = self._orders[row].draw(generator)
        self._prompt[row] = index
        self._state[row] = RUNNING
        self._elapsed[row] = 0
        self._finished[row] = self._cut[row] = False
        self.core.write_prompt(index, self._ids[row], self._mask[row])
        return self._reset_info(index)

    def _with_active(self, infos: dict[str, Any]) -> dict[str, Any]:
        if self.autoreset_mode == AutoresetMode.DISABLED:
            infos["active"], infos["_active"] = self._state == RUNNING, np.ones(self.num_envs, dtype=np.bool_)
        return infos

    def _scene(self, row: int, outcome: tuple[Mapping[str, Any], float] | None = None) -> Scene:
        return self._scene_of(int(self._prompt[row]), self._response_ids(row, int(self._elapsed[row])), outcome)

    def _rows_to_reset(self, mask: Any) -> list[int]:
        if mask is None:
            return list(range(self.num_envs))
        expected = f"expected options['reset_mask'] to be a bool array of shape ({self.num_envs},) with a True in it"
        if not isinstance(mask, np.ndarray):
            raise RLAIFError(f"{expected}, found {type(mask).__name__}")
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise RLAIFError(f"{expected}, found {mask.dtype} of shape {mask.shape}")
        if not mask.any():
            raise RLAIFError(f"{expected}, found none")
        if (self._state[~mask] == UNSTARTED).any():
            raise error.ResetNeeded("expected the first reset to begin every row, found a mask that leaves rows out")
        return np.flatnonzero(mask).tolist()

    def _chosen_prompts(self, chosen: Any) -> list[int | None]:
        if chosen is None:
            return [None] * self.num_envs
        if np.ndim(chosen) == 0:
            return [self.core.checked_prompt_index(chosen)] * self.num_envs
        if np.shape(chosen) != (self.num_envs,):
            raise RLAIFError(
                f"expected options['prompt_index'] to be an integer or {self.num_envs} of them, "
                f"found shape {np.shape(chosen)}"
            )
        return [self.core.checked_prompt_index(index) for index in chosen]

    def _row_seeds(self, seed: Any) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + row // self.group_size for row in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise RLAIFError(f"expected one seed or {self.num_envs}, found {len(seed)}")
        return list(seed)

    def _reseed(self, rows: Sequence[int], seeds: Sequence[int | None]) -> None:
        """Seed the rows that were given a seed, and those that never had one: with a fresh one for each group."""
        fresh: dict[int, int] = defaultdict(lambda: seeding.np_random()[1])
        for row in rows:
            seed = seeds[row]
            if seed is None and self._generators[row] is None:
                seed = fresh[row // self.group_size]
            if seed is not None:
                self._generators[row], self._seeds[row] = seeding.np_random(seed)
                self._orders[row].restart()


def _generator(state: Mapping[str, Any] | None) -> np.random.Generator | None:
    """A generator that goes on from a state; Gymnasium's are PCG64."""
    if state is None:
        return None
    bits = np.random.PCG64()
    bits.state = cast(Any, state)
    return np.random.Generator(bits)


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    for known in AutoresetMode:
        if mode == known or (isinstance(mode, str) and mode.replace("_", "").lower() == known.value.lower()):
            return known
    raise RLAIFError(f"expected autoreset_mode to be one of {[m.value for m in AutoresetMode]}, found {mode!r}")
