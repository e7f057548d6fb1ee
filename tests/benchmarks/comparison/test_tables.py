"""The tables of a comparison, on constructed answers and judgements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.comparison import ablations, tables
from benchmarks.comparison.config import ARMS
from benchmarks.comparison.figures import FIGURES
from benchmarks.comparison.outcomes import History, Outcome
from benchmarks.comparison.stages import Stage
from benchmarks.evaluation.metrics import win_rate_test
from benchmarks.evaluation.systems import System
from rlaif_env import statistics

PROMPTS = [f"prompt {i}" for i in range(40)]


def outcome(arm: str, seed: int, measures: Mapping[str, Any]) -> Outcome:
    """A policy's answers, each other than all the rest, with these measures: a number, or one for each prompt."""
    values = {name: np.array(np.broadcast_to(v, 40), np.float64) for name, v in {"length": 5.0, **measures}.items()}
    system = System(f"{arm}/{seed}", "", PROMPTS, [f"{arm} {seed} {i}" for i in range(40)], values)
    costs = {} if arm == "sft" else {"training": Stage("train", "", Path(), 60.0, 100.0)}
    return Outcome(arm, seed, system, None, costs)


def outcomes(seeds: Sequence[int]) -> list[Outcome]:
    """The policy wins 24, 28 and 38 of 40 prompts of seed 0, 1 and 2, and its gold rises by 0.1, 0.2 and 0.6."""
    wins, rises, place = [24, 28, 38], [0.1, 0.2, 0.6], np.arange(40)
    found = []
    for seed in seeds:
        found.append(outcome("sft", seed, {"gold": place / 100, "judge:gold-rm": 0.0}))
        after = {"gold": place / 100 + rises[seed], "judge:gold-rm": np.where(place < wins[seed], 1.0, -1.0)}
        found.append(outcome("human-rm", seed, after))
    return found


MAIN = "Main results: how often the first is preferred"
JUDGES = {"judge:gold-rm": "people", "gold": "gold"}


def test_from_three_seeds_on_every_interval_is_over_seeds_and_prompts() -> None:
    found = {table.title: table for table in tables.comparison_tables(outcomes([0, 1, 2]), [], JUDGES)}
    main, by_judge = found[MAIN], found["What each judge says of each policy"]
    cells = statistics.crossed(np.repeat([0, 1, 2], 40).tolist(), PROMPTS * 3)
    assert isinstance(cells, statistics.Crossed)
    won = np.concatenate([np.arange(40) < n for n in (24, 28, 38)])
    expected, p = statistics.rate(won, clusters=cells), win_rate_test(won, clusters=cells)
    (row,) = main.rows
    assert row[1] == tables.percent(expected) and expected.estimate == 0.75
    assert expected.low is not None and expected.low < 0.5 and p > 0.05 and row[5] == f"{p:.3f}"
    half = 4.30265273 * np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5
    assert by_judge.rows[1][2] == f"+0.30 [{0.3 - half:+.2f}, {0.3 + half:+.2f}]"
    for table in (main, by_judge, found["How the policies write"]):
        assert "over 3 seeds and 40 held-out prompts" in table.caption
    assert found["Seed by seed"].rows == [["human-rm", "+0.20, +0.40, +0.90", "+0.10, +0.20, +0.60"]]


def test_the_first_table_has_every_arm_beside_what_it_took() -> None:
    place, found = np.arange(40), []
    for seed in range(3):
        for arm, wins, own in (("sft", 0, 0), ("human-rm", 24, 2.0), ("group-preference", 30, 0)):
            scores = {"judge:gold-rm": np.where(place < wins, 1, -(wins > 0)), "gold": np.where(place < wins, 0.5, 0)}
            own_reward = {"judge:human-rm": np.where(place % 2, 1.0, -1.0) + own, "judge:direct-llm": 0.0}
            found.append(outcome(arm, seed, {**scores, **own_reward, "kl": wins / 4, "distinct-2": 0.9}))
    table, main, *_ = tables.comparison_tables(found, [], JUDGES)
    wins = ["people: wins, %", "people: at equal length, %", "gold: wins, %"]
    assert table.columns == ["arm", *wins, "reward, SD", "KL", "tokens", "distinct-2", "minutes"]
    group, human, sft = table.rows
    assert (group[0], human[0], sft[0]) == ("group-preference", "human-rm", "sft")  # the most wins first
    assert str(group[1]).startswith("75 [") and str(human[1]).startswith("60 [")
    assert str(group[3]).startswith("88 [") and str(human[3]).startswith("80 [")  # 10 and 16 ties of 40
    assert (group[4], human[4], sft[4]) == (None, "+2.0 [+2.0, +2.0]", None)
    assert [row[5] for row in table.rows] == ["7.5 [7.5, 7.5]", "6.0 [6.0, 6.0]", "0.00 [0.00, 0.00]"]
    assert [row[-1] for row in table.rows] == [1, 1, None]
    assert [row[0] for row in main.rows] == ["RLHF vs SFT (human-rm)", "group preference vs SFT (group-preference)"]
    shown = Console(width=80, record=True, file=StringIO())
    for one in tables.terminal_tables(table, main, JUDGES):
        shown.print(one.rich(show_lines=True))
    text = shown.export_text()
    assert "│ group-preference │ 75 [" in text and " 7.5 │" in text  # nothing folded, no interval of the KL


def test_every_arm_has_its_row_against_sft_and_no_row_is_there_twice() -> None:
    assert {a for a, b, *_ in tables.PAPER if b == "sft"} >= set(ARMS)
    assert len({(a, b) for a, b, *_ in tables.PAPER}) == len(tables.PAPER)


def history(*, updates: int = 40, slope: float = 1.0) -> History:
    """A training whose own reward, gold and KL rise evenly; the reward by one standard deviation."""
    steps, rise = np.arange(updates), slope * np.arange(updates) / 40
    measures = {"step": np.repeat(steps, 2).astype(float), "reward": np.tile([-1.0, 1.0], updates)}
    samples = System("", "", ["p"] * 2 * updates, ["r"] * 2 * updates, measures)
    return History(steps.tolist(), {"reward": rise, "gold": rise / 2, "kl": 10 * rise}, samples)


def test_figures_show_all_arms_apart_and_all_seeds() -> None:
    outcomes = [
        replace(outcome(arm, seed, {}), history=history(updates=40 - seed, slope=1 + seed))
        for arm in ARMS
        for seed in range(3)
    ]
    curves, _, plane = (draw(outcomes) for *_, draw in FIGURES)
    assert curves is not None and plane is not None
    looks = set()
    for arm, line in zip(ARMS, curves.axes[0].lines, strict=True):
        assert line.get_label() == arm
        looks.add((line.get_color(), str(line.get_linestyle()), line._dash_pattern[1] and tuple(line._dash_pattern[1])))
    assert len(looks) == len(ARMS)
    assert [text.get_text() for text in curves.legends[0].get_texts()] == list(ARMS)
    # the shortest of the three has 38 updates; the smoothed end of each is the mean of its updates 33 to 37
    mean, *seeds = plane.axes[0].lines[:7]
    ends = [(10 * slope * 35 / 40, slope * 35 / 80) for slope in (1, 2, 3)]
    assert len(mean.get_xdata()) == 38 and mean.get_xydata()[-1].tolist() == pytest.approx(list(ends[1]))
    assert [line.get_xydata()[-1].tolist() for line in seeds[1::2]] == [pytest.approx(list(end)) for end in ends]


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_with_fewer_they_are_over_prompts_and_say_so(seeds: Sequence[int]) -> None:
    found = {table.title: table for table in tables.comparison_tables(outcomes(seeds), [], JUDGES)}
    main, by_judge = found[MAIN], found["What each judge says of each policy"]
    won = np.concatenate([np.arange(40) < n for n in (24, 28, 38)[: len(seeds)]])
    (row,) = main.rows
    assert row[1] == tables.percent(statistics.rate(won, clusters=PROMPTS * len(seeds)))
    assert "intervals over 40 held-out prompts, ties" in main.caption
    assert by_judge.rows[1][2] == ("+0.10 [+0.10, +0.10]" if len(seeds) == 1 else "+0.15 [+0.15, +0.15]")


def test_staleness_is_by_policy_with_one_seed_and_over_seeds_with_three() -> None:
    rng = np.random.default_rng(0)
    prompts = [f"p{i % 12}" for i in range(72)]
    parts = []
    for _ in range(3):
        gold = rng.normal(size=72)
        parts.append((gold + rng.normal(size=72), gold, prompts))
    scores, gold = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    cells = statistics.crossed(np.repeat([0, 1, 2], 72).tolist(), prompts * 3)
    assert isinstance(cells, statistics.Crossed)
    over = statistics.spearman(scores, gold, clusters=cells)
    assert ablations._correlation(parts) == tables.with_interval(over, sign=True, units=True)
    one = statistics.spearman(parts[0][0], parts[0][1], clusters=prompts)
    assert ablations._correlation(parts[:1]) == tables.with_interval(one, sign=True, units=True)
    parts[1][0][:5] = np.nan
    assert ablations._correlation(parts).endswith(" (12); 5 failed")
    assert ablations._correlation([(np.ones(9), np.arange(9.0), ["p"] * 9)]) == "one value only"
    assert ablations._correlation([(np.full(9, np.nan), np.arange(9.0), ["p"] * 9)]) == "too few; 9 failed"
