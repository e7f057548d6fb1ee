"""A task looked at before it is used: splits, lengths, what models read, and all that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rewards.labeling.pairwise_prompts import pair_wording, pairwise_prompt
from rewards.language_model.config import LanguageModelConfig
from rewards.prompts import score_prompt
from rewards.task.lengths import context_length, prompt_core
from rlaif_env.api import DataError, Preference, RLAIFError
from rlaif_env.data.forms import holds_responses
from rlaif_env.data.rows import first_row
from rlaif_env.data.tasks import SPLITS, Task, list_tasks, load_task, read_toml
from rlaif_env.envs.core import Core, shown
from rlaif_env.models import encode, load_tokenizer
from rlaif_env.tables import Table, count_of

_WITHOUT = {
    "validation": "`rlaif train --validate-every` cannot be used",
    "test": "`rlaif train` needs --eval-prompts 0, and `rlaif evaluate` another --split",
    "gold": "`rlaif compare` judges without a gold reward model",
}
_FEW = 20  # held-out prompts below which an interval says little


@dataclass
class Inspection:
    """What was found."""

    task: Task
    problems: list[str] = field(default_factory=list)  # why it cannot be used
    notes: list[str] = field(default_factory=list)  # what else to know
    splits: dict[str, Core] = field(default_factory=dict)  # those with prompts, of which none is cut
    pairs: dict[str, int] = field(default_factory=dict)  # how many preferences a split has
    pair: Preference | None = None  # the first of them


def inspect_task(name: str, model: str, labeler: LanguageModelConfig) -> Inspection:
    """Look at a task.

    Args:
        name: A built-in task or a TOML file.
        model: The policy.
        labeler: The language model that is to score or label.

    Raises:
        RLAIFError: If the task cannot be read at all, or a model is unknown.
    """
    found = _opened(name)
    for split in SPLITS:
        _read_split(found, split, model)
    _compare_splits(found)
    if found.splits:
        _check_lengths(found, context_length(model), model)
        _check_questions(found, labeler)
    built_in = load_task(found.task.name) if found.task.name in list_tasks() else None
    if built_in and built_in.criterion != found.task.criterion:
        found.notes.append(
            f"the name {built_in.name!r} brings its own wording, which asks for {built_in.criterion!r}: the criterion "
            "is shown to people only; give the task another name to have language models asked for it"
        )
    for group in (found.problems, found.notes):
        group[:] = dict.fromkeys(group)  # what is wrong with a file is wrong for every split
    return found


def _opened(name: str) -> Inspection:
    """The task; where only its criterion is still to be filled in, that is a problem beside others."""
    try:
        return Inspection(load_task(name))
    except RLAIFError as error:
        if "expected criterion of a task to be text" not in str(error):
            raise
        task = read_toml(Path(name), criterion="[the criterion]")
        return Inspection(task, [f"{error}; fill it in: what makes a response better, to complete 'rate ...'"])


def _read_split(found: Inspection, split: str, model: str) -> None:
    task = found.task
    try:
        task.prompts(split)
        found.splits[split] = prompt_core(task, model, split)
    except RLAIFError as error:
        if split == "train" or isinstance(error, DataError):
            found.problems.append(str(error))
        elif str(error) not in found.problems:
            found.notes.append(f"{error}. Without any, {_WITHOUT[split]}")
    try:
        for pair in task.preferences(split) if _has_preferences(task) else ():
            found.pair = found.pair or pair
            found.pairs[split] = found.pairs.get(split, 0) + 1
    except DataError as error:
        found.problems.append(str(error))
    except RLAIFError:  # no file for the split, which is said above
        pass


def _has_preferences(task: Task) -> bool:
    """Whether a task's data are preferences, told from the first row; those of a data set are not looked at."""
    files = task.source.preferences or task.source.jsonl
    some = next(iter(files.values()), None) if isinstance(files, Mapping) else files
    return task.source.corpus is not None or (some is not None and holds_responses(first_row(some) or {}))


def _compare_splits(found: Inspection) -> None:
    train = set(found.splits["train"].prompts) if "train" in found.splits else set()
    for split, core in found.splits.items():
        if split != "train" and (shared := train & set(core.prompts)):
            found.notes.append(f"{len(shared)} prompts of {split!r} are in 'train' too, such as {shown(min(shared))}")
    if 0 < (count := len(set(found.splits["test"].prompts)) if "test" in found.splits else 0) < _FEW:
        found.notes.append(
            f"{count_of(count, 'distinct prompt')} in 'test': intervals over so few are wide, under 5 there are none; "
            "give more"
        )


def _check_lengths(found: Inspection, context: int | None, model: str) -> None:
    task = found.task
    P, T = task.max_prompt_tokens, task.max_response_tokens
    lengths = {split: core.prompt_lengths for split, core in found.splits.items()}
    cut = {split: np.minimum(counts, P) if task.truncate_prompts else counts for split, counts in lengths.items()}
    if context is not None and (text := _over(found, cut, context - T)):
        found.problems.append(
            f"expected prompts of at most {context - T} tokens, which {model} reads beside a response of {T} in its "
            f"context of {context}, found {text}; set truncate_prompts = true with max_prompt_tokens = {context - T}, "
            "or take a model that reads more"
        )
    if text := _over(found, lengths, P):
        if task.truncate_prompts:
            found.notes.append(f"of prompts of more than {P} tokens the policy reads the last {P}: {text}")
        else:
            found.problems.append(
                f"expected prompts of at most {P} tokens, found {text}; raise max_prompt_tokens, or set "
                "truncate_prompts = true"
            )


def _over(found: Inspection, lengths: Mapping[str, NDArray[np.int64]], most: int) -> str:
    """How many prompts have more than so many tokens, and which is the longest; "" if none has."""
    counts = {split: int((values > most).sum()) for split, values in lengths.items()}
    if not any(counts.values()):
        return ""
    split = max(lengths, key=lambda name: lengths[name].max())
    row = int(lengths[split].argmax())
    per_split = ", ".join(f"{count} in {name!r}" for name, count in counts.items() if count)
    return (
        f"{per_split}; the longest has {lengths[split][row]}, prompt {row} of {split!r} ({_around(found, split, row)})"
    )


def _around(found: Inspection, split: str, row: int) -> str:
    return shown(found.splits[split].prompts[row])


def _check_questions(found: Inspection, labeler: LanguageModelConfig) -> None:
    """Whether the labeler's context holds the score question on every prompt with the longest response."""
    task = found.task
    if labeler.url is not None:
        found.notes.append(f"{labeler.name} is behind a server: whether its context holds the questions is not known")
        return
    context = context_length(labeler.model)
    tokenizer = load_tokenizer(labeler.model)
    lengths = {
        split: np.array(
            [
                len(row) + task.max_response_tokens
                for row in encode(tokenizer, [score_prompt(task, p, "") for p in core.prompts])
            ]
        )
        for split, core in found.splits.items()
    }
    if context is not None and (text := _over(found, lengths, context)):
        found.problems.append(
            f"expected questions of at most {context} tokens, the context of the labeler {labeler.model}, found "
            f"(with a response of {task.max_response_tokens}) {text}; take a labeler that reads more (--labeler.model, "
            "--reward.model), or shorter prompts: it reads them whole"
        )


def splits_table(found: Inspection) -> Table:
    """The splits: prompts, pairs, lengths."""
    rows: list[list[str | int | None]] = []
    for split in SPLITS:
        pairs = found.pairs.get(split)
        if core := found.splits.get(split):
            lengths = core.prompt_lengths
            figures = [len(core.prompts), len(set(core.prompts)), int(np.median(lengths)), int(lengths.max())]
        rows.append([split, *(figures if core else [0, 0, None, None]), pairs])
    return Table(
        "splits",
        ["split", "prompts", "distinct", "median tokens", "longest", "pairs"],
        rows,
        f"Tokens as the policy reads them; the task allows {found.task.max_prompt_tokens} a prompt, "
        f"{found.task.max_response_tokens} a response. Policies and reward models learn on train and are measured on "
        "test; validation chooses checkpoints, gold is for the gold reward model of a comparison.",
    )


def rendered(found: Inspection) -> dict[str, str]:
    """What is read, by reader, for a prompt of middle length, or that of the first pair."""
    task = found.task
    split = next(iter(found.splits))
    core = found.splits[split]
    at = int(np.argsort(core.prompt_lengths)[len(core.prompts) // 2])
    judged, texts = core.prompts[at], (" [response 1]", " [response 2]")
    if found.pair:
        judged, texts = found.pair.prompt, (found.pair.response_1, found.pair.response_2)
    if judged in core.prompts:
        at = core.prompts.index(judged)
    ids = core.prompt_ids(at)[-task.max_prompt_tokens :].tolist()
    what = "prompt and response, one text" if task.kind == "continuation" else "the response, beside its prompt"
    asked_worse = pair_wording(task).inverted
    return {
        f"what the policy reads ({len(ids)} tokens)": str(core.tokenizer.decode(ids)),
        "the pairwise question" + (" (for the worse; the label is turned round)" if asked_worse else ""): (
            pairwise_prompt(task, judged, *texts)
        ),
        f"the score question, {task.scale[0]} to {task.scale[1]}": score_prompt(task, judged, texts[0]),
        f"what is judged: {what}": task.judged(judged, texts[0]),
    }
