"""What README and documents say a command takes, it takes; what they import can be imported."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from dataclasses import fields

import pytest

from rlaif_env.cli import COMMANDS
from rlaif_env.data.tasks import PromptSource, Task
from tests import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MORE = {
    "train": [["--reward", reward] for reward in ("direct-llm", "group-preference", "human-rm", "hf-rm", "compose")],
    "audit": [["direct-llm"], ["human-rm"]],
    "task": [["new"], ["check"]],
}
"""Arguments that a command's options depend on."""
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")


@pytest.fixture(scope="session")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What every command prints for --help."""
    found: dict[str, list[str]] = {}
    own = tmp_path_factory.mktemp("own") / "my_rewards.py"
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    own.write_text(re.findall(r"```python\n(# my_rewards.py.*?)```", page, re.S)[0], encoding="utf-8")
    mine = [["--reward", f"{own}:{name}"] for name in ("near", "Variety")]
    for name, (target, _) in COMMANDS.items():
        module, _, function = target.partition(":")
        for more in [*MORE.get(name, [[]]), *(mine if name == "train" else ())]:
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
                getattr(importlib.import_module(module), function)([*more, "--help"])
            found.setdefault(name, []).append(shown.getvalue())
    return found


@pytest.fixture(scope="session")
def options(helps: dict[str, list[str]]) -> dict[str, set[str]]:
    """The options of every command, as its --help has them."""
    found = {name: set(OPTION.findall("\n".join(texts))) for name, texts in helps.items()}
    assert "--criterion" in found["task"] and "--reward.scale" in found["train"] and "--labeler.url" in found["label"]
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_help_is_plain_words(name: str, helps: dict[str, list[str]]) -> None:
    for text in helps[name]:
        assert not re.search(r"`|(Settings|Options) of|Args:|Attributes:|Raises:|Returns:", text), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_on_a_page_is_one(page: object, options: dict[str, set[str]]) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():  # type: ignore[attr-defined]
        for command, rest in re.findall(r"\brlaif ([a-z-]+)([^`#]*)", line):
            if command in options:
                assert set(OPTION.findall(rest)) <= options[command] | {"--help"}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_import_on_a_page_works(page: object) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):  # type: ignore[attr-defined]
        for line in re.findall(r"^from ((?:rlaif_env|rewards|agents|benchmarks)[\w.]*) import ([\w, ]+)$", block, re.M):
            module = importlib.import_module(line[0])
            for name in line[1].replace(" ", "").split(","):
                assert hasattr(module, name), line


def test_every_key_of_a_task_is_on_its_page() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert {entry.name for kind in (Task, PromptSource) for entry in fields(kind)} - {"source"} <= set(
        re.findall(r"`(\w+)`", page)
    )
