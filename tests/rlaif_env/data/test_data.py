"""Prompts and preferences: what is read, what is refused and how, splits, and the rated corpus."""

from __future__ import annotations

import gzip
import json
import math
import sys
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_env.api import DataError, Preference
from rlaif_env.data import corpus
from rlaif_env.data import preferences as data
from rlaif_env.data import rows as rows_module
from rlaif_env.data.forms import messages_of

OWN = {"prompt": "p", "response_1": "one", "response_2": "two", "p_first": 0.25, "source": "ai:x", "meta": {"k": [1]}}
DIALOGUE = "\n\nHuman: Q\n\nAssistant:"
USER = {"role": "user", "content": "Q"}
YES = {"role": "assistant", "content": "Y"}
NO = {"role": "assistant", "content": "N"}


def write(path: Path, *rows: Any) -> Path:
    """Rows as lines: dictionaries as JSON, strings and bytes as they are."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def own(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**OWN, **changes}.items() if value != "absent"}


# Prompts

BAD_PROMPTS: list[tuple[Any, str]] = [
    ({"text": "x"}, "expected a field 'prompt', found the fields text"),
    ({"prompt": None}, "expected a field 'prompt', found null"),
    ({"prompt": ""}, "expected prompt to hold text, found ''"),
    ({"prompt": " \n"}, r"expected prompt to hold text, found ' \n'"),
    ({"prompt": 7}, "expected prompt to be a string, found int: 7"),
    ('{"prompt": NaN}', "expected numbers, found NaN"),
    ('{"prompt": "a", "x": -Infinity}', "expected numbers, found -Infinity"),
    (b'{"prompt": "caf\xe9"}', "expected UTF-8, found the byte 0xe9 at byte 16"),
    ("", "expected a row, found an empty line"),
    ('{"prompt": "a", "prompt": "b"}', "expected each key once, found 'prompt' twice"),
    ('{"prompt": ' + "[" * 100_000, "expected a JSON object, found one nested too deeply"),
    ({"prompt": "a\u0000b"}, "expected prompt to be plain text, found the control character U+0000 in it"),
    ('{"prompt": "a\x1bb"}', "expected a JSON object, found Invalid control character at"),
    ('{"prompt": "\\ud800"}', "expected prompt to be plain text, found the control character U+D800 in it"),
    ({"prompt": "a" * 11}, "expected prompt to have at most 10 characters, found 11"),
    ('"prompt"', "expected a JSON object, found str: '\"prompt\"'"),
    ('{"prompt": "a"', "expected a JSON object, found Expecting ',' delimiter at column 15"),
    ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "expected a JSON object, found Exceeds the limit"),
    ({"prompt": []}, "expected messages in prompt, found an empty list"),
    ({"prompt": [{"role": "user"}]}, "expected message 1 of prompt to have role and content, found {'role': 'user'}"),
    ({"prompt": [{"role": "tool", "content": "x"}]}, "expected message 1 of prompt to have a role of user, assistant"),
    ({"prompt": [{"role": "user", "content": ["x"]}]}, "expected message 1 of prompt to hold text alone, found ['x']"),
    ({"prompt": [{"role": "user", "content": 7}]}, "expected content to be a string, found int: 7"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PROMPTS, ids=[message[:60] for _, message in BAD_PROMPTS])
def test_each_bad_prompt_row_is_named_by_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "good"}, row, {"prompt": "also good"})
    with pytest.raises(DataError) as caught:
        list(data.read_prompts(path, max_characters=10))
    assert str(caught.value).startswith(f"{path}: 1 bad line; mend or remove what is named here\n  line 2: {message}")


def test_all_bad_rows_are_reported_together(tmp_path: Path) -> None:
    rows = [row for row, _ in BAD_PROMPTS]
    path = write(tmp_path / "p.jsonl", *rows, *({"no": i} for i in range(100)), {"prompt": "good"})
    with pytest.raises(DataError) as caught:
        list(data.read_prompts(path, max_characters=10))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(f": {len(rows) + 100} bad lines; mend or remove what is named here")
    assert [line.split(":")[0].strip() for line in lines[1:21]] == [f"line {i}" for i in range(1, 21)]
    assert lines[21:] == [f"  ... and {len(rows) + 80} more"]


def test_no_row_is_handed_on_after_a_bad_one(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": ""}, {"prompt": "b"})
    got = []
    with pytest.raises(DataError, match="line 2"):
        for prompt in data.read_prompts(path):
            got.append(prompt)
    assert got == ["a"]


def test_what_carries_no_data_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\xc3\xa9"}\r\n{"prompt": " b\\n", "other": 1}\r\n\r\n \n')
    assert list(data.read_prompts(path)) == ["aé", " b\n"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_files_and_gzip(tmp_path: Path, suffix: str) -> None:
    content = 'one prompt\r\n{"prompt": "not parsed"} \u2028 here\n'.encode()
    path = tmp_path / f"p.txt{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert list(data.read_prompts(path)) == ["one prompt", '{"prompt": "not parsed"} \u2028 here']
    path.write_bytes(gzip.compress(b"a\n\nb\n") if suffix else b"a\n\nb\n")
    with pytest.raises(DataError, match="line 2: expected a row, found an empty line"):
        list(data.read_prompts(path))


def test_prompts_of_messages_pairs_and_other_fields() -> None:
    rows = [
        {"prompt": [USER, YES, USER]},
        {"text": "a post", "other": 1},
        {"prompt": "wins", "text": "loses"},
        {"chosen": DIALOGUE + " Hello", "rejected": DIALOGUE + " No"},
    ]
    assert list(data.read_prompts(rows, ("prompt", "text"))) == [
        "\n\nHuman: Q\n\nAssistant: Y\n\nHuman: Q\n\nAssistant:",
        "a post",
        "wins",
        DIALOGUE,
    ]
    for bad, message in (
        (["text"], "row 1: expected a row of named fields, found str"),
        ([{"chosen": "yes", "rejected": "no"}], "expected chosen and rejected to begin with the same prompt"),
    ):
        with pytest.raises(DataError, match=message):
            list(data.read_prompts(bad))  # type: ignore[arg-type]


WHOLE_FILES = [
    ("missing.jsonl", None, "expected a file to read at .*missing.jsonl, found: No such file"),
    ("empty.jsonl", b"", "empty.jsonl: expected at least one prompt, found none"),
    ("blank.jsonl", b"\n\n", "blank.jsonl: expected at least one prompt, found none"),
    ("wide.jsonl", '{"prompt": "a"}'.encode("utf-16"), "wide.jsonl: expected UTF-8 text, found what looks like UTF-16"),
    ("packed.jsonl", gzip.compress(b"{}"), "packed.jsonl: expected UTF-8 text, found what looks like gzip"),
    (
        "cut.jsonl.gz",
        gzip.compress(b'{"prompt": "a"}\n' * 9)[:-9],
        "expected a whole file, found that it cannot be read on",
    ),
    (
        "plain.jsonl.gz",
        b'{"prompt": "a"}\n',
        "line 1: expected a whole file, found that it cannot be read on: Not a gzip",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), WHOLE_FILES, ids=[name for name, _, _ in WHOLE_FILES])
def test_files_that_are_wrong_as_a_whole(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(data.read_prompts(tmp_path / name))


# Preferences


def test_own_records_survive_writing_and_reading(tmp_path: Path) -> None:
    records = [
        Preference("p", "a", "b", 0.25, "ai:model", {"mass": 0.5, "nested": {"x": [1, None]}}),
        Preference("", "é\u2028\t\n", "🎬", 1, "human"),
        Preference("a\r\nb", "x" * 100_000, "y", 0.0),
    ]
    for name in ("r.jsonl", "r.jsonl.gz"):
        assert data.write_preferences(tmp_path / name, records) == 3
        assert list(data.read_preferences(tmp_path / name)) == records
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["r.jsonl", "r.jsonl.gz"]


def test_fields_of_ones_own_go_to_meta() -> None:
    [record] = data.read_preferences([own(id=7, source="absent")])
    assert record == Preference("p", "one", "two", 0.25, "human", {"k": [1], "id": 7})
    [record] = data.read_preferences([own(meta=None, prompt="absent")])
    assert (record.prompt, dict(record.meta)) == ("", {})


TURNS = DIALOGUE + " Y\n\nHuman: R\n\nAssistant:"
FORMS: list[tuple[dict[str, Any], tuple[str, str, str]]] = [
    ({"prompt": "p", "chosen": "y", "rejected": "n"}, ("p", "y", "n")),
    ({"prompt": "", "chosen": "y", "rejected": "n"}, ("", "y", "n")),
    ({"chosen": "The film was good", "rejected": "The film was bad"}, ("The film was", " good", " bad")),
    ({"chosen": "The film is", "rejected": "The films are"}, ("The", " film is", " films are")),
    ({"chosen": "a b", "rejected": "a b c"}, ("a", " b", " b c")),
    ({"chosen": "yes", "rejected": "no"}, ("", "yes", "no")),
    ({"chosen": TURNS + " S", "rejected": TURNS + " T"}, (TURNS, " S", " T")),
    ({"chosen": TURNS + " S", "rejected": DIALOGUE + " N"}, (DIALOGUE, " Y\n\nHuman: R\n\nAssistant: S", " N")),
    ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, (DIALOGUE, "Y", "N")),
    ({"chosen": [USER, YES], "rejected": [USER, NO]}, (DIALOGUE, "Y", "N")),
    (
        {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, {"role": "user", "content": "R"}, NO]},
        (DIALOGUE, "Y\n\nHuman: Q\n\nAssistant: Y", "Y\n\nHuman: R\n\nAssistant: N"),
    ),
    ({"prompt": "Q ", "chosen": [USER, YES], "rejected": [USER, NO]}, (DIALOGUE, "Y", "N")),
    ({"prompt": "Q", "chosen": [YES], "rejected": [NO]}, (DIALOGUE, "Y", "N")),
    ({"prompt": [USER], "chosen": "Y", "rejected": "N"}, (DIALOGUE, "Y", "N")),
    (
        {
            n: [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in (USER, a)]
            for n, a in (("chosen", YES), ("rejected", NO))
        },
        (DIALOGUE, "Y", "N"),
    ),
    (
        {"chosen": [USER, YES, USER, NO], "rejected": [USER, YES, USER, YES]},
        ("\n\nHuman: Q\n\nAssistant: Y\n\nHuman: Q\n\nAssistant:", "N", "Y"),
    ),
]


@pytest.mark.parametrize(("row", "expected"), FORMS)
def test_the_forms_of_trl(row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    [record] = data.read_preferences([row])
    assert (record.prompt, record.response_1, record.response_2) == expected
    assert (record.p_first, record.source) == (1.0, "human")


ARENA = {"conversation_a": [USER, YES], "conversation_b": [USER, NO], "question_id": "7"}
ANSWERS = {"prompt": "p", "response_a": "x", "response_b": "y"}
FROM_ZERO = {"prompt": "p", "response_0": "x", "response_1": "y"}
FROM_ONE = {"question": "p", "output_1": "x", "output_2": "y"}
CHOSEN = {"prompt": "p", "chosen": "x", "rejected": "y"}

JUDGED: list[tuple[dict[str, Any], float]] = [
    ({**ARENA, "winner": "model_a"}, 1),
    ({**ARENA, "winner": "model_b"}, 0),
    ({**ARENA, "winner": "tie (bothbad)"}, 0.5),
    ({**ARENA, "winner": "Tie"}, 0.5),
    ({**ANSWERS, "winner": "response_b"}, 0),
    ({**ANSWERS, "preference": "A"}, 1),
    ({**ANSWERS, "p_first": 0.25}, 0.25),
    ({**ANSWERS, "label": 0.5}, 0.5),
    ({**FROM_ZERO, "better_response_id": 1, "safer_response_id": 0}, 0),
    ({**FROM_ZERO, "label": 0.0}, 1),  # as pandas has whole numbers beside missing ones
    ({**FROM_ONE, "preference": 2}, 0),
    ({**FROM_ONE, "choice": "1"}, 1),
    ({**FROM_ONE, "votes": [1, 2, "tie", "output_1"]}, 0.625),
    ({**ANSWERS, "votes": {"a": 3, "b": 1}}, 0.75),
    ({**CHOSEN, "votes": ["chosen", "rejected", "chosen", "chosen"]}, 0.75),
    ({**CHOSEN, "tie": True}, 0.5),
    ({**CHOSEN, "tie": False}, 1),
    ({**CHOSEN, "margin": 0}, 0.5),
    ({**CHOSEN, "margin": 0.7}, 1),
    ({**CHOSEN, "score_chosen": 4.0, "score_rejected": 4.0}, 0.5),
    ({**CHOSEN, "score_chosen": 4.0, "score_rejected": 2.5, "label": "x"}, 1),
]


@pytest.mark.parametrize(("row", "p_first"), JUDGED)
def test_judgements_as_public_sets_have_them(row: dict[str, Any], p_first: float) -> None:
    [record] = data.read_preferences([row])
    assert record.p_first == p_first
    assert (record.prompt, record.response_1, record.response_2) in [("p", "x", "y"), (DIALOGUE, "Y", "N")]
    data_of = set(row) - {"prompt", "question", "p_first"} - {n for n in row if row[n] in ("x", "y") and n != "label"}
    assert set(record.meta) - {"prompt_messages"} == data_of - {"conversation_a", "conversation_b"}


AMBIGUOUS: list[tuple[dict[str, Any], str]] = [
    ({"chosen": [YES], "rejected": "y"}, "expected chosen and rejected to be both strings or both messages"),
    ({**ANSWERS, "label": 1}, "expected label to be 'response_a', 'response_b', an ending of theirs or 'tie', found 1"),
    ({**FROM_ONE, "preference": 0}, "expected preference to be 'output_1', 'output_2', an ending of theirs or 'tie'"),
    ({**FROM_ZERO, "label": True}, "found True; where that is a code, write p_first instead"),
    ({**ANSWERS, "winner": "c"}, "found 'c'"),
    (ANSWERS, "expected response_a, response_b and p_first, found no p_first, and no votes or winner"),
    ({**ANSWERS, "votes": []}, "expected votes to be a list of verdicts, or how many gave each"),
    ({**ANSWERS, "votes": {"a": -1, "b": 2}}, "expected votes to be a list of verdicts, or how many gave each"),
    ({**ANSWERS, "votes": {"a": 1, "c": 2}}, "expected a vote to be 'response_a'"),
    ({**CHOSEN, "margin": -1}, "expected a margin of chosen over rejected from 0, found -1"),
    ({**CHOSEN, "score_chosen": "4", "score_rejected": 4}, "expected score_chosen and score_rejected to be numbers"),
    ({"prompt": "R", "chosen": [USER, YES], "rejected": [USER, NO]}, "to go on from prompt or to begin with it"),
    (
        {"answer_0": "x", "answer_1": "y", "answer_2": "z"},
        "expected one form in a row, found answer_0, answer_1, answer",
    ),
]


@pytest.mark.parametrize(("row", "message"), AMBIGUOUS, ids=[message[:60] for _, message in AMBIGUOUS])
def test_a_judgement_that_could_mean_either_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(data.read_preferences([row]))
    assert message in str(caught.value)


def test_several_judgements_of_a_pair_become_a_soft_label() -> None:
    rows = [own(p_first=1.0), own(p_first=0.0), own(response_1="two", response_2="one", p_first=0.0), own(prompt="q")]
    one, other = data.averaged(data.read_preferences(rows))
    assert one == Preference("p", "one", "two", 2 / 3, "ai:x", {"k": [1], "judgements": 3})
    assert other == next(iter(data.read_preferences(rows[3:])))
    by_two = [Preference("p", "a", "b", 1.0, "human"), Preference("p", "a", "b", 0.0, "ai:x")]
    assert data.averaged(by_two) == by_two  # who judged is what a reward model is asked for


BAD_PREFERENCES: list[tuple[dict[str, Any], str]] = [
    (own(p_first=1.5), "expected p_first to be a number from 0 to 1, found 1.5"),
    (own(p_first=-0.1), "expected p_first to be a number from 0 to 1, found -0.1"),
    (own(p_first="0.5"), "expected p_first to be a number from 0 to 1, found '0.5'"),
    (own(p_first=True), "expected p_first to be a number from 0 to 1, found True"),
    (own(p_first="absent"), "expected response_1, response_2 and p_first, found no p_first"),
    (own(response_2="absent"), "expected response_1, response_2 and p_first, found no response_2"),
    (own(response_2=None), "expected response_1, response_2 and p_first, found no response_2"),
    (
        own(response_1=" "),
        "expected two responses, found the first one empty; remove it, or keep such pairs (in a task's TOML file: "
        "allow_empty = true under [source], in Python: allow_empty=True)",
    ),
    (own(response_1=3), "expected response_1 to be a string, found int: 3"),
    (own(response_2="one"), "expected two different responses, found the same one twice, 'one'; remove it, or"),
    (own(response_1="a\u0007"), "expected response_1 to be plain text, found the control character U+0007 in it"),
    (own(response_1="x" * 1_000_001), "expected response_1 to have at most 1000000 characters, found 1000001"),
    (own(prompt=["x"]), "expected message 1 of prompt to have role and content, found 'x'"),
    (own(prompt={}), "expected prompt to be a string, found dict: {}"),
    (own(meta=[1]), "expected meta to be an object, found list"),
    (own(source=1), "expected source to be a string, found int"),
    (own(k=1), "expected each fact once, found k both in meta and as a field"),
    (own(chosen="x"), "expected one form in a row, found response_1, response_2, chosen"),
    ({"prompt": "p", "chosen": "x", "rejected": "y"}, "expected the form of the rows before, response_1/response_2; f"),
    ({"prompt": "p", "chosen": "x"}, "expected both chosen and rejected, found only chosen"),
    ({"prompt": "p"}, "expected response_1, response_2 and p_first, or chosen and rejected; found the fields prompt"),
    (own(answer_a="x", answer_b="y"), "expected one form in a row, found response_1, response_2, answer_a, answer_b"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PREFERENCES, ids=[message[:60] for _, message in BAD_PREFERENCES])
def test_each_bad_preference_is_named_by_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "p.jsonl", OWN, row, own(prompt="another"))
    with pytest.raises(DataError) as caught:
        list(data.read_preferences(path))
    assert f"1 bad line; mend or remove what is named here\n  line 2: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"chosen": DIALOGUE + " a", "rejected": "\n\nHuman: R\n\nAssistant: a"}], "one dialogue with two last turns"),
        (
            [{"chosen": [USER, YES], "rejected": [USER]}],
            "expected chosen to go on with a message of the assistant, found",
        ),
        ([{"chosen": [YES], "rejected": [NO]}], "expected a message before the responses, found none"),
        (
            [{"chosen": "a", "rejected": "b"}, {"prompt": "", "chosen": "a", "rejected": "b"}],
            "row 2: expected the form of",
        ),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b", "p_chosen": 2}],
            "expected p_first to be a number from 0 to 1",
        ),
    ],
)
def test_bad_pairs_of_trl_forms(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(data.read_preferences(rows))


def test_what_may_be_allowed() -> None:
    rows = [own(response_2="one"), own(response_1="")]
    assert len(list(data.read_preferences(rows, allow_identical=True, allow_empty=True))) == 2
    [record] = data.read_preferences([own(response_1="x" * 2_000_000)], max_characters=2_000_000)
    assert len(record.response_1) == 2_000_000


def test_reading_takes_constant_memory(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        path = tmp_path / "many.jsonl"
        with path.open("w") as file:
            for i in range(lines):
                file.write(json.dumps(own(response_1=f"{i} " + "x" * 1000)) + "\n")
        tracemalloc.start()
        assert sum(1 for _ in data.read_preferences(path)) == lines
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(3000) < peak(500) + 100_000  # 2.5 MB more to read


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    data.write_preferences(path, [Preference("p", "a", "b", 1)])
    before = path.read_bytes()
    with pytest.raises(DataError, match="row 2: expected values that JSON can hold, found: Object of type set"):
        data.write_preferences(path, [Preference("p", "a", "b", 1), Preference("p", "a", "b", 1, "human", {"x": {1}})])
    with pytest.raises(DataError, match="row 1: expected values that JSON can hold, found: Out of range float"):
        data.write_preferences(path, [Preference("p", "a", "b", 1, "human", {"x": math.nan})])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match="expected a folder to write to at"):
        data.write_preferences(tmp_path / "no" / "r.jsonl", [])


def test_export_for_trl(tmp_path: Path) -> None:
    records = [Preference("p", "a", "b", 0.25, "ai:x", {"k": 1}), Preference(DIALOGUE, "c", "d", 1.0)]
    path = tmp_path / "trl.jsonl"

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    assert data.export_trl(records, path) == (2, 0)
    shared = {"p_chosen": 0.75, "source": "ai:x", "meta": {"k": 1}}
    assert rows()[0] == {"prompt": "p", "chosen": "b", "rejected": "a", **shared}
    assert list(data.read_preferences(path)) == [records[0].swapped(), records[1]]

    assert data.export_trl(records, path, conversational=True) == (2, 0)
    assert rows()[0]["prompt"] == [{"role": "user", "content": "p"}]
    assert (rows()[1]["prompt"], rows()[1]["chosen"]) == ([USER], [{"role": "assistant", "content": "c"}])
    again = list(data.read_preferences(path))
    assert (again[1].prompt, again[1].response_1, again[1].response_2) == (DIALOGUE, "c", "d")
    assert data.export_trl(again, path, conversational=True) == (2, 0)
    assert list(data.read_preferences(path)) == again

    tie = [*records, Preference("p", "a", "b", 0.5)]
    with pytest.raises(DataError, match=r"record 3: expected one response to be preferred, found p_first 0.5"):
        data.export_trl(tie, tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()
    assert data.export_trl(tie, path, skip_ties=True) == (2, 1)
    with pytest.raises(DataError, match="record 1: expected a prompt to make a conversation of, found an empty one"):
        data.export_trl([Preference("", "a", "b", 1)], path, conversational=True)


def test_prompts_become_messages() -> None:
    assert messages_of("Write a poem.") == [{"role": "user", "content": "Write a poem."}]
    assert messages_of("\n\nHuman: a\n\nb: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:") == [
        {"role": "user", "content": "a\n\nb: c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    assert messages_of("\n\nAssistant:") == [{"role": "user", "content": "\n\nAssistant:"}]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=30)
WORDS = TEXT.filter(str.strip)


@settings(deadline=None)
@given(TEXT, TEXT, TEXT, st.floats(0, 1), st.dictionaries(TEXT, st.integers() | TEXT, max_size=3))
def test_any_record_survives(prompt: str, one: str, two: str, p: float, meta: dict[str, Any]) -> None:
    record = Preference(prompt, one, two, p, "s", meta)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.jsonl"
        data.write_preferences(path, [record])
        assert list(data.read_preferences(path, allow_identical=True, allow_empty=True)) == [record]


@settings(deadline=None)
@given(TEXT, WORDS, WORDS)
def test_an_implicit_prompt_loses_nothing(prompt: str, one: str, two: str) -> None:
    row = {"chosen": prompt + one, "rejected": prompt + two}
    [record] = data.read_preferences([row], allow_identical=True)
    assert record.prompt + record.response_1 == row["chosen"]
    assert record.prompt + record.response_2 == row["rejected"]


# Splits


def test_splits_depend_on_the_text_alone() -> None:
    assert data.split_of("The  film\n") == data.split_of("the film")
    shares = Counter(data.split_of(f"text {i}") for i in range(20_000))
    for name, share in corpus.SPLIT_FRACTIONS.items():
        assert abs(shares[name] - 20_000 * share) < 4 * math.sqrt(20_000 * share * (1 - share))  # 4 standard deviations
    assert len({data.split_of("x", {"a": 0.5, "b": 0.5}, seed) for seed in range(20)}) == 2
    assert {data.split_of(f"{i}", {"none": 0.0, "all": 1.0}) for i in range(50)} == {"all"}
    # A promise to whoever trained on one side: these never change.
    promised = ["validation", "gold", "test", "train", "gold", "train", "train", "train"]
    assert [data.split_of(text) for text in "abcdefgh"] == promised
    for wrong in ({}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": math.nan}):
        with pytest.raises(DataError, match="expected shares from 0 that sum to 1, found"):
            data.split_of("x", wrong)


# Hugging Face data sets


def test_data_set_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is needed")
    rows = datasets.Dataset.from_list([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])
    assert list(data.read_prompts(rows)) == ["a", "b"]
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "many")
    assert list(data.read_prompts(data.dataset_rows(str(tmp_path / "one")))) == ["a", "b"]
    assert list(data.read_prompts(data.dataset_rows(str(tmp_path / "many"), "test"))) == ["a", "b"]
    with pytest.raises(DataError, match=r"expected the data set '.*many' with a split 'train', found: KeyError"):
        data.dataset_rows(str(tmp_path / "many"))
    pairs = datasets.Dataset.from_list([{"chosen": [USER, YES], "rejected": [USER, NO]}])
    assert next(data.read_preferences(pairs)).response_1 == "Y"


def test_parquet_folders_and_names(tmp_path: Path) -> None:
    pyarrow, parquet = (
        pytest.importorskip(name, reason="the extra 'data' is needed") for name in ("pyarrow", "pyarrow.parquet")
    )
    rows = [own(winner="x"), {"prompt": "q", "response_1": "a", "response_2": "b", "p_first": 1.0}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    written = write(tmp_path / "preferences.jsonl", *rows)
    records = list(data.read_preferences(written))
    assert list(data.read_preferences(tmp_path / "p.parquet")) == records
    assert list(data.read_preferences(tmp_path)) == records  # a folder that rlaif label wrote
    assert list(data.read_prompts(str(tmp_path / "p.parquet"))) == ["p", "q"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"bad\.parquet: expected a Parquet file, found"):
        list(data.read_preferences(tmp_path / "bad.parquet"))
    with pytest.raises(DataError, match=r"expected a Parquet file, found: .*No such file"):
        list(data.read_preferences(tmp_path / "none.parquet"))


def test_a_data_set_by_its_name_with_part_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the extra 'data' is needed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "owner" / "set" / "harmless").mkdir(parents=True)
    write(tmp_path / "owner" / "set" / "harmless" / "test.jsonl", CHOSEN)
    write(tmp_path / "owner" / "set" / "harmless" / "train.jsonl", CHOSEN, {**CHOSEN, "prompt": "q"})
    assert [r.prompt for r in data.read_preferences(tmp_path / "owner/set/harmless")] == ["p", "q"]
    assert [r.prompt for r in data.read_preferences(f"{tmp_path}/owner/set/harmless:test")] == ["p"]
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(rows_module, "dataset_rows", lambda *name, **part: asked.append((*name, part)) or [CHOSEN])
    for name in ("owner/name", "owner/name:test", "owner/name/harmless-base:test"):
        assert next(data.read_preferences(name)).prompt == "p"
    assert asked == [
        ("owner/name", "train", {"config": None}),
        ("owner/name", "test", {"config": None}),
        ("owner/name", "test", {"config": "harmless-base"}),
    ]


@pytest.mark.parametrize(
    "name",
    ["no.jsonl", "owner/no.jsonl", "./a/b/c/d", "owner", "/owner/name", "tests/no", "a" * 300],
)
def test_a_file_that_is_not_there_is_no_name_of_a_data_set(name: str) -> None:
    with pytest.raises(
        DataError, match=f"expected a file to read at {Path(name)}, found: (No such file|File name too long)"
    ):
        list(data.read_preferences(name))


def test_without_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"expected the package datasets to read the data set 'x', .* pip install datasets"
    ):
        data.dataset_rows("x")


# The rated corpus


def test_snippets_agree_with_the_published_means() -> None:
    snippets = data.movie_snippets()
    assert len(snippets) == 10_605 and len({snippet.id for snippet in snippets}) == 10_605
    file = corpus.assets.corpus_folder() / "movieReviewSnippets_GroundTruth.txt"
    columns = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    published = {int(number): float(mean) for number, mean, _ in columns}
    assert max(abs(snippet.mean - published[snippet.id]) for snippet in snippets) < 1e-6
    assert {rating for snippet in snippets for rating in snippet.ratings} == set(range(-4, 5))
    assert {len(snippet.ratings) for snippet in snippets} == set(range(15, 30))
    for snippet in snippets:
        assert "&amp;" not in snippet.text and snippet.text == " ".join(snippet.text.split())
    assert sum("é" in snippet.text for snippet in snippets) > 50  # read as UTF-8
    sides: dict[str, set[str]] = {}
    for snippet in snippets:
        sides.setdefault(snippet.text, set()).add(snippet.split)
    assert len(sides) < len(snippets) and {len(side) for side in sides.values()} == {1}
    assert sum(len(data.movie_snippets(split)) for split in data.SPLITS) == 10_605
    with pytest.raises(DataError, match="expected a split of train, validation, test, gold, found 'dev'"):
        data.movie_snippets("dev")


def test_human_preferences_are_the_raters_own() -> None:
    records = data.human_preferences("test", 400, seed=3, min_gap=0.5)
    snippets = {snippet.id: snippet for snippet in data.movie_snippets("test")}
    assert len({frozenset(record.meta["ids"]) for record in records}) == 400
    for record in records:
        first, second = (snippets[number] for number in record.meta["ids"])
        assert (record.prompt, record.response_1, record.response_2) == ("", first.text, second.text)
        assert abs(first.mean - second.mean) > 0.5 - 1e-9 and record.meta["means"] == [first.mean, second.mean]
        assert record.meta["raters"] == [len(first.ratings), len(second.ratings)]
    first, second = (snippets[number] for number in records[0].meta["ids"])
    wins = sum((a > b) + (a == b) / 2 for a in first.ratings for b in second.ratings)
    assert records[0].p_first == pytest.approx(wins / len(first.ratings) / len(second.ratings))
    assert 0.4 < np.mean([record.p_first > 0.5 for record in records]) < 0.6  # 4 standard deviations
    assert records == data.human_preferences("test", 400, seed=3, min_gap=0.5)
    assert records != data.human_preferences("test", 400, seed=4, min_gap=0.5)


def test_human_preferences_are_drawn_from_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    ratings = [(0, 1), (2, 2), (2, 2), (-1, 0)]  # means 0.5, 2, 2, -0.5
    few = [corpus.Snippet(number, f"text {number}", given) for number, given in enumerate(ratings)]
    monkeypatch.setattr(corpus, "movie_snippets", lambda split: few)
    found = {frozenset(record.meta["ids"]) for record in data.human_preferences("test", 6)}
    assert found == {frozenset(pair) for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))}
    found = {frozenset(record.meta["ids"]) for record in data.human_preferences("test", 4, min_gap=1.5)}
    assert found == {frozenset(pair) for pair in ((0, 1), (0, 2), (1, 3), (2, 3))}
    for n in (0, 5):
        with pytest.raises(
            DataError, match=f"expected n from 1 to 4, the pairs of 'test' with a gap of 1.5; found {n}"
        ):
            data.human_preferences("test", n, min_gap=1.5)
