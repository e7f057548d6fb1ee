"""Rewards made of rewards, the form TRL takes, the contract checker, and backends of other packages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rewards import Composite, as_trl_reward, check_backend, make_reward
from rewards.compose import compose
from rlaif_env.api import BackendError, RLAIFError, Scores
from rlaif_env.data.tasks import Task


class Length:
    """A backend by the book."""

    name = "length"

    def __deepcopy__(self, memo: object) -> Length:
        return self

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        lengths = np.array([len(r) for r in responses], dtype=np.float32)
        return Scores(lengths, {"words": np.array([len(r.split()) for r in responses])})


def vowels(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in r)) for r in responses]


# --- sums -------------------------------------------------------------------------------------------------------------


def test_a_weighted_sum_with_every_part_logged() -> None:
    composite = compose({"long": (0.5, Length()), "open": (-2, vowels)})
    scores = composite.score(["", ""], ["go on", "hm"])
    assert scores.values.tolist() == [0.5 * 5 - 2 * 2, 0.5 * 2 - 0.0]
    assert scores.values.dtype == np.float32
    assert {key: array.tolist() for key, array in scores.info.items()} == {
        "part/long": [5.0, 2.0],
        "long/words": [2, 1],
        "part/open": [2.0, 0.0],
    }
    assert composite.name == "compose:0.5*long+-2*open"
    check_backend(composite)


def test_parts_by_name_with_settings_and_by_entry_point(reward_plugin: Path, toy_task: Task) -> None:
    parts = {
        "toy-length": 2.0,
        "scaled": {"weight": 1, "reward": "toy-length", "scale": 10.0},
        "plain": [1, "toy-length"],
    }
    values = compose(parts, task=toy_task).score(["", ""], ["abc", ""]).values
    assert values.tolist() == [3 * (2 + 10 + 1), 0.0]
    assert compose({"again": (1.0, compose(parts, task=toy_task))}).score([""], ["abc"]).values.tolist() == [39.0]


def test_an_environment_makes_it_from_json(reward_plugin: Path, toy: dict[str, Any]) -> None:
    kwargs = json.loads(json.dumps({"parts": {"toy-length": 0.5, "more": {"weight": 1.0, "reward": "toy-length"}}}))
    env = gym.make("rlaif_env:RLAIF/TextGeneration-v0", **{**toy, "reward": "compose", "reward_kwargs": kwargs})
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.array([3, 4, 5, 1, 1, 1]))
    assert reward == 1.5 * len(info["response"]) > 0
    assert info["part/toy-length"] == info["part/more"] == info["more/length"] == len(info["response"])
    assert isinstance(make_reward("compose", parts={"toy-length": 1.0}), Composite)


def test_parts_of_any_scale_weigh_what_their_weights_say(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    responses = ["aeiou", "bcd", "", "a b", "uu"]
    file.write_text("".join(json.dumps({"prompt": "p", "response": r, "system": "sft"}) + "\n" for r in responses))
    parts = {
        "long": (3.0, lambda prompts, responses: [1000.0 + 70 * len(r) for r in responses]),
        "open": (-1.0, vowels),
    }
    composite = compose(parts, calibration=file)
    scores = composite.score(["p"] * 5, responses)
    long, open_ = (scores.info[f"scaled/{name}"] for name in ("long", "open"))
    for column in (long, open_):
        assert (column.mean(), column.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    assert scores.values == pytest.approx(3 * long - open_)
    lengths = np.array([1350.0, 1210, 1000, 1210, 1140])
    assert scores.info["part/long"].tolist() == lengths.tolist()
    (told,) = {*scores.info["calibration"].tolist()}
    assert json.loads(told)["long"] == {"mean": pytest.approx(lengths.mean()), "std": pytest.approx(lengths.std())}
    assert compose(parts, calibration=str(file)).score(["x"], ["a"]).values == composite.score(["x"], ["a"]).values
    check_backend(composite)


def test_a_sum_that_is_to_be_calibrated_scores_nothing_before() -> None:
    parts = {"long": (1.0, lambda prompts, responses: [7.0 * len(r) for r in responses]), "open": (1.0, vowels)}
    composite = compose(parts, calibration_samples=4)
    with pytest.raises(BackendError, match=r"to be calibrated on 4 samples of the start policy before it scores"):
        composite.score(["p"], ["a"])
    composite.calibrate(["p"] * 4, ["a", "ae", "xyz", ""])
    other = compose(parts, calibration_samples=4)
    other.moments = json.loads(json.dumps(composite.moments))
    one, two = (sum_.score(["p", "q"], ["aei", "xy"]) for sum_ in (composite, other))
    assert (
        one.values.tolist()
        == two.values.tolist()
        == pytest.approx([(3 - 1.5) / 1.118034 + (3 - 0.75) / 0.829156, (2 - 1.5) / 1.118034 - 0.75 / 0.829156])
    )
    assert one.info["calibration"].tolist() == two.info["calibration"].tolist()
    check_backend(composite)
    for settings in ({"calibration_samples": 1}, {"calibration_samples": 4, "calibration": "samples.jsonl"}):
        with pytest.raises(RLAIFError, match="expected a file as calibration, or calibration_samples of at least 2"):
            compose(parts, **settings)


CALIBRATIONS: list[tuple[str, str]] = [
    ("", "expected two samples or more to calibrate compose:1.open on, found 0"),
    ('{"prompt": "", "response": "b"}\n' * 3, "rewards of the part 'open' that differ, found 0 for all 3 samples"),
    ('{"prompt": "", "text": "b"}\n', "line 1: .*response"),
]


@pytest.mark.parametrize(("rows", "message"), CALIBRATIONS)
def test_samples_without_a_scale(rows: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(rows)
    with pytest.raises(RLAIFError, match=message):
        compose({"open": (1, vowels)}, calibration=tmp_path / "samples.jsonl")
    with pytest.raises(RLAIFError, match=r"none\.jsonl"):
        compose({"open": (1, vowels)}, calibration=tmp_path / "none.jsonl")


SUMS_THAT_CANNOT_BE: list[tuple[Any, str]] = [
    ({}, "expected at least one part to compose a reward of, found none"),
    ({"a": "high"}, "expected a number as the weight of the part 'a', found 'high'"),
    ({"a": (True, vowels)}, "expected a number as the weight of the part 'a', found True"),
    ({"a": (float("nan"), vowels)}, "expected a finite weight for the part 'a', found nan"),
    ({"a": (1, 2, 3)}, r"expected \(weight, reward\) for the part 'a', found 3 values"),
    ({"a": {"reward": "direct-llm"}}, "expected a weight in the part 'a', found reward"),
    ({"no-such": 1.0}, "unknown reward 'no-such'"),
    ({"a": {"weight": 1.0, "reward": vowels, "scale": 2}}, "expected reward_kwargs only with the name of a reward"),
]


@pytest.mark.parametrize(("parts", "message"), SUMS_THAT_CANNOT_BE)
def test_sums_that_cannot_be(parts: Any, message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        compose(parts)


def test_the_named_form_without_parts() -> None:
    with pytest.raises(
        RLAIFError, match=r"reward 'compose': expected parts such as \{\"direct-llm\": 1.0\}, found none"
    ):
        compose()


def test_a_part_that_fails_is_named_with_its_rows() -> None:
    def fails(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [1 / len(r) for r in responses]

    with pytest.raises(
        BackendError, match=r"part 'inverse' of compose:1.inverse: reward function 'fails' raised"
    ) as error:
        compose({"inverse": (1, fails)}).score(["", ""], ["a", ""])
    assert error.value.rows == (1,)


# --- TRL's form -------------------------------------------------------------------------------------------------------


def test_plain_texts_and_a_name() -> None:
    reward = as_trl_reward(Length())
    assert reward.__name__ == "length"
    assert reward(prompts=["a", "b"], completions=["xy", ""], trainer_state=None, colour=["red", "blue"]) == [2.0, 0.0]
    assert as_trl_reward(vowels)(prompts=["a"], completions=["oui"]) == [3.0]


def test_messages_become_the_text_that_preferences_have() -> None:
    seen: list[Any] = []

    def spy(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        seen.append((list(prompts), list(responses)))
        return [0.0] * len(responses)

    prompts = [[{"role": "user", "content": "hi"}]]
    as_trl_reward(spy)(prompts=prompts, completions=[[{"role": "assistant", "content": "hello"}]])
    assert seen == [(["\n\nHuman: hi\n\nAssistant:"], ["hello"])]


def test_what_the_backend_tells_goes_to_trls_log() -> None:
    table: dict[str, Any] = {}
    means: dict[str, float] = {}
    as_trl_reward(Length())(
        prompts=["", ""], completions=["a b", "c"], log_extra=table.__setitem__, log_metric=means.__setitem__
    )
    assert table == {"words": [2, 1]}
    assert means == {"length/words": 1.5}


def test_a_failure_is_an_error_and_no_reward() -> None:
    with pytest.raises(BackendError, match="expected finite rewards"):
        as_trl_reward(lambda prompts, responses: [float("nan")])(prompts=["a"], completions=["b"])


# --- the checker ------------------------------------------------------------------------------------------------------


def test_a_backend_by_the_book_passes() -> None:
    assert check_backend(Length()) == [
        "a backend has a name, a string that is not empty",
        "a backend has a method score(prompts, responses)",
        "a deep copy of a live backend is the backend itself (define __deepcopy__)",
        "a backend scores at least two of the rows given",
        "score returns Scores with one finite reward, and one entry of each info array, a row",
        "score leaves the lists it is given as they are",
        "the same batch gets the same rewards every time",
        "a row gets the same reward alone as in a batch, to 0.0001",
        "rewards come in the order of the rows",
        "an empty batch gives no rewards",
    ]


def test_refusing_a_text_with_the_projects_error_is_allowed() -> None:
    class Refuses(Length):
        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
            if bad := [i for i, r in enumerate(responses) if not r.strip()]:
                raise BackendError(f"expected a response with text in it, found {responses[bad[0]]!r}", bad)
            return super().score(prompts, responses)

    check_backend(Refuses())


class Unnamed(Length):
    name = ""


class Mute:
    name = "mute"

    def __deepcopy__(self, memo: object) -> Mute:
        return self


class Cloned(Length):
    __deepcopy__ = None  # type: ignore[assignment]


class Wrong(Length):
    """Breaks one rule, as told."""

    def __init__(self, rule: str) -> None:
        self.rule, self.calls = rule, 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Any:
        self.calls += 1
        values = super().score(prompts, responses).values
        if self.rule == "list":
            return values.tolist()
        if self.rule == "short":
            return Scores(values[:-1] if len(values) > 1 else values)
        if self.rule == "nan":
            return Scores(np.where(values == 0, np.nan, values))
        if self.rule == "info":
            return Scores(values, {"mean": np.float32(1)})
        if self.rule == "moody":
            return Scores(values + self.calls)
        if self.rule == "batch":
            return Scores(values - values.mean())
        if self.rule == "mutates" and len(responses) > 1:
            responses.append("x")  # type: ignore[attr-defined]
        if self.rule == "crash" and "" in responses:
            raise ZeroDivisionError("division by zero")
        if self.rule == "refuses":
            raise BackendError("no")
        if self.rule == "empty" and not len(responses):
            raise IndexError("no rows")
        return Scores(values)


RULES: list[tuple[Any, str]] = [
    (Unnamed(), "a backend has a name, a string that is not empty: found ''"),
    (Mute(), r"a backend has a method score\(prompts, responses\): found none"),
    (Cloned(), "a deep copy of a live backend is the backend itself .*: found a clone"),
    (Wrong("list"), "one finite reward.*expected Scores, found list"),
    (Wrong("short"), r"one finite reward.*expected values of shape \(6,\), found \(5,\)"),
    (Wrong("nan"), "one finite reward.*expected finite rewards, found 1 that are not"),
    (Wrong("info"), r"one entry of each info array.*expected info 'mean' of shape \(6,\), found \(\)"),
    (Wrong("moody"), "the same batch gets the same rewards every time: found"),
    (Wrong("batch"), "a row gets the same reward alone as in a batch, to 0.0001: found"),
    (Wrong("mutates"), "score leaves the lists it is given as they are: found that it changed them"),
    (Wrong("crash"), "a row that cannot be scored raises BackendError: found ZeroDivisionError: division by zero for"),
    (Wrong("refuses"), "a backend scores at least two of the rows given: found 0 of 6"),
    (Wrong("empty"), "one finite reward.*IndexError: no rows"),
]


@pytest.mark.parametrize(("backend", "message"), RULES)
def test_the_checker_names_the_rule_that_is_broken(backend: Any, message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        check_backend(backend)


def test_rewards_in_the_wrong_order_are_found() -> None:
    class Sorted(Length):
        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
            return Scores(np.sort(super().score(prompts, responses).values))

    with pytest.raises(RLAIFError, match="a row gets the same reward alone as in a batch"):
        check_backend(Sorted())


def test_the_checker_needs_rows() -> None:
    with pytest.raises(RLAIFError, match="expected as many prompts as responses and at least 2, found 1 and 1"):
        check_backend(Length(), ["a"], ["b"])


def test_a_backend_of_another_package_is_found_and_checked(reward_plugin: Path, toy_task: Task) -> None:
    backend = make_reward("toy-length", task=toy_task, scale=2.0)
    assert backend.score([""], ["abc"]).values.tolist() == [6.0]
    with pytest.raises(RLAIFError, match=r"define __deepcopy__"):
        check_backend(backend)
