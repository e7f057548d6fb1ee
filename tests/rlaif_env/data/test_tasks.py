"""Tasks: the built-in ones, a user's own, and what is said when something about them is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlaif_env.api import DataError, RLAIFError
from rlaif_env.data.preferences import movie_snippets, split_of
from rlaif_env.data.tasks import SPLITS, PromptSource, Task, gold_scores, list_tasks, load_task

TOML = """
name = "haiku"
kind = "continuation"
criterion = "how well the poem keeps to one image"
max_prompt_tokens = 32
max_response_tokens = 24
gold = "vader"

[source]
"""


def mine(**changes: Any) -> Task:
    facts: dict[str, Any] = {
        "name": "mine",
        "kind": "dialogue",
        "criterion": "how short it is",
        "max_prompt_tokens": 8,
        "max_response_tokens": 4,
    }
    return Task(**{**facts, **changes})


def rows(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_the_built_in_tasks() -> None:
    assert list_tasks() == ["movie-review", "summarization", "helpful", "harmless"]
    for name in list_tasks():
        task = load_task(name)
        assert task.name == name
        assert load_task(task) is task
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
        assert load_task(task.to_json()) == task


def test_the_scale_is_the_tasks() -> None:
    assert load_task("movie-review").scale == (1, 9)
    assert {load_task(name).scale for name in list_tasks() if name != "movie-review"} == {(1, 10)}
    assert mine().scale == (1, 10)
    task = mine(scale=[0, 4])  # as JSON and TOML hold it
    assert task.scale == (0, 4) and task.to_json()["scale"] == [0, 4]
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    assert Task.from_json({k: v for k, v in task.to_json().items() if k != "scale"}).scale == (1, 10)


def test_movie_review_prompts_are_openings_each_on_one_side() -> None:
    task = load_task("movie-review")
    prompts = {split: task.prompts(split) for split in SPLITS}
    flat = [prompt for split in SPLITS for prompt in prompts[split]]
    assert len(flat) == len(set(flat))
    assert {split: len(found) for split, found in prompts.items()} == {
        "train": 5019,
        "validation": 392,
        "test": 1266,
        "gold": 1616,
    }
    for split in SPLITS:
        texts = [snippet.text for snippet in movie_snippets(split) if len(snippet.text.split()) >= 12]
        assert set(prompts[split]) <= {" ".join(text.split()[:6]) for text in texts}
    assert all(len(prompt.split()) == 6 and prompt == prompt.strip() for prompt in flat)
    assert task.prompts("test") == prompts["test"]


def test_movie_review_prompts_fit() -> None:
    from transformers import AutoTokenizer

    from rlaif_env.models.assets import model_folder

    task = load_task("movie-review")
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    lengths = [len(ids) for split in SPLITS for ids in tokenizer(task.prompts(split))["input_ids"]]
    assert max(lengths) <= task.max_prompt_tokens


def test_movie_review_preferences_are_peoples() -> None:
    task = load_task("movie-review")
    found = list(task.preferences("validation"))
    assert len(found) == len(movie_snippets("validation")) == 509
    assert found == list(task.preferences("validation"))
    assert {record.source for record in found} == {"human"}
    assert {number for record in found for number in record.meta["ids"]} <= {s.id for s in movie_snippets("validation")}


def test_what_a_judge_reads() -> None:
    assert mine(kind="continuation").judged("The film", " is good.") == "The film is good."
    assert mine(kind="summary").judged("A long text.", "Short.") == "Short."
    assert mine(kind="dialogue").judged("Hi", "Yes?") == "Yes?"


def test_a_task_without_a_source_says_how_to_give_one() -> None:
    message = r"task 'summarization': expected a source of data, found none; on the command line: .*rlaif task new"
    with pytest.raises(RLAIFError, match=message):
        load_task("summarization").prompts()
    with pytest.raises(RLAIFError, match=message):
        list(load_task("summarization").preferences())


def test_one_file_is_divided_and_nothing_is_lost(tmp_path: Path) -> None:
    path = rows(tmp_path / "posts.jsonl", *({"text": f"post {i}"} for i in range(200)))
    task = load_task("summarization", source=path)
    divided = {split: task.prompts(split) for split in SPLITS}
    assert sorted(chain(*divided.values())) == sorted(f"post {i}" for i in range(200))
    assert all(split_of(prompt) == split for split, prompts in divided.items() for prompt in prompts)
    assert load_task(json.loads(json.dumps(task.to_json()))).prompts("test") == divided["test"]


def test_the_fields_of_each_kind(tmp_path: Path) -> None:
    path = rows(tmp_path / "all.jsonl", {"text": "T", "context": "C", "post": "P"})

    def only(task: Task) -> list[str]:
        return task.with_source(PromptSource(jsonl={"train": str(path)}, field=task.source.field)).prompts()

    assert only(load_task("summarization")) == ["T"]
    assert only(load_task("helpful")) == ["C"]
    assert only(mine(source=PromptSource(field="post"))) == ["P"]
    with pytest.raises(DataError, match="line 1: expected a field 'prompt', found the fields context, post, text"):
        only(mine(kind="continuation"))


def test_a_file_of_prompts_holds_no_preferences(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("What is bread?\n" * 20)
    with pytest.raises(
        DataError, match=r"expected preferences, found prompts without two responses in .*own\.txt; have"
    ):
        list(load_task("helpful", source=tmp_path / "own.txt").preferences("train"))


def test_pairs_of_the_paper_give_prompts_and_preferences(tmp_path: Path) -> None:
    def dialogue(i: int, answer: str) -> str:
        return f"\n\nHuman: question {i}\n\nAssistant: {answer}"

    pairs = [{"chosen": dialogue(i, "no"), "rejected": dialogue(i, "yes" if i else "")} for i in range(100)]
    task = load_task("harmless", source=rows(tmp_path / "hh.jsonl", *pairs))
    for split in SPLITS:
        prompts = task.prompts(split)
        records = list(task.preferences(split))
        assert [record.prompt for record in records] == prompts
        assert {record.response_1 for record in records} == {" no"}
    assert sum(len(task.prompts(split)) for split in SPLITS) == 100  # the pair with an empty response is one of them


def test_prompts_given_as_they_are() -> None:
    task = mine().with_source(["a", "b", "c", "d", "e", "f"])
    assert sorted(task.prompts("train")) == sorted(p for p in "abcdef" if split_of(p) == "train")
    named = mine(source=PromptSource(prompts={"train": ["a"], "test": ["b", "c"]}))
    assert (named.prompts(), named.prompts("test")) == (["a"], ["b", "c"])
    assert Task.from_json(json.loads(json.dumps(named.to_json()))) == named
    with pytest.raises(
        RLAIFError, match="task 'mine': expected prompts in the split 'gold', found none; give more prompts"
    ):
        named.prompts("gold")
    with pytest.raises(DataError, match="row 2: expected prompt to hold text, found ''"):
        mine(source=PromptSource(prompts={"train": ["a", ""]})).prompts()


def test_a_data_set_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(50)])
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "set")
    task = load_task("helpful", source=str(tmp_path / "set"))
    assert sorted(chain(*map(task.prompts, SPLITS))) == sorted(rows["prompt"])
    assert len(list(task.preferences("train"))) == len(task.prompts("train"))
    named = replace(task, source=replace(task.source, dataset_splits={"train": "train", "test": "test"}))
    assert (len(named.prompts("train")), named.prompts("test")) == (50, ["p0", "p1", "p2"])
    with pytest.raises(RLAIFError, match="task 'helpful': expected dataset_splits to name 'gold', found train, test"):
        named.prompts("gold")


def test_a_task_of_ones_own_in_toml(tmp_path: Path) -> None:
    rows(tmp_path / "p.jsonl", *({"line": f"line {i}"} for i in range(20)))
    path = tmp_path / "haiku.toml"
    path.write_text(TOML + 'jsonl = "p.jsonl"\nfield = "line"\n')
    task = load_task(path)
    assert (task.name, task.kind, task.max_response_tokens, task.gold) == ("haiku", "continuation", 24, "vader")
    assert task.source.jsonl == str(tmp_path / "p.jsonl")
    assert set(task.prompts("train")) <= {f"line {i}" for i in range(20)}
    assert load_task(str(path)) == task
    path.write_text(TOML + '[source.jsonl]\ntrain = "p.jsonl"\n')
    assert load_task(path).source.jsonl == {"train": str(tmp_path / "p.jsonl")}
    path.write_text(TOML + '[source.prompts]\ntrain = ["An old pond"]\n')
    assert load_task(path).prompts() == ["An old pond"] and load_task(path).scale == (1, 10)
    path.write_text(TOML.replace("[source]", "scale = [1, 5]\ntruncate_prompts = true\n[source]"))
    task = load_task(path)
    assert task.scale == (1, 5) and task.truncate_prompts and Task.from_json(task.to_json()) == task
    assert "truncate_prompts" not in mine().to_json()


TOML_ERRORS = [
    (
        "name = 1\n",
        "expected the keys name, kind, criterion, max_prompt_tokens, max_response_tokens in a task, found no kind",
    ),
    (TOML.replace("gold", "golden"), "expected the keys name, kind, .*, gold, scale, .*in a task, found golden"),
    (TOML.replace("[source]", "scale = [5, 1]"), "expected a scale of two whole numbers .*, found \\[5, 1\\]"),
    (TOML + 'json = "x"', "expected the keys corpus, jsonl, .* in a source of a task, found json"),
    (TOML + 'jsonl = "x"\ncorpus = "movie-review"', "expected one source of prompts, found corpus and jsonl"),
    (TOML.replace("[source]", "source = 3"), "expected source of a task to be a table, found 3"),
    ("name = ", "expected TOML in UTF-8, found: Invalid value"),
    (
        TOML.replace("= 32", '= "32"'),
        "task 'haiku': expected max_prompt_tokens to be a whole number from 1, found '32'",
    ),
    (
        TOML.replace("[source]", "truncate_prompts = 1\n[source]"),
        "expected truncate_prompts to be true or false, found 1",
    ),
    (TOML.replace("continuation", "poem"), "task 'haiku': expected kind continuation, summary, dialogue, found 'poem'"),
]


@pytest.mark.parametrize(("text", "message"), TOML_ERRORS, ids=[message[:50] for _, message in TOML_ERRORS])
def test_toml_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(RLAIFError, match="t.toml: .*" + message):
        load_task(tmp_path / "t.toml")


ERRORS: list[tuple[Any, str]] = [
    (
        lambda: load_task("poems"),
        r"expected a task \(movie-review, summarization, helpful, harmless\), a TOML file or a Task, ",
    ),
    (lambda: load_task("no.toml"), "expected a task's TOML file at no.toml, found: No such file"),
    (lambda: load_task(7), "a TOML file or a Task, found 7"),  # type: ignore[arg-type]
    (
        lambda: load_task("movie-review").prompts("dev"),
        "expected a split of train, validation, test, gold, found 'dev'",
    ),
    (
        lambda: list(load_task("movie-review").preferences("dev")),
        "expected a split of train, validation, test, gold, found",
    ),
    (
        lambda: mine(max_response_tokens=0),
        "task 'mine': expected max_response_tokens to be a whole number from 1, found 0",
    ),
    (lambda: mine(criterion=""), "expected criterion of a task to be text, found ''"),
    (lambda: mine(gold="bleu"), "task 'mine': expected gold to be vader or none, found 'bleu'"),
    (lambda: mine(source={"jsonl": "x"}), "task 'mine': expected source to be a PromptSource, found"),
    (lambda: PromptSource(corpus="books"), r"expected a built-in corpus \(movie-review\), found 'books'"),
    (lambda: PromptSource(jsonl={"dev": "x"}), "expected the splits train, validation, test, gold in jsonl, found dev"),
    (
        lambda: PromptSource(prompts="one"),
        "expected prompts of a source to be a list of strings, or one a split, found 'one'",
    ),
    (lambda: PromptSource(prompts=["a", 1]), "expected prompts of a source to be a list of strings"),  # type: ignore[list-item]
    (lambda: PromptSource(prompts={"train": None}), "expected prompts of a source to be a list of strings"),  # type: ignore[dict-item]
    (lambda: PromptSource(corpus={"train": "x"}), "expected corpus of a source to be a string, found {'train'"),  # type: ignore[arg-type]
    (lambda: PromptSource(allow_empty=None), "expected allow_empty of a source to be true or false, found None"),  # type: ignore[arg-type]
    (lambda: mine(scale=(1, 10, 20)), r"expected a scale of two whole numbers from 0 to 100, .*, found \(1, 10, 20\)"),
    (
        lambda: mine(scale=(9, 1)),
        r"expected a scale of two whole numbers from 0 to 100, the lower first, found \(9, 1\)",
    ),
    (lambda: mine(scale=(-1, 5)), r"expected a scale of two whole numbers from 0 to 100, .*, found \(-1, 5\)"),
    (lambda: mine(scale=(0, 101)), "expected a scale of two whole numbers from 0 to 100"),
    (lambda: mine(scale=(1.0, 9.0)), "expected a scale of two whole numbers from 0 to 100"),
    (lambda: mine(scale=(False, True)), "expected a scale of two whole numbers from 0 to 100"),
    (lambda: mine(scale="19"), "expected a scale of two whole numbers from 0 to 100, the lower first, found 19"),
    (lambda: mine(scale=None), "expected a scale of two whole numbers from 0 to 100, the lower first, found None"),
    (lambda: PromptSource(dataset=3), "expected dataset of a source to be a string, found 3"),  # type: ignore[arg-type]
    (lambda: PromptSource(jsonl=3), "expected jsonl of a source to be a string, or one a split, found 3"),  # type: ignore[arg-type]
    (lambda: PromptSource(allow_empty="yes"), "expected allow_empty of a source to be true or false"),  # type: ignore[arg-type]
    (lambda: PromptSource(dataset_splits="x"), "expected dataset_splits of a source to name a split each"),  # type: ignore[arg-type]
    (
        lambda: mine(source=PromptSource(jsonl={"test": "x"})).prompts(),
        "task 'mine': expected a file for the split 'train', ",
    ),
    (
        lambda: mine(source=PromptSource(jsonl="no.jsonl")).prompts(),
        "expected a file to read at no.jsonl, found: No such file",
    ),
    (lambda: gold_scores(mine(), ["x"]), r"task 'mine': expected a gold measure \(vader\), found none"),
    (lambda: gold_scores(mine(gold="vader"), ["x", None]), "expected text 1 to be a string, found NoneType"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("broken", "message"), ERRORS, ids=[message[:50] for _, message in ERRORS])
def test_what_is_wrong_is_said(broken: Any, message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        broken()


def test_the_gold_measure() -> None:
    scores = gold_scores(load_task("movie-review"), ["A wonderful film.", "A horrible mess.", "", "The film is long."])
    assert scores.dtype == np.float64 and scores.shape == (4,)
    assert scores[0] > 0.4 and scores[1] < -0.4
    assert scores[2:].tolist() == [0.0, 0.0]
    assert gold_scores(load_task("movie-review"), []).shape == (0,)
