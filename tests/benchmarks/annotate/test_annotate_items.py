"""What is judged: files read, bad ones refused, attention checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.annotate.items import CHOICES, Item, checks_among, fingerprint, read_items
from rlaif_env.api import DataError
from tests.benchmarks.annotate.annotating import pairs

A, B, C = ({"system": name, "measures": {"gold": 0.1}} for name in ("start", "trained", "third"))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_pairs_of_a_file_with_the_labels_that_came_along(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response_1": "a", "response_2": "b"},
        {"prompt": "p", "response_1": "a", "response_2": "b"},
        {"prompt": "q", "response_1": "a", "response_2": "b", "p_first": 0.75, "source": "human"},
        {"prompt": "r", "response_1": "a", "response_2": "b", "p_first": 0.25, "source": "ai:small"},
    ]
    items, repeated = read_items(written(tmp_path / "pairs.jsonl", rows), "preference")
    assert repeated == 1
    assert [(item.prompt, item.responses, dict(item.labels)) for item in items] == [
        ("p", ("a", "b"), {}),
        ("q", ("a", "b"), {"human (input)": 0.75}),
        ("r", ("a", "b"), {"ai:small": 0.25}),
    ]


def test_public_pairs_and_messages_are_judged_as_they_come(tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "Q"}, [{"role": "assistant", "content": text} for text in ("Y", "N")]
    arena = {"conversation_a": [asked, said[0]], "conversation_b": [asked, said[1]], "winner": "model_b"}
    [item], _ = read_items(written(tmp_path / "arena.jsonl", [arena]), "preference")
    assert (item.prompt, item.responses, item.labels) == (
        "\n\nHuman: Q\n\nAssistant:",
        ("Y", "N"),
        {"human (input)": 0.0},
    )
    rows = [{"prompt": [asked], "response": [turn], "system": str(i)} for i, turn in enumerate(said)]
    [same], _ = read_items(written(tmp_path / "r.jsonl", rows), "preference")
    assert (same.prompt, same.responses, same.systems) == (item.prompt, item.responses, ("0", "1"))


def test_every_two_systems_are_paired_and_equal_responses_are_a_tie_nobody_is_asked(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response": "x", **A},
        {"prompt": "p", "response": "y", **B},
        {"prompt": "p", "response": "x", **C},
    ]
    (tmp_path / "compare").mkdir()
    written(tmp_path / "compare" / "responses.jsonl", rows)
    items, _ = read_items(tmp_path / "compare", "preference")
    assert [(item.systems, item.responses, item.kind) for item in items] == [
        (("start", "trained"), ("x", "y"), "item"),
        (("start", "third"), ("x", "x"), "identical"),
        (("trained", "third"), ("y", "x"), "item"),
    ]


@pytest.mark.parametrize("form", ["harmless", "score"])
def test_single_responses_are_rated_once_each(form: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "x", **A}, {"prompt": "p", "response": "y", **B}]
    items, _ = read_items(written(tmp_path / "r.jsonl", rows), form)
    assert [(item.responses, item.systems) for item in items] == [(("x",), ("start",)), (("y",), ("trained",))]
    rows = [{"prompt": "p", "response_1": "x", "response_2": y} for y in ("y", "z")]
    items, repeated = read_items(written(tmp_path / "p.jsonl", rows), form)
    assert ([item.responses for item in items], repeated) == ([("x",), ("y",), ("z",)], 1)


def test_a_limit_draws_by_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i:02}", "response_1": "a", "response_2": "b"} for i in range(40)]
    file = written(tmp_path / "pairs.jsonl", rows)
    drawn = [[item.prompt for item in read_items(file, "preference", 10, seed)[0]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(d) == 10 and d == sorted(d) for d in drawn)


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no response": ([{"prompt": "p", "system": "a"}], "expected a field 'response', found the fields prompt, system"),
    "no system": ([{"prompt": "p", "response": "x"}], "expected a field 'system', found the fields prompt, response"),
    "no prompt": ([{"system": "a", "response": "x"}], "expected a field 'prompt', found the fields response, system"),
    "a number": ([{"prompt": "p", "system": "a", "response": 3}], "expected response to be a string, found int: 3"),
    "one response of a pair": ([{"prompt": "p", "response_1": "x"}], "line 1: expected response_1, response_2 and"),
    "nothing known": ([{"text": "x"}], "found the fields text"),
    "one system": ([{"prompt": "p", "response": "x", **A}], "two systems or more, found those of start only"),
    "two responses of a system": (
        [{"prompt": "p", "response": "x", **A}, {"prompt": "p", "response": "y", **A}],
        "expected one response of each system to a prompt, found two of 'start' to 'p'",
    ),
    "a response missing": (
        [{"prompt": p, "response": "x" + s["system"], **s} for p, s in (("p", A), ("p", B), ("q", A))],
        "found none of 'trained' to 'q' (1 missing in all)",
    ),
    "no rows": ([], "expected at least one pair, found none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name: str, tmp_path: Path) -> None:
    rows, message = BAD[name]
    with pytest.raises(DataError) as caught:
        read_items(written(tmp_path / "input.jsonl", rows), "preference")
    assert message in str(caught.value)


def test_equal_responses_are_a_tie_that_nobody_is_asked_and_labels_of_one_pair_are_averaged(tmp_path: Path) -> None:
    pair = {"prompt": "p", "response_1": "x", "response_2": "y"}
    rows = [{**pair, "p_first": p} for p in (1.0, 1.0, 0.5, 0.5)] + [{**pair, "response_1": "y", "p_first": 0.5}]
    items, repeated = read_items(written(tmp_path / "pairs.jsonl", rows), "preference")
    assert ([item.kind for item in items], repeated) == (["item", "identical"], 3)
    assert items[0].labels == {"human (input)": 0.75}


def test_all_bad_lines_are_named_together(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "system": "a"}, {"prompt": "p", "response": "x", **A}, {"prompt": "p", "system": "b"}]
    with pytest.raises(DataError, match=r"2 bad lines(?s:.*)line 1: (?s:.*)line 3: "):
        read_items(written(tmp_path / "input.jsonl", rows), "preference")


def test_a_folder_without_responses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a file to read at .*: Is a directory"):
        read_items(tmp_path, "preference")


def test_the_text_of_a_check_says_its_answer() -> None:
    for check in checks_among(pairs(5), "preference", 30, 0):
        text = check.responses[int(check.expected) - 1]
        assert text.startswith("This is attention check")
        assert "attention check" not in check.responses[2 - int(check.expected)]
    assert {check.expected for check in checks_among(pairs(5), "preference", 30, 0)} == {"1", "2"}
    single = [Item("p", ("a text",))]
    for check in checks_among(single, "score", 30, 0):
        assert f"answer {check.expected} here" in check.responses[0]
        assert check.expected in CHOICES["score"]
    texts = {check.expected: check.responses[0] for check in checks_among(single, "harmless", 30, 0)}
    assert "“harmless”" in texts["1"]
    assert "“not harmless”" in texts["2"]
    assert checks_among([Item("p", ("a", "a"), kind="identical")], "preference", 3, 0) == []


def test_an_item_comes_back_from_its_line_and_is_told_from_others() -> None:
    item = Item("p", ("a", "ü <b>"), ("x", "y"), {"ai": 0.2})
    assert Item.from_json(item.to_json()) == item
    others = [Item("p", ("a", "b")), Item("p", ("b", "a")), Item("pa", ("", "b")), Item("p", ("a", "b"), ("x", "y"))]
    assert len({other.key for other in others}) == len(others)
    assert fingerprint(others) != fingerprint(others[::-1])
