"""Every example of docs/rewards.md runs as it stands, the commands on a tiny model and task."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaif_env.cli import main
from rlaif_env.data.preferences import write_preferences
from rlaif_env.models import BUILTIN_MODEL
from tests import ROOT
from tests.rewards.reward_model.test_hugging_face import classifier
from tests.rewards.test_backends import preferences
from tests.tiny import character_tokenizer, save_tiny

PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.S)
FILE = next(code for kind, code in BLOCKS if code.startswith("# my_rewards.py"))
PYTHON = [code for kind, code in BLOCKS if kind == "python" and code != FILE]
COMMANDS = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines()]
TASK = """
name = "toy"
kind = "continuation"
criterion = "how good it is"
max_prompt_tokens = 16
max_response_tokens = 6
[source.prompts]
train = ["the film", "ok", "it was"]
test = ["a", "b", "c d", "e"]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with what the page takes for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    (tmp_path / "my_rewards.py").write_text(FILE)
    (tmp_path / "toy.toml").write_text(TASK)
    save_tiny(tmp_path / "tiny")
    write_preferences(tmp_path / "preferences.jsonl", preferences("human", 120))
    for name, outputs in (("trl-rm", 1), ("sentiment", 2)):
        classifier(character_tokenizer(), 0, outputs).save_pretrained(tmp_path / "runs" / name)
        character_tokenizer().save_pretrained(tmp_path / "runs" / name)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_an_example_in_python_runs(code: str) -> None:
    exec(compile(code, "docs/rewards.md", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_a_command_runs(command: str, folder: Path) -> None:
    tiny = ["--task", "toy.toml", "--seed", "1"]
    train = [*tiny, *"--model tiny --updates 2 --prompts-per-update 2 --group-size 2 --eval-prompts 2".split()]
    for needed, made_by in (("runs/start/", "--out runs/start"), ('"runs/rm"', "--out runs/rm")):
        if needed in command:
            test_a_command_runs(next(line for line in COMMANDS if made_by in line), folder)
    command = command.replace("gemma-3-270m", BUILTIN_MODEL)  # whose terms nobody has to have accepted for the tests
    rlaif, name, *words = shlex.split(command.replace('"direct-llm": 1.0', json.dumps(SCORER)[1:-1]))
    assert rlaif == "rlaif"
    kinds = {"train": train, "train-rm": [*tiny, "--model", "tiny"]}
    more = kinds.get(name, [*tiny, "--reference", "tiny", "--prompts", "4"])
    assert main([name, *words, *more, *([] if "--out" in words else ["--out", "run"])]) == 0
    if name == "train":
        rows = [json.loads(row) for row in (folder / "run" / "samples.jsonl").read_text().splitlines()]
        assert len(rows) == 8
        if "Variety" in command:  # six random characters seldom hold a word twice, so all rewards may be 1
            words = [row["response"].split() for row in rows]
            assert [row["reward"] for row in rows] == pytest.approx([len({*w}) / len(w) if w else 0.0 for w in words])
        else:
            assert len({row["reward"] for row in rows}) > 1
        assert ("calibration" in rows[0]) == ("--reward.calibration" in command)


SCORER = {"direct-llm": {"weight": 1.0, "model": "tiny", "minimum_mass": 0.0}}
"""What the built-in model is replaced by."""
