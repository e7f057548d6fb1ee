"""A labelling run that is killed with SIGKILL goes on where it was; the journal that makes it so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rewards.labeling.command import LabelConfig, label
from rewards.labeling.labeler import PreferenceLabeler
from rewards.labeling.pair_source import read_pairs
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import DataError
from rlaif_env.data.journal import Journal
from rlaif_env.data.preferences import read_preferences
from rlaif_env.records import RunError
from tests import ROOT
from tests.rewards.labeling.labelling import Judge, pair_rows, quiet, run, write_rows
from tests.tiny import save_tiny

SCRIPT = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from rewards.labeling.command import LabelConfig, label
from rewards.language_model.config import LanguageModelConfig

source, out, log, point, count, model = sys.argv[1:]
left = {point: int(count)}  # how often it comes past that point before it is killed there

def passes(where):
    left[where] = left.get(where, 10**9) - 1
    return left[where] >= 0

def logged(kind):
    ask = kind.label_logprobs
    def label_logprobs(self, prompts, labels):
        with open(log, "a") as file:
            file.writelines(repr(p) + "\\n" for p in prompts)
        if not passes("asking"):
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(self, prompts, labels)
    kind.label_logprobs = label_logprobs

synced = os.fsync
def fsync(number):
    if not passes("writing"):  # the disk gets all but the end of the last line
        os.ftruncate(number, os.fstat(number).st_size - 25)
        os.kill(os.getpid(), signal.SIGKILL)
    synced(number)

if model == "judge":
    from tests.rewards.labeling.labelling import Judge
    logged(Judge)
    judge = Judge()
else:
    from rewards.language_model.local import LocalLM
    logged(LocalLM)
    judge = None
if point == "writing":
    os.fsync = fsync
labeler = LanguageModelConfig(model)
config = LabelConfig(task="helpful", input=Path(source), out=Path(out), batch=3, labeler=labeler, minimum_mass=1e-9)
label(config, Console(), judge)
"""


def killed_run(tmp_path: Path, model: str, point: str, count: int) -> int:
    """Run in a process of its own that kills itself on coming past a point once too often; its exit code."""
    (tmp_path / "script.py").write_text(SCRIPT)
    files = [str(tmp_path / name) for name in ("pairs.jsonl", "out", "log")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py"), *files, point, str(count), model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def finished_questions(tmp_path: Path, model: str) -> Counter[str]:
    """The questions whose answers are whole lines of the journal."""
    file = tmp_path / "out" / "journal.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    keys = {json.loads(line)["key"] for line in lines}
    assert len(keys) == len(lines)
    judge = Judge()
    judge.name = model
    labeler = PreferenceLabeler(judge, "helpful")
    questions: set[str] = set()
    for pair in read_pairs(tmp_path / "pairs.jsonl"):
        questions.update(labeler.questions(pair.prompt, pair.response_1, pair.response_2))
    result = Counter(repr(question) for question in questions if labeler.key(question) in keys)
    assert len(result) == len(keys)
    return result


def kill_and_resume(tmp_path: Path, model: str, kills: Sequence[tuple[str, int]], n: int) -> None:
    """Kill runs of one job one after another, let the last one end, and hold all of them to the promise."""
    write_rows(tmp_path / "pairs.jsonl", pair_rows(n))
    log, journal = tmp_path / "log", tmp_path / "out" / "journal.jsonl"
    torn = 0
    for point, count in kills:
        before = finished_questions(tmp_path, model)
        log.write_text("")
        assert killed_run(tmp_path, model, point, count) == -signal.SIGKILL
        assert not Counter(log.read_text().splitlines()) & before  # nothing finished is asked again
        assert len(finished_questions(tmp_path, model) - before) >= 6 * count  # whole batches of three pairs are kept
        torn += journal.exists() and not journal.read_bytes().endswith(b"\n")
        assert not (tmp_path / "out" / "preferences.jsonl").exists()
    assert torn
    before = finished_questions(tmp_path, model)
    log.write_text("")
    assert killed_run(tmp_path, model, "never", 0) == 0
    asked = Counter(log.read_text().splitlines())
    assert not asked & before
    assert max(asked.values()) == 1
    assert len(asked) + len(before) == 2 * n
    result = list(read_preferences(tmp_path / "out" / "preferences.jsonl"))
    assert [p.prompt for p in result] == [row["prompt"] for row in pair_rows(n)]
    assert (tmp_path / "out" / "errors.jsonl").read_text() == ""


def test_a_killed_run_goes_on_without_asking_twice_or_losing_a_pair(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, "judge", [("asking", 0), ("asking", 2), ("writing", 2), ("writing", 1)], 25)
    uninterrupted = tmp_path / "other"
    uninterrupted.mkdir()
    run(uninterrupted, input=tmp_path / "pairs.jsonl", minimum_mass=1e-9)
    one, two = (folder / "out" / "preferences.jsonl" for folder in (tmp_path, uninterrupted))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_a_killed_run_of_a_real_model_goes_on(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = save_tiny(tmp_path / "model", byte_tokenizer, max_position_embeddings=4096)
    kill_and_resume(tmp_path, str(model), [("asking", 1), ("writing", 1)], 10)


def test_other_weights_under_the_path_are_another_labeler_or_policy(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    first, other = (save_tiny(tmp_path / str(seed), byte_tokenizer, seed=seed) for seed in (0, 1))
    task = tmp_path / "short.toml"
    task.write_text(
        'name = "short"\nkind = "dialogue"\ncriterion = "length"\nmax_prompt_tokens = 9\nmax_response_tokens = 3\n'
    )
    source = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "The film"}, {"prompt": "A story"}])
    folders = {name: tmp_path / name for name in ("labeler", "policy")}
    for folder in folders.values():
        shutil.copytree(first, folder)
    config = LabelConfig(
        task=str(task),
        input=source,
        policy=str(folders["policy"]),
        labeler=LanguageModelConfig(str(folders["labeler"])),
        minimum_mass=1e-12,
        out=tmp_path / "out",
    )
    label(config, quiet())
    for name, folder in folders.items():
        kept = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
        with pytest.raises(RunError, match=rf"found another \(content\.{name}: 'sha256:.*' there, 'sha256:.*' here\)"):
            label(config, quiet())
        (folder / "model.safetensors").write_bytes(kept)
    assert label(config, quiet())["asked_in_this_run"] == 0


def test_a_torn_line_is_cut_off_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    with Journal(file) as journal:
        journal.append({"a": {"x": 1}, "b": {"x": 2}})
        journal.append({"b": {"x": 3}})
        assert (list(journal), journal["b"], len(journal)) == (["a", "b"], {"key": "b", "x": 2}, 2)
    whole = file.read_bytes()
    for torn in (b'{"key": "c", "x"', b"{", b'{"key": "c", "x": 5}', b"\x00\x00"):
        file.write_bytes(whole + torn)
        seen: list[Any] = []
        with Journal(file, seen.append) as journal:
            assert (list(journal), [row["x"] for row in seen]) == (["a", "b"], [1, 2])
            journal.append({"c": {"x": 4}})
            assert [journal[key]["x"] for key in "abc"] == [1, 2, 4]
        assert file.read_bytes() == whole + b'{"key": "c", "x": 4}\n'
    for damaged in (b"\x00\x00\n", b"[1]\n", b'{"x": 1}\n', b'{"key": 3}\n', b"\xff\n"):
        file.write_bytes(whole + damaged + whole)
        with pytest.raises(
            DataError, match=r"journal.jsonl, line 3: expected a row of finished work, found a damaged line"
        ):
            Journal(file)


def test_a_write_that_fails_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "journal.jsonl"
    with Journal(file) as journal:
        journal.append({"a": {}})

        def full(number: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"cannot write .*journal.jsonl: No space left on device"):
            journal.append({"b": {}})
        monkeypatch.undo()
        assert "b" not in journal
        journal.append({"c": {}})
    assert list(Journal(file)) == ["a", "c"]
