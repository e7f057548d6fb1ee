"""Rewards made of rewards: weighted sums of backends and plain functions, and the form that TRL's trainers take."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.api import Live
from rlaif_env.api import BackendError, RewardBackend, RLAIFError, Scores, checked_scores, judges_groups
from rlaif_env.data.forms import dialogue, prompt_of
from rlaif_env.data.jsonl import check_text, read_jsonl
from rlaif_env.data.tasks import DEFAULT_TASK, TaskLike, load_task
from rlaif_env.keywords import CallableReward, resolve_reward, unshare

_ASSISTANT = "\n\nAssistant: "


class Composite(Live):
    """A weighted sum of reward backends; a reward backend.

    ``score`` returns the sum of weight times part and, for each part, info "part/<name>" (its own reward, before the
    weight) and "<name>/<key>" for whatever else it reports. After `calibrate` a part is (reward - mean) / std, which
    is in info "scaled/<name>", and means and deviations are in info "calibration", as JSON.

    Args:
        parts: Weight and backend of each term by the name that it has in the log.
        calibration_samples: Score nothing before `calibrate` was called, or ``moments`` were set, by whoever has so
            many samples of the start policy.
    """

    def __init__(self, parts: Mapping[str, tuple[float, RewardBackend]], calibration_samples: int = 0) -> None:
        if not parts:
            raise RLAIFError("expected at least one part to compose a reward of, found none")
        for name, (weight, _) in parts.items():
            if not math.isfinite(weight):
                raise RLAIFError(f"expected a finite weight for the part {name!r}, found {weight}")
        self.parts = dict(parts)
        self.calibration_samples = calibration_samples
        self.moments: Mapping[str, Sequence[float]] = {}  # mean and standard deviation by part, where calibrated
        self.name = "compose:" + "+".join(f"{weight:g}*{name}" for name, (weight, _) in parts.items())

    def calibrate(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """From now on standardise every part by its mean and standard deviation over n samples.

        Raises:
            RLAIFError: If there are less than two samples, or a part says the same of all.
            BackendError: If a part fails.
        """
        if len(responses) < 2:
            raise RLAIFError(f"expected two samples or more to calibrate {self.name} on, found {len(responses)}")
        moments = {}
        for name, values in self._rewards(prompts, responses).items():
            rewards = values.values.astype(np.float64)
            if np.ptp(rewards) == 0:
                raise RLAIFError(
                    f"expected rewards of the part {name!r} that differ, found {rewards[0]:g} for all {len(rewards)} "
                    "samples; there is no scale in that. Take more samples, or leave calibration away"
                )
            moments[name] = float(rewards.mean()), float(rewards.std())
        self.moments = moments

    def _rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        found = {}
        for name, (_, backend) in self.parts.items():
            try:
                found[name] = checked_scores(backend, prompts, responses)
            except BackendError as error:
                raise BackendError(f"part {name!r} of {self.name}: {error}", error.rows) from error
        return found

    @property
    def judges_groups(self) -> bool:
        """Whether a part does (`rlaif_env.api.judges_groups`)."""
        return any(judges_groups(backend) for _, backend in self.parts.values())

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Weighted sums; see `rlaif_env.api.RewardBackend`.

        Raises:
            BackendError: If a part fails or breaks its contract; the message names it. Or if the sum is not calibrated
                and was to be.
        """
        if self.calibration_samples and not self.moments:
            raise BackendError(
                f"expected {self.name} to be calibrated on {self.calibration_samples} samples of the start policy "
                "before it scores, found that it is not: rlaif train does that; elsewhere call calibrate(prompts, "
                "responses), or give calibration a file of samples"
            )
        total: NDArray[np.float64] = np.zeros(len(responses))
        info: dict[str, NDArray[Any]] = {}
        for name, scores in self._rewards(prompts, responses).items():
            mean, std = self.moments.get(name, (0.0, 1.0))
            scaled = (scores.values.astype(np.float64) - mean) / std
            total += self.parts[name][0] * scaled
            info[f"part/{name}"] = scores.values
            info |= {f"scaled/{name}": scaled} if self.moments else {}
            info |= {f"{name}/{key}": np.asarray(array) for key, array in scores.info.items()}
        if self.moments:
            known = {name: {"mean": mean, "std": std} for name, (mean, std) in self.moments.items()}
            info["calibration"] = np.full(len(responses), json.dumps(known))
        return Scores(total.astype(np.float32), info)


def compose(
    parts: Mapping[str, Any] | None = None,
    *,
    calibration: str | Path | None = None,
    calibration_samples: int = 0,
    task: TaskLike = DEFAULT_TASK,
) -> Composite:
    """The reward "compose": a weighted sum of named or live rewards.

    Each part is given by its name and one of

    * a weight: the name is a backend's, such as ``{"direct-llm": 0.5}``;
    * a weight and a backend, a function of (prompts, responses), or a backend's name:
      ``{"short": (-0.01, lambda prompts, responses: [len(r) for r in responses])}``;
    * a mapping with "weight" and a backend's settings, "reward" naming the backend if the part has another name:
      ``{"people": {"weight": 1.0, "reward": "human-rm", "model": "runs/rm"}}``.

    Args:
        parts: The parts by name, such as {"direct-llm": 0.5, "human-rm": {"weight": 0.5, "model": "runs/rm"}}.
        calibration: A JSON lines file of the start policy's samples (prompt, response), such as the responses.jsonl of
            rlaif evaluate: each part is standardised over them, so that weights compare parts of any scale.
        calibration_samples: In place of a file, have rlaif train draw so many samples of the policy before training.
        task: What the named backends judge.

    Raises:
        RLAIFError: If a part is in none of these forms, its weight is not a finite number, a name is unknown, or the
            file cannot be read or has no scale for a part.
    """
    if parts is None:
        raise RLAIFError("reward 'compose': expected parts such as {\"direct-llm\": 1.0}, found none")
    if not isinstance(parts, Mapping):
        raise RLAIFError(f"expected the parts of a reward by name, found {parts!r:.80}")
    judged = load_task(task)
    made = {}
    for name, value in parts.items():
        weight, reward, settings = _part(name, unshare(value))
        if isinstance(weight, bool) or not isinstance(weight, int | float) or abs(weight) > sys.float_info.max:
            raise RLAIFError(f"expected a number as the weight of the part {name!r}, found {weight!r:.60}")
        made[name] = float(weight), resolve_reward(reward, judged, settings)
    if calibration_samples and (calibration is not None or calibration_samples < 2):
        raise RLAIFError(
            f"expected a file as calibration, or calibration_samples of at least 2, found {calibration} and "
            f"{calibration_samples}"
        )
    composite = Composite(made, calibration_samples)
    if calibration is not None:
        composite.calibrate(*_samples(calibration))
    return composite


def _samples(file: str | Path) -> tuple[list[str], list[str]]:
    """Prompts and responses of a JSON lines file."""
    rows = read_jsonl(file, lambda row: [check_text(row, name, may_be_empty=True) for name in ("prompt", "response")])
    samples = list(rows)
    return [prompt for prompt, _ in samples], [response for _, response in samples]


def _part(name: str, value: Any) -> tuple[Any, Any, Mapping[str, Any] | None]:
    """Weight, reward and settings of a part."""
    if isinstance(value, Mapping):
        settings = dict(value)
        if "weight" not in settings:
            given = ", ".join(map(str, settings)) or "nothing"
            raise RLAIFError(f"expected a weight in the part {name!r}, found {given}")
        return settings.pop("weight"), settings.pop("reward", name), settings or None
    if not isinstance(value, tuple | list):
        return value, name, None
    if len(value) != 2:
        raise RLAIFError(f"expected (weight, reward) for the part {name!r}, found {len(value)} values")
    return value[0], value[1], None


def as_trl_reward(backend: RewardBackend | Callable[..., Any]) -> Callable[..., list[float]]:
    """A backend as one of TRL's ``reward_funcs``.

    Texts go to the backend as they are. Messages become one text, as they do when preferences are read: a prompt the
    dialogue in the HH form up to the assistant's turn, a completion what the assistant says. What the backend reports
    beside the reward goes to TRL's log where the trainer offers one.

    Args:
        backend: A reward backend, or a function of (prompts, responses).

    Returns:
        A function ``f(*, prompts, completions, **columns) -> list[float]`` with a ``__name__``.
    """
    inner: RewardBackend = backend if isinstance(backend, RewardBackend) else CallableReward(backend)

    def reward(*, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [p if isinstance(p, str) else prompt_of({"prompt": p}, ("prompt",)) for p in prompts]
        responses = [c if isinstance(c, str) else dialogue(c).removeprefix(_ASSISTANT) for c in completions]
        scores = checked_scores(inner, texts, responses)
        for key, array in scores.info.items():
            if callable(log := columns.get("log_extra")):
                log(key, np.asarray(array).tolist())
            if callable(log := columns.get("log_metric")) and np.issubdtype(np.asarray(array).dtype, np.number):
                log(f"{inner.name}/{key}", float(np.mean(array)))
        return [float(value) for value in scores.values]

    reward.__name__ = reward.__qualname__ = inner.name
    return reward
