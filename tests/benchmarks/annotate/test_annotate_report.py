"""What people said, counted: figures worked by hand, AI labelers in the same table, the file for a reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.annotate.items import Item
from benchmarks.annotate.report import report, show
from benchmarks.annotate.results import export, people_of, read_labels
from benchmarks.annotate.store import Store
from rlaif_env.api import RLAIFError
from rlaif_env.data.preferences import read_preferences
from tests.benchmarks.annotate.annotating import answer_to, better, judge, pairs, project


def tell(store: Store, name: str, verdicts: Mapping[str, str]) -> None:
    """Have somebody judge by prompt: "first" or "second" of the item as it stands, "tie" or "skip"."""
    first = {item.prompt: item.responses[0] for item in store.items().values()}

    def choose(shown: Mapping[str, Any]) -> str:
        verdict = verdicts.get(shown["prompt"], "skip")
        if verdict in ("tie", "skip"):
            return {"tie": "0", "skip": "skip"}[verdict]
        return "1" if (shown["responses"][0] == first[shown["prompt"]]) == (verdict == "first") else "2"

    judge(store, store.join(name), choose)


def figures(store: Store, labels: Sequence[Path] = (), exclude: Sequence[str] = ()) -> dict[str, Any]:
    people = people_of(store, exclude)
    result = report(store, people, read_labels(labels, people.items))
    json.dumps(result, allow_nan=False)
    show(result, Console(quiet=True))
    return result


@pytest.fixture
def judged(tmp_path: Path) -> Store:
    """Six pairs of two systems on three prompts' worth of clusters, two annotators."""
    store = project(tmp_path, pairs(6, ("trained", "start")))
    tell(store, "Ada", {f"prompt {i}": v for i, v in enumerate("first first first second tie first".split())})
    tell(store, "Ben", {f"prompt {i}": v for i, v in enumerate("first first second second tie skip".split())})
    return store


def test_the_counts_and_the_win_rate_by_hand(judged: Store) -> None:
    result = figures(judged)
    assert {name: result[name] for name in ("items", "judged", "answers", "skips", "ties", "identical")} == {
        "items": 6,
        "judged": 6,
        "answers": 11,
        "skips": 1,
        "ties": 2,
        "identical": 0,
    }
    (row,) = result["win_rates"]
    # verdicts: first, first, split (tie), second, tie, first
    assert (row["systems"], row["wins"], row["ties"], row["losses"], row["unjudged"]) == (
        ["trained", "start"],
        3,
        2,
        1,
        0,
    )
    assert row["win_rate"]["estimate"] == pytest.approx(4 / 6)
    assert row["win_rate"]["low"] < 4 / 6 < row["win_rate"]["high"]
    assert row["length_controlled"]["low"] <= row["length_controlled"]["estimate"] <= row["length_controlled"]["high"]
    assert row["extrapolated"]  # in every pair the first response is the shorter


def test_agreement_by_hand(judged: Store) -> None:
    agreement = figures(judged)["agreement"]
    # five items with both: f/f, f/f, f/s, s/s, t/t. Observed 4/5; chance (3*2 + 1*2 + 1*1) / 25
    (pair,) = agreement["cohens_kappa"]
    assert (pair["annotators"], pair["items"]) == (["Ada", "Ben"], 5)
    assert pair["kappa"]["estimate"] == pytest.approx((4 / 5 - 9 / 25) / (1 - 9 / 25))
    # Fleiss: shares of the ten answers are 5, 3 and 2 of 10
    chance = 0.25 + 0.09 + 0.04
    assert agreement["fleiss_kappa"] == pytest.approx((4 / 5 - chance) / (1 - chance))
    assert (agreement["fleiss_items"], agreement["items_with_several"]) == (5, 5)
    # Krippendorff, nominal: 1 - (n - 1) * (off-diagonal 2) / (n² - Σ n_c²)
    assert agreement["krippendorff_alpha"] == pytest.approx(1 - 9 * 2 / (100 - 25 - 9 - 4))


def test_people_beside_each_other_leave_ties_out(judged: Store) -> None:
    judges = figures(judged)["judges"]
    assert list(judges) == ["people", "Ada (person)", "Ben (person)"]
    assert (judges["Ada (person)"]["pairs"], judges["Ada (person)"]["ties_left_out"]) == (5, 1)
    assert judges["Ada (person)"]["agreement"]["estimate"] == pytest.approx(3 / 4)
    assert judges["people"]["first_shown"]["n"] == 9  # of 11 answers two are ties


def test_an_annotator_left_out(judged: Store) -> None:
    result = figures(judged, exclude=["Ben"])
    assert list(result["annotators"]) == ["Ada"]
    assert result["agreement"]["items_with_several"] == 0
    with pytest.raises(RLAIFError, match="expected annotators of Ada, Ben, found Cy"):
        people_of(judged, ["Cy"])


def test_people_who_follow_the_position_are_found_out(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(20), repeats=0.5)
    judge(store, store.join("Lefty"), lambda shown: "1")
    judge(store, store.join("Steady"))
    result = figures(store)
    assert result["annotators"]["Lefty"]["self_consistency"]["estimate"] == 0.0
    assert result["annotators"]["Steady"]["self_consistency"]["estimate"] == 1.0
    lefty, steady = result["judges"]["Lefty (person)"], result["judges"]["Steady (person)"]
    assert (lefty["first_shown"]["estimate"], lefty["same_position"]["estimate"]) == (1.0, 1.0)
    assert steady["same_position"]["estimate"] == 0.0
    assert lefty["same_position"]["n"] == 10


def test_checks_are_counted_and_are_no_items(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(10), checks=0.5)
    judge(store, store.join("Careful"))
    judge(store, store.join("Hasty"), lambda shown: "0")
    result = figures(store)
    assert result["annotators"]["Careful"]["checks"] == {"passed": 5, "of": 5}
    assert result["annotators"]["Hasty"]["checks"] == {"passed": 0, "of": 5}
    assert result["answers"] == 20


def test_equal_responses_are_ties_and_what_is_open_is_counted(tmp_path: Path) -> None:
    items = [*pairs(4, ("a", "b")), Item("same", ("x", "x"), ("a", "b"), kind="identical")]
    store = project(tmp_path, items)
    tell(store, "Ada", {f"prompt {i}": "first" for i in range(3)})
    result = figures(store)
    (row,) = result["win_rates"]
    assert (row["wins"], row["ties"], row["losses"], row["unjudged"]) == (3, 1, 0, 1)
    assert result["identical"] == 1


def test_prompts_are_the_clusters(tmp_path: Path) -> None:
    """Forty pairs on eight prompts say less than forty on forty: every interval must be the wider."""
    widths = []
    for prompts in (8, 40):
        folder = tmp_path / str(prompts)
        folder.mkdir()
        items = [Item(f"p{i % prompts}", (f"good {i}", f"bad {i}"), ("a", "b")) for i in range(40)]
        store = project(folder, items, repeats=0.5)
        who = store.join("Ada")
        state = store.state(who)
        while state["item"]:
            good = "1" if state["item"]["responses"][0].startswith("good") else "2"
            number = int(state["item"]["responses"][0].split()[1])
            choice = good if number % 2 == 0 or number % 5 == 0 else {"1": "2", "2": "1"}[good]
            state = store.answer(who, answer_to(state, choice))
        judge(store, store.join("Ben"), lambda shown: "1" if len(shown["prompt"]) % 2 else "2")
        result = figures(store, exclude=["Ben"])
        (row,) = result["win_rates"]
        assert row["win_rate"]["estimate"] == pytest.approx(24 / 40)
        widths.append(row["win_rate"]["high"] - row["win_rate"]["low"])
        result = figures(store)
        ada = result["judges"]["Ada (person)"]
        shown = [ada["agreement"], ada["kappa"], ada["first_shown"], result["agreement"]["cohens_kappa"][0]["kappa"]]
        assert [figure["units"] for figure in [*shown, row["win_rate"]]] == [prompts] * 5
        assert ada["same_position"]["units"] == result["annotators"]["Ada"]["self_consistency"]["units"] <= 20
        assert prompts == 40 or ada["same_position"]["units"] == 8
        store.close()
    assert widths[0] > widths[1]


def test_texts_that_pairs_share_are_the_clusters_where_no_prompt_is(tmp_path: Path) -> None:
    """Forty pairs of seven and eight texts say less than of eighty: each figure counts that, and the same way."""
    widths = []
    for first, second in ((7, 8), (40, 40)):
        folder = tmp_path / str(first)
        folder.mkdir()
        texts = [("good" + " very" * (i % first % 3) + f" {i % first}", f"bad {i % second}") for i in range(40)]
        store = project(folder, [Item("", pair, ("a", "b")) for pair in texts], repeats=0.5)
        judge(store, store.join("Ada"), lambda shown: "1" if "3" in shown["responses"][0] else better(shown))
        result = figures(store)
        (row,), ada = result["win_rates"], result["judges"]["Ada (person)"]
        shown = [row["win_rate"], row["length_controlled"], ada["first_shown"]]
        assert [figure["units"] for figure in shown] == [7 if first == 7 else 40] * 3
        assert (ada["same_position"]["units"] < 8) == (first == 7)
        widths.append([figure["high"] - figure["low"] for figure in shown[:2]])
        store.close()
    assert widths[0][0] > 1.5 * widths[1][0] and widths[0][1] > 1.1 * widths[1][1]


@pytest.mark.parametrize(("form", "choices"), [("harmless", ["1", "2"]), ("score", ["7", "3"])])
def test_one_response_in_several_items_is_one_unit(tmp_path: Path, form: str, choices: Sequence[str]) -> None:
    store = project(tmp_path, [Item("", (f"text {i % 6}",)) for i in range(18)], form=form)
    judge(store, store.join("Ada"), lambda shown: choices[shown["responses"][0][-1] in "124"])
    figure = figures(store)["systems"]["all"][form]
    assert (figure["n"], figure["units"]) == (18, 6)


def label_file(path: Path, mode: str = "pairwise") -> Path:
    """A labeler with a strong pull to the first position, on four of the pairs and one that is none of them."""
    rows = []
    for i in range(4):
        first, second = f"good {i}", f"bad answer {i}"
        p_first = 0.9 if i < 3 else 0.2
        if i == 1:  # this one stands the other way round in the file
            first, second, p_first = second, first, 1 - p_first
        answers = [{"p_1": 0.95}, {"p_1": 0.6 if i < 2 else 0.1}]
        meta = {"label": {"mode": mode, "answers": answers if mode == "pairwise" else [{"score": 3.0}] * 2}}
        row = {"prompt": f"prompt {i}", "response_1": first, "response_2": second, "p_first": p_first}
        rows.append({**row, "source": "ai:small", "meta": meta})
    rows.append({"prompt": "elsewhere", "response_1": "a", "response_2": "b", "p_first": 1.0, "source": "ai:small"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_ai_labeler_stands_in_the_same_table(judged: Store, tmp_path: Path) -> None:
    labeler = figures(judged, [label_file(tmp_path / "labels.jsonl")])["judges"]["ai:small"]
    # people: first, first, split, second; the labeler: first, first (turned round), first, second
    assert (labeler["pairs"], labeler["ties_left_out"], labeler["unmatched"]) == (4, 1, 1)
    assert labeler["agreement"]["estimate"] == 1.0
    # asked in both orders: the position shown first wins in 4 + 2 of 8 questions, both times in 2 of 4 pairs
    assert labeler["first_shown"]["estimate"] == pytest.approx(6 / 8)
    assert labeler["same_position"]["estimate"] == pytest.approx(2 / 4)


def test_a_scoring_labeler_has_no_position(judged: Store, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    label_file(tmp_path / "labels" / "preferences.jsonl", mode="score")
    labeler = figures(judged, [tmp_path / "labels"])["judges"]["ai:small"]
    assert (labeler["first_shown"], labeler["same_position"], labeler["pairs"]) == (None, None, 4)


def test_labels_that_came_with_the_items_and_labels_of_other_pairs(tmp_path: Path) -> None:
    store = project(tmp_path, [Item(f"prompt {i}", (f"a{i}", f"b{i}"), labels={"ai:own": i / 4}) for i in range(4)])
    tell(store, "Ada", {f"prompt {i}": "second" for i in range(4)})
    labeler = figures(store)["judges"]["ai:own"]
    assert labeler["agreement"]["estimate"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)  # p_first 0, 1/4, 1/2, 3/4
    with pytest.raises(RLAIFError, match="expected labels of the pairs that people judged"):
        read_labels([label_file(tmp_path / "labels.jsonl")], store.items())


def test_the_export_is_a_preference_file_with_soft_labels(judged: Store, tmp_path: Path) -> None:
    file = tmp_path / "preferences.jsonl"
    assert export(judged, people_of(judged), file) == (6, 0)
    records = {record.prompt: record for record in read_preferences(file)}
    assert [records[f"prompt {i}"].p_first for i in range(6)] == [1.0, 1.0, 0.5, 0.0, 0.5, 1.0]
    assert {record.source for record in records.values()} == {"human"}
    assert records["prompt 0"].response_1 == "good 0"
    answers = records["prompt 2"].meta["answers"]
    assert [(a["annotator"], a["value"]) for a in answers] == [("Ada", 1.0), ("Ben", 0.0)]
    assert records["prompt 0"].meta["systems"] == ["trained", "start"]


def test_items_nobody_judged_are_left_out_and_counted(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(5))
    with pytest.raises(RLAIFError, match=r"expected judgements in .*, found none yet"):
        export(store, people_of(store), tmp_path / "out.jsonl")
    with pytest.raises(RLAIFError, match="found none yet"):
        figures(store)
    assert not (tmp_path / "out.jsonl").exists()
    tell(store, "Ada", {"prompt 1": "first", "prompt 2": "tie"})
    assert export(store, people_of(store), tmp_path / "out.jsonl") == (2, 3)


@pytest.mark.parametrize("form, choices", [("harmless", ["1", "1", "2", "1"]), ("score", ["7", "10", "1", "4"])])
def test_ratings(form: str, choices: list[str], tmp_path: Path) -> None:
    items = [Item(f"p{i // 2}", (f"text {i}",), ("a" if i % 2 else "b",)) for i in range(4)]
    store = project(tmp_path, items, form=form)
    judge(store, store.join("Ada"), lambda shown: choices[int(shown["responses"][0].split()[1])])
    result = figures(store)
    means = {name: row["mean"] for name, row in result["systems"].items()}
    assert means == ({"b": 0.5, "a": 1.0} if form == "harmless" else {"b": 4.0, "a": 7.0})
    assert all(row[form]["estimate"] == row["mean"] for row in result["systems"].values())
    assert export(store, people_of(store), tmp_path / "ratings.jsonl") == (4, 0)
    rows = [json.loads(line) for line in (tmp_path / "ratings.jsonl").read_text().splitlines()]
    assert [row[form] for row in rows] == ([1.0, 1.0, 0.0, 1.0] if form == "harmless" else [7.0, 10.0, 1.0, 4.0])
    assert [row["system"] for row in rows] == ["b", "a", "b", "a"]


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    store = project(tmp_path, pairs(2))
    judge(store, store.join("[red]Ada[/red]"))
    people = people_of(store)
    console = Console(width=200)
    with console.capture() as shown:
        show(report(store, people, {}), console)
    assert "[red]Ada[/red]" in shown.get()
