"""Labels at a temperature that is fitted on people's choices, and how many exemplars a labeler needs."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rewards.labeling.answers import Label
from rewards.labeling.config import LabelConfig, LabelOptions, needed_shots
from rewards.labeling.pair_source import builtin_pairs, calibration_pairs
from rewards.labeling.probabilities import fitted_temperature, log_odds, tempered
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.data.corpus import movie_snippets
from rlaif_env.data.preferences import read_preferences
from rlaif_env.data.tasks import load_task
from tests.rewards.labeling.labelling import Judge, pair_rows, run, write_rows
from tests.tiny import save_tiny

ON_GRID = st.integers(0, 2**52).map(lambda i: i / 2**52)


@pytest.mark.parametrize(
    ("p", "temperature", "expected"),
    [(0.8, 2.0, 2 / 3), (0.8, 0.5, 16 / 17), (0.2, 0.5, 1 / 17), (0.5, 0.01, 0.5), (0.6, 1.0, 0.6), (1.0, 52.0, 2 / 3)],
)
def test_a_label_at_another_temperature_by_hand(p: float, temperature: float, expected: float) -> None:
    """Odds of 4 are odds of 2 at T = 2 and of 16 at T = 1/2; a certainty has the odds 2^52 and no more."""
    assert tempered(p, temperature) == pytest.approx(expected, abs=1e-15)


@given(ON_GRID, st.floats(1e-3, 1e3))
def test_exchanging_the_responses_of_a_calibrated_label_gives_one_minus_it(p: float, temperature: float) -> None:
    assert tempered(1 - p, temperature) == 1 - tempered(p, temperature)
    assert np.sign(tempered(p, temperature) - 0.5) in (np.sign(p - 0.5), 0)
    assert log_odds([p]) == -log_odds([1 - p])


@pytest.mark.parametrize("truth", [0.04, 0.5, 1.0, 7.0])
def test_the_temperature_of_people_whose_choices_are_known_is_found(truth: float) -> None:
    rng = np.random.default_rng(0)
    p = np.array([tempered(x, truth) for x in rng.uniform(0.02, 0.98, 4000)])  # logits of the labels: T times people's
    x = log_odds(p)
    people = 0.5 + 0.5 * np.tanh(x / truth / 2)
    assert fitted_temperature(p, people) == pytest.approx(truth, rel=1e-9)  # their shares
    assert fitted_temperature(np.where(x > 0, p, 1 - p), np.where(x > 0, people, 1 - people)) == pytest.approx(truth)
    choices = (rng.random(4000) < people).astype(float)  # one choice each: within 4 standard errors of 1 / T
    error = 1 / math.sqrt(float(np.sum(x**2 * people * (1 - people))))
    assert abs(1 / fitted_temperature(p, choices) - 1 / truth) < 4 * error


@pytest.mark.parametrize(
    ("p_first", "human", "message"),
    [
        ([0.9, 0.2], [0.0, 1.0], "expected labels that follow people's choices on the 2 pairs"),
        ([0.5, 0.5], [0.0, 1.0], "no temperature above 0 fits"),
        ([0.9, 0.2], [1.0, 0.0], "expected the labels to be wrong on some of the 2 pairs"),
        ([], [], "human"),
    ],
)
def test_labels_that_no_temperature_fits_are_an_error(p_first: list[float], human: list[float], message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        fitted_temperature(p_first, human)


def test_a_pair_without_a_label_gets_none_by_calibration() -> None:
    label = Label(math.nan, 0.0, "low mass", "why", {"mode": "score"})
    assert label.calibrated(0.5) is label


# --- the command ------------------------------------------------------------------------------------------------------


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with people who are surer than `Judge`, whose labels are 3/4 and 1/4: theirs are 9/10 and 1/10."""

    def higher(row: dict[str, Any]) -> bool:
        one, two = (hashlib.sha256(row[name].encode()).digest() for name in ("response_1", "response_2"))
        return one > two

    return [{**row, "p_first": 0.9 if higher(row) else 0.1} for row in rows]


def test_labels_are_calibrated_on_other_pairs_and_the_answers_are_kept(tmp_path: Path) -> None:
    rows = judged(pair_rows(26))
    source = write_rows(tmp_path / "pairs.jsonl", rows[:8])
    turned = {**rows[0], "response_1": rows[0]["response_2"], "response_2": rows[0]["response_1"]}
    people = write_rows(tmp_path / "people.jsonl", [turned, *rows[1:]])  # eight of them are labelled, one exchanged
    calibrated: dict[str, Any] = {"input": source, "calibrate": 12, "calibration": people}

    raw = run(tmp_path, input=source)
    before = (tmp_path / "out" / "preferences.jsonl").read_bytes()
    assert raw["calibration"] is None and raw["human"]["without_calibration"]["brier"] == raw["human"]["brier"]

    judge = Judge()
    report = run(tmp_path, judge, **calibrated)  # goes on: only what is new is asked
    assert len(judge.asked) == 24 and not [q for q in judge.asked if "one 0" in q]
    assert report["calibration"] == {"temperature": pytest.approx(0.5), "pairs": 12, "asked": 12}  # ln 3 / ln 9
    labels = list(read_preferences(tmp_path / "out" / "preferences.jsonl"))
    assert [p.p_first for p in labels] == pytest.approx([row["p_first"] for row in rows[:8]])
    assert {p.meta["label"]["calibration"]["raw_p_first"] for p in labels} == {0.75, 0.25}
    assert {p.meta["label"]["calibration"]["temperature"] for p in labels} == {report["calibration"]["temperature"]}
    assert (report["pairs"], report["human"]["pairs"]) == (8, 8)
    assert report["human"]["brier"] == pytest.approx(0) and report["human"]["calibration_error"] == pytest.approx(0)
    assert report["human"]["without_calibration"]["brier"] == pytest.approx(0.15**2)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "the temperature 0.5, fitted on 12 of 12 pairs" in page and "| as answered | 0.023 | 0.150 |" in page
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["config"]
    assert settings["calibrate"] == 12

    judge = Judge()
    run(tmp_path, judge, input=source)  # and without it they are what they were
    assert judge.asked == [] and (tmp_path / "out" / "preferences.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"calibrate": 30},
            r"expected 30 pairs that people judged and that are not labelled .* found 18; calibrate on",
        ),
        ({"calibrate": 5, "calibration": None}, "or give a file of pairs that people judged, to calibrate on"),
        ({"calibrate": -1, "calibration": None}, "expected a number of pairs to calibrate on"),
        ({"calibrate": 0}, "expected a number of pairs to calibrate on .* from 1 where a file"),
    ],
)
def test_too_few_judged_pairs_are_an_error_before_anything_is_asked(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    rows = judged(pair_rows(26))
    source = write_rows(tmp_path / "pairs.jsonl", rows[:8])
    people = write_rows(tmp_path / "people.jsonl", [*rows, *pair_rows(40, p_first=0.5, source="ai:other")[30:]])
    judge = Judge()
    with pytest.raises(RLAIFError, match=message):
        run(tmp_path, judge, **{"input": source, "calibration": people, **options})
    assert judge.asked == [] and not (tmp_path / "out").exists()


def test_a_labeler_that_contradicts_people_is_not_calibrated(tmp_path: Path) -> None:
    rows = judged(pair_rows(26))
    judge = Judge()
    contrary = [{**row, "p_first": 1 - row["p_first"]} for row in rows[8:]]
    source, people = write_rows(tmp_path / "pairs.jsonl", rows[:8]), write_rows(tmp_path / "people.jsonl", contrary)
    with pytest.raises(DataError, match="found that they do not"):
        run(tmp_path, judge, input=source, calibrate=18, calibration=people)
    assert len(judge.asked) == 36  # and the pairs to label are not asked about in vain
    assert run(tmp_path, input=source)["labelled"] == 8


def test_the_corpus_is_calibrated_on_training_pairs_that_are_not_labelled() -> None:
    task = load_task("movie-review")
    train = {snippet.text for snippet in movie_snippets("train")}
    labelled = list(builtin_pairs(task, "train", n=300, seed=1, min_gap=0.5))  # what the seed of 0 draws to calibrate
    found = calibration_pairs(task, 300, labelled[:10], file=None, seed=0, min_gap=0.5)
    assert {text for pair in found for text in (pair.response_1, pair.response_2)} <= train
    both = [{frozenset((pair.response_1, pair.response_2)) for pair in pairs} for pairs in (found, labelled[:10])]
    assert len(both[0]) == 300 and not both[0] & both[1]
    assert all(abs(pair.meta["means"][0] - pair.meta["means"][1]) > 0.49 for pair in found)


def test_a_dry_run_counts_the_pairs_to_calibrate_on(tmp_path: Path) -> None:
    rows = judged(pair_rows(9))
    source, people = write_rows(tmp_path / "pairs.jsonl", rows[:4]), write_rows(tmp_path / "people.jsonl", rows)
    estimate = run(tmp_path, input=source, calibrate=5, calibration=people, dry_run=True)
    assert (estimate["pairs"], estimate["done"], estimate["questions"]) == (4, 0, 18)


def test_either_order_alone_of_a_task_that_asks_for_the_worse_one_is_turned_round(tmp_path: Path) -> None:
    judge = Judge(push=0.05)  # without a position that it likes: both orders say what people say
    rows = [{**row, "p_first": 1 - row["p_first"]} for row in judged(pair_rows(30))]
    source = write_rows(tmp_path / "pairs.jsonl", rows)
    human = run(tmp_path, judge, input=source, task="harmless")["human"]
    assert human["one_order_alone"]["estimate"] == human["alignment"]["estimate"] == 1


# --- exemplars --------------------------------------------------------------------------------------------------------


def test_a_base_model_is_shown_all_exemplars_and_another_none(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    base, tuned = save_tiny(tmp_path / "base", byte_tokenizer), save_tiny(tmp_path / "tuned", byte_tokenizer)
    (tuned / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    movie, models = load_task("movie-review"), [LanguageModelConfig(str(folder)) for folder in (base, tuned)]
    assert [needed_shots(model, movie, "pairwise") for model in models] == [4, 0]
    assert [needed_shots(model, movie, "score") for model in models] == [4, 0]
    assert needed_shots(LanguageModelConfig("served", "http://localhost:1"), movie, "pairwise") == 0
    options = LabelOptions(), LabelOptions(shots=1), LabelOptions(template="{text_1} {text_2}")
    assert [each.with_shots(models[0], movie).shots for each in options] == [4, 1, 0]
    assert LabelConfig().shots == -1
