"""`rlaif report`: what is on the page, that model output stays text, and what a bad folder is told."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.report import build, main, write_report
from benchmarks.report.contents import Report
from benchmarks.report.curves import curve, curves
from benchmarks.report.definitions import definitions_of
from benchmarks.report.findings import as_tables, verdict
from benchmarks.report.folders import ROOM
from benchmarks.report.page import _decimals, _shown, _value, pieces
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.tables import Table, is_number

EVIL = [
    "<script>window.ran = true</script>",
    "</script><script>window.ran = true</script>",
    "<!--<script>",
    "]]></SCRIPT ><img src=x onerror='window.ran = true'>",
    "<img src='https://example.invalid/x.png' onerror=\"window.ran = true\">",
    "&lt;b&gt; & &amp; \" ' ` ${1}",
    "مرحبا \u202e gpj.exe \u2066 עברית",
    "👩‍👩‍👧‍👦 café 日本語のテキスト",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f return \r end",
    "line \u2028 paragraph \u2029 next \x85",
    "half \ud800 pair \udfff",
    "[[body]] [[policy]] {{title}}",
    "a" * 100_000,
    "",
]


class Page(HTMLParser):
    """A page as a browser would see it without running its script."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.data: list[Any] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self.comments: list[str] = []
        self._script = ""
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID and tag not in ("path", "text"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self._script = dict(attrs).get("type") or "code"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "text"):
            assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self._script == "application/json":
                self.data.append(json.loads(data))
            else:
                self.scripts.append(data)
            return
        if self.open and self.open[-1] == "style":
            return
        self.texts.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(table: Table) -> Page:
    return Page("".join(pieces(Report("title", "kind", tables=[table]))))


def lines(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def interval(estimate: float, low: float | None, high: float | None, n: int = 64) -> dict[str, float | None]:
    return {"estimate": estimate, "low": low, "high": high, "n": n, "units": n}


def training_run(folder: Path, *, updates: int = 30) -> Path:
    folder.mkdir()
    config = {"task": "movie-review", "reward": "direct-llm", "model": "tiny", "updates": updates, "seed": 3}
    record = {
        "command": "train",
        "config": config,
        "started": "2026-01-01T00:00:00+0000",
        "command_line": ["rlaif", "train", "--reward", "direct-llm"],
        "versions": {"torch": "2.9.0"},
        "git_commit": "0123abc",
    }
    (folder / "config.json").write_text(json.dumps(record))
    lines(
        folder / "metrics.jsonl",
        [{"step": i, "reward": i / 10, "kl": i * 0.1, "loss": -i * 1.0} for i in range(1, updates + 1)],
    )
    rows = [
        {
            "step": step,
            "prompt": f"prompt {prompt}",
            "response": f" answer {step} {k}",
            "reward": k / 10,
            "prompt_index": prompt,
            "finish_reason": "eos",
        }
        for step in (1, 2)
        for prompt in range(3)
        for k in range(4)
    ]
    lines(folder / "samples.jsonl", rows)
    evaluation = {
        "reward": [interval(0.1, 0, 0.2), interval(0.4, 0.3, 0.5), interval(0.3, 0.2, 0.4)],
        "gold": [interval(0.2, 0.1, 0.3), interval(0.5, 0.4, 0.6), interval(0.3, 0.2, 0.4)],
        "kl": [interval(0, 0, 0), interval(8.25, 7, 9), interval(8.25, 7, 9)],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    held = [
        {
            "prompt": f"held out {i}",
            "before": {"response": f"a plain film {i}", "reward": i / 64, "gold": 0.5, "length": 4},
            "after": {"response": f"a truly wonderful film {i}", "reward": 1 - i / 64, "gold": 1.0, "length": 5},
        }
        for i in range(64)
    ]
    lines(folder / "evaluation.jsonl", held)
    return folder


def comparison(folder: Path, responses: Sequence[str] = ("one", "two", "three"), **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    found = {
        "title": "Rewards <compared> & told",
        "facts": {"task": "movie-review", "seeds": [0, 1], "minutes": 1.5, "failures": {"judge": 2}},
        "tables": [
            {
                "title": "Main",
                "caption": "Wilson intervals.",
                "columns": ["system", "win rate", "n", "note"],
                "rows": [["sft", "9.5% [4.0%, 20.1%]", 5, "base"], ["human-rm", "61.0% [50.0%, 70.0%]", 1200, None]],
            }
        ],
        "figures": [],
        "warnings": ["One seed <only>."],
        **more,
    }
    (folder / "comparison.json").write_text(json.dumps(found))
    rows = [
        {
            "prompt": f"prompt {i}: {text[:50]}",
            "system": system,
            "response": text if system == "sft" else f"{text} indeed",
            "measures": {"gold": i / 7 if system == "sft" else -i / 7, "length": len(text)},
        }
        for system in ("sft", "human-rm")
        for i, text in enumerate(responses)
    ]
    lines(folder / "responses.jsonl", rows)
    return folder


# --- what is on the page ----------------------------------------------------------------------------------------------


def test_a_training_run(tmp_path: Path) -> None:
    out = write_report(training_run(tmp_path / "r7"))
    assert out == tmp_path / "r7" / "report.html"
    page = Page(out.read_text(encoding="utf-8"))
    assert "direct-llm on movie-review" in page.text
    assert "Training run r7" in page.text
    assert "went from 0.200 to 0.500 on held-out prompts: +0.300 [+0.200, +0.400]." in page.text
    assert ["gold", "0.200", "0.500", "0.300", "0.200", "0.400"] in page.rows
    assert ["kl", "0.000", "8.250", "8.250", "7.000", "9.000"] in page.rows
    assert "30 of 30" in page.text
    assert page.count("svg") == 3, "reward, KL, and the loss among the further curves"
    assert "rlaif train --reward direct-llm" in page.text
    assert "0123abc" in page.text
    assert "what the environment paid for a response" in page.text
    held, training = page.data
    assert (held["systems"], held["measures"]) == (["before", "after"], ["reward", "gold", "length"])
    assert len(held["rows"]) == 64
    assert held["rows"][32] == [
        "held out 32",
        [[0, "a plain film 32", [0.5, 0.5, 4]], [1, "a truly wonderful film 32", [0.5, 1, 5]]],
        [],
    ]
    assert (training["systems"], training["extras"], len(training["rows"])) == (["policy"], ["update"], 6)
    assert training["rows"][3][0] == "prompt 0"
    assert training["rows"][3][2] == [2]
    assert [answer[2] for answer in training["rows"][3][1]] == [[0], [0.1], [0.2], [0.3]]


def test_a_comparison(tmp_path: Path) -> None:
    page = Page(build(comparison(tmp_path / "c", advice=["Best by people: human-rm <b>."])))
    assert "Rewards <compared> & told" in page.text
    assert "One seed <only>." in page.text
    assert page.text.index("human-rm <b>.") < page.text.index("One seed <only>.")
    assert page.rows == [
        ["system", "win rate", "n", "note"],
        ["sft", "9.5% [4.0%, 20.1%]", "5", "base"],
        ["human-rm", "61.0% [50.0%, 70.0%]", "1,200", "–"],
    ]
    values = [attributes.get("data-value") for tag, attributes in page.tags if tag == "td"]
    assert values == [None, "9.5", "5.0", None, None, "61.0", "1200.0", None]
    assert "0, 1" in page.text, "a list is one fact"
    assert '"judge": 2' in page.text, "a nested fact stands with the provenance"
    (data,) = page.data
    assert [row[0] for row in data["rows"]] == ["prompt 0: one", "prompt 1: two", "prompt 2: three"]
    assert data["rows"][1][1] == [[0, "two", [0.142857, 3]], [1, "two indeed", [-0.142857, 3]]]


def test_an_evaluation_with_responses_alone_gets_its_means(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "system": "a", "response": "x", "measures": {"gold": 1.0}},
        {"prompt": "q", "system": "a", "response": "y", "measures": {"gold": 2.0}},
        {"prompt": "q", "system": "b", "response": "z", "measures": {"gold": None}},
        {"prompt": "r", "system": "a", "response": "y", "measures": {"gold": None}},
    ]
    lines(tmp_path / "responses.jsonl", rows)
    page = Page(build(tmp_path))
    assert ["a", "3", "1.500"] in page.rows
    assert ["b", "1", "–"] in page.rows
    assert "b has no response to 2 of 3 prompts." in page.text
    assert "a: gold is missing in 1 of 3 responses." in page.text


def test_two_prompts_of_the_same_words_stay_two(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "system": system, "response": f"{system}{i}", "measures": {}} for system in "ab" for i in (1, 2)
    ]
    lines(tmp_path / "responses.jsonl", rows)
    (data,) = Page(build(tmp_path)).data
    assert data["rows"] == [["p", [[0, "a1", []], [1, "b1", []]], []], ["p", [[0, "a2", []], [1, "b2", []]], []]]


def test_a_reward_model_and_a_labelling_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"command": "train-rm", "config": {"model": "tiny", "seed": 0}}))
    report = {
        "figures": {"human": {"pairs": 600, "accuracy": interval(0.74, 0.7, 0.78, 600), "accuracy_at_gap": None}},
        "curve": [{"pairs": 128, "accuracy": 0.7}, {"pairs": 256, "accuracy": 0.75}],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "reliability.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    picture = "iVBORw0KGgo="
    record = {"prompt": "", "response_1": "good", "response_2": "bad", "p_first": 0.75, "meta": {"human_p_first": 1.0}}
    lines(tmp_path / "preferences.jsonl", [record])
    page = Page(build(tmp_path))
    assert "Reward model" in page.text
    assert ["figures · human · accuracy", "0.740", "0.700", "0.780", "600", "600"] in page.rows
    assert ["figures · human · pairs", "600"] in page.rows
    assert ["figures · human · accuracy_at_gap", "–"] in page.rows
    assert ["256", "0.750"] in page.rows
    assert [a["src"] for tag, a in page.tags if tag == "img"] == [f"data:image/png;base64,{picture}"]
    (data,) = page.data
    assert data["rows"] == [["", [[0, "good", [0.75, 1]], [1, "bad", [0.25, 0]]], []]]


@pytest.mark.parametrize(
    ("gold", "reward", "expected"),
    [
        (interval(0.2, 0.1, 0.3), interval(0.2, 0.1, 0.3), []),
        (interval(0.0, -0.1, 0.1), interval(0.2, 0.1, 0.3), ["holds 0: no gain was shown."]),
        (interval(0.2, None, None, 4), interval(0.2, None, None, 4), ["nothing was shown."]),
        (interval(-0.2, -0.3, -0.1), interval(0.2, 0.1, 0.3), ["fell while the reward rose: over-optimisation."]),
        (interval(-0.2, -0.3, -0.1), interval(0.0, -0.1, 0.1), ["The gold measure fell."]),
    ],
)
def test_the_finding_is_stated_as_it_came_out(gold: dict, reward: dict, expected: list[str]) -> None:
    nothing = interval(0, 0, 0)
    _, warnings = verdict({"gold": [nothing, nothing, gold], "reward": [nothing, nothing, reward]})
    assert len(warnings) == len(expected)
    assert all(found.endswith(end) for found, end in zip(warnings, expected, strict=True))


def test_without_a_gold_measure_the_page_says_so() -> None:
    assert verdict({"reward": []}) == (
        "",
        ["No gold measure was taken: nothing here says whether a higher reward is a better text."],
    )


def test_a_reward_that_was_changed_is_a_warning(tmp_path: Path) -> None:
    run = training_run(tmp_path / "r", updates=10)
    record = json.loads((run / "config.json").read_text())
    changes = {"4": "reward_options.minimum_mass 0.001 -> 1e-05", "7": "reward_options.shots 0 -> 2"}
    (run / "config.json").write_text(json.dumps(record | {"reward_changes": changes}))
    text = Page(build(run)).text
    for update, what in changes.items():
        assert f"The reward was changed after update {update}: {what}." in text


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = training_run(tmp_path / "r", updates=10)
    (run / "evaluation.json").unlink()
    (run / "evaluation.jsonl").unlink()
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: text.index('{"step": 8')] + '{"step": 8, "rew')
    with (run / "samples.jsonl").open("a") as stream:
        stream.write('{"step": 3, "prompt": "half a li')
    page = Page(build(run))
    assert "The run has made 7 of 10 updates." in page.text
    assert "There is no evaluation on held-out prompts" in page.text
    assert "metrics.jsonl ends within a line, which was left out" in page.text
    assert "samples.jsonl ends within a line, which was left out" in page.text
    (data,) = page.data
    assert len(data["rows"]) == 6


def test_nested_figures_are_all_in_the_tables() -> None:
    rng = random.Random(0)

    def nested(depth: int) -> Any:
        if depth == 0:
            return rng.choice(
                [rng.random(), rng.randrange(9), "word", None, True, [1, 2], interval(rng.random(), 0, 1)]
            )
        return {f"k{i}": nested(rng.randrange(depth)) for i in range(3)}

    def leaves(value: Any) -> int:
        if isinstance(value, dict) and "estimate" not in value:
            return sum(map(leaves, value.values()))
        return 1

    for _ in range(30):
        found = nested(3)
        assert sum(len(table.rows) for table in as_tables(found)) == leaves(found)


# --- numbers, curves, names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        ([0.12345, 0.5], ["0.123", "0.500"]),
        ([12.345, -0.5], ["12.35", "−0.50"]),
        ([1234567, -3], ["1,234,567", "−3"]),
        ([1234.56], ["1,234.6"]),
        ([0.5, 0.00042], ["0.500", "4.2e−4"]),
        ([2.5e9], ["2.5e9"]),
        ([0.0], ["0.000"]),
    ],
)
def test_numbers_are_shown_with_the_decimals_of_their_column(cells: list[float], shown: list[str]) -> None:
    assert [_shown(cell, _decimals(cells)) for cell in cells] == shown


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        (3, 3.0),
        ("52.8% [45.9%, 59.5%]", 52.8),
        ("−0.25 [−1, 0]", -0.25),
        ("+1,200", 1200.0),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("2026-01-01", None),
        ("3rd", None),
        ("text", None),
        ("", None),
        (None, None),
    ],
)
def test_a_cell_is_sorted_by_the_number_it_begins_with(cell: Any, value: float | None) -> None:
    assert _value(cell) == value


def test_a_column_with_one_word_in_it_is_no_column_of_numbers() -> None:
    page = page_of(Table("t", ["a", "b"], [["1", 2], ["one", 3]]))
    assert [a.get("data-kind") for tag, a in page.tags if tag == "th"] == [None, "number"]


def test_a_table_of_many_rows_is_folded_and_whole() -> None:
    page = page_of(Table("t", ["a"], [[i] for i in range(400)]))
    assert len(page.rows) == 401
    assert "Show 400 rows" in page.text


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, True), (0.5, True), (True, False), (10**400, False), (float("nan"), False), ("1", False)],
)
def test_what_is_a_number(value: object, expected: bool) -> None:
    assert is_number(value) is expected


def test_a_curve_of_a_line_is_a_line() -> None:
    figure = curve("x & y", np.array([[i, 2.0 * i] for i in range(1, 6)]))
    (path,) = re.findall(r'<path class="mean" d="M([^"]*)"', figure.svg)
    points = np.array([[float(v) for v in point.split()] for point in path.split("L")])
    assert points[0, 0] == 52
    assert points[-1, 0] == 430
    assert np.allclose(np.diff(points, axis=0), np.diff(points, axis=0)[0], atol=0.11)
    assert points[0, 1] > points[-1, 1], "up is more"
    assert "x &amp; y, updates 1 to 5: from 2 to 10" in figure.svg


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-9, 2e-9, 3e-9], [-1e9, 1e9], [5.0] * 50])
def test_a_curve_has_room_for_any_values(values: list[float]) -> None:
    figure = curve("x", np.array(list(enumerate(values)), dtype=float))
    numbers = [float(n) for path in re.findall(r'd="([^"]*)"', figure.svg) for n in re.findall(r"[\d.]+", path)]
    assert numbers
    assert all(0 <= n <= 440 for n in numbers)
    assert "nan" not in figure.svg


def test_long_runs_are_drawn_as_means_of_stretches_and_say_so() -> None:
    figure = curve("x", np.array([[i, i % 2] for i in range(5000)], dtype=float))
    assert "means of 400 stretches of the 5,000 updates" in figure.caption
    assert len(figure.svg) < 30_000


def test_curves_show_the_panels_first_and_fold_the_rest() -> None:
    found = curves([{"step": 1, "loss": 1.0, "kl": 2.0, "reward": 0.5}, {"step": 2, "kl": 2.5, "late": 1.0}])
    assert [(figure.title.split(" ")[0], figure.folded) for figure in found] == [
        ("reward", False),
        ("KL", False),
        ("loss", True),
        ("late", True),
    ]


def test_validations_are_drawn_beside_the_updates(tmp_path: Path) -> None:
    folder = training_run(tmp_path / "r7")
    rows = [{"step": 0, "gold": 0.2, "unscored": 1.0}, {"step": 10, "gold": 0.1, "win_rate": 0.7}]
    lines(folder / "validation.jsonl", rows)
    page = Page(build(folder))
    assert page.count("svg") == 3 + 3
    assert "validation: gold measure" in page.text and "validation: win rate against the start" in page.text


def test_definitions_are_found_by_every_spelling() -> None:
    found = definitions_of(["raw_score", "reward/label_mass", "figures · human · brier", "KL (nats)", "nonsense"])
    assert list(found) == ["raw score", "label mass", "kl", "brier"]


# --- model output stays text ------------------------------------------------------------------------------------------


def test_model_output_stays_text(tmp_path: Path) -> None:
    text = build(comparison(tmp_path / "c", EVIL))
    text.encode("utf-8")  # no half pair is left
    page = Page(text)
    assert page.comments == []
    assert page.count("img") == 0
    assert len(page.scripts) == 1, "the page's own script is the only one"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    (data,) = page.data
    assert [row[1][0][1] for row in data["rows"]] == EVIL, "every text is there, character by character"
    shown = " ".join(page.text.split())
    assert "</script><script>window.ran = true</script>" in shown, "and is text without a script too"
    assert "nul ␀ bell ␇ escape ␛[31m delete ␡ return ␍ end" in shown


def test_every_other_text_of_a_folder_stays_text_too(tmp_path: Path) -> None:
    evil = EVIL[1] + EVIL[4]
    table = {"title": evil, "caption": evil, "columns": [evil, "n"], "rows": [[evil, 1]]}
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    figures = [{"title": evil, "file": "x.png", "caption": evil}]
    folder = comparison(
        tmp_path / "c", title=evil, facts={evil: evil}, tables=[table], figures=figures, warnings=[evil], advice=[evil]
    )
    (folder / "config.json").write_text(json.dumps({"command_line": [evil], "config": {evil: evil}}))
    rows = [{"prompt": evil, "system": evil, "response": "x", "measures": {evil: 1}}]
    lines(folder / "responses.jsonl", rows)
    page = Page(build(folder))
    assert len(page.scripts) == 1
    assert page.count("img") == 1
    assert page.comments == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.data[0]["systems"] == [evil]


def test_nothing_of_the_page_is_fetched_and_only_its_own_script_may_run(tmp_path: Path) -> None:
    page = Page(build(training_run(tmp_path / "r")))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    linked = [v for _, a in page.tags for n, v in a.items() if n in ("src", "href", "action", "srcset", "data")]
    assert all(v is not None and v.startswith(("#", "data:")) for v in linked), linked
    assert not [a for _, a in page.tags if "style" in a], "inline styles would be refused by the policy"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("../x.png", b"\x89PNG\r\n\x1a\n", "expected the figure ../x.png inside"),
        ("x.jpg", b"\xff\xd8", "expected the figure x.jpg to be a .svg or .png"),
        ("x.png", b"<svg onload='1'/>", "to be a picture of the kind .png, found b'<svg onload="),
        ("x.svg", b"<html>", "to be a picture of the kind .svg, found b'<html>'"),
        ("none.svg", None, "expected a figure at"),
    ],
)
def test_a_bad_figure(name: str, data: bytes | None, message: str, tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", figures=[{"title": "t", "file": name, "caption": ""}])
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=re.escape(message)):
        build(folder)


def test_a_figure_too_large_for_a_page_is_left_out_and_named(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", figures=[{"title": "t", "file": "x.png", "caption": ""}])
    (folder / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(3_100_000))
    page = Page(build(folder))
    assert "The figure x.png was left out: 3.1 MB are too much for a page." in page.text
    assert page.count("img") == 0


# --- size -------------------------------------------------------------------------------------------------------------


def test_rows_left_out_are_counted_and_the_rest_evenly_spaced(tmp_path: Path) -> None:
    page = Page(build(comparison(tmp_path / "c", [f"text {i}" for i in range(100)]), samples=10))
    (data,) = page.data
    assert [row[1][0][1] for row in data["rows"]] == [f"text {10 * i}" for i in range(10)]
    assert data["note"] == "Shown: 10 of 100 prompts, evenly spaced over the file; --samples 10 says so."
    assert data["note"] in page.text


def test_a_page_of_long_responses_stays_within_its_room(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [f"{rng.randrange(10**9)}" for _ in range(1000)]
    texts = [" ".join(rng.choices(words, k=200)) for _ in range(4000)]
    out = write_report(comparison(tmp_path / "c", texts), tmp_path / "page.html")
    assert 0.9 * ROOM < out.stat().st_size < 15e6
    note = re.search(r'"note": "(Shown: [^"]*)"', out.read_text(encoding="utf-8"))
    assert note is not None
    assert re.fullmatch(
        r"Shown: [\d,]+ of 4,000 prompts, evenly spaced over the file; "
        r"more would not fit into the 12\.0 MB that this page has for them\.",
        note[1],
    )


def test_a_text_longer_than_a_page_can_hold_is_cut_and_its_length_told(tmp_path: Path) -> None:
    (data,) = Page(build(comparison(tmp_path / "c", ["é" * 300_000]))).data
    assert data["rows"][0][1][0][1] == "é" * 200_000
    assert data["rows"][0][1][0][3] == 300_000


# --- bad folders ------------------------------------------------------------------------------------------------------

RESPONSE = {"prompt": "p", "system": "s", "response": "r", "measures": {"gold": 1}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {},
            "expected {folder} to hold comparison.json, evaluation.json, responses.jsonl or a run's config.json, found",
        ),
        (
            {"notes.txt": "hello"},
            "responses.jsonl or a run's config.json, found notes.txt: name a folder that rlaif train",
        ),
        ({"comparison.json": "{"}, "{folder}/comparison.json: expected a JSON object, found"),
        ({"comparison.json": "[]"}, "{folder}/comparison.json: expected a JSON object, found list: '[]'"),
        ({"comparison.json": '{"tables": {}}'}, "{folder}/comparison.json: expected tables to be a list, found dict"),
        ({"comparison.json": '{"facts": 1}'}, "{folder}/comparison.json: expected facts to be an object, found int"),
        (
            {"comparison.json": '{"tables": [{"columns": ["a"], "rows": [[1, 2]]}]}'},
            "{folder}/comparison.json, table 1, row 1: expected 1 cells, found '[1, 2]'",
        ),
        (
            {"comparison.json": '{"tables": [{"columns": ["a"], "rows": [[true]]}]}'},
            "table 1, row 1: expected text, finite numbers and null, found 'True'",
        ),
        (
            {"comparison.json": '{"tables": [{"columns": ["a"], "rows": [[1' + "0" * 400 + "]]}]}"},
            "table 1, row 1: expected text, finite numbers and null, found '1000",
        ),
        ({"comparison.json": '{"figures": ["x"]}'}, "figure 1: expected an object with a file, found 'x'"),
        ({"comparison.json": b"\xff"}, "{folder}/comparison.json: expected UTF-8, found the byte 0xff"),
        (
            {"responses.jsonl": json.dumps(RESPONSE) + '\n{"prompt": "p", "sys'},
            "{folder}/responses.jsonl: 1 bad line; mend or remove what is named here\n"
            "  line 2: expected a JSON object, found",
        ),
        (
            {"responses.jsonl": json.dumps({**RESPONSE, "response": None})},
            "line 1: expected response to be a string, found response: NoneType 'None'",
        ),
        (
            {"responses.jsonl": json.dumps({"prompt": "p", "text": "r"})},
            "line 1: expected system to be a string, found the fields prompt, text",
        ),
        (
            {"responses.jsonl": json.dumps({**RESPONSE, "measures": {"gold": "high"}})},
            "line 1: expected measures: gold to be a finite number or null, found str 'high'",
        ),
        (
            {"config.json": '{"command": "train", "config": {}}', "metrics.jsonl": '{"step": 1}\n{"st\n{"step": 2}\n'},
            "{folder}/metrics.jsonl, line 2: expected a JSON object, found",
        ),
        (
            {"config.json": '{"command": "train", "config": {}}', "samples.jsonl": '{"step": 1\n{"step": 2}\n'},
            "{folder}/samples.jsonl: 2 bad lines",
        ),
        (
            {"config.json": '{"command": "train", "config": {}}', "evaluation.json": '{"gold": 1}'},
            "{folder}/evaluation.json: expected gold to be three intervals, found '1'",
        ),
        ({"config.json": '{"command": "train", "config": 1}'}, "expected config to be an object, found '1'"),
    ],
)
def test_a_bad_folder_is_told_what_is_wrong(files: dict[str, str | bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RLAIFError) as raised:
        build(tmp_path)
    assert (
        message.format(folder=tmp_path) in str(raised.value) if "{folder}" in message else message in str(raised.value)
    )
    assert not list(tmp_path.glob("*.html")), "nothing is written"


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, found in (("file", "a file"), ("none", "nothing")):
        with pytest.raises(RLAIFError, match=f"expected a folder at .*{name}, found {found}: name the folder"):
            build(tmp_path / name)


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    with pytest.raises(RLAIFError, match=r"cannot write .*/none/x\.html: No such file"):
        write_report(folder, tmp_path / "none" / "x.html")
    with pytest.raises(RLAIFError, match="expected samples of at least 0, found -1"):
        write_report(folder, samples=-1)
    assert sorted(p.name for p in folder.iterdir()) == ["comparison.json", "responses.jsonl"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comparison(tmp_path / "c")
    assert main([str(folder), "--out", str(tmp_path / "x.html"), "--samples", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x.html'} (0.0 MB)\n"
    assert "Shown: 2 of 3 prompts" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert list(tmp_path.glob(".x.html*")) == []


def test_a_metric_of_any_range_is_drawn_with_two_ticks_at_least() -> None:
    for low in np.linspace(0, 1, 41).tolist():
        for width in (0.9, 1.1, 1.4):
            svg = curve("x", np.array([(1, low), (2, low + width)])).svg
            assert svg.count('class="grid"') > 1
