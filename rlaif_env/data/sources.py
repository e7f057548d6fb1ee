"""Where a task's prompts and preferences come from: a value that JSON and TOML can hold, and the reading of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif_env.api import DataError, Preference, RLAIFError
from rlaif_env.data.corpus import SPLITS, check_split, human_preferences, movie_snippets, split_of
from rlaif_env.data.forms import holds_responses
from rlaif_env.data.preferences import read_preferences, read_prompts
from rlaif_env.data.rows import Rows, dataset_rows, first_row

_CORPORA = ("movie-review",)
_OPENING_WORDS = 6
_LEAST_WORDS = 12


@dataclass(frozen=True)
class PromptSource:
    """Where the prompts and preferences of a task come from. At most one of the first four is set.

    A single value is divided into the four splits by the hash of each prompt; a mapping names the splits itself.

    Attributes:
        corpus: A built-in corpus: "movie-review".
        jsonl: A file as in `rlaif_env.data.rows` (JSON lines, Parquet, ``.txt``), or one for each split.
        dataset: A Hugging Face data set, by name or folder.
        prompts: The prompts themselves, or those of each split.
        field: The field that holds the prompt; by default ``prompt``, else ``text`` in a summary task and ``context``
            in a dialogue task, else the common beginning of ``chosen`` and ``rejected``.
        preferences: A preference file, or one for each split; by default the rows of ``jsonl`` or ``dataset``.
        dataset_config: The configuration of the data set.
        dataset_revision: Its revision.
        dataset_splits: The data set's own split for each of ours; by default its "train", divided.
        allow_identical: Keep preferences between two equal responses.
        allow_empty: Keep preferences in which a response is empty.

    Raises:
        RLAIFError: If more than one source is given, or a value is of the wrong kind.
    """

    corpus: str | None = None
    jsonl: str | Mapping[str, str] | None = None
    dataset: str | None = None
    prompts: Sequence[str] | Mapping[str, Sequence[str]] | None = None
    field: str | None = None
    preferences: str | Mapping[str, str] | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_splits: Mapping[str, str] | None = None
    allow_identical: bool = False
    allow_empty: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("corpus", "jsonl", "dataset", "prompts") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RLAIFError(f"expected one source of prompts, found {' and '.join(given)}")
        self._check("a string", str | None, "corpus", "dataset", "field", "dataset_config", "dataset_revision")
        self._check("true or false", bool, "allow_identical", "allow_empty")
        self._check("a string, or one a split", str | None, "jsonl", "preferences", "dataset_splits")
        self._check("a list of strings, or one a split", Sequence | None, "prompts")
        if self.corpus is not None and self.corpus not in _CORPORA:
            raise RLAIFError(f"expected a built-in corpus ({', '.join(_CORPORA)}), found {self.corpus!r}")
        if isinstance(self.dataset_splits, str):
            raise RLAIFError(f"expected dataset_splits of a source to name a split each, found {self.dataset_splits!r}")
        object.__setattr__(self, "prompts", each_split(_frozen_texts, self.prompts))

    def _check(self, what: str, kind: Any, *names: str) -> None:
        """Hold fields, or what they hold for each split, to a kind."""
        for name in names:
            value = getattr(self, name)
            divided = isinstance(value, Mapping) and what.endswith("one a split")
            if divided and (unknown := [str(split) for split in value if split not in SPLITS]):
                raise RLAIFError(f"expected the splits {', '.join(SPLITS)} in {name}, found {', '.join(unknown)}")
            if not all(isinstance(one, kind) for one in (value.values() if divided else [value])):
                raise RLAIFError(f"expected {name} of a source to be {what}, found {value!r:.80}")

    def read_prompts(self, split: str, fields: Sequence[str], task: str) -> list[str]:
        """The prompts of a split for `Task.prompts`; ``fields`` are where `preferences.read_prompts` looks for them."""
        check_split(split)
        if self.corpus is not None:
            return _movie_prompts(split)
        if self.prompts is not None:
            divided = not isinstance(self.prompts, Mapping)
            given = self.prompts.get(split, ()) if isinstance(self.prompts, Mapping) else self.prompts
            prompts = list(read_prompts([{"prompt": text} for text in given])) if given else []
        else:
            rows, divided = self._rows(split, self.jsonl, task)
            prompts = list(read_prompts(rows, (self.field,) if self.field else fields))
        if divided:
            prompts = [prompt for prompt in prompts if split_of(prompt) == split]
        if not prompts:
            raise RLAIFError(
                f"task {task!r}: expected prompts in the split {split!r}, found none; give more prompts, or a file for "
                "each split (in a TOML file: train = ..., test = ... under [source.jsonl], in Python: "
                "PromptSource(jsonl={'train': ..., 'test': ...}))"
            )
        return prompts

    def read_preferences(self, split: str, task: str) -> Iterator[Preference]:
        """The preferences of a split for `Task.preferences`, one at a time."""
        check_split(split)
        if self.corpus is not None and self.preferences is None:
            yield from human_preferences(split, len(movie_snippets(split)))
            return
        rows, divided = self._rows(split, self.jsonl if self.preferences is None else self.preferences, task)
        if isinstance(rows, str) and self.preferences is None:
            row = first_row(rows)
            if row is not None and not holds_responses(row):
                raise DataError(
                    f"task {task!r}: expected preferences, found prompts without two responses in {rows}; have a "
                    "policy respond and a model judge (`rlaif label --task ... --policy MODEL`), or name a file of "
                    "preferences (preferences = ... under [source])"
                )
        records = read_preferences(rows, allow_identical=self.allow_identical, allow_empty=self.allow_empty)
        for record in records:
            if not divided or split_of(record.prompt) == split:
                yield record

    def _rows(self, split: str, files: str | Mapping[str, str] | None, task: str) -> tuple[Rows, bool]:
        """The file or the rows of a split, and whether they are still to be divided."""
        if isinstance(files, Mapping):
            if split not in files:
                raise RLAIFError(f"task {task!r}: expected a file for the split {split!r}, found {', '.join(files)}")
            return files[split], False
        if files is not None:
            return files, True
        if self.dataset is None:
            raise RLAIFError(
                f"task {task!r}: expected a source of data, found none; on the command line: --task with the file that "
                f"`rlaif task new DATA --name {task}` writes, in Python: load_task({task!r}, source=...), a JSON lines "
                "file or the name of a Hugging Face data set"
            )
        names = self.dataset_splits
        if names is not None and split not in names:
            raise RLAIFError(f"task {task!r}: expected dataset_splits to name {split!r}, found {', '.join(names)}")
        theirs = "train" if names is None else names[split]
        rows = dataset_rows(self.dataset, theirs, config=self.dataset_config, revision=self.dataset_revision)
        return rows, names is None


def _movie_prompts(split: str) -> list[str]:
    """The opening words of the snippets of a split that go on long enough.

    An opening that several snippets share is a prompt once, in the split of the first of them.
    """
    openings: dict[str, str] = {}
    for snippet in movie_snippets():
        words = snippet.text.split()
        if len(words) >= _LEAST_WORDS:
            openings.setdefault(" ".join(words[:_OPENING_WORDS]), snippet.split)
    return [opening for opening, side in openings.items() if side == split]


def each_split(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of what is given for all splits, or of what is given for each of them; None stays None."""
    if isinstance(value, Mapping):
        return {split: function(one) for split, one in value.items()}
    return None if value is None else function(value)


def _frozen_texts(prompts: Sequence[str] | None) -> tuple[str, ...]:
    """Prompts as a tuple, so that a source is a value."""
    if prompts is None or isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RLAIFError(f"expected prompts of a source to be a list of strings, or one a split, found {prompts!r:.80}")
    return tuple(prompts)
