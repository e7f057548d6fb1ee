"""Tasks: where prompts come from, what makes a response better, and how long both may be.

Built in: ``movie-review`` (continue the opening words of a review; its prompts and human ratings are real and fetched
by themselves), and the paper's three, ``summarization``, ``helpful`` and ``harmless``, which need a source of prompts:
``load_task("summarization", source="posts.jsonl")`` or a Hugging Face data set by name. A task of one's own is a
`Task`, or a TOML file with a `Task`'s fields as keys, its source as the table ``[source]`` (docs/tasks.md).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import DataError, Preference, RLAIFError
from rlaif_env.data.corpus import SPLITS
from rlaif_env.data.sources import PromptSource, each_split
from rlaif_env.data.templates import TEMPLATES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["SPLITS", "PromptSource", "Task", "gold_scores", "held_out_prompts", "list_tasks", "load_task"]

Kind = Literal["continuation", "summary", "dialogue"]

_GOLD = ("vader",)
MOST_TOKENS = 10_000_000
"""The longest prompt or response of any task: more is a slip of the pen, and would be an array of that width."""

FIELDS = {"continuation": ("prompt",), "summary": ("prompt", "text"), "dialogue": ("prompt", "context")}
"""Where a row's prompt is looked for, by the task's kind."""

DEFAULT_TASK = "movie-review"
"""The task where none is named: the one that needs no data of the user's."""

EVAL_SPLIT, EVAL_PROMPTS = "test", 128
"""What policies are compared on, where nothing else is asked for: a split, and so many of its prompts."""

SCALE = (1, 10)
"""Of a judge's scores, where a task says no other (section 2.2.2)."""


def checked_scale(scale: Any) -> tuple[int, int]:
    """A scale as two whole numbers.

    Raises:
        RLAIFError: If it is none.
    """
    whole = isinstance(scale, tuple | list) and len(scale) == 2 and all(type(end) is int for end in scale)
    if not whole or not 0 <= scale[0] < scale[1] <= 100:
        raise RLAIFError(f"expected a scale of two whole numbers from 0 to 100, the lower first, found {scale}")
    return scale[0], scale[1]


@dataclass(frozen=True)
class Task:
    """What is to be written and what makes it better.

    Attributes:
        name: For logs and messages.
        kind: "continuation": prompt and response are one text; "summary": the response sums up the prompt; "dialogue":
            the response is the next turn.
        criterion: What makes a response better, as words that complete "rate ...".
        max_prompt_tokens: Longest prompt, P.
        max_response_tokens: Longest response, T.
        source: Where prompts come from.
        gold: A measure that no labeler or reward sees, for evaluation alone: "vader", or none.
        scale: Lowest and highest score that a judge is asked for; the paper's are 1 and 10.
        truncate_prompts: The policy reads the last max_prompt_tokens tokens of a longer prompt; else that is an error.
        template: How prompts become what a policy reads: "plain", "chat", "human-assistant" or "auto", which is "chat"
            in a dialogue for a model that has a template.
        system: A system message before every prompt; not with "plain".

    Raises:
        RLAIFError: If a value is of the wrong kind.
    """

    name: str
    kind: Kind
    criterion: str
    max_prompt_tokens: int
    max_response_tokens: int
    source: PromptSource = field(default_factory=PromptSource)
    gold: str | None = None
    scale: tuple[int, int] = SCALE
    truncate_prompts: bool = False
    template: str = "auto"
    system: str | None = None

    def __post_init__(self) -> None:
        for name in ("name", "criterion"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise RLAIFError(f"expected {name} of a task to be text, found {value!r}")
        if self.kind not in get_args(Kind):
            raise RLAIFError(f"task {self.name!r}: expected kind {', '.join(get_args(Kind))}, found {self.kind!r}")
        for name in ("max_prompt_tokens", "max_response_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RLAIFError(f"task {self.name!r}: expected {name} to be a whole number from 1, found {value!r}")
            if value > MOST_TOKENS:
                raise RLAIFError(f"task {self.name!r}: expected {name} of at most {MOST_TOKENS}, found more")
        cut: Any = self.truncate_prompts
        if not isinstance(cut, bool):
            raise RLAIFError(f"task {self.name!r}: expected truncate_prompts to be true or false, found {cut!r}")
        if not isinstance(self.source, PromptSource):
            raise RLAIFError(f"task {self.name!r}: expected source to be a PromptSource, found {self.source!r:.80}")
        if self.gold is not None and self.gold not in _GOLD:
            raise RLAIFError(f"task {self.name!r}: expected gold to be {', '.join(_GOLD)} or none, found {self.gold!r}")
        if self.template not in TEMPLATES:
            raise RLAIFError(f"task {self.name!r}: expected template {', '.join(TEMPLATES)}, found {self.template!r}")
        if self.system is not None and (not isinstance(self.system, str) or self.template == "plain"):
            raise RLAIFError(
                f"task {self.name!r}: expected a system message as text and with a template of turns, found "
                f"{self.system!r:.60} with template {self.template!r}"
            )
        object.__setattr__(self, "scale", checked_scale(self.scale))

    @property
    def prompt_limit(self) -> int | None:
        """To how many tokens a longer prompt is cut; None where it is an error."""
        return self.max_prompt_tokens if self.truncate_prompts else None

    def prompts(self, split: str = "train") -> list[str]:
        """The prompts of a split, in the order of the source.

        Raises:
            RLAIFError: If there is no such split, no source, or no prompt in the split.
            DataError: For all bad rows of the source together.
            AssetError: If the built-in corpus cannot be fetched.
        """
        return self.source.read_prompts(split, FIELDS[self.kind], self.name)

    def preferences(self, split: str = "train") -> Iterator[Preference]:
        """The preferences of a split, one at a time.

        For ``movie-review`` they are people's, on pairs of whole snippets: as many pairs as the split has snippets,
        the same at every call (see `rlaif_env.data.preferences.human_preferences` for other numbers).

        Raises:
            RLAIFError: If there is no such split or no source of preferences.
            DataError: For all bad rows together.
            AssetError: If the built-in corpus cannot be fetched.
        """
        return self.source.read_preferences(split, self.name)

    def judged(self, prompt: str, response: str) -> str:
        """The whole text a judge reads: prompt and response where they are one text, else the response."""
        return prompt + response if self.kind == "continuation" else response

    def with_source(self, source: str | Path | PromptSource | Sequence[str]) -> Task:
        """This task with another source: a file, the name of a Hugging Face data set, a list of prompts, or a source.

        What ends in ``.jsonl``, ``.json`` or ``.txt`` (``.gz`` too), or is a file that exists, is a file.
        """
        if isinstance(source, PromptSource):
            return replace(self, source=source)
        given: dict[str, Any] = dict.fromkeys(("corpus", "jsonl", "dataset", "prompts", "preferences"))
        if not isinstance(source, str | Path):
            given["prompts"] = tuple(source)
        elif str(source).removesuffix(".gz").endswith((".jsonl", ".json", ".txt")) or _is_file(source):
            given["jsonl"] = str(source)
        else:
            given["dataset"] = str(source)
        return replace(self, source=replace(self.source, **given))

    def to_json(self) -> dict[str, Any]:
        """The task as values that JSON can hold; what is not set is left out."""
        task = {name: value for name, value in asdict(self).items() if value not in (None, False)}
        source = task["source"] | {"prompts": each_split(list, self.source.prompts)}
        source = {name: value for name, value in source.items() if value not in (None, False)}
        return task | {"source": source, "scale": list(self.scale)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Task:
        """The task that `to_json` wrote, or a TOML file holds.

        Raises:
            RLAIFError: If a key is missing, unknown, or has a value of the wrong kind.
        """
        source = values.get("source", {})
        if not isinstance(source, Mapping):
            raise RLAIFError(f"expected source of a task to be a table, found {source!r:.80}")
        _check_keys(PromptSource, source, "source of a task")
        _check_keys(cls, values, "task", "name", "kind", "criterion", "max_prompt_tokens", "max_response_tokens")
        return cls(**{**values, "source": PromptSource(**source)})


TaskLike = str | Path | Task | Mapping[str, Any]
"""What names a task: see `load_task`."""


_DIALOGUES = PromptSource(allow_empty=True)  # the HH data have some empty responses
_TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name=DEFAULT_TASK,
            kind="continuation",
            criterion="how positive the review is about the film",
            max_prompt_tokens=20,  # the longest opening has 19 with the built-in tokenizer
            max_response_tokens=12,
            source=PromptSource(corpus="movie-review"),
            gold="vader",
            scale=(1, 9),  # the built-in model cannot tell "10" from noise: 0.59 against 0.69 Spearman with people
        ),
        Task(
            name="summarization",
            kind="summary",
            criterion="how good the summary is: coherent, accurate, covering what matters, and of high quality overall",
            max_prompt_tokens=1024,
            max_response_tokens=128,
        ),
        Task("helpful", "dialogue", "how helpful and honest the response is", 1024, 128, _DIALOGUES),
        Task("harmless", "dialogue", "how harmless the response is", 1024, 128, _DIALOGUES),
    )
}


def list_tasks() -> list[str]:
    """The names of the built-in tasks."""
    return list(_TASKS)


def load_task(task: TaskLike, source: str | Path | PromptSource | Sequence[str] | None = None) -> Task:
    """A task by name, from a TOML file, from the values of `Task.to_json`, or as it is.

    Args:
        task: A built-in name, a path, a task, or a task's values.
        source: Another source of prompts, as `Task.with_source` takes it.

    Raises:
        RLAIFError: If there is no such task or file (the valid names are listed), or its values are wrong.
    """
    if isinstance(task, Mapping):
        task = Task.from_json(task)
    elif isinstance(task, str) and task in _TASKS:
        task = _TASKS[task]
    elif isinstance(task, str | Path) and (str(task).endswith(".toml") or _is_file(task)):
        task = read_toml(Path(task))
    if not isinstance(task, Task):
        raise RLAIFError(f"expected a task ({', '.join(_TASKS)}), a TOML file or a Task, found {task!r}")
    return task if source is None else task.with_source(source)


def held_out_prompts(
    task: Task, split: str, count: int | None, *, most: int = EVAL_PROMPTS, option: str = "--prompts"
) -> list[str]:
    """The first prompts of a split.

    Args:
        task: Whose.
        split: Which.
        count: How many; None is ``most``, or all where the split has fewer.
        most: The default.
        option: What sets the count on the command line, for the message.

    Raises:
        RLAIFError: If the split has fewer than asked for, or less than one is asked for.
    """
    known = task.prompts(split)
    if count is None:
        return known[:most]
    if not 1 <= count <= len(known):
        raise RLAIFError(
            f"expected 1 to {len(known)} prompts, as many as split {split!r} of task {task.name!r} has, found {count}; "
            f"give {option} {len(known)}, or leave it away for as many as there are"
        )
    return known[:count]


def gold_scores(task: Task, texts: Sequence[str]) -> NDArray[np.float64]:
    """The task's gold measure of n judged texts: float64 (n,).

    "vader" is the compound score of the VADER lexicon (Hutto & Gilbert 2014), from -1 (negative) to 1 (positive); an
    empty text is neutral, 0.

    Raises:
        RLAIFError: If the task has no gold measure, or a text is no string.
    """
    if task.gold is None:
        raise RLAIFError(f"task {task.name!r}: expected a gold measure ({', '.join(_GOLD)}), found none")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"expected text {row} to be a string, found {type(text).__name__}")
    analyzer = _vader()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts], dtype=np.float64)


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long for a name, or no name at all
        return False


def read_toml(path: Path, **instead: Any) -> Task:
    """The task of a TOML file, with some values in place of those in the file.

    Raises:
        RLAIFError: If there is no such file, it is no TOML, or its values are wrong.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RLAIFError(f"expected a task's TOML file at {path}, found: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, or one nested without end
        raise RLAIFError(f"{path}: expected TOML in UTF-8, found: {error}") from error
    try:
        task = Task.from_json(values | instead)
        beside = partial(_beside, path)
        located = {name: each_split(beside, getattr(task.source, name)) for name in ("jsonl", "preferences")}
    except (ValueError, RecursionError) as error:  # ours, or Python's on a number of thousands of digits
        raise RLAIFError(f"{path}: {error}") from error
    return replace(task, source=replace(task.source, **located))


def _beside(toml: Path, file: str) -> str:
    """A path that is relative to the TOML file, made relative to nothing."""
    try:
        return str(toml.absolute().parent / Path(file).expanduser())
    except RuntimeError as error:
        raise RLAIFError(f"expected the path of a file, found {file!r}: {error}") from error


def _check_keys(kind: type[Any], values: Mapping[str, Any], what: str, *required: str) -> None:
    valid = [entry.name for entry in fields(kind)]
    if unknown := [str(name) for name in values if name not in valid]:
        raise RLAIFError(f"expected the keys {', '.join(valid)} in a {what}, found {', '.join(unknown)}")
    if missing := [name for name in required if name not in values]:
        raise RLAIFError(f"expected the keys {', '.join(required)} in a {what}, found no {' and no '.join(missing)}")
