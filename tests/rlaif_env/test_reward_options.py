"""What a command line can set of a named reward, read from its factory's own signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tyro

from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import load_task
from rlaif_env.keywords import resolve_reward
from rlaif_env.options import as_options, option_values, reward_options

SOURCE = '''
from __future__ import annotations
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
if TYPE_CHECKING:
    from elsewhere import Live
class Judge:
    name = "judge"
    def __init__(self, **settings): self.settings = settings
    def score(self, prompts, responses): return [0.0] * len(prompts)
def make(*, task: Any, model: str | Live = "m", url: str | None = None, chat: bool = False, mass: float = 1e-3,
         scale: tuple[float, float] | None = None, mode: Literal["a", "b"] = "a", names: Sequence[str] = (),
         server: Mapping[str, Any] | None = None, tokenizer: Live | None = None, anything: Any = None):
    """A judge.

    Args:
        task: What is judged.
        scale: Lowest and highest score,
            both included.
        server: How it is asked.
    """
    return Judge(model=model, url=url, scale=scale, server=server)
def free(*, task, one: int = 1, **kwargs): return Judge(one=one, **kwargs)
def needs(task, level: int): return Judge(level=level)
'''


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """An installed package of rewards; gives the keywords that a command line makes of one's options."""
    info = tmp_path / "judges-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: judges\nVersion: 1.0\n")
    names = "\n".join(f"{name} = the_judges:{name}" for name in ("make", "free", "needs"))
    (info / "entry_points.txt").write_text(f"[rlaif_env.rewards]\n{names}\n")
    (tmp_path / "the_judges.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def values(name: str, line: str, *given: str) -> dict[str, Any]:
        return option_values(tyro.cli(reward_options(name, given), args=line.split()))

    return values


def test_options_are_the_factorys_and_those_not_set_are_not_said(judges: Callable[..., dict[str, Any]]) -> None:
    assert judges("make", "") == {} and judges("make", "--model m --no-chat") == {}
    line = "--model x --url u --chat --mass 0.5 --scale 1 9 --mode b --names p q --anything 7"
    assert judges("make", f'{line} --server {{"limits":{{"retries":2}}}}') == {
        "model": "x",
        "url": "u",
        "chat": True,
        "mass": 0.5,
        "scale": [1.0, 9.0],
        "mode": "b",
        "names": ["p", "q"],
        "server": {"limits": {"retries": 2}},
        "anything": "7",
    }
    options = [field.name for field in fields(reward_options("make"))]
    assert "task" not in options and "tokenizer" not in options, "a live object is not for a command line"
    assert judges("needs", "--level 3") == {"level": 3} and judges("needs", "") == {}
    assert judges("free", "--one 2 --two [1,2] --three x", "two", "three") == {"one": 2, "two": [1, 2], "three": "x"}


def test_they_come_back_from_their_values(judges: Callable[..., dict[str, Any]]) -> None:
    for name, values in (
        ("make", {"scale": [1.0, 9.0], "server": {"a": 1}, "chat": True, "model": "x"}),
        ("free", {"two": [1, 2], "three": "x", "one": 5}),
    ):
        kind = reward_options(name, list(values))
        assert option_values(tyro.cli(kind, args=[], default=as_options(kind, values))) == values


def test_help_shows_the_docstring(judges: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        judges("make", "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Lowest and highest score, both included." in shown and "--server JSON How it is asked." in shown


def test_one_clear_error(judges: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    expected = "reward 'make': expected options among model, url, .*, anything, found colour, size"
    with pytest.raises(RLAIFError, match=expected):
        judges("make", "", "colour", "size")
    with pytest.raises(RLAIFError, match=r"unknown reward 'nothing': expected one of .*direct-llm"):
        reward_options("nothing")
    for text in ("{", "3", '{"a": NaN}'):
        with pytest.raises(SystemExit):
            tyro.cli(reward_options("make"), args=["--server", text])
        shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert "--server" in shown and "JSON" in shown
    task = load_task("movie-review")
    message = "reward 'make': got an unexpected keyword argument 'colour'; its settings are: model, url, .*anything$"
    with pytest.raises(RLAIFError, match=message):
        resolve_reward("make", task, {"colour": 1})
    with pytest.raises(
        RLAIFError, match=r"reward 'needs': missing a required argument: 'level'; its settings are: lev"
    ):
        resolve_reward("needs", task, {})


@pytest.mark.parametrize("name", ["direct-llm", "hf-rm", "human-rm", "distilled-rm", "reward-model", "compose"])
def test_the_built_in_rewards_can_be_set(name: str) -> None:
    assert {field.name for field in fields(reward_options(name))} >= ({"parts"} if name == "compose" else {"model"})
