"""The command `rlaif`: its table, its messages and its exit codes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rlaif_env import cli
from rlaif_env.api import DataError, RLAIFError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[list[str]], int]], None]:
    """Put a function into the table as the command `try-me`, from a module that really is imported."""

    def put(function: Callable[[list[str]], int]) -> None:
        (tmp_path / "tried").mkdir()
        (tmp_path / "tried" / "__init__.py").write_text("raise AssertionError('imported too early')")
        (tmp_path / "tried" / "it.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        module = ModuleType("tried.it")
        module.main = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tried.it", module)
        monkeypatch.setattr(cli, "COMMANDS", {"try-me": ("tried.it:main", "be tried")})

    return put


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(argv: list[str], command, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda rest: 0)
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "  try-me     be tried\n" in shown


def test_the_arguments_and_the_exit_code_pass_through(command) -> None:
    seen: list[list[str]] = []
    command(lambda rest: seen.append(rest) or 7)
    assert cli.main(["try-me", "--seed", "3"]) == 7
    assert seen == [["--seed", "3"]]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("try_me", "rlaif: no command 'try_me': did you mean try-me? (rlaif --help lists them)"),
        ("xyz", "rlaif: no command 'xyz': expected one of try-me (rlaif --help lists them)"),
    ],
)
def test_an_unknown_command_names_the_nearest(
    typed: str, message: str, command, capsys: pytest.CaptureFixture[str]
) -> None:
    command(lambda rest: 0)
    assert cli.main([typed]) == 2
    assert capsys.readouterr().err.strip() == message


def failing(error: BaseException) -> Callable[[list[str]], int]:
    def main(rest: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RLAIFError("expected a, found b"), 2, "rlaif try-me: expected a, found b"),
        (DataError("prompts.jsonl, line 3: empty"), 2, "rlaif try-me: prompts.jsonl, line 3: empty"),
        (KeyboardInterrupt(), 130, "rlaif try-me: interrupted"),
    ],
)
def test_errors_are_one_message(
    error: BaseException, code: int, message: str, command, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.delenv("RLAIF_TRACEBACK", raising=False)
    command(failing(error))
    assert cli.main(["try-me"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err.strip()) == ("", message)


def test_a_traceback_on_request(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_TRACEBACK", "1")
    command(failing(RLAIFError("expected a, found b")))
    with pytest.raises(RLAIFError, match="expected a, found b"):
        cli.main(["try-me"])


def test_other_errors_are_not_hidden(command) -> None:
    command(failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["try-me"])


def test_every_command_is_listed_and_there(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert listed == set(cli.COMMANDS)
    for name, (target, _) in cli.COMMANDS.items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_as_a_process_help_is_quick_and_loads_no_model_code() -> None:
    code = "import sys; from rlaif_env.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: rlaif COMMAND")


def test_it_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "rlaif_env.cli", "no-such-command"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(cli.__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr.startswith("rlaif: no command 'no-such-command': ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rlaif ")


def test_what_runs_in_one_process_says_so_once_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["label"]) == 2
    assert capsys.readouterr().err == "rlaif label: runs in one process; torchrun is for train, sft, train-rm\n"
