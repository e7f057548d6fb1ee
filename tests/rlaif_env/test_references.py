"""Rewards that a user names: a module's function, a file's, a class, a factory, and what is said of others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rewards import check_backend, make_reward
from rewards.compose import compose
from rlaif_env.api import BackendError, RLAIFError, checked_scores
from rlaif_env.keywords import reward_factory
from rlaif_env.options import reward_options
from rlaif_env.references import code_in

SOURCE = '''
"""Rewards of somebody's own."""
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
from rlaif_env import Scores

calls = []
number = 3

def length(prompts, responses):
    calls.append(len(responses))
    return [float(len(response)) for response in responses]

def near(prompts, responses, words: int = 5, weight=1.0, *, task=None):
    """Near a number of words.

    Args:
        words: How many.
    """
    return [-weight * abs(len(response.split()) - words) for response in responses]

def short(prompts, responses):
    return [1.0]

def infinite(prompts, responses):
    return [float("nan")] * len(responses)

def fails(prompts, responses):
    return [1 / len(response) for response in responses]

def one(text):
    return len(text)

def nothing():
    return None

@dataclass
class Words:
    task: object = None
    scale: float = 1.0
    name = "words"
    def __deepcopy__(self, memo): return self
    def score(self, prompts, responses):
        count = np.array([len(response.split()) for response in responses], dtype=np.float32)
        return Scores(self.scale * count, {"words": count})

def make(*, level: int): return Words(None, level)

ready = Words(None, 7.0)
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of rewards, in the working directory."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own_rewards.py"
    file.write_text(SOURCE)
    yield file
    sys.modules.pop("own_rewards", None)


@pytest.mark.parametrize("place", ["own_rewards.py", "./own_rewards.py", "{folder}/own_rewards.py", "own_rewards"])
def test_functions_classes_factories_and_objects(file: Path, place: str, toy: dict[str, Any]) -> None:
    place = place.format(folder=file.parent)
    path = list(sys.path)
    prompts, responses = ["a", "b"], ["one two", ""]

    def values(name: str, **settings: Any) -> list[float]:
        backend = make_reward(f"{place}:{name}", **settings)
        check_backend(backend)
        return checked_scores(backend, prompts, responses).values.tolist()

    assert values("length") == [7.0, 0.0]
    assert values("near") == [-3.0, -5.0] and values("near", words=2, weight=2.0) == [0.0, -4.0]
    assert values("Words", scale=2.0) == [4.0, 0.0] and values("make", level=3) == [6.0, 0.0]
    assert values("ready") == [14.0, 0.0]
    assert make_reward(f"{place}:near", words=2).name == "near"
    assert make_reward(f"{place}:Words").task.name == "movie-review"  # type: ignore[attr-defined]
    assert compose({f"{place}:length": 0.5}).score(prompts, responses).values.tolist() == [3.5, 0.0]
    env = gym.make("rlaif_env:RLAIF/TextGeneration-v0", **{**toy, "reward": f"{place}:length"})
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.array([3, 4, 5, 1, 1, 1]))
    assert reward == len(info["response"]) > 0
    assert sys.path == path
    assert [kept.name for kept in file.parent.iterdir() if kept.suffix != ".py"] in ([], ["__pycache__"])


def test_a_file_is_imported_once_for_a_content(file: Path) -> None:
    first, again = (reward_factory("own_rewards.py:length")() for _ in range(2))
    first.score([""], ["a"])
    again.score(["", ""], ["a", "b"])
    assert sys.modules[first.function.func.__module__].calls == [1, 2]  # type: ignore[attr-defined]
    assert "own_rewards" not in sys.modules and not (file.parent / "__pycache__").exists()
    before = code_in(["own_rewards.py:length"])
    file.write_text(SOURCE.replace("float(len(response))", "float(len(response)+1)").replace("number = 3", "number=3"))
    assert len(file.read_text()) == len(SOURCE)  # and in the same second: byte code would be taken for current
    assert make_reward("own_rewards.py:length").score([""], ["abc"]).values == [4.0]
    after = code_in({"parts": {"own_rewards.py:length": 1.0, "b": [1.0, "own_rewards:near"], "m": "no_such:name"}})
    assert list(after) == ["own_rewards.py:length", "own_rewards:near"]
    assert len({*before.values(), *after.values()}) == 2


def test_finding_the_code_of_a_name_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "never").mkdir()
    for name in ("__init__", "deep"):
        (tmp_path / "never" / f"{name}.py").write_text("raise SystemExit('imported')\n")
    assert list(
        code_in(["never.deep:f", "never:f", "never.none:f", "json.decoder:JSONDecoder", "http://x:80", "m:8b"])
    ) == [*("never.deep:f", "never:f", "json.decoder:JSONDecoder")]


def test_options_of_code(file: Path) -> None:
    options = {field.name: field.default for field in fields(reward_options("own_rewards.py:near"))}
    assert options == {"words": 5, "weight": 1.0}
    assert {field.name for field in fields(reward_options("own_rewards.py:Words"))} == {"scale"}


WRONG: list[tuple[str, str]] = [
    ("none.py:f", r"reward 'none.py:f': expected a file of Python at .*none.py, found none"),
    ("own_rewards.py", r"reward 'own_rewards.py': expected package.module:name or path/file.py:name, found"),
    ("folder/own_rewards:f", r"expected package.module:name or path/file.py:name, found 'folder/own_rewards:f'"),
    ("own_rewards.py:lenght", r"expected 'lenght' in own_rewards.py, found length, near, .*Words, make there"),
    ("own_rewards.py:number", r"expected a function of \(prompts, responses\), or .*, found 3 is not a callable"),
    ("own_rewards.py:one", r"'text'; its settings are: text; a reward function takes two lists, prompts and responses"),
    ("own_rewards.py:nothing", r"names to return an object with a name and a score method, found NoneType; a reward"),
    ("own_rewards.py:make", r"missing a required argument: 'level'; its settings are: level"),
    ("no_such_module:f", r"found no module 'no_such_module' among those installed.*path/file.py:name"),
    ("rlaif_env.no_such:f", r"found no module 'rlaif_env.no_such' among those installed"),
    ("broken.py:f", r"reward 'broken.py:f': cannot import broken.py: SyntaxError: .*broken.py, line 1"),
    ("lacks.py:f", r"reward 'lacks.py:f': cannot import lacks.py: ModuleNotFoundError: No module named 'lacking'"),
    ("lacks:f", r"reward 'lacks:f': cannot import lacks: ModuleNotFoundError: No module named 'lacking'"),
]


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_what_is_no_reward_is_told(file: Path, name: str, message: str) -> None:
    (file.parent / "broken.py").write_text("def f(:\n")
    (file.parent / "lacks.py").write_text("import lacking\n")
    with pytest.raises(RLAIFError, match=message):
        make_reward(name)
    assert not [module for module in sys.modules if module.startswith(("_rlaif_broken", "_rlaif_lacks", "lacks"))]


SCORES: list[tuple[str, str]] = [
    ("short", r"reward backend 'short': expected values of shape \(2,\), found \(1,\)"),
    ("infinite", r"reward backend 'infinite': expected finite rewards, found 2 that are not \(row 0: nan"),
    ("fails", r"reward function 'fails' raised ZeroDivisionError: division by zero"),
]


@pytest.mark.parametrize(("name", "message"), SCORES)
def test_what_is_no_score_is_told(file: Path, name: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        checked_scores(make_reward(f"own_rewards.py:{name}"), ["", ""], ["a", ""])
