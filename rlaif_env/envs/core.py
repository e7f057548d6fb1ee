"""What every environment here is made of: prompts as token ids, the vocabulary, and the way to the reward.

A `Core` is built once for an environment (or a whole vector of them), does not change, and is shared by every copy of
it. The same token ids therefore earn the same reward whichever environment they were typed into.

Notation: n rows, P prompt tokens, T response tokens, V vocabulary (the model's logit width), W observation width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from gymnasium import error, spaces
from numpy.typing import NDArray

from rlaif_env.api import BackendError, RewardBackend, RLAIFError, Tokenizer
from rlaif_env.batches import scored_rows
from rlaif_env.data.tasks import DEFAULT_TASK, TaskLike, load_task
from rlaif_env.data.templates import encode_prompts
from rlaif_env.keywords import RewardFunction, Shared, resolve_reward, unshare
from rlaif_env.models import (
    BUILTIN_MODEL,
    continuation_text,
    load_tokenizer,
    logit_width,
    model_end_ids,
)

RESERVED_INFO = frozenset(
    "prompt prompt_index response response_length finish_reason judge_failed action_mask active episode final_obs "
    "final_info".split()
)
"""Info keys with a meaning of their own, which a backend may not use."""

ON_FAILURE = ("raise", "mark")


class PromptOrder:
    """Draws 0…size-1 without replacement, epoch after epoch, each epoch in a fresh order.

    A Fisher-Yates shuffle that is carried out one draw at a time, so that starting again costs nothing however many
    prompts there are; all randomness is the generator's, one number a draw. It goes on from what `state` gave.
    """

    def __init__(self, size: int, state: Mapping[str, Any] | None = None) -> None:
        self.size = size
        self._drawn = 0
        self._moved: dict[int, int] = {}  # place -> what stands there, where that is not the place's own number
        if state is not None:
            self._drawn = int(state["drawn"])
            self._moved = {int(place): int(index) for place, index in state["moved"]}

    def restart(self) -> None:
        """Begin a new epoch."""
        self._drawn = 0
        self._moved = {}

    def draw(self, generator: np.random.Generator) -> int:
        """The next index."""
        if self._drawn == self.size:
            self.restart()
        first = self._drawn
        place = int(generator.integers(first, self.size))
        here = self._moved.pop(first, first)
        self._drawn += 1
        if place == first:
            return here
        picked = self._moved.get(place, place)
        self._moved[place] = here
        return picked

    def state(self) -> dict[str, Any]:
        """Where it is in its epoch, as JSON can hold it."""
        return {"drawn": self._drawn, "moved": [[place, index] for place, index in self._moved.items()]}


class Response(NamedTuple):
    """A finished response: where it came from and how it ended."""

    row: int  # of the environment, for error messages
    prompt_index: int
    ids: NDArray[np.int64]  # (<= T,), without the end token
    stopped: bool  # by an end token; else by the token budget


class Core:
    """Prompts, tokens and reward of an environment.

    Args:
        task: What is asked: a task's name, a TOML file, a `Task`, or the dict a spec's JSON makes of one.
        reward: What judges: a backend's name, a function ``f(prompts, responses) -> n floats``, or a backend. Names are
            entry points of the group "rlaif_env.rewards".
        reward_kwargs: Keywords for a named backend.
        tokenizer: The model whose tokenizer the policy uses, or a live tokenizer.
        vocab_size: V, the width of the policy's logits; None is the named model's, or a live tokenizer's length.
        end_ids: Tokens that end a response beside the tokenizer's EOS; None is those of the named model's generation
            config, which may end a turn by a token of its own.
        split: Which of the task's prompts: "train", "validation", "test" or "gold".
        max_prompt_tokens: P; None is the task's.
        max_response_tokens: T; None is the task's.
        truncate_prompts: Cut a longer prompt to P tokens at its front, a dialogue by turns, and do not refuse it; None
            is as the task says.
        on_failure: What becomes of a step with a response that the backend cannot score: "raise" its error; or "mark":
            pay NaN for that response, with the reason in its info "judge_failed", and the others what they earn.

    Raises:
        RLAIFError: If a keyword cannot be used, a prompt is longer than P or empty, or the tokenizer has no EOS or pad.
    """

    def __init__(
        self,
        *,
        task: TaskLike | Shared = DEFAULT_TASK,
        reward: str | RewardFunction | RewardBackend | Shared = "direct-llm",
        reward_kwargs: Mapping[str, Any] | None = None,
        tokenizer: str | Path | Tokenizer | Shared = BUILTIN_MODEL,
        vocab_size: int | None = None,
        end_ids: Sequence[int] | None = None,
        split: str = "train",
        max_prompt_tokens: int | None = None,
        max_response_tokens: int | None = None,
        truncate_prompts: bool | None = None,
        on_failure: Literal["raise", "mark"] = "raise",
    ) -> None:
        if on_failure not in ON_FAILURE:
            raise RLAIFError(f"expected on_failure to be one of {', '.join(ON_FAILURE)}, found {on_failure!r}")
        self.on_failure = on_failure
        self.task = load_task(unshare(task))
        self.P = _positive("max_prompt_tokens", max_prompt_tokens, self.task.max_prompt_tokens)
        self.T = _positive("max_response_tokens", max_response_tokens, self.task.max_response_tokens)
        self.tokenizer = _live_tokenizer(unshare(tokenizer))
        self.known_ids = len(self.tokenizer)
        self.V = self._vocabulary(unshare(tokenizer), vocab_size)
        self.eos_id, self.pad_id = self._special_id("eos"), self._special_id("pad")
        self.end_ids = self._end_ids(unshare(tokenizer), end_ids)
        self.prompts = tuple(self.task.prompts(split))
        self._flat, self._starts = self._encoded_prompts(
            self.task.truncate_prompts if truncate_prompts is None else truncate_prompts
        )
        self.backend = resolve_reward(unshare(reward), self.task, unshare(reward_kwargs))

    def __deepcopy__(self, memo: object) -> Core:
        return self

    def _vocabulary(self, tokenizer: Any, vocab_size: int | None) -> int:
        if vocab_size is None:
            vocab_size = logit_width(tokenizer) if isinstance(tokenizer, str | Path) else self.known_ids
        if _positive("vocab_size", vocab_size) < self.known_ids:
            raise RLAIFError(
                f"expected vocab_size of at least {self.known_ids}, the number of ids the tokenizer has, "
                f"found {vocab_size}; use the width of the model's logits"
            )
        return int(vocab_size)

    def _special_id(self, kind: str) -> int:
        special = getattr(self.tokenizer, f"{kind}_token_id", None)
        if not isinstance(special, int) or not 0 <= special < self.V:
            mend = "set tokenizer.pad_token = tokenizer.eos_token" if kind == "pad" else "set tokenizer.eos_token"
            raise RLAIFError(
                f"expected a tokenizer with {'an EOS' if kind == 'eos' else 'a pad'} token whose id is from 0 to "
                f"{self.V - 1}, found {special!r}; {mend}"
            )
        return special

    def _end_ids(self, tokenizer: Any, given: Sequence[int] | None) -> NDArray[np.int64]:
        named = isinstance(tokenizer, str | Path)
        ends = [self.eos_id, *(given or (model_end_ids(tokenizer) if named and given is None else ()))]
        for token in ends:
            if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < self.V:
                raise RLAIFError(f"expected end_ids from 0 to {self.V - 1}, found {token!r}")
        return np.array(list(dict.fromkeys(map(int, ends))), dtype=np.int64)

    def _encoded_prompts(self, truncate: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All prompts' ids end to end, and where each begins."""
        rows, _ = encode_prompts(self.task, self.tokenizer, self.prompts, self.P if truncate else None)
        for i, row in enumerate(rows):
            if len(row) > self.P:
                raise RLAIFError(
                    f"expected prompts of at most {self.P} tokens, found {len(row)} in prompt {i} "
                    f"({shown(self.prompts[i])}); raise max_prompt_tokens, or keep the last tokens (in the task's "
                    "TOML file: truncate_prompts = true, in Python: truncate_prompts=True)"
                )
            if not row:
                raise RLAIFError(f"expected a token in every prompt, found none in prompt {i} ({self.prompts[i]!r})")
        flat = np.fromiter((token for row in rows for token in row), dtype=np.int32)
        if not 0 <= flat.min() <= flat.max() < self.V:
            raise RLAIFError(f"expected prompt ids from 0 to {self.V - 1}, found {flat.max()}; give vocab_size")
        return flat, np.cumsum([0, *map(len, rows)], dtype=np.int64)

    def observation_space(self, width: int) -> spaces.Dict:
        """Token ids (W,) int64 and their mask (W,) int8."""
        return spaces.Dict(
            {
                "input_ids": spaces.Box(0, self.V - 1, (width,), np.int64),
                "attention_mask": spaces.Box(0, 1, (width,), np.int8),
            }
        )

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt."""
        return np.diff(self._starts)

    def prompt_ids(self, index: int) -> NDArray[np.int32]:
        """Token ids of a prompt."""
        return self._flat[self._starts[index] : self._starts[index + 1]]

    def write_prompt(self, index: int, ids: NDArray[np.int64], mask: NDArray[np.int8]) -> None:
        """Write a prompt, left-padded, into the first P places of ids (W,) and mask (W,), and blank the rest."""
        prompt = self.prompt_ids(index)
        ids[:] = self.pad_id
        mask[:] = 0
        ids[self.P - len(prompt) : self.P] = prompt
        mask[self.P - len(prompt) : self.P] = 1

    def checked_prompt_index(self, index: Any) -> int:
        """A prompt index asked for by a caller; raises `RLAIFError` if it is no integer or out of range."""
        if isinstance(index, bool | np.bool_) or not isinstance(index, int | np.integer):
            raise RLAIFError(f"expected options['prompt_index'] to be an integer, found {index!r}")
        if not 0 <= index < len(self.prompts):
            raise RLAIFError(f"expected options['prompt_index'] from 0 to {len(self.prompts) - 1}, found {index}")
        return int(index)

    def checked_action(
        self, action: Any, shape: tuple[int, ...], acting: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """Token ids as an int64 array; those of rows that do not act are 0, whatever they were.

        Raises:
            gymnasium.error.InvalidAction: If the dtype is not an integer one, the shape differs, or an id is outside
                0…V-1.
        """
        try:
            array = np.asarray(action)
        except ValueError as problem:
            raise error.InvalidAction(f"expected token ids of shape {shape}, found rows of unequal length") from problem
        if not np.issubdtype(array.dtype, np.integer):
            raise error.InvalidAction(f"expected token ids of an integer dtype, found {array.dtype}")
        if array.shape != shape:
            raise error.InvalidAction(f"expected token ids of shape {shape}, found {array.shape}")
        ids = array.astype(np.int64, copy=False)
        if acting is not None and not acting.all():
            ids = ids.copy()
            ids[~acting] = 0
        if ids.min() < 0 or ids.max() >= self.V:
            place = tuple(np.argwhere((ids < 0) | (ids >= self.V))[0].tolist())
            where = f" at {place}" if place else ""
            raise error.InvalidAction(f"expected token ids from 0 to {self.V - 1}, found {array[place]}{where}")
        return ids

    def action_mask(self) -> NDArray[np.int8]:
        """1 for the V tokens worth choosing: the tokenizer knows them and they are text or an end; a fresh array."""
        return self._worth_choosing.copy()

    @cached_property
    def _worth_choosing(self) -> NDArray[np.int8]:
        mask = np.zeros(self.V, dtype=np.int8)
        mask[: self.known_ids] = 1
        special = getattr(self.tokenizer, "all_special_ids", None) or [self.pad_id]
        mask[[i for i in special if 0 <= i < self.V]] = 0
        mask[self.end_ids] = 1
        return mask

    def split_response(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
        """What counts of response ids: those before the first end token, and whether there was one."""
        ends = np.flatnonzero(np.isin(ids, self.end_ids))
        return (ids[: ends[0]], True) if len(ends) else (ids, False)

    def decode(self, prompt_index: int, ids: NDArray[np.int64]) -> str:
        """Text of response ids behind their prompt, without special tokens; ids the tokenizer lacks have no text."""
        known = [i for i in ids.tolist() if i < self.known_ids]
        return continuation_text(self.tokenizer, self.prompt_ids(prompt_index).tolist(), known)

    def score(self, responses: Sequence[Response]) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
        """Score n finished responses in one call of the backend; where it fails, as ``on_failure`` says.

        Returns:
            The rewards (n,) and each row's info: prompt_index, prompt, response, response_length (tokens, the end
            included), finish_reason ("stop" or "length"), and whatever the backend tells beside the reward. A row that
            could not be scored and is marked has the reward NaN and the info "judge_failed", the reason.

        Raises:
            BackendError: If the backend fails; its message names rows and prompts, its ``rows`` are the environment's.
        """
        prompts = [self.prompts[r.prompt_index] for r in responses]
        texts = [self.decode(r.prompt_index, r.ids) for r in responses]
        try:
            rewards, parts, failed = scored_rows(self.backend, prompts, texts, apart=self.on_failure == "mark")
            if taken := sorted(RESERVED_INFO & {key for row in parts for key in row}):
                raise BackendError(f"expected backend info keys other than the environment's own, found {taken}")
        except BackendError as failure:
            raise self._located(failure, responses) from failure
        infos = [
            {
                "prompt_index": r.prompt_index,
                "prompt": prompts[i],
                "response": texts[i],
                "response_length": len(r.ids) + int(r.stopped),
                "finish_reason": "stop" if r.stopped else "length",
                **{key: _plain(value) for key, value in parts[i].items()},
                **({"judge_failed": failed[i]} if i in failed else {}),
            }
            for i, r in enumerate(responses)
        ]
        return rewards, infos

    def _located(self, failure: BackendError, responses: Sequence[Response]) -> BackendError:
        """The failure with the environment's rows and prompts in place of positions in the batch."""
        concerned = [responses[i] for i in failure.rows if i < len(responses)] or list(responses)
        places = (f"row {r.row}, prompt {r.prompt_index}: {shown(self.prompts[r.prompt_index])}" for r in concerned[:3])
        more = f"; and {len(concerned) - 3} more rows" if len(concerned) > 3 else ""
        return BackendError(f"{failure} [{'; '.join(places)}{more}]", [r.row for r in concerned])


def shown(text: str, limit: int = 60) -> str:
    """A text as an error message quotes it."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def _plain(value: Any) -> Any:
    """Numbers keep their numpy type, truth values and strings become Python's."""
    return value.item() if isinstance(value, np.generic) and not isinstance(value, np.number) else value


def _positive(name: str, value: Any, default: int | None = None) -> int:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RLAIFError(f"expected {name} to be a positive integer, found {value!r}")
    return int(value)


def _live_tokenizer(tokenizer: Any) -> Tokenizer:
    if isinstance(tokenizer, str | Path):
        return cast(Tokenizer, load_tokenizer(tokenizer))
    if not all(callable(getattr(tokenizer, method, None)) for method in ("encode", "decode", "__len__")):
        raise RLAIFError(
            f"expected tokenizer to be a model's name or an object with encode, decode and len, found {tokenizer!r}"
        )
    return cast(Tokenizer, tokenizer)
