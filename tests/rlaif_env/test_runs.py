"""The run folder: what is written can be read, what cannot be written is refused with a reason."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_env.api import DataError
from rlaif_env.records import RunError, read_metrics, write_json
from rlaif_env.runs import RunFolder

CONFIG = {"task": "movie-review", "seed": 3, "lr": 7e-4}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.create(tmp_path / "run", CONFIG, command="train") as run:
        yield run


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- config.json ------------------------------------------------------------------------------------------------------


def test_the_configuration_says_what_is_needed_to_run_again(run: RunFolder) -> None:
    record = json.loads((run.path / "config.json").read_text())
    assert record["command"] == "train"
    assert record["config"] == CONFIG
    assert record["command_line"] == sys.argv
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "gymnasium", "numpy"} <= set(record["versions"])
    assert record["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", record["git_commit"])
    assert record["platform"]["cpus"] == os.cpu_count()


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Settings:
    folder: Path
    colour: Colour
    betas: tuple[float, float]


def test_data_classes_paths_enums_and_arrays_become_json(tmp_path: Path) -> None:
    value = {"s": Settings(Path("a/b"), Colour.RED, (0.9, 0.99)), "x": np.float32(0.5), "i": np.arange(3)}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "s": {"folder": "a/b", "colour": "red", "betas": [0.9, 0.99]},
        "x": 0.5,
        "i": [0, 1, 2],
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"lr": float("nan")}, "expected x.json to hold text, finite numbers and the like, found: "),
        ({"lr": np.array([np.inf])}, "expected x.json to hold text, finite numbers and the like, found: "),
        ({"f": print}, "found: builtin_function_or_method <built-in function print>"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(value: object, message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(RunError, match=re.escape(message)):
        write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"task": "movie-review"}, r"train-movie-review-\d{8}-\d{6}"),
        ({"task": "my tasks/../poems.toml"}, r"train-poems-\d{8}-\d{6}"),
        ({"task": {"name": "a b/c"}}, r"train-a-b-c-\d{8}-\d{6}"),
        ({}, r"train-\d{8}-\d{6}"),
    ],
)
def test_the_default_name(config: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunFolder.create(None, config, command="train") as run:
        assert run.path.parent == Path("runs")
        assert re.fullmatch(name, run.path.name)


def test_two_runs_within_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [RunFolder.create(None, CONFIG) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    for run in runs:
        run.close()


def occupied_by_file(path: Path) -> None:
    path.write_text("a file")


def under_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("a file")


def with_other_files(path: Path) -> None:
    path.mkdir()
    for name in "abcd":
        (path / name).write_text("")


def with_a_run(path: Path) -> None:
    RunFolder.create(path, CONFIG).close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (occupied_by_file, "cannot write {path}: File exists"),
        (under_a_file, "cannot write {path}: Not a directory"),
        (with_other_files, "expected {path} to be new or empty, found a, b, c ...: name another folder for the run"),
        (with_a_run, "expected {path} to be new or empty, found a run in it: name another folder"),
    ],
)
def test_a_folder_that_cannot_be_used(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "parent" / "run"
    path.parent.mkdir()
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=re.escape(message.format(path=path))):
        RunFolder.create(path, CONFIG)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="giving up the rights of root needs them")
def test_a_folder_without_permission_as_an_ordinary_user(tmp_path: Path) -> None:
    code = (
        "import os; from rlaif_env.records import RunError; from rlaif_env.runs import RunFolder\nos.seteuid(65534)\n"
        "try: RunFolder.create('/usr/no-rights-here', {})\nexcept RunError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cannot write /usr/no-rights-here: Permission denied"


def test_going_on_with_a_run_appends_after_the_last_whole_line(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", CONFIG, command="train") as run:
        run.log(1, {"reward": 0.5})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "rew')  # a writer killed in the middle
    with RunFolder.create(tmp_path / "run", dict(CONFIG), command="train", exist=True) as run:
        run.log(2, {"reward": 0.75})
    assert read_metrics(run.path) == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75}]


@pytest.mark.parametrize(
    ("command", "config", "difference"),
    [
        ("train", {**CONFIG, "lr": 1e-5}, "lr: 0.0007 there, 1e-05 here"),
        ("train", {"task": "movie-review", "seed": 3}, "lr: 0.0007 there, 'nothing' here"),
        ("sft", CONFIG, "command: 'train' there, 'sft' here"),
    ],
)
def test_going_on_with_another_configuration_is_refused(
    command: str, config: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    RunFolder.create(tmp_path, CONFIG, command="train").close()
    message = f"expected {tmp_path} to hold a run of this configuration, found another ({difference})"
    with pytest.raises(RunError, match=re.escape(message)):
        RunFolder.create(tmp_path, config, command=command, exist=True)


def test_two_processes_cannot_write_one_folder_and_a_dead_one_holds_nobody_up(tmp_path: Path) -> None:
    code = (
        "import sys, time; from rlaif_env.runs import RunFolder\n"
        f"run = RunFolder.create({str(tmp_path)!r}, {CONFIG!r}); print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        message = f"{tmp_path} is being written by another run: wait for its end, or name another folder"
        with pytest.raises(RunError, match=re.escape(message)):
            RunFolder.create(tmp_path, CONFIG, exist=True)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / "run.lock").exists()
    RunFolder.create(tmp_path, CONFIG, exist=True).close()


def test_one_process_cannot_open_a_folder_twice_either(run: RunFolder) -> None:
    with pytest.raises(RunError, match="is being written by another run"):
        RunFolder.create(run.path, CONFIG, command="train", exist=True)
    run.log(1, {"reward": 1.0})
    assert read_metrics(run.path) == [{"step": 1, "reward": 1.0}]


# --- metrics ----------------------------------------------------------------------------------------------------------


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1).filter(lambda name: name != "step")
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60)


@given(st.lists(st.dictionaries(NAMES, NUMBERS, max_size=4), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_metrics_read_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float]]) -> None:
    with RunFolder.create(tmp_path_factory.mktemp("run"), {}) as run:
        for step, row in enumerate(rows):
            run.log(step, row)
        assert read_metrics(run.path) == [{"step": step, **row} for step, row in enumerate(rows)]


def test_numbers_of_all_libraries_are_metrics(run: RunFolder) -> None:
    torch = pytest.importorskip("torch")
    run.log(1, {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(3), "d": 2, "e": np.array([1.5])})
    assert read_metrics(run.path / "metrics.jsonl") == [{"step": 1, "a": 0.5, "b": 0.25, "c": 3, "d": 2, "e": 1.5}]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("nan"), "nan"),
        (np.float32(-np.inf), "-inf"),
        (True, "True"),
        ("0.5", "'0.5'"),
        (None, "None"),
        ([0.5, 0.5], "[0.5, 0.5]"),
    ],
)
def test_what_is_not_a_finite_number_is_refused_and_nothing_written(value: object, found: str, run: RunFolder) -> None:
    message = f"expected metric 'kl' at step 4 to be a finite number, found {found}"
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        run.log(4, {"reward": 1.0, "kl": value})
    assert not (run.path / "metrics.jsonl").exists()


def test_step_is_the_lines_own_name(run: RunFolder) -> None:
    with pytest.raises(RunError, match="expected metrics by other names than 'step'"):
        run.log(1, {"step": 2})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_an_error_with_the_file(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        run.log(1, {"reward": 1.0})


def test_a_line_still_being_written_is_not_a_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1, "reward": 0.5}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: expected a JSON object, found b'{'"),
        (b"", "line 2: expected a JSON object, found b''"),
        (b"\xff", "line 2: expected a JSON object, found b'\\xff'"),
        (b"[" * 100_000, "line 2: expected a JSON object, found b'[[["),
        (b"[1]", "line 2: expected finite numbers and a step, found b'[1]'"),
        (b'{"reward": 1}', "line 2: expected finite numbers and a step"),
        (b'{"step": 1.5}', "line 2: expected finite numbers and a step"),
        (b'{"step": 2, "kl": NaN}', "line 2: expected finite numbers and a step"),
        (b'{"step": 2, "kl": "1"}', "line 2: expected finite numbers and a step"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'metrics.jsonl'}, {message}")):
        read_metrics(tmp_path)


def test_no_metrics_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a run's metrics at .*: No such file or directory"):
        read_metrics(tmp_path)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_every_response_is_written_with_its_reward_and_parts(run: RunFolder) -> None:
    parts = {"mass": np.array([0.5, 0.25], dtype=np.float32), "finish": np.array(["stop", "length"])}
    run.log_samples(7, ["p", "q"], ["fine\n\u2028", "\ud800"], np.array([1, -1], dtype=np.float32), parts)
    run.log_samples(8, [], [], [])
    assert lines(run.path / "samples.jsonl") == [
        {"step": 7, "prompt": "p", "response": "fine\n\u2028", "reward": 1.0, "mass": 0.5, "finish": "stop"},
        {"step": 7, "prompt": "q", "response": "\ud800", "reward": -1.0, "mass": 0.25, "finish": "length"},
    ]


@pytest.mark.parametrize(
    ("rewards", "parts", "message"),
    [
        ([1.0], {}, "expected columns of one length at step 1, found {'prompt': 2, 'response': 2, 'reward': 1}"),
        (1.0, {}, "expected columns of one length at step 1"),
        ([1.0, 2.0], {"a": [1, 2, 3]}, "expected columns of one length at step 1"),
        ([1.0, np.nan], {}, "to hold text, finite numbers and the like"),
        ([1.0, 2.0], {"mass": [np.inf, 1.0]}, "to hold text, finite numbers and the like"),
    ],
)
def test_samples_that_do_not_fit_are_refused(rewards: Any, parts: dict[str, Any], message: str, run: RunFolder) -> None:
    with pytest.raises(RunError, match=re.escape(message)):
        run.log_samples(1, ["p", "q"], ["x", "y"], rewards, parts)
    assert not (run.path / "samples.jsonl").exists()


# --- TensorBoard ------------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script> **bold** [a](javascript:b)\n\n# head\r- item & `code` &lt;\n| a | b |\n"


def test_tensorboard_holds_scalars_and_texts(run: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (1, 2):
        run.log(step, {"reward": step / 2})
    run.log_text(2, "samples", HOSTILE)
    run.close()
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 1.0)]
    (text,) = events.Tensors("samples/text_summary")
    assert text.step == 2


def test_model_text_is_shown_by_tensorboard_as_it_is(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    with RunFolder.create(tmp_path, {}) as run:
        run.log_text(1, "samples", HOSTILE)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("samples/text_summary")
    (page,) = re.findall(r"<pre><code>(.*)</code></pre>", markdown_to_safe_html(text.tensor_proto.string_val[0]), re.S)
    assert "<" not in page
    assert html.unescape(page).strip() == HOSTILE.replace("\r", "\n").strip()


# --- checkpoints and curves -------------------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_or_not_there(run: RunFolder) -> None:
    with run.checkpoint(5) as folder:
        (folder / "weights").write_text("old")
        assert not (run.path / "checkpoints" / "000005").exists()
    with pytest.raises(ZeroDivisionError), run.checkpoint(5) as folder:
        (folder / "weights").write_text("half")
        raise ZeroDivisionError
    assert (run.path / "checkpoints" / "000005" / "weights").read_text() == "old"
    with run.checkpoint(5) as folder:
        (folder / "weights").write_text("new")
    assert (run.path / "checkpoints" / "000005" / "weights").read_text() == "new"
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["000005"]


def test_curves_are_a_picture_of_what_was_logged(run: RunFolder) -> None:
    from matplotlib.image import imread

    assert run.curves() is None
    rng = np.random.default_rng(0)
    for step in range(80):
        row = {"reward": step / 80 + rng.normal(0, 0.1), "kl": 0.01 * step, "length": 16.0, "other": 1.0}
        run.record("metrics.jsonl", {"step": step, **row})
    file = run.curves()
    assert file == run.path / "curves.png"
    picture = imread(file)[..., :3]  # (height, width, 3)
    assert picture.shape[1] == round(2 * 5.2 * 120)
    blue = (picture[..., 2] > 0.6) & (picture[..., 0] < 0.3)
    height, width = blue.shape
    panels = [blue[: height // 2, : width // 2], blue[: height // 2, width // 2 :], blue[height // 2 :, : width // 2]]
    assert all(panel.sum() > 200 for panel in panels)
    assert not blue[height // 2 :, width // 2 :].any()  # entropy was never logged: no fourth panel
    for step in (0, 40, 80):
        run.log(step, {"reward": step / 80, "win_rate": 0.5}, "validation")
    run.curves()
    picture = imread(file)[..., :3]
    orange = (picture[..., 0] > 0.8) & (picture[..., 2] < 0.3)
    quarters = [q for half in np.split(orange, 2) for q in np.array_split(half, 2, axis=1)]
    assert [bool(q.sum() > 50) for q in quarters] == [True, False, False, True]  # reward, kl, length, win_rate
    assert not blue[height // 2 :, width // 2 :].any() and len(read_metrics(run.path)) == 80


def test_drawing_touches_no_global_state(tmp_path: Path) -> None:
    code = (
        "import sys; from rlaif_env.runs import RunFolder\n"
        f"with RunFolder.create({str(tmp_path)!r}, {{}}) as run:\n"
        "    run.record('metrics.jsonl', {'step': 1, 'reward': 0.5}); run.curves()\n"
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
