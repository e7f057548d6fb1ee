from __future__ import annotations

import itertools
import math
import re
import time
from dataclasses import asdict
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlaif_env import statistics as s
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import agreement, bootstrap, intervals, measures, text_measures

# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_reads_as_a_number_and_as_text() -> None:
    interval = s.Interval(0.5, 0.25, 0.75, 12, 12)
    assert float(interval) == 0.5
    assert str(interval) == "0.500 [0.250, 0.750] (n = 12)"
    assert str(s.Interval(0.5, 0.25, 0.75, 12, 7)) == "0.500 [0.250, 0.750] (n = 12, 7 units)"


def test_the_number_of_units_stands_where_they_are_too_few_for_an_interval() -> None:
    found = s.rate([1, 0, 1, 1, 1, 1], clusters=["a", "a", "b", "b", "c", "d"])
    assert (found.low, found.high, found.units, found.n) == (None, None, 4, 6)
    assert str(found) == "0.833 (4 units only) (n = 6)"
    assert s.interval_text(found, ".0f", scale=100) == s.interval_text(asdict(found), ".0f", scale=100)
    assert s.interval_text(found, ".0f", scale=100) == "83 (4 units only)"
    assert s.interval_text(s.rate([1, 0, 1, 1, 1]), ".0%") == "80% [38%, 96%]"
    assert s.interval_text(s.rate([1, 0, 1, 1, 1]), ".0%", units=True) == "80% [38%, 96%] (5)"
    assert s.interval_text(found, ".0f", scale=100, units=True) == "83 (4 units only)"
    assert s.interval_text(None, ".2f") == s.interval_text({"estimate": None, "low": None, "high": None}, ".2f") == "-"


RANDOM = np.random.default_rng(0).random((2, 20))
FIGURES = {
    "wilson": lambda groups: s.wilson(3, len(set(groups))),
    "rate": lambda groups: s.rate(RANDOM[0] > 0.4, clusters=groups),
    "mean": lambda groups: s.bootstrap_mean(RANDOM[0], clusters=groups, resamples=200),
    "change": lambda groups: s.measure_change("gold", *RANDOM, list(map(str, groups)), resamples=200),
    "accuracy": lambda groups: s.accuracy(*RANDOM, clusters=groups),
    "position": lambda groups: s.position_bias(*RANDOM, clusters=groups).same_position,
    "kappa": lambda groups: s.cohens_kappa(*(RANDOM > 0.5).tolist(), clusters=groups),
    "spearman": lambda groups: s.spearman(*RANDOM, clusters=groups),
    "reliability": lambda groups: s.reliability_table(*RANDOM, bins=1, clusters=groups)[0].observed,
    "shared texts": lambda groups: s.rate(RANDOM[0] > 0.4, clusters=s.Dyads(groups, groups + groups.max() + 1)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_counts_its_units_and_needs_five(name: str) -> None:
    few, enough = (FIGURES[name](np.arange(20) % units) for units in (4, 5))
    assert (few.units, few.low, few.high) == (4, None, None)
    assert enough.units == s.FEWEST_UNITS == 5 and enough.low < enough.estimate < enough.high


@pytest.mark.parametrize(
    ("p", "df", "expected"),  # from printed tables; df of 1 and 2 have a closed form
    [
        (0.975, 1, math.tan(0.475 * math.pi)),
        (0.975, 2, 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        (0.995, 5, 4.0321429836),
        (0.975, 10, 2.2281388520),
        (0.95, 30, 1.6972608866),
        (0.5, 7, 0.0),
    ],
)
def test_t_quantile_agrees_with_printed_tables(p: float, df: float, expected: float) -> None:
    assert s.t_quantile(p, df) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("level", [0.01, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1 - 1e-9])
def test_normal_quantile_is_that_of_the_standard_library(level: float) -> None:
    assert s.normal_quantile(level) == pytest.approx(NormalDist().inv_cdf(0.5 + level / 2), rel=1e-12)


def test_t_quantile_becomes_normal_and_falls_with_the_degrees_of_freedom() -> None:
    assert s.t_quantile(0.975, 1e7) == pytest.approx(1.959964, abs=1e-5)
    values = [s.t_quantile(0.975, df) for df in (1, 1.5, 2, 3.7, 10, 1000)]
    assert values == sorted(values, reverse=True)


def test_wilson_by_hand() -> None:
    # z² = 3.841459: (0.8 + z²/20 ± z·√(0.016 + z²/400)) / (1 + z²/10)
    found = s.wilson(8, 10)
    assert (found.estimate, found.n) == (0.8, 10)
    assert (found.low, found.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    none, every = s.wilson(0, 10), s.wilson(10, 10)
    assert none.low == 0 and none.high == pytest.approx(3.841459 / 13.841459, abs=1e-6)
    assert every.high == 1 and every.low == pytest.approx(10 / 13.841459, abs=1e-6)


def test_wilson_is_scipys_where_scipy_has_it() -> None:
    for k, n, level in ((0, 7, 0.95), (3, 10, 0.95), (10, 10, 0.9), (212, 500, 0.99)):
        found, expected = s.wilson(k, n, level=level), binomtest(k, n).proportion_ci(level, method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_symmetric_and_holds_the_estimate(case: tuple[int, int]) -> None:
    k, n = case
    one, other = s.wilson(k, n), s.wilson(n - k, n)
    if n < s.FEWEST_UNITS:
        return
    assert 0 <= one.low <= one.estimate <= one.high <= 1
    assert one.low == pytest.approx(1 - other.high, abs=1e-12)
    assert s.wilson(k, n, level=0.99).high >= one.high


def test_rate_without_ties_is_wilson() -> None:
    for wins, n in ((7, 10), (0, 15), (15, 15), (1, 40)):
        found, expected = s.rate([1.0] * wins + [0.0] * (n - wins)), s.wilson(wins, n)
        assert (found.estimate, found.low, found.high) == pytest.approx(
            (expected.estimate, expected.low, expected.high), abs=1e-9
        )


@pytest.mark.parametrize(("wins", "ties", "losses"), [(5, 2, 3), (12, 36, 2), (1, 8, 0), (30, 5, 60)])
def test_rate_limits_are_where_the_score_test_stops_rejecting(wins: int, ties: int, losses: int) -> None:
    n = wins + ties + losses
    found = s.rate([1.0] * wins + [0.5] * ties + [0.0] * losses)
    assert found.estimate == pytest.approx((wins + ties / 2) / n)
    for limit, sign in ((found.low, 1), (found.high, -1)):
        delta = 2 * limit - 1
        # the likelihood at this difference, maximised over the share of losses by brute force
        q = np.linspace(max(0.0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9, 20_001)
        likelihood = losses * np.log(q) + ties * np.log(1 - 2 * q - delta)
        likelihood += wins * np.log(q + delta) if wins else 0
        best = q[np.argmax(likelihood)]
        score = (wins - losses - n * delta) / math.sqrt(n * (2 * best + delta - delta**2))
        assert score == pytest.approx(sign * 1.959964, abs=1e-3)


def test_rate_of_ties_only_is_narrower_than_of_wins_and_losses_and_not_empty() -> None:
    ties, split = s.rate([0.5] * 30), s.rate([1.0, 0.0] * 15)
    assert ties.estimate == split.estimate == 0.5
    assert 0.05 < ties.high - ties.low < split.high - split.low


def test_rate_counts_clusters_not_rows() -> None:
    outcomes = np.array([1.0] * 14 + [0.0] * 6)
    repeated = s.rate(np.repeat(outcomes, 5), clusters=np.repeat(np.arange(20), 5))
    single, naive = s.rate(outcomes), s.rate(np.repeat(outcomes, 5))
    assert repeated.n == 100
    # t instead of z and m - 1 instead of m make it a little wider than Wilson's at 20 rows
    assert single.low - 0.04 < repeated.low < single.low
    assert naive.high - naive.low < 0.5 * (repeated.high - repeated.low)


def test_rate_of_clusters_without_any_spread_is_wilsons_of_the_clusters() -> None:
    found, expected = s.rate([1.0] * 40, clusters=[i // 4 for i in range(40)]), s.wilson(10, 10)
    assert (found.low, found.high) == (expected.low, expected.high)


def test_clusters_may_be_prompts() -> None:
    assert s.group_codes(["b", "a", "b", "c"], 4).tolist() == [0, 1, 0, 2]
    assert s.group_codes(None, 3).tolist() == [0, 1, 2]
    assert s.group_codes(np.array([7, 3, 7]), 3).tolist() == [0, 1, 0]


# --- bootstrap --------------------------------------------------------------------------------------------------------


def test_bootstrap_error_is_the_textbook_one() -> None:
    values = np.array([1.0, 4.0, 2.0, 9.0, 4.0])
    found = s.studentised_bootstrap(values, resamples=500)
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    assert (found.estimate, found.df, found.n, found.t.size) == (4.0, 4, 5, 500)
    assert (np.diff(found.t[np.isfinite(found.t)]) >= 0).all()


def test_bootstrap_draws_from_all_resamples_and_only_from_them() -> None:
    values = np.array([0.0, 1.0, 5.0])
    possible = set()
    for drawn in itertools.product(values, repeat=3):
        shift, spread = np.mean(drawn) - values.mean(), np.std(drawn, ddof=1) / math.sqrt(3)
        possible.add(round(shift / spread, 6) if spread else math.copysign(math.inf, shift))
    found = {round(float(t), 6) for t in s.studentised_bootstrap(values, resamples=5_000).t}
    assert found == possible


def test_bootstrap_interval_takes_the_tails_crosswise() -> None:
    # skewed to the right: the interval reaches further up than down, as the percentile interval's does not
    values = np.random.default_rng(1).exponential(size=30)
    found = s.bootstrap_mean(values)
    assert found.high - found.estimate > 1.2 * (found.estimate - found.low)


def test_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert s.bootstrap_mean(values, seed=3) == s.bootstrap_mean(values, seed=3)
    assert s.bootstrap_mean(values, seed=3) == s.bootstrap_mean(values, seed=np.random.default_rng(3))
    assert s.bootstrap_mean(values, seed=3) != s.bootstrap_mean(values, seed=4)


def test_bootstrap_moves_and_scales_with_its_values() -> None:
    values = np.random.default_rng(0).exponential(size=25)
    one, other = s.bootstrap_mean(values), s.bootstrap_mean(1e6 - 1e-3 * values)
    assert (other.estimate, other.low, other.high) == pytest.approx(
        (1e6 - 1e-3 * one.estimate, 1e6 - 1e-3 * one.high, 1e6 - 1e-3 * one.low), abs=1e-5
    )


def test_rows_that_repeat_within_a_cluster_add_nothing() -> None:
    values = np.random.default_rng(0).normal(size=30)
    one = s.bootstrap_mean(values)
    repeated = s.bootstrap_mean(np.repeat(values, 4), clusters=np.repeat(np.arange(30), 4))
    assert (repeated.estimate, repeated.low, repeated.high) == pytest.approx((one.estimate, one.low, one.high))
    naive = s.bootstrap_mean(np.repeat(values, 4))
    assert naive.high - naive.low < 0.6 * (repeated.high - repeated.low)


def test_clusters_of_unequal_size_give_the_mean_over_rows() -> None:
    found = s.bootstrap_mean([1.0, 1.0, 1.0, 5.0, 2.0, 4.0, 2.0], clusters=[0, 0, 0, 1, 2, 3, 4])
    assert found.estimate == pytest.approx(16 / 7)
    assert found.low < 16 / 7 < found.high


def test_the_error_of_clusters_is_that_of_leaving_each_out() -> None:
    values, groups = np.random.default_rng(2).normal(size=12), np.array([0, 0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5])
    without = np.array([values[groups != one].mean() for one in range(6)])
    expected = math.sqrt(5 / 6 * ((without - values.mean()) ** 2).sum())
    assert s.mean_error(values, groups).error == pytest.approx(expected)
    # a few clusters of different sizes: the interval holds that of Student's t with this error
    found = s.bootstrap_mean(values, clusters=groups)
    half = s.t_quantile(0.975, 5) * expected
    assert found.low <= found.estimate - half + 1e-12 and found.high >= found.estimate + half - 1e-12


def test_an_error_that_few_clusters_make_has_few_degrees_of_freedom() -> None:
    # one success in eight: kurtosis 8 (7⁴ + 7) / (7² + 7)² = 43 / 7, so 16 / (43 / 7 - 5 / 7)
    assert s.mean_error(np.array([1.0] + [0.0] * 7), None).df == pytest.approx(16 / (38 / 7))
    assert s.mean_error(np.array([1.0, 0.0] * 4), None).df == s.mean_error(np.ones(8), None).df == 7
    assert s.mean_error(np.random.default_rng(0).normal(size=4000), None).df == pytest.approx(4000, rel=0.1)
    assert s.mean_error(np.ones(3), [0, 0, 0]).df == 0
    # all successes in two of twenty prompts say less than as many in twenty different ones
    rows, prompts = np.arange(60), np.arange(60) // 3
    few, spread = (s.rate(won, clusters=prompts) for won in (rows < 6, rows % 10 == 0))
    assert few.estimate == spread.estimate == 0.1 and spread.high < 0.21 and few.high > 0.35


def test_a_mean_of_some_ten_rows_holds_students_interval_and_from_thirty_is_the_bootstraps_own() -> None:
    values = np.random.default_rng(3).exponential(size=30)
    for n, held in ((10, True), (30, False)):
        found, half = s.bootstrap_mean(values[:n]), s.t_quantile(0.975, n - 1) * values[:n].std(ddof=1) / math.sqrt(n)
        assert (found.estimate - found.low >= half - 1e-12) == held
        assert found.high - found.estimate > half


def test_intervals_end_where_their_measure_does() -> None:
    # a change of distinct-2 on eight prompts had limits of -0.837 and +1.192
    before, after, prompts = [0.0, 0, 1, 0, 1, 0, 1, 0], [1.0, 1, 0, 1, 0, 0, 0.5, 1], list("aabcdeff")
    found, free = (
        s.measure_change("distinct-2", before, after, prompts),
        s.paired_bootstrap(before, after, clusters=prompts),
    )
    assert free.high > 1 and found.high == 1 and found.low == max(-1, free.low)
    mean = s.measure_mean("distinct-2", [0.0] * 5 + [1.0], [str(i) for i in range(6)])
    assert 0 == mean.low < mean.high <= 1
    assert s.measure_mean("reward", before, prompts) == s.bootstrap_mean(before, clusters=prompts)


@pytest.mark.parametrize("values", [[0.1] * 10, [3.7] * 6, [0.0] * 5, [0.1 + 0.2, 0.3] * 4])
def test_values_without_spread_have_an_interval_of_no_width(values: list[float]) -> None:
    found = s.bootstrap_mean(values)
    assert (found.low, found.high) == pytest.approx((values[0], values[0]))


@pytest.mark.parametrize("values", [[1.0] * 4 + [2.0], [0.0] * 197 + [1.0] * 3, [1.0, 2, 4, 2, 1], [0.0] * 9 + [1e9]])
def test_limits_stay_finite_where_resamples_have_no_spread(values: list[float]) -> None:
    found = s.bootstrap_mean(values, resamples=2_000)
    assert math.isfinite(found.low) and math.isfinite(found.high)
    assert found.low < found.estimate < found.high


def test_limits_that_the_bootstrap_leaves_infinite_are_students() -> None:
    found = s.studentised_bootstrap([1.0, 2.0], resamples=2_000).interval()
    assert found.high - found.estimate == pytest.approx(12.7062 * 0.5, rel=1e-4)


def test_paired_bootstrap_uses_the_pairing() -> None:
    rng = np.random.default_rng(0)
    before = 100 * rng.normal(size=50)
    after = before + 1 + 0.5 * rng.normal(size=50)
    found = s.paired_bootstrap(before, after)
    assert found == s.bootstrap_mean(after - before)
    assert 0.8 < found.low < found.high < 1.2
    assert s.paired_bootstrap(after, before).estimate == pytest.approx(-found.estimate)


def test_resampled_counts_have_the_right_sums_in_any_number_of_chunks() -> None:
    chunks = list(s.resampled_counts(70_000, 100, np.random.default_rng(0)))
    assert sum(len(chunk) for chunk in chunks) == 100 and len(chunks) > 1
    assert all((chunk.sum(axis=1) == 70_000).all() for chunk in chunks)


# --- agreement and calibration ----------------------------------------------------------------------------------------


def test_accuracy_counts_ties_one_half() -> None:
    #            right wrong tie   tie  both tie
    found = s.accuracy([0.9, 0.2, 0.5, 0.7, 0.5], [1.0, 0.8, 1.0, 0.5, 0.5])
    assert found.estimate == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.5) / 5)


def test_position_bias_by_hand() -> None:
    #  pair:        first both  second both  follows the text  no preference  first both
    found = s.position_bias([0.9, 0.1, 0.9, 0.5, 0.6], [0.8, 0.4, 0.2, 0.9, 0.7])
    assert found.same_position.estimate == pytest.approx(3 / 5)
    assert found.first is not None
    assert found.first.estimate == pytest.approx(2 / 3)
    assert found.first.n == 3
    assert s.position_bias([0.9], [0.1]).first is None


def test_cohens_kappa_by_hand() -> None:
    # both yes 20, only first 5, only second 10, both no 15: observed 0.7, chance 0.5
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = s.cohens_kappa(a, b)
    assert found.estimate == pytest.approx(0.4)
    assert 0.1 < found.low < 0.4 < found.high < 0.65
    perfect = s.cohens_kappa([0, 1] * 10, [0, 1] * 10)
    assert perfect.estimate == perfect.high == 1
    assert perfect.low == pytest.approx(2 * 20 / 23.841459 - 1, abs=1e-6)  # Wilson's lower limit, chance ½
    assert s.cohens_kappa([0, 1] * 10, [1, 0] * 10).estimate == pytest.approx(-1)


def test_kappas_standard_error_is_that_of_the_formula_for_independence() -> None:
    # Fleiss, Cohen and Everitt: with 50:50 labels and kappa 0 the variance is 1 / n, here 1 / (n - 1) and read with t
    found = s.cohens_kappa([0, 0, 1, 1] * 100, [0, 1, 0, 1] * 100)
    assert found.estimate == pytest.approx(0)
    assert found.high == pytest.approx(math.tanh(s.t_quantile(0.975, 399) / math.sqrt(399)), abs=1e-6)
    assert found == s.cohens_kappa([0, 0, 1, 1] * 100, [0, 1, 0, 1] * 100, clusters=range(400))


def test_auc_by_hand_and_by_the_formula_of_delong() -> None:
    assert s.auc([3, 2, 2, 1], [True, True, False, False]).estimate == 3.5 / 4  # 3 > 2, 3 > 1, 2 = 2, 2 > 1
    rng = np.random.default_rng(0)
    found = np.arange(60) < 20
    values = rng.normal(size=60) + found
    area = s.auc(values, found)
    placed = (1 + np.sign(values[found][:, None] - values[~found])) / 2  # DeLong, DeLong and Clarke-Pearson 1988
    error = math.sqrt(placed.mean(1).var(ddof=1) / 20 + placed.mean(0).var(ddof=1) / 40)
    assert area.estimate == pytest.approx(placed.mean())
    logit = math.log(placed.mean() / (1 - placed.mean()))
    half = 1.96 * error / (placed.mean() * (1 - placed.mean()))
    for limit, expected in ((area.low, logit - half), (area.high, logit + half)):
        assert limit == pytest.approx(1 / (1 + math.exp(-expected)), abs=0.015)
    other = s.auc(-values, found)
    assert (other.estimate, other.low, other.high) == pytest.approx((1 - area.estimate, 1 - area.high, 1 - area.low))
    assert s.auc(values, found).units == 26  # 2 · 20 · 40 / 60


def test_spearman_by_hand() -> None:
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / √(4.5 · 5)
    assert s.spearman([10, 20, 20, 90], [1, 3, 2, 4]).estimate == pytest.approx(4.5 / math.sqrt(22.5))
    x = np.random.default_rng(0).normal(size=30)
    found = s.spearman(x, np.exp(x))
    assert found.estimate == 1 and found.low > 0.99 and found.high <= 1
    assert s.spearman(x, -(x**3)).estimate == -1
    # Bonett and Wright at rho = 0: z / √(n - 3)
    flat = s.spearman([1, 2, 3, 4, 5, 6, 7], [4, 1, 7, 4, 7, 1, 4])
    assert flat.estimate == pytest.approx(0, abs=1e-12)
    assert flat.high == pytest.approx(math.tanh(1.959964 / 2), abs=1e-6)


def test_brier_by_hand() -> None:
    assert s.brier([0.8, 0.4], [1.0, 0.5]) == pytest.approx((0.04 + 0.01) / 2)
    assert s.brier([0.5] * 4, [0, 1, 0, 1]) == 0.25


def test_excess_cross_entropy_by_hand() -> None:
    assert s.excess_cross_entropy([0.0], [1.0]) == pytest.approx(math.log(2))
    # margin log 3 predicts 3/4: ½·log(4/3) + ½·log 4 - log 2
    assert s.excess_cross_entropy([math.log(3)], [0.5]) == pytest.approx(0.5 * math.log(4 / 3))
    targets = np.array([0.1, 0.5, 0.99])
    assert s.excess_cross_entropy(np.log(targets / (1 - targets)), targets) == pytest.approx(0, abs=1e-12)
    assert s.excess_cross_entropy([1000.0, -1000.0], [0.0, 0.0]) == pytest.approx(500)


def test_reliability_table_and_calibration_error_by_hand() -> None:
    #   confidence:      .95   .85   .85   1.0  .9   .5
    predicted, target = [0.05, 0.15, 0.85, 1.0, 0.9, 0.5], [0.0, 1.0, 1.0, 1.0, 0.5, 1.0]
    table = s.reliability_table(predicted, target)
    assert [row.n for row in table] == [1, 0, 0, 2, 3]  # 0.9 is in the last bin, as 1.0 is
    assert table[3].predicted == pytest.approx(0.85)
    assert table[3].observed is not None and table[3].observed.estimate == pytest.approx(0.5)
    assert table[0].observed is not None and table[0].observed.estimate == 0.5  # no favourite: the mean of both orders
    assert table[1].observed is None and math.isnan(table[1].predicted)
    assert (table[0].low, table[-1].high) == (0.5, 1.0)
    expected = (1 * 0.0 + 2 * (0.85 - 0.5) + 3 * (2.85 - 2.5) / 3) / 6
    assert s.expected_calibration_error(predicted, target) == pytest.approx(expected)
    assert s.expected_calibration_error(predicted, target, bins=1) == pytest.approx(abs(5.05 - 4.0) / 6)


PREDICTIONS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=30)


@given(PREDICTIONS)
def test_the_order_of_a_pair_changes_no_figure(rows: list[tuple[float, float, bool]]) -> None:
    # 1 - (1 - x) is x from ½ up only: below it, a confidence is the rounded 1 - x either way
    p, y = (np.maximum(values, 1 - np.array(values)) for values in zip(*((p, y) for p, y, _ in rows), strict=True))
    swapped = np.array([swap for *_, swap in rows])
    q, z = np.where(swapped, 1 - p, p), np.where(swapped, 1 - y, y)
    for figure in (s.expected_calibration_error, s.brier, lambda a, b: float(s.accuracy(a, b))):
        assert figure(q, z) == pytest.approx(figure(p, y), abs=1e-12)
    margin = 4 * p - 2
    one, other = s.excess_cross_entropy(margin, y), s.excess_cross_entropy(np.where(swapped, -margin, margin), z)
    assert other == pytest.approx(one, abs=1e-12)
    assert [(row.n, row.predicted, row.observed) for row in s.reliability_table(q, z) if row.n] == [
        (row.n, row.predicted, row.observed) for row in s.reliability_table(p, y) if row.n
    ]


@given(PREDICTIONS)
def test_five_bins_of_confidence_are_the_usual_ten_over_both_orders(rows: list[tuple[float, float, bool]]) -> None:
    p, y = (np.array(values) for values in zip(*((p, y) for p, y, _ in rows), strict=True))
    assume((np.abs(p[:, None] - np.linspace(0, 1, 11)[1:-1]) > 1e-9).all())  # an edge belongs to the bin above it
    both, target = np.concatenate([p, 1 - p]), np.concatenate([y, 1 - y])
    place = np.minimum(9, (both * 10).astype(int))
    ten = sum(abs(float((both - target)[place == i].sum())) for i in range(10)) / both.size
    assert s.expected_calibration_error(p, y) == pytest.approx(ten, abs=1e-9)


# --- text -------------------------------------------------------------------------------------------------------------


def test_word_counts() -> None:
    texts = ["", "  ...  ", "One two.", "don't stop-gap it’s", "naïve 3.5 Ünï", "a\tb\nc", "snake_case"]
    assert s.word_counts(texts).tolist() == [0, 0, 2, 3, 4, 3, 2]


def test_repeated_ngrams_by_hand() -> None:
    found = s.repeated_ngrams(["a b c a b c a b c", "a b c d", "a b", ""], 3)
    assert found.tolist() == pytest.approx([1 - 3 / 7, 0, 0, 0])  # seven trigrams, abc bca cab among them


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("In 1999 there were 1,000 men.", "In 1,999 or 1999, 1000 men and 12 dogs", ["12"]),
        ("", "3rd of 2.50, 02.5 and 7.", ["3", "2.5", "7"]),
        ("", "gpt4 and v2 have none", []),
        ("0", "0.0 and 000", []),
        ("", "1,234,5 and 12,34", ["1234", "5", "12", "34"]),
    ],
)
def test_new_numbers(prompt: str, response: str, expected: list[str]) -> None:
    assert s.new_numbers(prompt, response) == expected


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("A film by Jane Doe.", "The film by Jane and JANE Doe is good.", []),
        ("A film.", "It was shot by John Smith's crew in New York. Later, I'm told, NASA came.",
         ["John Smith", "New York", "NASA"]),
        ("new york", "She left New York for New Delhi", ["New Delhi"]),
        ("", "Nobody. Sees! Openings?\nHere: None", []),
        ("", "Jane Doe wins; so Jane Doe, Bob", ["Doe", "Jane Doe", "Bob"]),
        ("", "", []),
    ],
)  # fmt: skip
def test_new_names(prompt: str, response: str, expected: list[str]) -> None:
    assert s.new_names(prompt, response) == expected


@pytest.mark.parametrize(
    "text", ["1," * 200_000, "A b " * 50_000, "\n" * 200_000 + "B", "-'a" * 100_000, "1" * 200_000]
)
def test_text_measures_take_time_in_proportion(text: str) -> None:
    start = time.process_time()
    s.new_numbers(text, text)
    s.new_names("", text)
    s.word_counts([text])
    assert time.process_time() - start < 5


# --- what is refused --------------------------------------------------------------------------------------------------

NAN = math.nan
BAD = [
    (lambda: s.wilson(1, 0), "expected at least one row, found n = 0"),
    (lambda: s.wilson(5, 4), "expected successes from 0 to n = 4, found 5"),
    (lambda: s.wilson(NAN, 4), "expected successes from 0 to n = 4, found nan"),
    (lambda: s.wilson(1, 2, level=95), "expected a confidence level between 0 and 1, found 95"),
    (lambda: s.t_quantile(0.975, 0.5), "expected 0.5 <= p < 1 and df >= 1, found p = 0.975, df = 0.5"),
    (lambda: s.rate([]), "expected at least one value of outcomes, found none"),
    (lambda: s.rate([0.5, NAN]), "expected finite outcomes, found nan in row 1 (1 such rows); count failed rows apart"),
    (lambda: s.rate([0.5, 2]), "expected outcomes from 0 to 1, found 2 in row 1"),
    (lambda: s.rate([[0.5]]), "expected outcomes of shape (n,), found (1, 1)"),
    (lambda: s.rate(["yes"]), "expected outcomes to be numbers, found \"['yes']\""),
    (lambda: s.rate([1, 0], clusters=["a"]), "expected one cluster for each of 2 rows, found 1"),
    (lambda: s.rate([1, 0], clusters=[[1], [2]]), "expected clusters to be hashable, such as strings or numbers"),  # type: ignore[list-item]
    (lambda: s.bootstrap_mean([]), "expected at least one value of values, found none"),
    (lambda: s.bootstrap_mean([1.0, math.inf]), "expected finite values, found inf in row 1"),
    (lambda: s.studentised_bootstrap([1.0]), "expected at least two independent rows or clusters to resample, found 1"),
    (lambda: s.studentised_bootstrap([1, 2], clusters=[0, 0]), "expected at least two independent rows or clusters"),
    (lambda: s.bootstrap_mean([1, 2, 3, 4, 5], resamples=9), "expected at least 100 resamples"),
    (lambda: s.bootstrap_mean([1, 2], level=1), "expected a confidence level between 0 and 1, found 1"),
    (lambda: s.paired_bootstrap([1, 2], [1, 2, 3]), "expected 2 values of after, found 3"),
    (lambda: s.accuracy([0.5], [0.5, 1]), "expected 1 values of target, found 2"),
    (lambda: s.accuracy([1.5], [1]), "expected p_first from 0 to 1, found 1.5 in row 0"),
    (lambda: s.cohens_kappa([], []), "expected two equally long, non-empty lists of labels, found 0 and 0"),
    (lambda: s.cohens_kappa([1], [1, 2]), "expected two equally long, non-empty lists of labels, found 1 and 2"),
    (lambda: s.cohens_kappa([1, 1], [1, 1]), "expected at least two different labels, found 1 only"),
    (lambda: s.auc([1, 2], [True, True]), "expected positive rows and others, found 2 of 2 positive"),
    (lambda: s.spearman([1, 2, 3], [1, 2, 3]), "expected at least 4 rows for a rank correlation, found 3"),
    (lambda: s.spearman([1, 2, 3, 4], [5, 5, 5, 5]), "expected y to vary, found one value in all 4 rows"),
    (lambda: s.reliability_table([0.5], [1], bins=0), "expected at least one bin, found 0"),
    (lambda: s.excess_cross_entropy([0.0], [1.5]), "expected target from 0 to 1, found 1.5 in row 0"),
    (lambda: s.repeated_ngrams([], 2), "expected at least one text in texts, found none"),
    (lambda: s.repeated_ngrams("one text", 2), "expected texts to be a list of strings, found 'one text'"),
    (lambda: s.word_counts([None]), "expected texts to be a list of strings, found '[None]'"),  # type: ignore[list-item]
    (lambda: s.repeated_ngrams(["a b"], 0), "expected n-grams of at least one word, found n = 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_bad_input_is_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(RLAIFError, match=re.escape(message)):
        call()


def test_everything_there_is_comes_from_one_door() -> None:
    assert len(s.__all__) == len(set(s.__all__))
    assert all(hasattr(s, name) for name in s.__all__)
    for module in (agreement, bootstrap, intervals, measures, text_measures):
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        assert {name for name in own if not name.startswith("_")} <= set(s.__all__)


# --- seeds and prompts ------------------------------------------------------------------------------------------------

# seeds have means 1, 2, 3, prompts 0, 1, 2, 3, 4; what is left is +d in one and -d in the other corners of a square
TABLE = np.add.outer([-1.0, 0.0, 1.0], np.arange(5.0))
TABLE[0, 0] += 0.5
TABLE[0, 1] -= 0.5
TABLE[1, 0] -= 0.5
TABLE[1, 1] += 0.5
CELLS = np.indices((3, 5)).reshape(2, -1)


def test_the_error_of_a_crossed_layout_is_that_of_the_two_way_analysis_of_variance() -> None:
    found = s.mean_error(TABLE.ravel(), s.Crossed(*CELLS))
    # mean squares: 5 (1 + 0 + 1) / 2 = 5 by seeds, 3 (4 + 1 + 0 + 1 + 4) / 4 = 7.5 by prompts, 4 / 4 / 8 of the rest
    assert (found.error**2, found.seeds.error**2, found.rest) == pytest.approx((7.5 / 15, 5 / 15, 0.125 / 15))
    assert (found.seeds.df, found.seeds.units, found.units) == (2, 3, 5)
    by_seed, by_prompt = 4.30265273**2, s.t_quantile(0.975, found.df) ** 2
    half = math.sqrt(by_seed * (5 - 0.0625) / 15 + by_prompt * (7.5 - 0.0625) / 15)
    interval = s.mean_interval(TABLE.ravel(), s.Crossed(*CELLS))
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((2 - half, 2, 2 + half))
    assert (interval.n, interval.units) == (15, 5)


def test_seeds_that_are_all_alike_change_nothing() -> None:
    values = np.random.default_rng(0).normal(size=40)
    cells = s.Crossed(*np.indices((3, 40)).reshape(2, -1))
    same, once = s.mean_interval(np.tile(values, 3), cells), s.mean_interval(values, None)
    assert (same.low, same.high) == pytest.approx((once.low, once.high))
    wins = values > -0.5
    same, once = s.rate(np.tile(wins, 3), clusters=cells), s.rate(np.tile(wins, 3), clusters=cells.prompts)
    assert (same.low, same.high) == pytest.approx((once.low, once.high))
    assert s.rate(np.ones(120), clusters=cells) == s.rate(np.ones(120), clusters=cells.prompts)


def test_seeds_that_differ_are_what_the_interval_is_made_of() -> None:
    cells = s.Crossed(*np.indices((3, 200)).reshape(2, -1))
    values = np.array([0.1, 0.2, 0.6])[cells.seeds]
    found = s.mean_interval(values, cells)
    assert found.high - 0.3 == pytest.approx(4.30265273 * np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5)
    won = s.rate(np.arange(600) % 200 < np.array([40, 100, 160])[cells.seeds], clusters=cells)
    assert won.low < 0.1 and won.high > 0.9


def test_missing_cells_and_repeated_prompts_are_counted_as_they_are() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 30)) + rng.normal(size=(4, 1)) + rng.normal(size=30)
    seeds, prompts = np.indices((4, 30)).reshape(2, -1)
    kept = rng.random(120) < 0.9
    found = s.Crossed(seeds[kept], prompts[kept]).rest(values.ravel()[kept])
    # least squares on all indicators at once
    design = np.hstack([np.eye(4)[seeds[kept]], np.eye(30)[prompts[kept]]])
    left = values.ravel()[kept] - design @ np.linalg.lstsq(design, values.ravel()[kept], rcond=None)[0]
    n, free = kept.sum(), kept.sum() - np.linalg.matrix_rank(design)
    assert found == pytest.approx(left @ left / n / free)
    whole = s.Crossed(seeds, prompts).rest(values.ravel())
    twice = s.Crossed(np.tile(seeds, 2), np.tile(prompts, 2)).rest(np.tile(values.ravel(), 2))
    assert twice == pytest.approx(whole)  # a copy of a row is no new one
    assert s.Crossed(np.arange(6) % 3, np.arange(6)).rest(np.arange(6.0)) == 0  # nothing is crossed


def test_with_two_seeds_the_prompts_alone_are_drawn() -> None:
    assert s.crossed([0, 0, 1, 1], ["a", "b", "a", "b"]) == ["a", "b", "a", "b"]
    found = s.crossed([5, 5, 7, 9], ["a", "b", "a", "b"])
    assert isinstance(found, s.Crossed)
    assert (found.seeds.tolist(), found.prompts.tolist()) == ([0, 0, 1, 2], [0, 1, 0, 1])
    values = np.random.default_rng(0).normal(size=20)
    prompts = [str(i % 10) for i in range(20)]
    two = s.crossed([i // 10 for i in range(20)], prompts)
    assert s.measure_mean("reward", values, two) == s.bootstrap_mean(values, clusters=prompts)


@pytest.mark.parametrize("effect", [0.0, 0.3])
def test_a_p_value_is_1_less_the_level_whose_interval_just_reaches(effect: float) -> None:
    rng = np.random.default_rng(2)
    cells = s.Crossed(*np.indices((3, 40)).reshape(2, -1))
    values = rng.normal(0.3, 1, size=120) + effect * np.array([-1, 0, 1])[cells.seeds]
    spread = s.mean_error(values, cells)
    for level in (0.5, 0.9, 0.95, 0.999):
        assert s.p_value(spread, -s.half_width(spread, level)) == pytest.approx(1 - level)
    assert (s.p_value(spread, 0.0), s.p_value(spread, 1e9)) == (1.0, 1e-12)


def test_rank_correlation_over_seeds_is_the_mean_of_the_seeds_z() -> None:
    rng = np.random.default_rng(3)
    seeds, prompts = np.indices((3, 30)).reshape(2, -1)
    x = rng.normal(size=90)
    y = x + rng.normal(size=90) * np.array([0.3, 1.0, 3.0])[seeds]
    found = s.spearman(x + 10 * seeds, y - 10 * seeds, clusters=s.Crossed(seeds, prompts))  # ranks are within seeds
    each = [math.atanh(s.spearman(x[seeds == i], y[seeds == i]).estimate) for i in range(3)]
    assert found.estimate == pytest.approx(math.tanh(np.mean(each)))
    assert (found.n, found.units) == (90, 30)
    half = 4.30265273 * np.std(each, ddof=1) / 3**0.5  # seeds that differ so much are nearly all there is
    assert math.atanh(found.high) - math.atanh(found.estimate) == pytest.approx(half, rel=0.1)
    # the same answers of each seed: one seed's jackknife over prompts, with the degrees of freedom its kurtosis leaves
    once = np.arange(90) % 30
    same = s.spearman(x[once], y[once], clusters=s.Crossed(seeds, prompts))
    alone = s.spearman(np.repeat(x[:30], 2), np.repeat(y[:30], 2), clusters=np.repeat(np.arange(30), 2))
    assert (same.estimate, same.low, same.high) == pytest.approx((alone.estimate, alone.low, alone.high), abs=0.03)
