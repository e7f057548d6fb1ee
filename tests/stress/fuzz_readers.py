"""Readers of files and settings as something to throw inputs at.

A reader's ``make`` gives a folder to work in and returns a function of one input's bytes. That function returns where
the input was accepted, after checking that what was read survives writing and reading again (`Lost` if not), and raises
the project's own error where it was refused. What else it raises is a fault of the reader.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif_env.api import RLAIFError
from tests.stress.fuzz_inputs import damaged, json_input, lines_input, tar_input, toml_input

__all__ = ["FILE_READERS", "Fair", "Lost", "Read", "Reader", "same"]

Read = Callable[[bytes], None]


class Lost(AssertionError):
    """An input was accepted and something of it was lost or changed."""


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        inputs: Draws one input.
        make: Given a folder of its own, returns what reads an input.
    """

    inputs: Callable[[random.Random], bytes]
    make: Callable[[Path], Read]


def same(expected: object, found: object, what: str) -> None:
    """Hold two values to be equal.

    Raises:
        Lost: If they are not.
    """
    if expected != found:
        raise Lost(f"{what}: expected {expected!r:.300}, found {found!r:.300}")


# --- tasks, prompts, preferences --------------------------------------------------------------------------------------

_TASK: dict[str, Any] = {
    "name": "haiku",
    "kind": "continuation",
    "criterion": "how well the poem keeps to one image",
    "max_prompt_tokens": 32,
    "max_response_tokens": 32,
}
_TASKS = (
    {**_TASK, "source": {"jsonl": "prompts.jsonl", "field": "text", "allow_empty": True}},
    {**_TASK, "gold": "vader", "source": {"prompts": {"train": ["one", "two"], "test": ["three"]}}},
    {**_TASK, "kind": "dialogue", "source": {"jsonl": {"train": "a.jsonl"}, "preferences": {"train": "b.jsonl"}}},
    {**_TASK, "kind": "summary", "source": {"dataset": "a/b", "dataset_splits": {"train": "x"}, "dataset_config": "c"}},
    {**_TASK, "source": {"corpus": "movie-review"}},
)
_MESSAGES = [{"role": "user", "content": "Hello?"}]
_PROMPTS: tuple[list[Any], ...] = (
    [{"prompt": "The film was"}, {"prompt": "Le café"}, {"prompt": "映画は"}],
    [{"text": "A post", "id": 3}, {"text": "Another"}],
    [{"prompt": _MESSAGES}, {"prompt": [*_MESSAGES, {"role": "assistant", "content": "Yes"}, *_MESSAGES]}],
    [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}],
)


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


_PREFERENCES: tuple[list[Any], ...] = (
    [
        {
            "prompt": "p",
            "response_1": "a",
            "response_2": "b",
            "p_first": 0.7,
            "source": "ai:m",
            "meta": {"k": [1, None]},
        },
        {"prompt": "q", "response_1": "c d", "response_2": "e", "p_first": 1, "extra": {"deep": [{"x": 2.5}]}},
    ],
    [
        {"prompt": "p", "chosen": "yes", "rejected": "no", "p_chosen": 0.8},
        {"prompt": "é", "chosen": "x", "rejected": "y"},
    ],
    [{"chosen": "It is a good film", "rejected": "It is a bad one"}, {"chosen": "one two", "rejected": "one three"}],
    [{"prompt": _MESSAGES, "chosen": _answer("Hi"), "rejected": _answer("No")}],
    [{"chosen": [*_MESSAGES, *_answer("Hi")], "rejected": [*_MESSAGES, *_answer("No")], "source": "human"}],
)


def _task_toml(folder: Path) -> Read:
    from rlaif_env.data.tasks import Task, load_task

    file = folder / "task.toml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        task = load_task(file)
        again = Task.from_json(json.loads(json.dumps(task.to_json(), allow_nan=False)))
        same(task, again, "a task as JSON")
        same("xy", again.judged("x", "y").replace("x", "", 0) if task.kind == "continuation" else "xy", "a judged text")
        with suppress(RLAIFError):
            if task.source.prompts is not None:
                again.prompts("train")
            elif task.source.jsonl is not None and folder.name in str(task.source.jsonl):
                again.prompts("train")

    return read


def _stored(folder: Path, data: bytes, stem: str, *, text: bool = False) -> Path:
    """The input as a file, by its checksum a plain one, a packed one, or one whose packing is damaged."""
    kind = zlib.crc32(data)
    suffix = ".txt" if text and kind % 5 == 0 else ".jsonl"
    packing = kind // 8 % 8
    if packing < 5:
        file = folder / f"{stem}{suffix}"
    else:
        file = folder / f"{stem}{suffix}.gz"
        packed = gzip.compress(data, compresslevel=1, mtime=0) if packing < 7 else data
        data = damaged(random.Random(kind), packed) if packing == 6 else packed
    file.write_bytes(data)
    return file


def _prompt_file(folder: Path) -> Read:
    from rlaif_env.data.jsonl import write_jsonl
    from rlaif_env.data.preferences import read_prompts

    def read(data: bytes) -> None:
        found = list(read_prompts(_stored(folder, data, "in", text=True), ("prompt", "text", "context")))
        write_jsonl(folder / "out.jsonl", [{"prompt": prompt} for prompt in found])
        same(found, list(read_prompts(folder / "out.jsonl")), "prompts written and read")

    return read


def _preference_file(folder: Path) -> Read:
    from rewards.labeling.pair_source import read_pairs
    from rlaif_env.data.preferences import export_trl, read_preferences, write_preferences

    def read(data: bytes) -> None:
        file = _stored(folder, data, "in")
        allowed = {"allow_identical": zlib.crc32(data) % 2 == 0, "allow_empty": True}
        try:
            found = list(read_preferences(file, **allowed))
        finally:
            with suppress(RLAIFError):
                for pair in read_pairs(file):
                    json.dumps(pair.meta, allow_nan=False)
        out = folder / "out.jsonl.gz"
        write_preferences(out, found)
        same(found, list(read_preferences(out, **allowed)), "preferences written and read")
        for conversational in (False, True):
            with suppress(RLAIFError):
                export_trl(found, folder / "trl.jsonl", conversational, skip_ties=True)

    return read


def _demonstrations(folder: Path) -> Read:
    from agents.sft import demonstrations

    def read(data: bytes) -> None:
        for row in demonstrations(_stored(folder, data, "in")):
            json.dumps(str(row)).encode()

    return read


# --- settings ---------------------------------------------------------------------------------------------------------

_PARTS = {"direct-llm": 0.5, "human": {"weight": 1.0, "reward": "human-rm", "model": "rm"}}
_KWARGS: tuple[Any, ...] = (
    {
        "reward": "direct-llm",
        "kwargs": {"scale": [1, 9], "shots": 2, "minimum_mass": 0.01, "template": "Rate {text}: "},
    },
    {"reward": "direct-llm", "kwargs": {"template": "{prompt} and {response}", "chat": False, "dtype": "float32"}},
    {"reward": "compose", "kwargs": {"parts": _PARTS}},
    {"reward": "human-rm", "kwargs": {"model": "rm", "base": "base", "standalone": False, "dtype": None}},
    {"reward": "endpoint", "kwargs": {"limits": {"timeout": 5, "retries": 2, "price_in": 0.1}, "extra": {"a": 1}}},
    {"reward": "endpoint", "kwargs": {"route": "chat", "revision": "1", "boundaries": "all", "progress": False}},
)


class Fair:
    """A language model to which all labels are equally likely."""

    name = "fair"

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> Any:
        """The same for every label, (n, k)."""
        import numpy as np

        return np.full((len(prompts), len(labels)), -math.log(len(labels)))

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        """Nothing, n times."""
        return ["" for _ in prompts]


def _reward_kwargs(folder: Path) -> Read:
    import numpy as np

    from rewards import make_reward
    from rewards.endpoint.model import EndpointLM
    from rlaif_env.api import checked_scores
    from rlaif_env.data.jsonl import json_object

    os.chdir(folder)  # names of files in an input stay here

    def read(data: bytes) -> None:
        try:
            row = json_object(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RLAIFError(str(error)) from error
        reward, kwargs = row.get("reward"), row.get("kwargs")
        if not isinstance(reward, str) or not isinstance(kwargs, dict):
            raise RLAIFError("no settings")
        if reward == "endpoint":
            if "cache" in kwargs or "url" in kwargs:
                raise RLAIFError("not to be tried")
            try:
                server = EndpointLM("http://127.0.0.1:9/v1", "m", cache=None, **kwargs)
            except TypeError as error:  # the model or the config twice
                raise RLAIFError(str(error)) from error
            server.close()
            return
        if "url" in kwargs:
            raise RLAIFError("not to be tried")
        if reward == "direct-llm":
            kwargs["model"] = Fair()
        if reward == "compose" and isinstance(kwargs.get("parts"), dict):
            parts = kwargs["parts"]
            if "direct-llm" in parts and not isinstance(parts["direct-llm"], dict):
                parts["direct-llm"] = [parts["direct-llm"], lambda prompts, responses: [1.0] * len(prompts)]
        made = make_reward(reward, **kwargs)
        values = checked_scores(made, ["p", "q"], ["r", "s"]).values
        same(True, bool(np.isfinite(values).all()), "finite rewards")

    return read


# --- files that a run leaves ------------------------------------------------------------------------------------------

_JOURNAL: tuple[list[Any], ...] = (
    [{"key": f"k{i}", "logprobs": [[-0.5, None]], "tokens": [20, 1]} for i in range(3)],
    [{"key": "r", "logprobs": [[-0.5, -1], [-2, -0.1]], "rationales": ["a", "é"], "tokens": [9, 30]}],
)
_METRICS: tuple[list[Any], ...] = (
    [{"step": i, "reward": 0.25 * i, "kl": 1e-3, "length": 12, "entropy": 2.5} for i in range(1, 5)],
    [],
)


def _journal(folder: Path) -> Read:
    from rewards.labeling.job import LabelConfig, LabelJob
    from rlaif_env.data.journal import Journal

    file = folder / "journal.jsonl"
    job = LabelJob(LabelConfig(), Fair())

    def read(data: bytes) -> None:
        file.write_bytes(data)
        with Journal(file, job.note) as journal:
            before = {key: journal[key] for key in journal}
            journal.append({"new": {"value": 1}})
        with Journal(file) as journal:
            after = {key: journal[key] for key in journal}
        same({"new": {"key": "new", "value": 1}} | before, after, "a journal's rows after one more")

    return read


def _metrics(folder: Path) -> Read:
    from rlaif_env.runs import read_metrics

    file = folder / "metrics.jsonl"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        rows = read_metrics(folder)
        file.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
        same(rows, read_metrics(file), "metrics written and read")
        for row in rows:
            same(True, all(math.isfinite(float(value)) for value in row.values()), "figures that can be drawn")

    return read


def _run_folder(folder: Path) -> Read:
    from rlaif_env.runs import RunFolder

    def read(data: bytes) -> None:
        run = folder / "run"
        run.mkdir(exist_ok=True)
        (run / "config.json").write_bytes(data)
        for name in ("metrics.jsonl", "samples.jsonl"):
            (run / name).write_bytes(data)
        with RunFolder.create(run, {"seed": 1, "task": "t"}, command="train", exist=True):
            kept = (run / "metrics.jsonl").read_bytes()
            same(data[: data.rfind(b"\n") + 1], kept, "whole lines")

    return read


_RUN = {"command": "train", "config": {"seed": 1, "task": "t"}, "started": "2025-01-01", "versions": {"python": "3.11"}}


def _archive(folder: Path) -> Read:
    from rlaif_env.models.assets import _copy_member

    archive, out = folder / "in.tar.gz", folder / "out"
    out.mkdir()

    def read(data: bytes) -> None:
        archive.write_bytes(data)
        target = out / "member.txt"
        target.unlink(missing_ok=True)
        try:
            _copy_member(archive, "thing-1.0/data.txt", target)
            same(True, target.is_file() and not target.is_symlink(), "a plain file")
        finally:
            same([], [p.name for p in out.iterdir() if p != target], "nothing beside the file asked for")
            same({"in.tar.gz", "out"}, {p.name for p in folder.iterdir()}, "nothing outside the folder")

    return read


_MANIFEST = {"original": "o.whl", "sha256": "0" * 64, "files": {"a.txt": {"bytes": 1, "sha256": "ca978112"}}}


def _manifest(folder: Path) -> Read:
    from rlaif_env.models import assets

    asset = assets._Asset("f", "r==1", "-", "o.whl", "0" * 64, 1, 1, lambda *paths: None)
    (folder / "a.txt").write_bytes(b"a")

    def read(data: bytes) -> None:
        (folder / "manifest.json").write_bytes(data)
        if damage := assets._damage(folder, asset):
            raise RLAIFError(damage)

    return read


FILE_READERS: dict[str, Reader] = {
    "task-toml": Reader(lambda rng: toml_input(rng, _TASKS), _task_toml),
    "prompts": Reader(lambda rng: lines_input(rng, _PROMPTS), _prompt_file),
    "preferences": Reader(lambda rng: lines_input(rng, _PREFERENCES), _preference_file),
    "demonstrations": Reader(lambda rng: lines_input(rng, ([{"prompt": "p", "response": "r"}],)), _demonstrations),
    "reward-kwargs": Reader(lambda rng: json_input(rng, _KWARGS), _reward_kwargs),
    "journal": Reader(lambda rng: lines_input(rng, _JOURNAL), _journal),
    "metrics": Reader(lambda rng: lines_input(rng, _METRICS), _metrics),
    "run-folder": Reader(lambda rng: json_input(rng, (_RUN,)), _run_folder),
    "archive": Reader(lambda rng: tar_input(rng, "thing-1.0/data.txt", b"some data\n" * 20), _archive),
    "manifest": Reader(lambda rng: json_input(rng, (_MANIFEST,)), _manifest),
}
"""Readers of files and settings, by name."""
