"""`rlaif task`: a TOML file from data of each form, and a look at a task that says all that is wrong with it."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from rewards.task.command import main
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.cli import main as rlaif
from rlaif_env.data.tasks import PromptSource, Task, load_task
from tests import ROOT
from tests.tiny import tiny_backbone

PLACES = [f"{opening} place {i}" for i in range(8) for opening in ("The food in", "My day in", "Who is in", "I left")]
HUMAN = "\n\nHuman: {}\n\nAssistant:"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model: a character a token, a context of 512."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_backbone(0).save_merged(None, folder)
    return str(folder)


@pytest.fixture
def run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a subcommand in the test's folder; its exit code and what it printed, in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(command: str, *arguments: str) -> tuple[int, str]:
        judge = ["--labeler.model", model] if command == "check" else []
        code = main([command, *arguments, "--model", model, *judge])
        return code, " ".join(capsys.readouterr().out.split())

    return call


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def pair(i: int, **changes: Any) -> dict[str, Any]:
    start = HUMAN.format(f"question {i}?")
    return {"chosen": f"{start} Yes, {i}.", "rejected": f"{start} No.", **changes}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


FORMS: dict[str, tuple[Callable[[Path], str], str, dict[str, Any]]] = {
    "text": (
        lambda folder: (folder / "p.txt").write_text("\n".join(PLACES)) and "p.txt",
        "continuation",
        {"jsonl": "p.txt"},
    ),
    "gzip": (
        lambda folder: (folder / "p.txt.gz").write_bytes(gzip.compress("\n".join(PLACES).encode())) and "p.txt.gz",
        "continuation",
        {},
    ),
    "HH": (lambda folder: write(folder / "hh.jsonl", *map(pair, range(30))), "dialogue", {"allow_empty": False}),
    "HH with an empty response": (
        lambda folder: write(
            folder / "hh.jsonl", *map(pair, range(30)), pair(31, rejected=HUMAN.format("question 31?"))
        ),
        "dialogue",
        {"allow_empty": True, "allow_identical": False},
    ),
    "TRL, messages": (
        lambda folder: write(
            folder / "m.jsonl",
            *(
                {
                    "prompt": [message("user", f"{text}?")],
                    "chosen": [message("assistant", "Yes.")],
                    "rejected": [message("assistant", "No.")],
                }
                for text in PLACES
            ),
        ),
        "dialogue",
        {},
    ),
    "our own": (
        lambda folder: write(
            folder / "o.jsonl",
            *({"prompt": text, "response_1": " a", "response_2": " b", "p_first": 0.5} for text in PLACES),
        ),
        "continuation",
        {},
    ),
    "questions in a field of their own": (
        lambda folder: write(folder / "q.jsonl", *({"id": 1, "question": f"{text}?"} for text in PLACES)),
        "dialogue",
        {"field": "question"},
    ),
    "long texts": (
        lambda folder: write(folder / "t.jsonl", *({"text": f"{text} " + "a " * 70} for text in PLACES)),
        "summary",
        {"field": None},
    ),
    "short texts": (
        lambda folder: write(folder / "t.jsonl", *({"text": text} for text in PLACES)),
        "continuation",
        {"field": "text"},
    ),
    "posts to sum up": (
        lambda folder: write(
            folder / "s.jsonl", *({"prompt": f"{text} TL;DR:", "completion": " b"} for text in PLACES)
        ),
        "summary",
        {},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_each_form_becomes_a_task_that_can_be_used(form: str, run: Any, tmp_path: Path) -> None:
    make, kind, source = FORMS[form]
    code, said = run("new", make(tmp_path), "--out", "task.toml", "--criterion", 'how "short" it is')
    assert code == 0 and f"kind {kind} (" in said and said.endswith("next: rlaif task check task.toml")
    task = load_task(tmp_path / "task.toml")
    assert (task.kind, task.criterion) == (kind, 'how "short" it is')
    assert {name: getattr(task.source, name) for name in source if name != "jsonl"} == {
        name: value for name, value in source.items() if name != "jsonl"
    }
    code, said = run("check", "task.toml")
    assert code == 0 and "no problems: rlaif train --task task.toml" in said


def test_every_key_stands_in_the_file_with_what_it_means(run: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "p.jsonl", *({"prompt": text} for text in PLACES))
    assert run("new", "data/p.jsonl", "--out", "my.toml", "--criterion", "how short it is")[0] == 0
    text = (tmp_path / "my.toml").read_text()
    for entry in (*fields(Task), *fields(PromptSource)):
        assert f"{entry.name} = " in text or f"[source.{entry.name}]" in text or entry.name == "source"
    every = (
        text.replace("# scale", "scale").replace("# gold", "gold").replace("# truncate_prompts =", "truncate_prompts =")
    )
    (tmp_path / "every.toml").write_text(every)
    task = load_task(tmp_path / "every.toml")
    assert (task.gold, task.scale, task.truncate_prompts) == ("vader", (1, 10), False)
    assert task.source == PromptSource(jsonl=str(tmp_path / "data" / "p.jsonl"))


def test_the_lengths_are_those_of_the_data(run: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a" * n, "response": "b" * (n // 2)} for n in (*range(20, 40), 30, 100)]
    run("new", write(tmp_path / "p.jsonl", *rows), "--criterion", "c", "--kind", "continuation")
    task = load_task(tmp_path / "task.toml")
    assert task.max_prompt_tokens == 104 and task.max_response_tokens == 20  # the next eight; of 95 % with their ends
    assert not task.truncate_prompts
    run("new", write(tmp_path / "q.jsonl", {"prompt": "a" * 700}, *rows), "--criterion", "c", "--out", "long.toml")
    task = load_task(tmp_path / "long.toml")
    assert task.max_prompt_tokens == 512 - task.max_response_tokens and task.truncate_prompts


def test_a_built_in_name_brings_its_kind_and_criterion(run: Any, tmp_path: Path) -> None:
    run("new", write(tmp_path / "hh.jsonl", *map(pair, range(30))), "--name", "harmless")
    task = load_task(tmp_path / "task.toml")
    assert task.criterion == load_task("harmless").criterion
    _, said = run("check", "task.toml")
    assert "for the worse; the label is turned round" in said
    text = (tmp_path / "task.toml").read_text().replace(task.criterion, "how polite it is")
    (tmp_path / "task.toml").write_text(text)
    assert "the criterion is shown to people only" in run("check", "task.toml")[1]


def test_what_the_models_read_is_shown(run: Any, tmp_path: Path) -> None:
    run("new", write(tmp_path / "hh.jsonl", *map(pair, range(30))), "--criterion", "how short it is")
    code, said = run("check", "task.toml")
    first = load_task(tmp_path / "task.toml").prompts()[0].split()[2].rstrip("?")
    assert code == 0 and f"Human: question {first}? │ │ │ │ Assistant:" in said
    assert "which response is better? What counts is how short it is." in said and "Response 2 - No." in said
    assert "a score from 1 (awful) to 10 (perfect) for how short it is" in said and "SCORE:" in said
    assert "what is judged: the response, beside its prompt" in said
    for split in ("train", "validation", "test", "gold"):
        assert f"│ {split} │ {len(load_task(tmp_path / 'task.toml').prompts(split))} │" in said


def test_all_problems_come_in_one_list(run: Any, tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in (*PLACES, "z" * 490, "y" * 600)]
    run("new", write(tmp_path / "p.jsonl", *rows))
    text = (tmp_path / "task.toml").read_text()
    assert 'criterion = ""' in text
    with pytest.raises(RLAIFError, match="expected criterion of a task to be text, found ''"):
        load_task(tmp_path / "task.toml")
    rest = text[text.index("\n[source]") :].replace('jsonl = "p.jsonl"', '# jsonl = "p.jsonl"')
    given = {"train": [row["prompt"] for row in rows], "test": PLACES[:3]}
    (tmp_path / "task.toml").write_text(
        'name = "mine"\nkind = "continuation"\ncriterion = " "\nmax_prompt_tokens = 400\nmax_response_tokens = 32\n'
        + rest
        + "\n[source.prompts]\n"
        + "".join(f"{split} = {json.dumps(prompts)}\n" for split, prompts in given.items())
    )
    code, said = run("check", "task.toml")
    notes, problems = said.partition("to know:")[2].split("problems:")
    assert code == 1 and "no problems" not in said
    assert "1. " in problems and "expected criterion of a task to be text, found ' '; fill it in" in problems
    assert "expected prompts of at most 400 tokens, found 2 in 'train'; the longest has 600, prompt 33" in problems
    assert "in its context of 512, found 2 in 'train'" in problems and "max_prompt_tokens = 480" in problems
    assert "the context of the labeler" in problems and "4. " in problems
    assert "split 'validation', found none; give more prompts" in notes and "--validate-every` cannot be used" in notes
    assert "3 prompts of 'test' are in 'train' too" in notes
    assert "3 distinct prompts in 'test': intervals over so few are wide" in notes


def test_a_cut_is_a_note_and_no_problem(run: Any, tmp_path: Path) -> None:
    run("new", write(tmp_path / "p.jsonl", *({"prompt": text} for text in PLACES)), "--criterion", "c")
    text = (tmp_path / "task.toml").read_text().replace("# truncate_prompts = false", "truncate_prompts = true")
    (tmp_path / "task.toml").write_text(text.replace("max_prompt_tokens = 24", "max_prompt_tokens = 5"))
    code, said = run("check", "task.toml")
    assert code == 0 and "of prompts of more than 5 tokens the policy reads the last 5: " in said
    assert "what the policy reads (5 tokens)" in said


def test_rows_that_are_no_data_are_named(run: Any, tmp_path: Path) -> None:
    run("new", write(tmp_path / "hh.jsonl", *map(pair, range(30))), "--criterion", "c")
    write(tmp_path / "hh.jsonl", *map(pair, range(30)), {"chosen": 3, "rejected": "x"})
    code, said = run("check", "task.toml")
    assert code == 1 and said.count("hh.jsonl: 1 bad line") == 1 and "line 31" in said
    (tmp_path / "hh.jsonl").unlink()
    code, said = run("check", "task.toml")
    assert code == 1 and "expected a file to read at" in said


ERRORS = [
    ({"a": "x", "b": "y"}, "expected a field prompt, text or context, found a, b; give --field NAME"),
    ({"response_1": "a", "response_2": "b", "p_first": 0.5}, "expected prompts, found preferences without one"),
    ({"prompt": ""}, "line 1: expected prompt to hold text"),
]


@pytest.mark.parametrize(("row", "message"), ERRORS)
def test_data_that_makes_no_task(row: dict[str, Any], message: str, run: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run("new", write(tmp_path / "p.jsonl", row))
    assert message in str(caught.value)
    assert not (tmp_path / "task.toml").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", "", "expected at least one prompt, found none"),
        ("p.csv", "a,b\n1,2\n", "line 1: expected a JSON object"),
    ],
)
def test_a_file_of_no_rows_or_of_others_says_so(name: str, text: str, message: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        run("new", str(tmp_path / name))


def test_parquet_makes_a_task(run: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'data' is needed")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"prompt": [f"What is {i}?" for i in range(60)]}), tmp_path / "mine.parquet")
    assert run("new", str(tmp_path / "mine.parquet"), "--criterion", "c")[0] == 0
    code, said = run("check", "task.toml")
    assert code == 0 and "task mine: dialogue" in said


def test_a_file_that_is_there_is_kept(run: Any, tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_text("mine")
    with pytest.raises(RLAIFError, match=r"expected no file at task.toml yet, found one; give another --out"):
        run("new", write(tmp_path / "p.jsonl", *({"prompt": text} for text in PLACES)))
    assert (tmp_path / "task.toml").read_text() == "mine"


def test_a_built_in_task_can_be_looked_at(run: Any) -> None:
    code, said = run("check", "helpful")
    assert code == 1 and said.count("expected a source of data, found none") == 1
    assert "`rlaif task new DATA --name helpful` writes" in said


def test_a_built_in_task_with_data_is_fine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["check", "movie-review"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "│ test │ 1266 │" in said and "rated from 1 (terrible) to 9 (excellent)" in said


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["old"], 2)])
def test_without_a_subcommand_the_two_are_named(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    assert "rlaif task new DATA" in capsys.readouterr().out


def test_the_page_s_commands_lead_from_a_file_to_a_judged_policy(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand on it, but for the size of the models and of the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    write(tmp_path / "prompts.jsonl", *({"prompt": f"{text} no {i}"} for text in PLACES for i in range(8)))
    smaller = {
        "task": f"--model {model}",
        "label": f"--labeler.model {model} --minimum-mass 1e-9 --policy {model}",
        "train-rm": f"--model {model}",
        "train": f"--model {model} --updates 1",
        "evaluate": f"--reference {model} --judge.model {model} --label.minimum-mass 1e-9 --resamples 100",
    }
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    lines = re.findall(r"```bash\n(.*?)```", page, re.S)[0].splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    assert [command[0] for command in commands] == ["task", "task", "label", "train-rm", "train", "evaluate"]
    for command in commands:
        more = f" --labeler.model {model}" if command[:2] == ["task", "check"] else ""
        assert rlaif([*command, *shlex.split(smaller[command[0]] + more)]) == 0, command
    shown = " ".join(capsys.readouterr().out.split())
    assert "no problems: rlaif train --task mine.toml" in shown
    count = len(load_task(tmp_path / "mine.toml").prompts("test"))
    assert 0 < count < 128 and f"eval_prompts: {count}, all that split 'test' has (by default 128)" in shown
    assert f"prompts: {count}, all that split 'test' has" in shown and "no reward sees the gold measure" not in shown
    assert json.loads((tmp_path / "runs" / "eval" / "evaluation.json").read_text())
