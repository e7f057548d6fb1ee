"""Whether the measures that stand for unsupported content and incoherence say what a reader of the responses says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.evaluation.qualitative import SIGNS, example_tables, with_unsupported
from benchmarks.evaluation.systems import System
from rlaif_env.data.jsonl import read_jsonl
from rlaif_env.statistics import Interval, auc, cohens_kappa, interval_text, new_names, new_numbers, repeated_ngrams
from tests import ROOT

JUDGED: list[dict[str, Any]] = list(read_jsonl(Path(__file__).parent / "data" / "judged.jsonl", lambda row: row))
MEASURES = {
    "names and numbers": lambda row: len(new_names(*_pair(row))) + len(new_numbers(*_pair(row))),
    "perplexity": lambda row: row["perplexity"],
    "repeated 3-grams": lambda row: repeated_ngrams([row["response"]], 3)[0],
}
STANDS_FOR = {
    "unsupported": ("names and numbers", "unsupported"),
    "perplexity": ("perplexity", "incoherent"),
}


def _pair(row: dict[str, Any]) -> tuple[str, str]:
    return row["prompt"], row["response"]


def area(measure: str, judgement: str, part: str) -> Interval:
    rows = [row for row in JUDGED if row["part"] == part]
    return auc([MEASURES[measure](row) for row in rows], [row[judgement] for row in rows])


def test_there_are_enough_of_every_policy_and_none_is_judged_twice_in_a_part() -> None:
    systems = [row["system"] for row in JUDGED]
    assert len(JUDGED) == 192
    assert all(systems.count(name) >= 28 for name in set(systems)) and len(set(systems)) == 5
    assert len({(row["prompt"], row["response"]) for row in JUDGED}) == len(JUDGED)


def test_the_areas_under_the_curve_are_those_that_tables_and_page_give() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, (measure, judgement) in STANDS_FOR.items():
        assert SIGNS[name].area == interval_text(area(measure, judgement, "report"), ".2f")
    for measure in MEASURES:
        judgement = "unsupported" if measure == "names and numbers" else "incoherent"
        figures = [interval_text(area(measure, judgement, part), ".2f") for part in ("choose", "report")]
        assert f"| {measure} | {judgement} | {figures[0]} | {figures[1]} |" in page
    for judgement in ("unsupported", "incoherent"):
        rows = [row for row in JUDGED if "again" in row]
        kappa = cohens_kappa([row[judgement] for row in rows], [row["again"][judgement] for row in rows])
        shares = {name: [r[judgement] for r in JUDGED if r["system"] == name] for name in ("sft", "human-rm")}
        assert f"{judgement} {interval_text(kappa, '.2f')}" in page
        assert all(f"{sum(judged)} of {len(judged)}" in page for judged in shares.values())


@pytest.mark.slow
def test_the_perplexities_in_the_file_are_those_of_the_built_in_model() -> None:
    from benchmarks.evaluation.systems import _reference_nll
    from rlaif_env.data.tasks import load_task
    from rlaif_env.models import BUILTIN_MODEL, backbone

    some = JUDGED[::24]
    prompts, responses = ([row[name] for row in some] for name in ("prompt", "response"))
    lengths, nll = _reference_nll(backbone(BUILTIN_MODEL), load_task("movie-review"), prompts, responses)
    assert np.exp(nll / lengths) == pytest.approx([row["perplexity"] for row in some], rel=0.02)


def test_examples_are_the_worst_and_the_best_by_the_measure_over_all_seeds() -> None:
    def system(names: list[float], numbers: list[float], mark: str) -> System:
        texts = [f"{mark}{i}" for i in range(3)]
        measures = {
            "new_names": np.array(names),
            "new_numbers": np.array(numbers),
            "perplexity": np.array([9.0, np.nan, 4.0]),
        }
        return with_unsupported(System(mark, "", ["p0", "p1", "p2"], texts, measures))

    policies = {
        "sft": [system([0, 0, 0], [0, 0, 0], "s")],
        "human-rm": [system([0, 1, 1], [1, 0, 1], "a"), system([0, 0, 3], [1, 0, 0], "b")],
    }
    by_names, by_perplexity = example_tables(policies)
    assert [row for row in by_names.rows if str(row[0]).startswith("human-rm")] == [
        ["human-rm, worst", 3, "p2 ▸ b2"],
        ["human-rm, worst", 2, "p2 ▸ a2"],
        ["human-rm, best", 0, "p1 ▸ b1"],
    ]
    assert [row[1:] for row in by_perplexity.rows[:2]] == [[9, "p0 ▸ s0"], [4, "p2 ▸ s2"]]
    assert by_perplexity.rows[2][0] == "human-rm, worst"  # of the two values of sft none is the best beside the worst
    assert SIGNS["perplexity"].area in by_perplexity.caption
