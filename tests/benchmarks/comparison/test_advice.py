"""What a comparison advises, on outcomes whose figures are known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.comparison.advice import advice_of, faults_of
from benchmarks.comparison.outcomes import History, Outcome
from benchmarks.comparison.stages import Stage
from benchmarks.evaluation.systems import System
from rlaif_env.data.tasks import load_task

TASK = load_task("movie-review")
PROMPTS = [f"prompt {i}" for i in range(60)]
START = np.linspace(-0.4, 0.4, 60)


def won(share: float, turn: int = 0) -> np.ndarray[Any, Any]:
    """Values that are above `START` on a share of the prompts, other ones by ``turn``, and under it elsewhere."""
    return START + np.where((np.arange(60) * 37 + turn) % 60 < 60 * share, 0.2, -0.2)


def stage(folder: Path, seconds: float, report: Any = None) -> Stage:
    for file in ("report.json", "run/report.json"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(report))
    return Stage("", "", folder, seconds, 0.0)


def outcome(arm: str, folder: Path, measures: Mapping[str, Any], *, seconds: float = 10, people: int = 0) -> Outcome:
    """One arm's; people's judgements go through a reward model as in a comparison."""
    costs = {"training": stage(folder / arm, seconds)}
    if people:
        costs["reward model"] = stage(folder / f"{arm}-rm", 5, {"labels": {"sources": {"human": people, "ai:x": 7}}})
    values = {"distinct-2": np.full(60, 0.9)} | {name: np.asarray(v, np.float64) for name, v in measures.items()}
    responses = [f"{arm} {i}" for i in range(60)]
    return Outcome(arm, 0, System(f"{arm}/0", "", PROMPTS, responses, values), None, costs)


def three(folder: Path, **wins: float) -> list[Outcome]:
    """SFT and the usual arms by the gold reward model; the human one needs people."""
    people = {"human-rm": 6000, "combined-rm": 6000}
    arms = [
        outcome(name, folder, {"judge:gold-rm": won(share, 20 * place)}, seconds=20 + place, people=people.get(name, 0))
        for place, (name, share) in enumerate({n.replace("_", "-"): s for n, s in wins.items()}.items())
    ]
    return [outcome("sft", folder, {"judge:gold-rm": START}), *arms]


def told(outcomes: list[Outcome]) -> dict[str, str]:
    return dict(sentence.split(": ", 1) for sentence in advice_of(outcomes, TASK))


def test_the_best_arm_those_level_with_it_their_costs_and_the_best_without_people(tmp_path: Path) -> None:
    advice = told(three(tmp_path, distilled_rm=0.75, human_rm=0.8, direct_llm=0.7))
    assert list(advice) == ["Best by people (gold RM)", "Cheapest of these", "Without people's judgements", "One seed"]
    best = advice["Best by people (gold RM)"]
    assert best.startswith("human-rm, preferred to SFT on 80 [")
    assert "not to be told from it: distilled-rm (75 [" in best and " and direct-llm (70 [" in best
    assert advice["Cheapest of these"] == (
        "distilled-rm, 20 s from labels to policy and no judgements by people; direct-llm, 22 s from labels to policy "
        "and no judgements by people; human-rm, 26 s from labels to policy and 6,000 judgements by people (their own "
        "time is not in the seconds)."
    )
    assert advice["Without people's judgements"].startswith("distilled-rm (75 [")
    assert "not to be told from human-rm, which is preferred to it on 5" in advice["Without people's judgements"]


def test_an_arm_that_the_best_surely_beats_is_no_choice(tmp_path: Path) -> None:
    outcomes = three(tmp_path, human_rm=1.0, direct_llm=0.8)
    outcomes[1].system.measures["judge:gold-rm"] += 1
    advice = told(outcomes)
    assert advice["Best by people (gold RM)"].endswith("; human-rm is preferred to direct-llm (100 [94, 100] %).")
    assert advice["Its cost"].startswith("human-rm, 25 s") and "Cheapest of these" not in advice
    assert ", behind human-rm, which is preferred to it on 100 [" in advice["Without people's judgements"]


def test_where_the_best_needs_no_people_or_all_do_or_none_does(tmp_path: Path) -> None:
    advice = told(three(tmp_path, human_rm=0.7, direct_llm=0.8))
    assert advice["Without people's judgements"] == "direct-llm all the same, it needs none."
    for arms in ({"direct_llm": 0.8, "self_llm": 0.7}, {"human_rm": 0.8, "combined_rm": 0.7}):
        assert "Without people's judgements" not in told(three(tmp_path, **arms))
    advice = told(three(tmp_path, human_rm=0.8, direct_llm=0.5))
    assert advice["Without people's judgements"].startswith("no arm is shown to help; the highest is direct-llm (50 [")


def test_arms_that_help_nothing_or_harm(tmp_path: Path) -> None:
    advice = told(three(tmp_path, human_rm=0.8, direct_llm=0.5, self_llm=0.2))
    assert advice["Keep away from"].startswith("self-llm (20 [") and "direct-llm" not in advice["Keep away from"]
    assert advice["No gain shown"].startswith("direct-llm (50 [") and "self-llm" not in advice["No gain shown"]
    advice = told(three(tmp_path, human_rm=0.5, direct_llm=0.45))
    assert list(advice) == ["No arm is shown to help", "One seed"]
    assert advice["No arm is shown to help"].startswith("human-rm (50 [")


@pytest.mark.parametrize(
    ("judges", "head", "caution"),
    [
        (("judge:gold-rm", "gold", "judge:direct-llm"), "Best by people (gold RM)", False),
        (("gold", "judge:direct-llm"), "Best by gold (vader)", False),
        (("judge:human-rm", "judge:direct-llm"), "Best by direct-llm", True),
    ],
)
def test_an_independent_judge_is_asked_first(tmp_path: Path, judges: tuple[str, ...], head: str, caution: bool) -> None:
    start = outcome("sft", tmp_path, {judge: START for judge in judges})
    advice = told([start, outcome("direct-llm", tmp_path, {judge: won(0.8) for judge in judges})])
    assert next(iter(advice)) == head and ("No independent judge" in advice) == caution


def test_judges_that_disagree_are_named(tmp_path: Path) -> None:
    measures = {"judge:gold-rm": START, "judge:direct-llm": START, "gold": START}
    start = outcome("sft", tmp_path, measures)
    one = outcome("human-rm", tmp_path, {"judge:gold-rm": START + 2, "judge:direct-llm": START + 1, "gold": won(0.8)})
    two = outcome("direct-llm", tmp_path, {"judge:gold-rm": START + 1, "judge:direct-llm": START + 2, "gold": won(0.8)})
    assert told([start, one, two])["Judges disagree"] == (
        "human-rm is preferred to direct-llm on 100 [94, 100] % by people (gold RM), 0 [0, 6] % by direct-llm (the "
        "reward of direct-llm)."
    )
    alike = replace(two, system=replace(two.system, measures=one.system.measures))
    assert "Judges disagree" not in told([start, one, alike])


def test_too_few_prompts_are_told_and_nothing_else(tmp_path: Path) -> None:
    outcomes = three(tmp_path, human_rm=0.8)
    few = [replace(o, system=replace(o.system, prompts=["a", "b"] * 30)) for o in outcomes]
    expected = "Too few prompts: 2 held-out prompts tell no arms apart; see --train.eval-prompts."
    assert advice_of(few, TASK) == [expected]


def test_trainings_that_went_wrong_are_to_be_stopped_earlier(tmp_path: Path) -> None:
    own = {"judge:gold-rm": START, "judge:human-rm": START, "gold": START}
    start = outcome("sft", tmp_path, own)
    trained = outcome("human-rm", tmp_path, own | {"judge:human-rm": START + 1, "distinct-2": np.full(60, 0.6)})
    steps, hill = list(range(1, 41)), np.concatenate([np.linspace(0, 1, 18), np.linspace(1, 0, 22)])
    curves = {"reward": np.linspace(0, 2, 40), "gold": hill}
    trained = replace(trained, history=History(steps, curves, trained.system))
    wholesome = replace(trained, arm="direct-llm", history=History(steps, curves | {"gold": -hill}, trained.system))
    wholesome = replace(wholesome, system=replace(start.system, name="direct-llm/0"))
    assert [fault.kind for fault in faults_of([start, trained, wholesome], TASK)] == [
        "over-optimised",
        "alike",
        "own reward alone",
    ]
    assert told([start, trained, wholesome])["Stop early, or raise --train.agent.beta"] == (
        "human-rm (over-optimised since update 16, responses alike, its own reward rose, gold did not for sure)."
    )
    again = [replace(o, seed=1, history=None) for o in (start, trained)]
    advice = told([start, trained, *again])
    assert (
        "over-optimised since update 16 in 1 of 2, responses alike in 1 of 2"
        in advice["Stop early, or raise --train.agent.beta"]
    )
    assert advice["Two seeds"] == "all this is about the trainings of seeds 0 and 1; others may end otherwise."
    third = [replace(o, seed=2) for o in again]
    assert not any(name.endswith(("seed", "seeds")) for name in told([start, trained, *again, *third]))
    assert not any("Stop" in name for name in told([start, wholesome]))
