"""The command ``rlaif task``: a task of the user's own, written from data and looked at before it is used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from rewards.language_model.config import LanguageModelConfig
from rewards.task.draft import draft, write_draft
from rewards.task.inspection import inspect_task, rendered, splits_table
from rlaif_env.models import BUILTIN_MODEL
from rlaif_env.tables import printable

_SHOWN = 1_500  # characters of a rendered prompt


@dataclass(frozen=True)
class NewConfig:
    """Write the TOML file of a task from a data file, every key explained.

    Attributes:
        data: Prompts, preferences (TRL's and HH's forms, or our own) or demonstrations: JSON lines, Parquet, or a .txt
            file with one prompt a line; .gz too.
        out: The file to write.
        kind: What a response is to its prompt; guessed from the data where not given.
        name: The task's name; by default that of the data file. A built-in name (helpful, harmless, summarization,
            movie-review) brings that task's kind, criterion and wordings.
        criterion: What makes a response better, such as "how helpful the response is"; else to be filled in.
        field: The field that holds the prompt, where it is none of prompt, text and context.
        model: The policy, whose tokenizer measures the lengths.
    """

    data: Annotated[Path, tyro.conf.Positional]
    out: Path = Path("task.toml")
    kind: Literal["continuation", "summary", "dialogue"] | None = None
    name: str | None = None
    criterion: str = ""
    field: str | None = None
    model: str = BUILTIN_MODEL


@dataclass(frozen=True)
class CheckConfig:
    """Look at a task before it is used: splits, lengths, what models read, what is judged, and every problem.

    Attributes:
        task: A TOML file, or a built-in task's name.
        model: The policy.
        labeler: The language model that is to score or label.
    """

    task: Annotated[str, tyro.conf.Positional]
    model: str = BUILTIN_MODEL
    labeler: LanguageModelConfig = field(default_factory=LanguageModelConfig)


def new(config: NewConfig, console: Console) -> int:
    """Write the file and say what is in it; returns the exit code.

    Raises:
        RLAIFError: If the data cannot be used, or there is a file already.
    """
    settings = {name: value for name, value in vars(config).items() if name not in ("data", "out")}
    text, said = draft(config.data, config.out, **settings)
    write_draft(text, config.out)
    fill = "" if 'criterion = ""' not in text else "fill in its criterion, then "
    console.print(f"{config.out}: {said}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"next: {fill}rlaif task check {config.out}", highlight=False, markup=False, soft_wrap=True)
    return 0


def check(config: CheckConfig, console: Console) -> int:
    """Show a task; returns the exit code, 1 if it cannot be used.

    Raises:
        RLAIFError: If the task cannot be read at all, or a model is unknown.
    """
    found = inspect_task(config.task, config.model, config.labeler)
    task = found.task
    console.print(
        Text(f"task {task.name}: {task.kind}, better by {task.criterion!r}, gold measure {task.gold or 'none'}")
    )
    console.print(splits_table(found).rich())
    for title, text in (rendered(found) if found.splits else {}).items():
        cut = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}\n[...]\n{text[-_SHOWN // 2 :]}"
        console.print(Panel(Text(printable(cut)), title=Text(title), title_align="left"))
    for title, lines in {"to know": found.notes, "problems": found.problems}.items():
        if lines:
            console.print(Text(f"{title}:"))
        for number, line in enumerate(lines, start=1):
            console.print(Text(printable(f"  {number}. {line}")), soft_wrap=True)
    if found.problems:
        return 1
    console.print(f"no problems: rlaif train --task {config.task}", highlight=False, markup=False, soft_wrap=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif task``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["new"]:
        return new(tyro.cli(NewConfig, args=arguments[1:], prog="rlaif task new"), Console())
    if arguments[:1] == ["check"]:
        return check(tyro.cli(CheckConfig, args=arguments[1:], prog="rlaif task check"), Console())
    print("usage: rlaif task new DATA [OPTIONS]\n       rlaif task check TASK [OPTIONS]\n")
    print("Write the TOML file of a task of your own from a data file, or look at a task; each has --help.")
    return 0 if arguments and arguments[0] in ("-h", "--help") else 2
