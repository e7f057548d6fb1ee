"""Calibrated labels: the temperature, and `rlaif label --calibrate`."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.labeling.answers import Label
from rewards.labeling.calibration import Calibration, fitted_temperature, log_odds, tempered
from rewards.labeling.pair_source import builtin_pairs, held_out_pairs
from rlaif_env.api import RLAIFError
from rlaif_env.data.preferences import read_preferences
from rlaif_env.data.tasks import load_task
from rlaif_env.statistics import excess_cross_entropy
from tests.rewards.labeling.labelling import Judge, pair_rows, quiet, run, write_rows

# --- the temperature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [0.02, 0.5, 1.0, 4.0])
def test_the_temperature_that_made_people_s_labels_is_found(truth: float) -> None:
    p = 0.5 + np.random.default_rng(0).uniform(-0.04, 0.04, 300)
    human = 1 / (1 + np.exp(-np.log(p / (1 - p)) / truth))
    assert fitted_temperature(p, human) == pytest.approx(truth, rel=1e-9)
    assert [tempered(q, truth) for q in p] == pytest.approx(human.tolist(), rel=1e-12)


def test_no_temperature_beside_the_fitted_one_is_likelier_for_choices_and_their_number_tells_how_near_it_is() -> None:
    rng = np.random.default_rng(1)
    p = rng.beta(2, 2, 20_000)
    human = (rng.random(p.size) < 1 / (1 + np.exp(-log_odds(p) / 0.6))).astype(float)  # 0 or 1
    fitted = fitted_temperature(p, human)
    assert fitted == pytest.approx(0.6, abs=0.03)  # its standard error is 0.007
    least = excess_cross_entropy(log_odds(p) / fitted, human)
    assert all(excess_cross_entropy(log_odds(p) / (fitted * by), human) > least for by in (0.99, 1.01))


def test_a_pair_counts_the_same_in_either_order_to_the_last_bit() -> None:
    grid = 2.0**-52
    p = np.concatenate([[0.0, 0.5, 1.0, grid, 1 - grid], np.round(np.random.default_rng(2).random(500) / grid) * grid])
    assert (log_odds(1 - p) == -log_odds(p)).all() and np.isfinite(log_odds(p)).all()
    for temperature in (0.01, 0.3, 1.0, 7.0):
        assert all(tempered(1 - q, temperature) == 1 - tempered(q, temperature) for q in p)
        assert tempered(0.5, temperature) == 0.5
    assert [tempered(q, 1.0) for q in p] == pytest.approx(p.tolist(), abs=1e-15)
    order = sorted(p)
    assert [tempered(q, 0.3) for q in order] == sorted(tempered(q, 0.3) for q in order)  # no choice is changed


@pytest.mark.parametrize(
    ("human", "message"),
    [
        (0.5, "agree with people better than chance, found that on 30 pairs they do not"),
        (0.1, "agree with people better than chance"),
        (1.0, "people to disagree with some labels, found that they never do on 30 pairs"),
    ],
)
def test_where_no_temperature_is_best_it_is_said(human: float, message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        fitted_temperature(np.full(30, 0.7), np.full(30, human))


def test_pairs_without_a_label_do_not_count_and_too_few_are_refused() -> None:
    labels = [(Label(0.75, 0.9, "ok", "", {"mode": "score"}), 0.9)] * 20
    none = Label(float("nan"), 0.0, "low mass", "little", {})
    found = Calibration.fitted([*labels, (none, 0.1)])
    assert (found.temperature, found.pairs) == (pytest.approx(0.5), 20)  # log 3 / log 9
    assert found.applied(none) is none
    warm = found.applied(labels[0][0])
    assert warm.p_first == pytest.approx(0.9)
    facts = {"temperature": found.temperature, "pairs": 20, "p_first": 0.75}
    assert warm.record == {"mode": "score", "calibration": facts}
    with pytest.raises(RLAIFError, match=r"labels of at least 20 pairs .* found 19"):
        Calibration.fitted([*labels[1:], (none, 0.1)])


# --- pairs to calibrate on --------------------------------------------------------------------------------------------


def test_no_pair_that_is_labelled_is_calibrated_on_in_either_order(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(50, p_first=0.9, source="human"))
    task = load_task("helpful", source=source)
    labelled = [pair for pair in islice(builtin_pairs(task, "train", n=None, seed=0, min_gap=0.0), 8)]
    settings: dict[str, Any] = {"source": None, "seed": 0, "min_gap": 0.0}
    count = sum(1 for _ in builtin_pairs(task, "train", n=None, seed=0, min_gap=0.0)) - 8
    others = held_out_pairs(task, labelled, count, **settings)
    assert len({p.prompt for p in others}) == count
    assert not {p.prompt for p in others} & {p.prompt for p in labelled}
    with pytest.raises(RLAIFError, match=f"expected {count + 1} pairs in the training split of 'helpful'.*{count};"):
        held_out_pairs(task, labelled, count + 1, **settings)
    swapped = [{"prompt": p.prompt, "response_1": p.response_2, "response_2": p.response_1} for p in labelled]
    rows = [*({**row, "p_first": 0.5} for row in swapped), *pair_rows(1, p_first=1.0), *pair_rows(60, p_first=1.0)[55:]]
    file = write_rows(tmp_path / "more.jsonl", [*rows, *pair_rows(80)[75:], rows[-1]])  # unjudged ones, and one twice
    known = {p.prompt for p in labelled}
    wanted = {row["prompt"] for row in rows} - known
    assert {p.prompt for p in held_out_pairs(task, labelled, len(wanted), **{**settings, "source": file})} == wanted
    with pytest.raises(RLAIFError, match=re.escape(f"pairs in {file} that people judged")):
        held_out_pairs(task, labelled, len(wanted) + 1, **{**settings, "source": file})


# --- the command ------------------------------------------------------------------------------------------------------


def judged_by(file: Path, rows: list[dict[str, Any]]) -> Path:
    """People who agree with the judge and are surer: 0.9 where its mean of both orders is 0.75."""
    run(file.parent / "plain", input=write_rows(file, rows))
    labels = read_preferences(file.parent / "plain" / "out" / "preferences.jsonl")
    return write_rows(
        file, [{**row, "p_first": 0.1 + 0.8 * (p.p_first > 0.5)} for row, p in zip(rows, labels, strict=True)]
    )


def test_labels_are_written_with_the_temperature_that_people_s_pairs_want(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    rows = pair_rows(40)
    source, people = write_rows(tmp_path / "pairs.jsonl", rows[:10]), judged_by(tmp_path / "people.jsonl", rows)
    plain, judge = run(tmp_path, input=source), Judge()
    out, before = tmp_path / "out", (tmp_path / "out" / "preferences.jsonl").read_bytes()
    options: dict[str, Any] = {"input": source, "calibrate": 30, "calibrate_on": people}
    report = run(tmp_path, judge, **options)  # the same folder goes on: only people's pairs are asked
    assert len(judge.asked) == 60 and not any(f"question {i}\n" in "".join(judge.asked) for i in range(10))
    assert report["calibration"] == {"temperature": pytest.approx(0.5), "pairs": 30}
    assert (plain["calibration"], report["labelled"], report["asked_in_this_run"]) == (None, 10, 60)
    labels = list(read_preferences(out / "preferences.jsonl"))
    raw = [json.loads(line) for line in before.decode().splitlines()]
    for label, was in zip(labels, raw, strict=True):
        facts = {"temperature": report["calibration"]["temperature"], "pairs": 30, "p_first": was["p_first"]}
        assert label.p_first == pytest.approx(0.9 if was["p_first"] > 0.5 else 0.1)
        assert label.meta["label"] == {**was["meta"]["label"], "calibration": facts}
    assert json.loads((out / "config.json").read_text())["config"]["calibrate"] == 30
    assert "**Calibrated** with temperature 0.500, fitted on 30 other pairs" in (out / "report.md").read_text()
    again, bytes_of = Judge(), (out / "preferences.jsonl").read_bytes()
    run(tmp_path, again, **options)
    assert (again.asked, (out / "preferences.jsonl").read_bytes()) == ([], bytes_of)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    run(fresh, **options)  # in one go: the same labels
    assert (fresh / "out" / "preferences.jsonl").read_bytes() == bytes_of
    run(tmp_path, again, input=source)  # and without it what there was before, of the same answers
    assert (again.asked, (out / "preferences.jsonl").read_bytes()) == ([], before)


def test_what_a_calibration_does_to_held_out_figures_is_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    people = judged_by(tmp_path / "people.jsonl", pair_rows(50))
    rows = [json.loads(line) for line in people.read_text().splitlines()]
    source = write_rows(tmp_path / "pairs.jsonl", rows[:20])
    human = run(tmp_path, input=source, calibrate=30, calibrate_on=people)["human"]
    raw = human["uncalibrated"]
    assert (human["brier"], human["excess_cross_entropy"]) == (pytest.approx(0), pytest.approx(0))
    assert raw["brier"] == pytest.approx(0.15**2)
    assert raw["calibration_error"] == pytest.approx(0.15)
    divergence = 0.9 * np.log(0.9 / 0.75) + 0.1 * np.log(0.1 / 0.25)
    assert raw["excess_cross_entropy"] == pytest.approx(divergence)
    page = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"before the calibration: Brier score 0.02\d, calibration error 0.150, excess", page)


def test_a_dry_run_counts_the_pairs_to_calibrate_on(tmp_path: Path) -> None:
    people = write_rows(tmp_path / "people.jsonl", pair_rows(50, p_first=0.9))
    source, console = write_rows(tmp_path / "pairs.jsonl", pair_rows(10)), quiet()
    found = run(tmp_path, Judge(), console, input=source, calibrate=30, calibrate_on=people, dry_run=True)
    assert (found["pairs"], found["done"], found["questions"]) == (10, 0, 80)
    assert "10 pairs, 0 of them labelled already, and 30 to calibrate on" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate": 19}, "expected calibrate, a number of pairs, from 20, .* found 19"),
        ({"calibrate": -1}, "found -1"),
        ({"calibrate_on": Path("people.jsonl")}, "found 0 with the file people.jsonl"),
    ],
)
def test_a_calibration_on_nothing_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        run(tmp_path, **options)


def test_a_judge_at_chance_gets_no_calibration_and_its_answers_are_kept(tmp_path: Path) -> None:
    people = write_rows(tmp_path / "people.jsonl", pair_rows(40, p_first=0.5))
    options: dict[str, Any] = {"input": write_rows(tmp_path / "pairs.jsonl", pair_rows(5))}
    with pytest.raises(RLAIFError, match="better than chance"):
        run(tmp_path, **options, calibrate=30, calibrate_on=people)
    assert run(tmp_path, **options)["labelled"] == 5


def test_either_order_alone_of_a_task_that_asks_for_the_worse_one_is_turned_round(tmp_path: Path) -> None:
    """Without a push for the first position both orders agree with each other, and with people who like the rest."""
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(30))
    judge = Judge(push=0.05)  # 0.75 and 0.25
    run(tmp_path, judge, input=source, task="harmless")
    labels = read_preferences(tmp_path / "out" / "preferences.jsonl")
    rows = [{**row, "p_first": float(p.p_first > 0.5)} for row, p in zip(pair_rows(30), labels, strict=True)]
    (tmp_path / "judged").mkdir()
    source = write_rows(tmp_path / "judged.jsonl", rows)
    human = run(tmp_path / "judged", judge, input=source, task="harmless")["human"]
    assert human["one_order_alone"]["estimate"] == human["alignment"]["estimate"] == 1
