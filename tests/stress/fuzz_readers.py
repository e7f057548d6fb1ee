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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_env.api import RLAIFError, checked_scores
from rlaif_env.data import preferences
from rlaif_env.data.journal import Journal
from rlaif_env.data.jsonl import json_object, write_jsonl
from rlaif_env.data.tasks import Task, load_task
from rlaif_env.models import fetching
from rlaif_env.records import read_metrics
from rlaif_env.runs import RunFolder
from tests.stress.fuzz_inputs import damaged, json_input, lines_input, tar_input, toml_input

__all__ = ["FILE_READERS", "Fair", "Lost", "Read", "Reader", "at_once", "same"]

Read = Callable[[bytes], None]


class Lost(AssertionError):
    """An input was accepted and something of it was lost or changed."""


@dataclass(frozen=True)
class Reader:
    """One reader: ``inputs`` draws one input; ``make``, given a folder of its own, returns what reads an input."""

    inputs: Callable[[random.Random], bytes]
    make: Callable[[Path], Read]


def at_once(read: Callable[[Path, bytes], None]) -> Callable[[Path], Read]:
    """The ``make`` of a reader that has nothing to prepare."""
    return lambda folder: partial(read, folder)


def same(expected: object, found: object, what: str) -> None:
    """Hold two values to be equal.

    Raises:
        Lost: If they are not.
    """
    if expected != found:
        raise Lost(f"{what}: expected {expected!r:.300}, found {found!r:.300}")


# --- tasks, prompts, preferences --------------------------------------------------------------------------------------

_WORDS = {"name": "haiku", "kind": "continuation", "criterion": "how well the poem keeps to one image"}
_TASK: dict[str, Any] = {**_WORDS, "max_prompt_tokens": 32, "max_response_tokens": 32}
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


_PAIR = {
    "prompt": "p",
    "response_1": "a",
    "response_2": "b",
    "p_first": 0.7,
    "source": "ai:m",
    "meta": {"k": [1, None]},
}
_OTHER = {"prompt": "q", "response_1": "c d", "response_2": "e", "p_first": 1, "extra": {"deep": [{"x": 2.5}]}}
_CHOSEN, _REJECTED = ([{"role": "assistant", "content": text}] for text in ("Hi", "No"))
_PREFERENCES: tuple[list[Any], ...] = (
    [_PAIR, _OTHER],
    [dict(prompt="p", chosen="yes", rejected="no", p_chosen=0.8), dict(prompt="é", chosen="x", rejected="y")],
    [{"chosen": "It is a good film", "rejected": "It is a bad one"}, {"chosen": "one two", "rejected": "one three"}],
    [{"prompt": _MESSAGES, "chosen": _CHOSEN, "rejected": _REJECTED}],
    [{"chosen": [*_MESSAGES, *_CHOSEN], "rejected": [*_MESSAGES, *_REJECTED], "source": "human"}],
)


def _task_toml(folder: Path, data: bytes) -> None:
    file = folder / "task.toml"
    file.write_bytes(data)
    task = load_task(file)
    again = Task.from_json(json.loads(json.dumps(task.to_json(), allow_nan=False)))
    same(task, again, "a task as JSON")
    if task.kind == "continuation":
        same("xy", again.judged("x", "y"), "a judged text")
    if task.source.prompts is not None or folder.name in str(task.source.jsonl):
        with suppress(RLAIFError):
            again.prompts("train")


def _stored(folder: Path, data: bytes, *, text: bool = False) -> Path:
    """The input as a file, by its checksum a plain one, a packed one, or one whose packing is damaged."""
    kind = zlib.crc32(data)
    packing = kind // 8 % 8
    if packing in (5, 6):
        data = gzip.compress(data, compresslevel=1, mtime=0)
    if packing == 6:
        data = damaged(random.Random(kind), data)
    file = folder / ("in" + (".txt" if text and kind % 5 == 0 else ".jsonl") + (".gz" if packing >= 5 else ""))
    file.write_bytes(data)
    return file


def _prompt_file(folder: Path, data: bytes) -> None:
    prompts = list(preferences.read_prompts(_stored(folder, data, text=True), ("prompt", "text", "context")))
    write_jsonl(folder / "out.jsonl", [{"prompt": prompt} for prompt in prompts])
    same(prompts, list(preferences.read_prompts(folder / "out.jsonl")), "prompts written and read")


def _preference_file(folder: Path, data: bytes) -> None:
    from rewards.labeling.pair_source import read_pairs

    file, out = _stored(folder, data), folder / "out.jsonl.gz"
    allowed = {"allow_identical": zlib.crc32(data) % 2 == 0, "allow_empty": True}
    try:
        records = list(preferences.read_preferences(file, **allowed))
    finally:
        with suppress(RLAIFError):
            for pair in read_pairs(file):
                json.dumps(pair.meta, allow_nan=False)
    preferences.write_preferences(out, records)
    same(records, list(preferences.read_preferences(out, **allowed)), "preferences written and read")
    for conversational in (False, True):
        with suppress(RLAIFError):
            preferences.export_trl(records, folder / "trl.jsonl", conversational, skip_ties=True)


def _demonstrations(folder: Path, data: bytes) -> None:
    from agents.sft import demonstrations

    for row in demonstrations(_stored(folder, data)):
        json.dumps(str(row)).encode()


# --- settings ---------------------------------------------------------------------------------------------------------

_PARTS = {"direct-llm": 0.5, "human": {"weight": 1.0, "reward": "human-rm", "model": "rm"}}
_SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("direct-llm", {"scale": [1, 9], "shots": 2, "minimum_mass": 0.01, "template": "Rate {text}: "}),
    ("direct-llm", {"template": "{prompt} and {response}", "chat": False, "dtype": "float32"}),
    ("compose", {"parts": _PARTS}),
    ("human-rm", {"model": "rm", "base": "base", "standalone": False, "dtype": None}),
    ("endpoint", {"limits": {"timeout": 5, "retries": 2, "price_in": 0.1}, "extra": {"a": 1}}),
    ("endpoint", {"route": "chat", "revision": "1", "boundaries": "all", "progress": False}),
)
_KWARGS = tuple({"reward": reward, "kwargs": kwargs} for reward, kwargs in _SETTINGS)


class Fair:
    """A language model to which all labels are equally likely."""

    name = "fair"

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> Any:
        """The same for every label, (n, k)."""
        return np.full((len(prompts), len(labels)), -math.log(len(labels)))

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        """Nothing, n times."""
        return ["" for _ in prompts]


def _reward_kwargs(folder: Path) -> Read:
    os.chdir(folder)  # names of files in an input stay here
    return _made_reward


def _made_reward(data: bytes) -> None:
    from rewards import make_reward
    from rewards.endpoint.model import EndpointLM

    try:
        row = json_object(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RLAIFError(str(error)) from error
    reward, kwargs = row.get("reward"), row.get("kwargs")
    if not isinstance(reward, str) or not isinstance(kwargs, dict):
        raise RLAIFError("no settings")
    if {"cache", "url"} & set(kwargs):
        raise RLAIFError("not to be tried")
    if reward == "endpoint":
        try:
            server = EndpointLM("http://127.0.0.1:9/v1", "m", cache=None, **kwargs)
        except TypeError as error:  # what `language_model_from` makes of it
            raise RLAIFError(str(error)) from error
        server.close()
        return
    if reward == "direct-llm":
        kwargs["model"] = Fair()
    if reward == "compose" and isinstance(kwargs.get("parts"), dict):
        parts = kwargs["parts"]
        if "direct-llm" in parts and not isinstance(parts["direct-llm"], dict):
            parts["direct-llm"] = [parts["direct-llm"], lambda prompts, responses: [1.0] * len(prompts)]
    values = checked_scores(make_reward(reward, **kwargs), ["p", "q"], ["r", "s"]).values
    same(True, bool(np.isfinite(values).all()), "finite rewards")


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
    from rewards.labeling.config import LabelConfig
    from rewards.labeling.job import LabelJob

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


def _metrics(folder: Path, data: bytes) -> None:
    file = folder / "metrics.jsonl"
    file.write_bytes(data)
    rows = read_metrics(folder)
    file.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    same(rows, read_metrics(file), "metrics written and read")
    same(True, all(math.isfinite(float(v)) for row in rows for v in row.values()), "figures that can be drawn")


def _run_folder(folder: Path, data: bytes) -> None:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    for name in ("config.json", "metrics.jsonl", "samples.jsonl"):
        (run / name).write_bytes(data)
    with RunFolder.create(run, {"seed": 1, "task": "t"}, command="train", exist=True):
        same(data[: data.rfind(b"\n") + 1], (run / "metrics.jsonl").read_bytes(), "whole lines")


_RUN = {"command": "train", "config": {"seed": 1, "task": "t"}, "started": "2025-01-01", "versions": {"python": "3.11"}}


def _archive(folder: Path, data: bytes) -> None:
    archive, out = folder / "in.tar.gz", folder / "out"
    out.mkdir(exist_ok=True)
    archive.write_bytes(data)
    target = out / "member.txt"
    target.unlink(missing_ok=True)
    try:
        fetching.copy_tar_member(archive, "thing-1.0/data.txt", target)
        same(True, target.is_file() and not target.is_symlink(), "a plain file")
    finally:
        same([], [p.name for p in out.iterdir() if p != target], "nothing beside the file asked for")
        same({"in.tar.gz", "out"}, {p.name for p in folder.iterdir()}, "nothing outside the folder")


_MANIFEST = {"original": "o.whl", "sha256": "0" * 64, "files": {"a.txt": {"bytes": 1, "sha256": "ca978112"}}}


def _manifest(folder: Path, data: bytes) -> None:
    asset = fetching.Asset("f", (fetching.Original("r==1", "o.whl", "0" * 64, 1),), "-", 1, lambda *paths: None)
    (folder / "a.txt").write_bytes(b"a")
    (folder / "manifest.json").write_bytes(data)
    if damage := fetching.damage(folder, asset):
        raise RLAIFError(damage)


FILE_READERS: dict[str, Reader] = {
    "task-toml": Reader(lambda rng: toml_input(rng, _TASKS), at_once(_task_toml)),
    "prompts": Reader(lambda rng: lines_input(rng, _PROMPTS), at_once(_prompt_file)),
    "preferences": Reader(lambda rng: lines_input(rng, _PREFERENCES), at_once(_preference_file)),
    "demonstrations": Reader(
        lambda rng: lines_input(rng, ([{"prompt": "p", "response": "r"}],)), at_once(_demonstrations)
    ),
    "reward-kwargs": Reader(lambda rng: json_input(rng, _KWARGS), _reward_kwargs),
    "journal": Reader(lambda rng: lines_input(rng, _JOURNAL), _journal),
    "metrics": Reader(lambda rng: lines_input(rng, _METRICS), at_once(_metrics)),
    "run-folder": Reader(lambda rng: json_input(rng, (_RUN,)), at_once(_run_folder)),
    "archive": Reader(lambda rng: tar_input(rng, "thing-1.0/data.txt", b"some data\n" * 20), at_once(_archive)),
    "manifest": Reader(lambda rng: json_input(rng, (_MANIFEST,)), at_once(_manifest)),
}
"""Readers of files and settings, by name."""
