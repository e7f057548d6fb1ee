"""A task's TOML file from a data file: the kind guessed from its form, the lengths measured, every key explained."""

from __future__ import annotations

import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from rewards.task.lengths import context_length, prompt_core
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.data.forms import holds_responses, prompt_of
from rlaif_env.data.preferences import read_preferences, read_prompts
from rlaif_env.data.rows import first_row, parsed
from rlaif_env.data.tasks import FIELDS, PromptSource, Task, list_tasks, load_task
from rlaif_env.models import encode, load_tokenizer
from rlaif_env.tables import count_of

_ANSWERS = ("response", "completion", "summary")  # of demonstrations
_LONG = 60  # words; a text so long is there to be summed up, not to be gone on with
_USUAL = {"continuation": 32, "summary": 128, "dialogue": 128}  # T where the file holds no responses
_EXAMPLES = {
    "gold": "vader",
    "corpus": "movie-review",
    "jsonl": "prompts.jsonl",
    "dataset": "owner/name",
    "prompts": ["...", "..."],
    "field": "question",
    "preferences": "pairs.jsonl",
    "dataset_config": "default",
    "dataset_revision": "main",
}
_SPLITS = """
# Files of your own for the splits, in place of jsonl above (they can be named for preferences and prompts, too):
# [source.jsonl]
# train = "train.jsonl"
# test = "test.jsonl"
# The splits of a Hugging Face data set, in place of its "train", divided:
# [source.dataset_splits]
# train = "train"
# test = "test"
"""


@dataclass
class Sample:
    """What is in a data file."""

    what: str  # "prompts", "preferences" or "demonstrations"
    prompt_field: str | None  # where the prompt is; None in preferences and text files
    rows: int = 0
    prompts: dict[str, None] = field(default_factory=dict)  # distinct, in their order
    responses: list[str] = field(default_factory=list)
    empty: int = 0  # preferences with an empty response
    identical: int = 0  # preferences between equal ones


def sample_of(path: Path, name: str | None = None) -> Sample:
    """Read a data file: JSON lines, Parquet or one prompt a line, ``.gz`` too.

    Args:
        path: The file.
        name: The field that holds the prompt, where it is none of the usual ones.

    Raises:
        DataError: For all its bad rows together, or where it holds no prompt.
    """
    if path.name.removesuffix(".gz").endswith(".txt"):
        found = Sample("prompts", None)
        rows: Iterator[tuple[str, tuple[str, ...]]] = ((prompt, ()) for prompt in read_prompts(path))
    elif holds_responses(first_row(path) or {}):
        found = Sample("preferences", None)
        pairs = read_preferences(path, allow_identical=True, allow_empty=True)
        rows = ((pair.prompt, (pair.response_1, pair.response_2)) for pair in pairs)
    else:
        given = set(first_row(path) or {})
        found = Sample("demonstrations" if given & {*_ANSWERS} else "prompts", name or _field(path, given))
        rows = parsed(path, lambda row: _demonstration(row, str(found.prompt_field)), "prompt")
    for prompt, responses in rows:
        found.rows += 1
        found.prompts[prompt] = None
        found.responses += responses
        found.empty += not all(text.strip() for text in responses)
        found.identical += len(responses) == 2 and len({*responses}) == 1
    found.prompts.pop("", None)  # of pairs of whole texts
    if not found.prompts:
        raise DataError(f"{path}: expected prompts, found {found.what} without one; give a file with prompts")
    return found


def _field(path: Path, given: set[str]) -> str:
    usual = [name for name in ("prompt", "text", "context") if name in given]
    others = sorted(given - {*_ANSWERS, "meta", "source", "id"})
    if not given:
        return "prompt"  # no row at all, or a first one that is none: reading the file says which
    if not usual and len(others) != 1:
        raise DataError(
            f"{path}: expected a field prompt, text or context, found {', '.join(others)}; give --field NAME"
        )
    return (usual or others)[0]


def _demonstration(row: Mapping[str, Any], name: str) -> tuple[str, tuple[str, ...]]:
    return prompt_of(row, (name,)), tuple(row[key] for key in _ANSWERS if isinstance(row.get(key), str))[:1]


def guessed_kind(found: Sample) -> tuple[str, str]:
    """The kind of a task that a data file is made for, and what tells it."""
    prompts = [prompt.rstrip() for prompt in found.prompts]

    def most(test: re.Pattern[str]) -> bool:
        return 2 * sum(test.search(prompt) is not None for prompt in prompts) > len(prompts)

    if most(re.compile(r"\n\nAssistant:$")):
        return "dialogue", "the prompts are conversations"
    if most(re.compile(r"TL;DR:?$", re.I)):
        return "summary", "the prompts end in TL;DR"
    if found.prompt_field == "text" and 2 * sum(len(prompt.split()) >= _LONG for prompt in prompts) > len(prompts):
        return "summary", "the texts are long"
    if found.prompt_field == "context" or most(re.compile(r"[.?!:]['\")\]]*$")):
        return "dialogue", "the prompts are whole sentences, said to an assistant"
    return "continuation", "the prompts break off, for the response to go on with"


def draft(
    data: Path,
    out: Path,
    *,
    model: str,
    kind: str | None = None,
    name: str | None = None,
    criterion: str = "",
    field: str | None = None,
) -> tuple[str, str]:
    """The text of a task's TOML file, and in words what it says.

    Args:
        data: The data file.
        out: Where the TOML file will be; the path of the data is relative to it.
        model: The policy, whose tokenizer measures lengths.
        kind: The task's kind; None guesses it.
        name: Its name; by default that of the data file. A built-in name brings that task's criterion and wordings.
        criterion: What makes a response better; where it is "" the user has to fill it in.
        field: The field that holds the prompt.

    Raises:
        DataError: If the data cannot be used.
        RLAIFError: If there is no such kind or model.
    """
    found = sample_of(data, field)
    name = name or re.sub(r"\.(jsonl|json|txt|parquet)(\.gz)?$", "", data.name)
    like = load_task(name) if name in list_tasks() else None
    guess, why = guessed_kind(found)
    if like or kind:
        guess, why = (like.kind, f"that of {name!r}") if like else (str(kind), "as asked for")
    longest_response = _USUAL[guess]
    context = context_length(model)
    measured = "no responses in the data: a usual length"
    if found.responses:
        lengths = np.array([len(row) + 1 for row in encode(load_tokenizer(model), found.responses)])  # its end too
        longest_response, measured = int(np.quantile(lengths, 0.95)), f"responses in the data: {_described(lengths)}"
    if context is not None:
        longest_response = min(longest_response, context // 2)
    values: dict[str, Any] = {"name": name, "kind": guess, "criterion": criterion or (like.criterion if like else "")}
    source = PromptSource(prompts={"train": tuple(found.prompts)})
    prompts = Task(name, guess, "how good it is", 1, longest_response, source)  # type: ignore[arg-type]
    lengths = prompt_core(prompts, model, "train").prompt_lengths
    room = max(1, (context or 10**7) - longest_response)
    longest_prompt = min(-(-int(lengths.max()) // 8) * 8, room)  # the next multiple of 8, for prompts to come
    values |= {"max_prompt_tokens": longest_prompt, "max_response_tokens": longest_response}
    notes = {
        "kind": f"chosen here because: {why}",
        "criterion": "" if values["criterion"] else "TO FILL IN, such as: how helpful and honest the response is",
        "max_prompt_tokens": f"prompts in the data: {_described(lengths)} under {model}",
        "max_response_tokens": measured,
    }
    if (cut := int((lengths > room).sum())) > 0:
        values["truncate_prompts"] = True
        notes["truncate_prompts"] = f"{cut} prompts are longer than the context of {model} leaves room for"
    if like:
        values["scale"] = list(like.scale)
    settings: dict[str, Any] = {"jsonl": Path(os.path.relpath(data, out.absolute().parent)).as_posix()}
    if found.prompt_field and found.prompt_field not in FIELDS[guess]:
        settings["field"] = found.prompt_field
    for key, count in {"allow_identical": found.identical, "allow_empty": found.empty}.items():
        if count:
            settings[key], notes[key] = True, f"{count_of(count, 'pair')} in the data"
    text = "\n".join(
        [
            *_wrapped(f"A task for rlaif, of {data.name}; `rlaif task check {out.name}` looks at it. docs/tasks.md."),
            *_keys(Task, values, notes, without=("source",)),
            "",
            *_wrapped("Where prompts and preferences come from: one of corpus, jsonl, dataset and prompts."),
            "[source]",
            *_keys(PromptSource, settings, notes, without=("dataset_splits",)),
        ]
    )
    said = (
        f"{count_of(found.rows, 'row')} of {found.what}, {count_of(len(found.prompts), 'distinct prompt')}; "
        f"kind {guess} ({why}); at most "
        f"{values['max_prompt_tokens']} tokens a prompt, {values['max_response_tokens']} a response"
    )
    return text + "\n" + _SPLITS, said


def _described(lengths: Any) -> str:
    median, most = (int(np.quantile(lengths, share)) for share in (0.5, 0.95))
    return f"half have at most {median} tokens, 95 % {most}, the longest {int(lengths.max())}"


def _keys(
    kind: type[Any], values: Mapping[str, Any], notes: Mapping[str, str], without: tuple[str, ...]
) -> Iterator[str]:
    """The lines of all keys of a table, each behind what it means; those without a value as comments."""
    meanings = _attributes(kind)
    for entry in fields(kind):
        if entry.name in without:
            continue
        yield ""
        note = notes.get(entry.name, "")
        yield from _wrapped(meanings[entry.name] + (f" ({note})" if note else ""))
        example = _EXAMPLES.get(entry.name, None if entry.default is MISSING else entry.default)
        value = values.get(entry.name, "..." if example is None else example)
        yield f"{'' if entry.name in values else '# '}{entry.name} = {json.dumps(value, ensure_ascii=False)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")


def _attributes(kind: type[Any]) -> dict[str, str]:
    """What the docstring of a class says of each attribute, without markup."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.M)
    return {name: " ".join(text.split()).replace("`", "") for name, text in found}


def write_draft(text: str, out: Path) -> None:
    """Write a new TOML file.

    Raises:
        RLAIFError: If there is one already, or it cannot be written.
    """
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RLAIFError(f"expected no file at {out} yet, found one; give another --out, or remove it") from error
    except OSError as error:
        raise RLAIFError(f"expected a file to write at {out}, found: {error.strerror}") from error
