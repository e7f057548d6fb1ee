"""Evaluation statistics, pure functions: rates with their failures, tests, aggregates over seeds, raters' agreement.

All of `rlaif_env.statistics.agreement`, `benchmarks.evaluation.length_control` and `benchmarks.evaluation.aggregates`
can be imported from here too; methods, and the range in which each interval was found to cover 93-97 %, stand in the
modules that define them.

A row that failed (a judge gave no answer) is never a loss, never a tie, and never left out in silence: pass `failed`,
and the `Rate` carries their number beside the figure, with what the rate would be had they all been losses or wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.evaluation.aggregates import fleiss_kappa, interquartile_mean, iqm_over_seeds, krippendorff_alpha
from benchmarks.evaluation.length_control import LengthControl, length_baseline, length_control, position_baseline
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import (
    Clusters,
    Floats,
    Interval,
    PositionBias,
    ReliabilityBin,
    StudentisedBootstrap,
    accuracy,
    bootstrap_mean,
    brier,
    checked_array,
    cohens_kappa,
    excess_cross_entropy,
    expected_calibration_error,
    group_codes,
    new_names,
    new_numbers,
    normal_quantile,
    paired_bootstrap,
    position_bias,
    rate,
    reliability_table,
    repeated_ngrams,
    resampled_counts,
    spearman,
    studentised_bootstrap,
    t_quantile,
    wilson,
    word_counts,
)

__all__ = [
    "Clusters",
    "Floats",
    "Interval",
    "LengthControl",
    "PairedTest",
    "PositionBias",
    "Rate",
    "ReliabilityBin",
    "StudentisedBootstrap",
    "accuracy",
    "bootstrap_mean",
    "brier",
    "checked_array",
    "cohens_kappa",
    "excess_cross_entropy",
    "expected_calibration_error",
    "fleiss_kappa",
    "group_codes",
    "harmless_rate",
    "holm",
    "interquartile_mean",
    "iqm_over_seeds",
    "krippendorff_alpha",
    "labeler_alignment",
    "length_baseline",
    "length_control",
    "mcnemar",
    "new_names",
    "new_numbers",
    "normal_quantile",
    "paired_bootstrap",
    "paired_bootstrap_test",
    "perplexity",
    "position_baseline",
    "position_bias",
    "rate",
    "reliability_table",
    "repeated_ngrams",
    "resampled_counts",
    "reward_model_accuracy",
    "sequence_kl",
    "sign_test",
    "spearman",
    "studentised_bootstrap",
    "t_quantile",
    "wilson",
    "win_rate",
    "word_counts",
]


# --- rates with their failures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """A share of the judged rows, and what became of every row.

    Attributes:
        interval: The share over judged rows, ties counted ½, with its interval.
        wins: Rows that count 1.
        ties: Rows that count ½.
        losses: Rows that count 0.
        failed: Rows without a judgement, in none of the above.
    """

    interval: Interval
    wins: int
    ties: int
    losses: int
    failed: int

    @property
    def total(self) -> int:
        """All rows, the failed ones too."""
        return self.wins + self.ties + self.losses + self.failed

    @property
    def lowest(self) -> float:
        """The share of all rows had every failed one been a loss."""
        return (self.wins + self.ties / 2) / self.total

    @property
    def highest(self) -> float:
        """The share of all rows had every failed one been a win."""
        return (self.wins + self.ties / 2 + self.failed) / self.total


def _judged(n: int, failed: ArrayLike | None) -> NDArray[np.bool_]:
    """Rows that did not fail, bool (n,); an error if there are none."""
    if failed is None:
        return np.ones(n, dtype=bool)
    mask = np.asarray(failed)
    if mask.shape != (n,) or mask.dtype != np.bool_:
        raise RLAIFError(f"expected failed to be {n} booleans, found {mask.dtype} of shape {mask.shape}")
    if n and mask.all():
        raise RLAIFError(f"expected at least one judged row, found {n} rows that all failed")
    return ~mask


def _row_rate(name: str, values: Floats, judged: NDArray[np.bool_], clusters: Clusters | None, level: float) -> Rate:
    """Rate of rows above ½ (wins), at ½ (ties) and below. values: (n,) in [0, 1] where judged."""
    kept = checked_array(name, values[judged], low=0.0, high=1.0)
    outcomes = (1 + np.sign(kept - 0.5)) / 2
    groups = None if clusters is None else group_codes(clusters, values.size)[judged]
    wins, ties, losses = (int((outcomes == side).sum()) for side in (1.0, 0.5, 0.0))
    interval = rate(outcomes, clusters=groups, level=level)
    return Rate(interval, wins, ties, losses, int((~judged).sum()))


def _rows(name: str, values: ArrayLike, length: int | None = None) -> Floats:
    """float64 (n,), NaN allowed: failed rows have nothing else to hold."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RLAIFError(f"expected {name} to be numbers, found {str(values)[:80]!r}") from error
    if array.ndim != 1 or array.size == 0:
        raise RLAIFError(f"expected {name} of shape (n,) with n >= 1, found {array.shape}")
    if length is not None and array.size != length:
        raise RLAIFError(f"expected {length} values of {name}, found {array.size}")
    return array


def win_rate(
    p_first: ArrayLike, *, failed: ArrayLike | None = None, clusters: Clusters | None = None, level: float = 0.95
) -> Rate:
    """How often the first of two policies is preferred, a tie counted ½ (section 2.3).

    Args:
        p_first: (n,) probability in [0, 1] that the first response is better: above ½ a win, ½ a tie, below a loss.
            Anything, NaN too, where the row failed.
        failed: (n,) booleans, which rows have no judgement.
        clusters: (n,) which rows belong together, such as the prompt; None if all are independent.
        level: Nominal coverage.

    Returns:
        The rate over judged rows with its interval, and all the counts.

    Raises:
        RLAIFError: If there is no judged row, or a judged row is not finite or outside [0, 1].
    """
    values = _rows("p_first", p_first)
    return _row_rate("p_first", values, _judged(values.size, failed), clusters, level)


def labeler_alignment(
    p_ai: ArrayLike,
    p_human: ArrayLike,
    *,
    failed: ArrayLike | None = None,
    clusters: Clusters | None = None,
    level: float = 0.95,
) -> Rate:
    """AI labeler alignment: how often the labeler's and the person's choice agree; a tie of either counts ½.

    Section 2.3 has hard human labels and no ties; ½ is what a fair coin gets on them.

    Args:
        p_ai: (n,) the labeler's probability in [0, 1] that the first is better; anything where the row failed.
        p_human: (n,) the person's, hard or soft.
        failed: (n,) booleans, which rows have no AI label.
        clusters: (n,) which rows belong together, such as the prompt.
        level: Nominal coverage.

    Raises:
        RLAIFError: If there is no judged row, or a judged row is not finite or outside [0, 1].
    """
    values = _rows("p_ai", p_ai)
    judged = _judged(values.size, failed)
    human = _rows("p_human", p_human, values.size)
    ai = checked_array("p_ai", values[judged], low=0.0, high=1.0)
    agree = np.full(values.size, np.nan)
    people = checked_array("p_human", human[judged], low=0.0, high=1.0)
    agree[judged] = (1 + np.sign(ai - 0.5) * np.sign(people - 0.5)) / 2
    return _row_rate("agreement", agree, judged, clusters, level)


def reward_model_accuracy(
    rewards_1: ArrayLike,
    rewards_2: ArrayLike,
    p_human: ArrayLike,
    *,
    clusters: Clusters | None = None,
    level: float = 0.95,
) -> Rate:
    """Pairwise accuracy of a reward model on preferences (section 2.3); equal rewards or a tied label count ½.

    Args:
        rewards_1: (n,) finite rewards of the first responses.
        rewards_2: (n,) finite rewards of the second.
        p_human: (n,) probability in [0, 1] that the first is preferred, hard or soft.
        clusters: (n,) which rows belong together, such as the prompt.
        level: Nominal coverage.

    Raises:
        RLAIFError: If the arrays are empty, differ in length, are not finite, or p_human leaves [0, 1].
    """
    first = checked_array("rewards_1", rewards_1)
    second = checked_array("rewards_2", rewards_2, length=first.size)
    return labeler_alignment((1 + np.sign(first - second)) / 2, p_human, clusters=clusters, level=level)


def harmless_rate(
    harmless: ArrayLike, *, failed: ArrayLike | None = None, clusters: Clusters | None = None, level: float = 0.95
) -> Rate:
    """Share of responses judged harmless (section 2.3).

    Args:
        harmless: (n,) booleans, or probabilities in [0, 1] of which those above ½ count; anything where the row failed.
        failed: (n,) booleans, which rows have no judgement.
        clusters: (n,) which rows belong together, such as the prompt.
        level: Nominal coverage.

    Raises:
        RLAIFError: If there is no judged row, or a judged row is not finite or outside [0, 1].
    """
    values = _rows("harmless", harmless)
    return _row_rate("harmless", values, _judged(values.size, failed), clusters, level)


# --- tests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedTest:
    """Two systems on the same rows.

    Attributes:
        only_first: Rows that only the first gets right.
        only_second: Rows that only the second gets right.
        p_value: Two-sided, exact.
    """

    only_first: int
    only_second: int
    p_value: float


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided sign test: the chance of a split at least as uneven if both sides were equally likely.

    Args:
        wins: Rows for the one side, ties left out.
        losses: Rows for the other.

    Returns:
        The p-value; 1 without any rows.

    Raises:
        RLAIFError: If a count is negative or not whole.
    """
    for name, count in (("wins", wins), ("losses", losses)):
        if count < 0 or int(count) != count:
            raise RLAIFError(f"expected {name} to be a whole number from 0, found {count!r}")
    n, k = int(wins + losses), int(min(wins, losses))
    if n == 0:
        return 1.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    i = np.arange(k + 1)
    log_terms = log_factorial[n] - log_factorial[i] - log_factorial[n - i] - n * math.log(2)
    return min(1.0, 2 * float(np.exp(log_terms).sum()))


def mcnemar(correct_first: ArrayLike, correct_second: ArrayLike) -> PairedTest:
    """Exact McNemar test: are two systems right equally often on the same independent rows?

    Args:
        correct_first: (n,) 1 or True where the first system is right, else 0.
        correct_second: (n,) the same of the second.

    Raises:
        RLAIFError: If the arrays are empty, differ in length, or hold anything but 0 and 1.
    """
    first = checked_array("correct_first", correct_first, low=0.0, high=1.0)
    second = checked_array("correct_second", correct_second, length=first.size, low=0.0, high=1.0)
    for name, values in (("correct_first", first), ("correct_second", second)):
        if (bad := np.flatnonzero((values != 0) & (values != 1))).size:
            raise RLAIFError(f"expected {name} to be 0 or 1, found {values[bad[0]]:g} in row {bad[0]}")
    b, c = int((first > second).sum()), int((second > first).sum())
    return PairedTest(b, c, sign_test(b, c))


def paired_bootstrap_test(
    before: ArrayLike,
    after: ArrayLike,
    *,
    clusters: Clusters | None = None,
    resamples: int = 10_000,
    seed: int | np.random.Generator = 0,
) -> float:
    """Two-sided p-value of no mean difference, from the distribution behind `paired_bootstrap`.

    Below 0.05 where that 95 % interval leaves out 0. Differences that are all alike have no spread to resample: the
    sign test decides, one sign a cluster.

    Args:
        before: (n,) finite.
        after: (n,) finite, on the same rows.
        clusters: (n,) which rows belong together, such as the prompt.
        resamples: R; the p-value is at least 2 / (R + 1).
        seed: A seed, or the generator to draw from.

    Raises:
        RLAIFError: If the arrays are empty, differ in length or are not finite, or clusters do not match.
    """
    first = checked_array("before", before)
    second = checked_array("after", after, length=first.size)
    bootstrap = studentised_bootstrap(second - first, clusters=clusters, resamples=resamples, seed=seed)
    if bootstrap.error == 0:
        return sign_test(int(bootstrap.df) + 1, 0) if bootstrap.estimate else 1.0
    observed = bootstrap.estimate / bootstrap.error
    beyond = min(int((bootstrap.t >= observed).sum()), int((bootstrap.t <= observed).sum()))
    return min(1.0, 2 * (beyond + 1) / (bootstrap.t.size + 1))


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p-values: rejecting those below α keeps the chance of any false rejection at most α.

    Args:
        p_values: (k,) in [0, 1], one for each comparison made.

    Returns:
        float64 (k,), in the order given.

    Raises:
        RLAIFError: If there are none, or one is outside [0, 1].
    """
    p = checked_array("p_values", p_values, low=0.0, high=1.0)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (p.size - np.arange(p.size))))
    return adjusted


# --- under the models -------------------------------------------------------------------------------------------------


def _token_sums(name: str, log_probs: Sequence[ArrayLike]) -> tuple[Floats, Floats]:
    """Sum and number of each response's token log-probabilities, (n,) each."""
    if len(log_probs) == 0:
        raise RLAIFError(f"expected at least one response in {name}, found none")
    rows = [checked_array(f"{name} of response {i}", row, high=1e-6) for i, row in enumerate(log_probs)]
    return np.array([row.sum() for row in rows]), np.array([float(row.size) for row in rows])


def perplexity(log_probs: Sequence[ArrayLike]) -> Floats:
    """Perplexity of each response under a reference model: a proxy for coherence that a loop or a cliché passes too.

    Args:
        log_probs: n responses, each (tokens,) natural-log probabilities under the reference; lengths may differ.

    Returns:
        float64 (n,), exp of minus the mean.

    Raises:
        RLAIFError: If a response has no tokens, or a value that is not finite or is positive.
    """
    sums, sizes = _token_sums("log_probs", log_probs)
    return np.asarray(np.exp(-sums / sizes))


def sequence_kl(policy: Sequence[ArrayLike], reference: Sequence[ArrayLike]) -> Floats:
    """Estimates of KL(policy ‖ reference) in nats, one a response sampled from the policy; their mean is unbiased.

    Args:
        policy: n responses, each (tokens,) natural-log probabilities under the policy.
        reference: The same tokens under the reference.

    Returns:
        float64 (n,): log π(y|x) - log π_ref(y|x), negative for some responses.

    Raises:
        RLAIFError: If the responses differ in number or tokens, or a value is not finite or is positive.
    """
    if len(policy) != len(reference):
        raise RLAIFError(f"expected as many responses under both models, found {len(policy)} and {len(reference)}")
    first, sizes = _token_sums("policy", policy)
    second, others = _token_sums("reference", reference)
    if (bad := np.flatnonzero(sizes != others)).size:
        i = int(bad[0])
        raise RLAIFError(f"expected the same tokens under both models, found {sizes[i]:g} and {others[i]:g} in row {i}")
    return first - second
