"""Validations during a training: compared prompt by prompt, warned about, and no part of what is learned."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from agents.training.command import train
from agents.training.config import TrainConfig
from agents.training.display import validation_text
from agents.watch import Validations, distinct_lost
from rlaif_env.files import content_of
from rlaif_env.references import load_reference
from tests.stress.survival import differences, paid_by

NAN = float("nan")


# --- compared prompt by prompt ----------------------------------------------------------------------------------------


def test_win_rates_by_hand() -> None:
    seen, prompts = Validations(), ["a", "b", "c", "d", "a"]  # the second "a" is not another prompt

    def observe(step: int, reward: list[float], gold: list[float]) -> dict[str, float]:
        return seen.observe(step, prompts, ["x"] * 5, {"reward": np.array(reward), "gold": np.array(gold)})[0]

    assert observe(0, [0, 1, 2, NAN, 9], [0, 0, 0, 0, 0]) == {}
    # of a, b and c: above, equal, below; d is not known. Gold: two above, two below
    assert observe(5, [1, 1, 1, 5, 9], [1, 1, -1, -1, 9]) == {"win_rate": 0.5, "gold_win_rate": 0.5}
    assert observe(9, [NAN] * 5, [1, 0, 0, 0, 0]) == {"gold_win_rate": 0.625}  # against the first, not the last
    assert json.loads(json.dumps(seen.state(), allow_nan=False))["seen"][0]["reward"] == [0, 1, 2, None]


def test_distinct_pairs_at_equal_length_by_hand() -> None:
    # cut to "a b c" and "a b a": pairs ab, bc, ab, ba: three different of four; then "x x x", "x x x": one of four
    lost, error = distinct_lost(["a b c d e", "a b a"], ["x x x", "x x x x x x"])
    assert lost == pytest.approx(3 / 4 - 1 / 4)
    assert error == pytest.approx(0)  # without either one: 1 - 1 / 2 both times
    assert distinct_lost(["a b", "c d"], ["x", ""]) == (0.0, 0.0)
    rng = np.random.default_rng(0)
    words = [" ".join(map(str, rng.integers(0, 300, 20))) for _ in range(60)]
    longer = [f"{text} {' '.join(map(str, rng.integers(0, 300, 200)))}" for text in words]
    assert distinct_lost(words, longer)[0] == 0  # the same words and many more


# --- warnings ---------------------------------------------------------------------------------------------------------


def watched(seed: int, times: int = 8, n: int = 32, **by_the_end: float) -> list[str]:
    """Kinds of the alarms over validations whose reward, gold and number of words in use change linearly."""
    rng, seen, kinds = np.random.default_rng(seed), Validations(), []
    change = {"reward": 0.0, "gold": 0.0, "words": 0.0, **by_the_end}
    reward, gold, texts = (np.zeros(n), np.zeros(n), np.full((n, 16), "", dtype=object))
    for time in range(times + 1):
        done = time / times
        fresh = rng.random(n) < (0.5 if time else 1)  # the other prompts get the same response as before
        reward = np.where(fresh, rng.normal(change["reward"] * done, 0.5, n), reward)
        flat = rng.random(n) < 0.4  # as VADER's compound, many responses have exactly 0
        gold = np.where(fresh, np.where(flat, 0.0, rng.normal(0.3 + change["gold"] * done, 0.5, n)), gold)
        words = rng.integers(0, int(400 * (1 + change["words"] * done)), (n, 16)).astype(str).astype(object)
        texts = np.where(fresh[:, None], words, texts)
        responses = [" ".join(row) for row in texts]
        found = seen.observe(time, [f"p{i}" for i in range(n)], responses, {"reward": reward, "gold": gold})[1]
        kinds += [alarm.kind for alarm in found]
    return kinds


def test_a_sound_run_is_not_warned_about() -> None:
    """The levels allow one in a hundred of each kind; four of 100 runs or more would come once in 50 at that rate."""
    for change in ({"reward": 2.0}, {"reward": 2.0, "gold": 0.3}, {"reward": 2.0, "words": -0.1}):
        assert sum(bool(watched(seed, **change)) for seed in range(100)) < 4


@pytest.mark.parametrize(
    ("kind", "change"), [("validation-gold", {"gold": -1.5}), ("validation-diversity", {"words": -0.99})]
)
def test_an_over_optimising_run_is_warned_about_once(kind: str, change: dict[str, float]) -> None:
    assert [watched(seed, n=64, reward=2.0, **change) for seed in range(10)] == [[kind]] * 10
    assert [watched(seed, n=64, reward=-2.0, **change) for seed in range(10)] == [[]] * 10  # reward falls too: no news


def test_few_prompts_are_no_ground_to_warn_on() -> None:
    seen, prompts = Validations(), ["a", "b", "c"]
    for time in range(5):
        measures = {"reward": np.full(3, float(time)), "gold": np.full(3, -float(time))}
        assert seen.observe(time, prompts, ["u v w", "x y z", "r s t"], measures)[1] == []


# --- whole runs -------------------------------------------------------------------------------------------------------

JUDGE = """
import numpy as np
from rlaif_env.api import Scores

class Judge:
    name = "judge"
    calls, stop_at = 0, 0

    def score(self, prompts, responses):
        Judge.calls += 1
        if Judge.calls == Judge.stop_at:
            import signal
            signal.raise_signal(signal.SIGINT)
        return Scores(np.array([sum(i * ord(c) for i, c in enumerate(r, 1)) / 1024 for r in responses], np.float32))

def make(task):
    return Judge()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TrainConfig]]:
    """Configurations of six updates of a tiny model."""
    config = paid_by(JUDGE, tmp_path_factory.mktemp("job"), eval_prompts=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLAIF_DEVICE", "cpu")
        yield config


def rows_of(file: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def test_validations_are_shown_and_change_nothing_that_is_learned(
    job: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    plain = train(job(tmp_path / "plain")).folder
    seen = train(job(tmp_path / "seen", validate_every=2, validation_prompts=2), console).folder
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows_of(plain / name) == rows_of(seen / name)
    assert content_of(plain) == content_of(seen)  # of a run's folder that is its policy
    assert {"equal_reward_groups", "reward_length_correlation"} & set(rows_of(plain / "metrics.jsonl")[0])
    first, *later = rows_of(seen / "validation.jsonl")
    assert [row["step"] for row in (first, *later)] == [0, 2, 4, 6]
    assert "win_rate" not in first and first["kl"] == pytest.approx(0, abs=1e-4)
    assert all({"win_rate", "gold_win_rate", "reward", "gold", "distinct-2", "length", "kl"} <= set(r) for r in later)
    shown = console.export_text()
    assert "validation after update 0: reward" in shown and "2 prompts, wins against the start)" in shown
    assert validation_text(0, first, 1).endswith("(1 prompt)")
    assert not (plain / "validation.jsonl").exists()


def test_a_run_that_is_gone_on_with_compares_with_the_same_start(
    job: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    def config(name: str) -> TrainConfig:
        return job(tmp_path / name, validate_every=2, validation_prompts=2, checkpoint_every=1)

    whole = train(config("whole")).folder
    with pytest.MonkeyPatch.context() as patch:
        judge = type(load_reference(config("x").reward)(None))
        patch.setattr(judge, "calls", 0)
        patch.setattr(judge, "stop_at", 6)
        assert train(config("cut")).interrupted
        patch.setattr(judge, "stop_at", 0)
        cut = train(config("cut")).folder
    assert differences(whole, cut) == []
    assert rows_of(whole / "validation.jsonl") == rows_of(cut / "validation.jsonl")
