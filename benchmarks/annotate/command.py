"""The command ``rlaif annotate``: serve the page, write what people answered, or report on it.

config.json           what is judged and how it is given out
responses.jsonl       the sampled responses, if there are policies
annotations.sqlite    items, annotators and answers
report.json           the report
"""

from __future__ import annotations

import json
import math
import shlex
import socket
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.annotate.items import Item, checks_among, corpus_items, fingerprint, read_items
from benchmarks.annotate.project import Plan, StoreError
from benchmarks.annotate.report import report, show
from benchmarks.annotate.results import export, people_of, read_labels
from benchmarks.annotate.store import Store
from rewards.labeling.pair_source import prompts_of_file, respond
from rewards.language_model.choice import language_model_from
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import RLAIFError
from rlaif_env.data.jsonl import write_jsonl
from rlaif_env.data.tasks import Task, load_task
from rlaif_env.models import TEMPERATURE
from rlaif_env.records import write_json
from rlaif_env.runs import RunFolder

_DATABASE = "annotations.sqlite"
_CORPUS_PAIRS = 200


@dataclass(frozen=True)
class AnnotateConfig(Plan):
    """Collect people's preferences in the browser; go on with them, export them, report on them.

    Attributes:
        seed: Of all orders, draws and sampled responses.
        criterion: What makes a response better, told above the page; the task's if not given.
        out: The run folder. Given alone, it goes on with what is there.
        input: What to judge: a file of pairs in any preference form, a file with a response of each policy to each
            prompt (fields prompt, system, response), a comparison's folder, or, with policies, a file of prompts;
            for a file also Parquet, or a Hugging Face data set as owner/name:split.
        task: Says what makes a response better; without input, where pairs or prompts come from.
        split: Which split of the task, without input.
        policies: Models that respond to each prompt now: built-in names, folders or Hugging Face ids.
        temperature: Of those responses.
        pairs: At most so many items, drawn by the seed; with policies, so many prompts.
        annotators: Names to print a link for; nobody else may join then.
        host: Address to listen on. Off loopback the link carries a token.
        port: Port to listen on; 0 for any that is free.
        device: Device of the policies.
        export: Write what people answered to this file instead of serving.
        report: Report on what people answered instead of serving.
        labels: AI labels of the same pairs, files or folders of rlaif label, to set beside people in the report.
        exclude: Annotators to leave out of the export and the report.
    """

    out: Path | None = None
    input: Path | None = None
    task: str | None = None
    split: str = "train"
    policies: tuple[str, ...] = ()
    temperature: float = TEMPERATURE
    pairs: int | None = None
    annotators: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8765
    device: str | None = None
    export: Path | None = None
    report: bool = False
    labels: tuple[Path, ...] = ()
    exclude: tuple[str, ...] = ()


_PLAN = tuple(entry.name for entry in fields(Plan))
_PROJECT = (*_PLAN, "input", "task", "split", "policies", "temperature", "pairs")  # what an earlier run was begun with


def annotate(config: AnnotateConfig, console: Console) -> None:
    """Serve the page until Ctrl-C, or export or report.

    Raises:
        DataError: For all bad rows of the input together; nothing is written then.
        RunError: If the folder holds another run, or is being served.
        StoreError: If the database is another version's or another project's, or cannot be written.
        RLAIFError: If an option makes no sense or the port is in use.
    """
    if config.export is None and not config.report:
        _serve(config, console)
        return
    if config.out is None:
        raise RLAIFError("expected the folder of the annotations (--out), found none")
    with closing(Store(config.out / _DATABASE)) as store:
        people = people_of(store, config.exclude)
        if config.export is not None:
            written, left = export(store, people, config.export)
            rest = f"; {left} items without a judgement left out" if left else ""
            console.print(f"{written} items in {config.export}{rest}", highlight=False, soft_wrap=True)
        if config.report:
            result = report(store, people, read_labels(config.labels, people.items))
            write_json(config.out / "report.json", result)
            show(result, console)
            console.print(f"all figures: {config.out / 'report.json'}", highlight=False, soft_wrap=True)


def _serve(config: AnnotateConfig, console: Console) -> None:
    server = _server()
    project, make = _project(config, console)
    sock = server.listen(config.host, config.port)  # before anything is written
    created = partial(RunFolder.create, config.out, project, command="annotate", exist=True)
    with sock, created() as run, closing(make(run.path)) as store:
        _invite(store, config.annotators)
        token = None if server.is_loopback(config.host) else store.token
        app = server.application(store, host=config.host, token=token, joining=not config.annotators)
        _greet(config, run.path, store, sock.getsockname()[1], token, console)
        with suppress(KeyboardInterrupt):  # the way to end it
            server.serve(app, sock)
        _part(store, run.path, console)


def _server() -> Any:
    """The module `benchmarks.annotate.server`, whose packages are an extra."""
    try:
        from benchmarks.annotate import server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("starlette", "uvicorn", "anyio"):
            raise
        raise RLAIFError(
            f"expected the packages starlette and uvicorn to serve the page, found no {error.name}: "
            "pip install 'rlaif-env[annotate]'"
        ) from error
    return server


def _project(config: AnnotateConfig, console: Console) -> tuple[dict[str, Any], Callable[[Path], Store]]:
    """What config.json records, and how the store is made once the folder is there."""
    if config.pairs is not None and config.pairs < 1:
        raise RLAIFError(f"expected pairs from 1, found {config.pairs}")
    if config.input is None and config.task is None:
        return _earlier(config)
    task = None if config.task is None else load_task(config.task)
    config = replace(config, criterion=config.criterion or (task.criterion if task else ""))
    project = {name: getattr(config, name) for name in _PROJECT}
    items: list[Item] = []
    if not config.policies:
        if config.input is not None:
            items, repeated = read_items(config.input, config.form, config.pairs, config.seed)
        elif task is not None:
            items, repeated = corpus_items(task, config.form, config.split, config.pairs or _CORPUS_PAIRS, config.seed)
        if repeated:
            console.print(f"{repeated} repeated items are asked once", highlight=False)
        project["items"] = fingerprint(items)
    elif task is None:
        raise RLAIFError("expected a task (--task) that says how long responses of the policies may be, found none")

    def make(folder: Path) -> Store:
        asked = _sampled(config, task, folder) if task and config.policies else items
        if not any(item.kind == "item" for item in asked):
            raise RLAIFError("expected something to judge, found only pairs of equal responses")
        count = math.ceil(config.checks * len(asked)) + 1 if config.checks else 0
        everything = [*asked, *checks_among(asked, config.form, count, config.seed)]
        return Store.create(folder / _DATABASE, everything, Plan(**{name: getattr(config, name) for name in _PLAN}))

    return project, make


def _earlier(config: AnnotateConfig) -> tuple[dict[str, Any], Callable[[Path], Store]]:
    """Going on with a folder that is there."""
    if config.out is None or not (config.out / "config.json").is_file():
        raise RLAIFError(
            "expected something to judge (--input, or --task for the pairs it brings along), or a folder to go on with "
            f"(--out), found {'none' if config.out is None else f'no earlier run in {config.out}'}"
        )
    Store(config.out / _DATABASE).close()
    try:
        begun = json.loads((config.out / "config.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RLAIFError(f"expected {config.out / 'config.json'} to be a run's configuration: {error}") from error
    given = [name for name in _PROJECT if getattr(config, name) != getattr(AnnotateConfig(), name)]
    if changed := [name for name in given if getattr(config, name) != begun.get(name)]:
        raise RLAIFError(
            f"expected to go on with {config.out} as it was begun, found another {', '.join(changed)}: name another "
            "folder (--out) for that"
        )
    return begun, lambda folder: Store(folder / _DATABASE, write=True)


def _sampled(config: AnnotateConfig, task: Task, folder: Path) -> list[Item]:
    """Items of responses that the policies give now; those of an earlier start of the same run are taken."""
    if len(set(config.policies)) < len(config.policies):
        raise RLAIFError(f"expected different policies, found {', '.join(config.policies)}")
    file = folder / "responses.jsonl"
    if not file.exists():
        source = task.prompts(config.split) if config.input is None else prompts_of_file(config.input)
        prompts = list(dict.fromkeys(source))[: config.pairs or _CORPUS_PAIRS]
        rows = []
        for place, name in enumerate(config.policies):
            policy = language_model_from(LanguageModelConfig(name, device=config.device))
            seed = config.seed * len(config.policies) + place
            texts = respond(policy, task, prompts, temperature=config.temperature, seed=seed)
            rows += [{"prompt": p, "system": name, "response": t} for p, t in zip(prompts, texts, strict=True)]
        write_jsonl(file, rows)
    return read_items(file, config.form, None, config.seed)[0]


def _invite(store: Store, names: Sequence[str]) -> None:
    """Take in the annotators named, those who are there already aside; two with one name are an error."""
    there = {one.name for one in store.annotators()}
    for at, name in enumerate(names):
        if name in names[:at]:
            raise StoreError(f"expected annotators of different names, found {name!r} twice", 409)
        if name not in there:
            store.join(name)


def _greet(config: AnnotateConfig, folder: Path, store: Store, port: int, token: str | None, console: Console) -> None:
    host = socket.gethostname() if config.host in ("0.0.0.0", "::") else config.host
    link = f"http://{f'[{host}]' if ':' in host else host}:{port}/" + (f"?token={token}" if token else "")
    items = sum(item.kind == "item" for item in store.items().values())
    judges = f"{store.plan.overlap} annotators" if store.plan.overlap else "everybody"
    lines = [f"{items} items in {folder}, each for {judges} to judge"]
    lines += [] if config.annotators else [f"open {link}"]
    lines += [f"  {one.name}: {link}#k={one.key}" for one in store.annotators()]
    lines += ["every answer is on the disk before the page moves on; Ctrl-C ends, and the same command goes on"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _part(store: Store, folder: Path, console: Console) -> None:
    answers = len(store.judgements())
    command = f"rlaif annotate --out {shlex.quote(str(folder))}"
    lines = [
        f"{answers} answers of {len(store.annotators())} annotators are kept in {folder}",
        f"  go on:   {command}",
        f"  export:  {command} --export preferences.jsonl",
        f"  report:  {command} --report",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif annotate``; returns the exit code."""
    import tyro

    annotate(tyro.cli(AnnotateConfig, args=argv, prog="rlaif annotate"), Console())
    return 0
