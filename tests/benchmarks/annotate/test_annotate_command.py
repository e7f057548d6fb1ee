"""The command: what it serves, writes and refuses; a small run of the stress benchmark."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.annotate.command import AnnotateConfig, annotate
from benchmarks.annotate.store import Store
from rlaif_env.api import RLAIFError
from rlaif_env.cli import main
from rlaif_env.data.preferences import read_preferences
from rlaif_env.records import RunError
from tests import ROOT
from tests.benchmarks.annotate.annotating import judge
from tests.stress.annotation import StressConfig, stress


@contextmanager
def serving(*options: Any) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The real command in a process of its own, and the lines it printed up to the last link."""
    command = [sys.executable, "-m", "rlaif_env.cli", "annotate", *map(str, options)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    lines = []
    try:
        assert server.stdout is not None
        for line in server.stdout:
            lines.append(line.strip())
            if "Ctrl-C ends" in line:
                break
        assert any("http://" in line for line in lines), lines
        yield server, lines
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def link_of(lines: list[str], name: str = "open") -> str:
    """The link printed for a name, or the one for everybody."""
    return next(result[1] for line in lines if (result := re.match(rf"{name}:? (http\S+)", line)))


def pair_file(path: Path, n: int = 20) -> Path:
    """Pairs whose better response says so."""
    rows = [
        {"prompt": f"Film {i} is", "response_1": f"good and warm {i}", "response_2": f"a bad idea {i}"}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """The folder that a start of the command leaves, without its server having served anything."""
    monkeypatch.setattr("benchmarks.annotate.server.serve", lambda app, sock: None)
    out = tmp_path / "people"
    wanted = {"input": pair_file(tmp_path / "pairs.jsonl"), "out": out, "port": 0, **options}
    annotate(AnnotateConfig(**wanted), console())
    return out


def console() -> Any:
    from rich.console import Console

    return Console(width=200)


def test_a_folder_goes_on_with_the_same_command_and_with_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path, monkeypatch, annotators=("Ada", "Ben"), repeats=0.0)
    store = Store(out / "annotations.sqlite", write=True)
    judge(store, store.annotators()[0], lambda shown: "1", most=5)
    store.close()
    made(tmp_path, monkeypatch, annotators=("Ada", "Ben"), repeats=0.0)
    annotate(AnnotateConfig(out=out, port=0), console())
    shown = capsys.readouterr().out
    links = re.findall(r"(Ada|Ben): http://127\.0\.0\.1:\d+/#k=([\w-]+)", shown)
    assert len(links) == 6
    assert len(set(links)) == 2
    assert "20 items in" in shown
    assert "5 answers of 2 annotators are kept in" in shown
    with pytest.raises(RunError, match="to hold a run of this configuration, found another"):
        made(tmp_path, monkeypatch, repeats=0.5)
    with pytest.raises(RunError, match="found another"):
        made(tmp_path, monkeypatch, repeats=0.0, input=pair_file(tmp_path / "others.jsonl", 3))
    with pytest.raises(RLAIFError, match="as it was begun, found another overlap"):
        annotate(AnnotateConfig(out=out, port=0, overlap=2), console())


def test_off_loopback_the_printed_link_carries_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, monkeypatch, host="0.0.0.0")
    assert re.search(rf"open http://{socket.gethostname()}:\d+/\?token=[\w-]{{40,}}", capsys.readouterr().out)


def test_export_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = made(tmp_path, monkeypatch, annotators=("Ada",))
    store = Store(out / "annotations.sqlite", write=True)
    judge(store, store.annotators()[0], lambda shown: "1" if "good" in shown["responses"][0] else "2")
    store.close()
    file = tmp_path / "preferences.jsonl"
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["annotate", "--out", str(out), "--export", str(file), "--report"]) == 0
    assert {record.p_first for record in read_preferences(file)} == {1.0}
    shown = capsys.readouterr().out
    assert "20 items in" in shown
    assert "Ada (person)" in shown
    report = json.loads((out / "report.json").read_bytes())
    assert (report["judged"], report["annotators"]["Ada"]["judged"]) == (20, 20)


def test_policies_respond_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Echo:
        """A policy that says its own name."""

        def __init__(self, name: str) -> None:
            self.name = name

        def generate(self, prompts: list[str], **settings: Any) -> list[str]:
            assert settings["max_new_tokens"] == 12
            return [f"{self.name} on {prompt}" if "1" not in prompt else "the same" for prompt in prompts]

    monkeypatch.setattr("benchmarks.annotate.command.language_model_from", lambda config: Echo(config.model))
    (tmp_path / "prompts.txt").write_text("Film 1\nFilm 2\nFilm 3\n")
    out = made(
        tmp_path,
        monkeypatch,
        input=tmp_path / "prompts.txt",
        task="movie-review",
        policies=("start", "trained"),
        checks=0.0,
    )
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert set(rows[0]) == {"prompt", "system", "response"}
    store = Store(out / "annotations.sqlite")
    assert [item.kind for item in store.items().values()] == ["identical", "item", "item"]
    assert store.plan.criterion == "how positive the review is about the film"
    store.close()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to judge": ({"input": None}, "expected something to judge (--input, or --task for the pairs"),
    "no such file": ({"input": Path("nowhere.jsonl")}, "expected a file to read at nowhere.jsonl"),
    "no pairs": ({"pairs": 0}, "expected pairs from 1, found 0"),
    "policies without a task": ({"policies": ("a", "b")}, "expected a task (--task)"),
    "a rate beyond 1": ({"checks": 2.0}, "expected a share from 0 to 1 for checks, found 2.0"),
    "one name twice": ({"annotators": ("Ada", "Ada")}, "expected annotators of different names, found 'Ada' twice"),
    "one name in two spellings": ({"annotators": ("Ada", "ADA")}, "expected a name that nobody else has"),
    "a report without a folder": ({"report": True, "out": None}, "expected the folder of the annotations (--out)"),
    "an export of nothing": ({"export": Path("x.jsonl")}, "expected annotations at"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, message = REFUSED[name]
    with pytest.raises(RLAIFError) as caught:
        made(tmp_path, monkeypatch, **options)
    assert message in str(caught.value)


def test_a_port_in_use_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RLAIFError, match=r"Address already in use; name another"):
            made(tmp_path, monkeypatch, port=taken.getsockname()[1])
    assert not (tmp_path / "people").exists()


def test_a_folder_with_other_things_is_left_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "people").mkdir()
    (tmp_path / "people" / "annotations.sqlite").write_text("mine")
    with pytest.raises(RunError, match="to be new or empty, found annotations"):
        made(tmp_path, monkeypatch)
    assert (tmp_path / "people" / "annotations.sqlite").read_text() == "mine"


@pytest.mark.slow
def test_ctrl_c_ends_the_command_and_the_folder_is_one_server_s(tmp_path: Path) -> None:
    options = ["--input", pair_file(tmp_path / "pairs.jsonl"), "--out", tmp_path / "people", "--port", 0]
    with serving(*options) as (server, lines):
        assert urllib.request.urlopen(link_of(lines)).status == 200
        second = subprocess.run(
            [sys.executable, "-m", "rlaif_env.cli", "annotate", *map(str, options)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
        )
        assert second.returncode == 2
        assert "is being written by another run" in second.stderr
        server.send_signal(signal.SIGINT)
        assert server.stdout is not None
        rest = server.stdout.read()
        assert server.wait(timeout=60) == 0
    assert "0 answers of 0 annotators are kept in" in rest
    assert "Traceback" not in rest


@pytest.mark.slow
def test_no_answer_is_lost_or_doubled_when_the_server_is_killed(tmp_path: Path) -> None:
    result = stress(StressConfig(items=30, annotators=4, kills=2, think=0.02), tmp_path)
    assert result["kills"] == 2
    assert result["acknowledged"] >= 60
    assert (result["lost"], result["doubled"], result["items_with_too_few_judges"]) == (0, 0, 0)
