"""How often each interval offered holds the truth: ``python -m tests.stress.coverage`` prints the table.

For every setting, data sets are drawn from a distribution whose truth is known, the interval is computed as a user
would, and the share that holds the truth is printed with its own Wilson interval. The settings stand at the edges of
the ranges that `rlaif_env.statistics.intervals`, `rlaif_env.statistics.agreement`,
`benchmarks.evaluation.length_control` claim, where nominal 95 % must be 93-97 %.

Those whose data begin with "8 clusters", "20 clusters" or "40 clusters" have clusters of 2 to 20 rows each (about 7,
negative binomial), or of 7 where they say so, whose rows correlate by the number that follows. ``--only clusters``
prints them alone.

Those whose data begin with "2 seeds", "3 seeds" or "5 seeds" are the same prompts answered after each of so many
trainings (``--only seeds``): a prompt and what prompt and training have together make half of the variance each, and
seeds differ by none, as much, or four times as much as these leave uncertain about the mean.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from benchmarks.evaluation.length_control import length_control
from rewards.labeling.report import alignment
from rlaif_env.statistics import (
    FEWEST_SEEDS,
    Crossed,
    Floats,
    Interval,
    auc,
    bootstrap_mean,
    clusters_of_pairs,
    cohens_kappa,
    interval_text,
    mean_interval,
    paired_bootstrap,
    rate,
    spearman,
    wilson,
)

__all__ = ["Setting", "coverage", "main", "settings"]

Draw = Callable[[np.random.Generator, int], tuple[Interval, float]]


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        interval: The function under test.
        data: What it is given.
        draw: (generator, resamples) to the interval of a fresh data set, and the truth.
        claimed: Whether it lies in a range that is claimed, or is shown beyond its edge.
    """

    interval: str
    data: str
    draw: Draw
    claimed: bool = True

    @property
    def quick(self) -> bool:
        """Whether nothing is resampled, so that more data sets can be drawn."""
        kind = self.interval.split(",")[0]
        return kind in ("wilson", "rate", "mean_interval", "cohens_kappa", "auc") or (
            self.interval == "spearman" and "clusters" not in self.data
        )


def coverage(
    setting: Setting, data_sets: int = 2_000, *, resamples: int = 2_000, seed: int | np.random.Generator = 0
) -> Interval:
    """Share of data sets with an interval whose interval holds the truth, with its own Wilson interval.

    Args:
        setting: What to draw and compute.
        data_sets: How many to draw.
        resamples: For the intervals that resample.
        seed: A seed, or the generator to draw from.

    Raises:
        RLAIFError: If data_sets < 1.
    """
    rng = np.random.default_rng(seed)
    held = []
    for _ in range(data_sets):
        interval, truth = setting.draw(rng, resamples)
        if interval.low is not None and interval.high is not None:
            held.append(interval.low <= truth <= interval.high)
    return wilson(sum(held), len(held))


def _share(n: int, p: float) -> Draw:
    return lambda rng, _: (wilson(int(rng.binomial(n, p)), n), p)


def _ties(n: int, wins: float, ties: float) -> Draw:
    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        outcomes = rng.choice([1.0, 0.5, 0.0], p=[wins, ties, 1 - wins - ties], size=n)
        return rate(outcomes), wins + ties / 2

    return draw


def _clusters(rng: np.random.Generator, m: int) -> NDArray[np.int64]:
    """Cluster of each row, of 1 to 7 rows each."""
    return np.repeat(np.arange(m), rng.integers(1, 8, size=m))


def _shared_uniforms(rng: np.random.Generator, clusters: NDArray[np.int64], correlation: float) -> Floats:
    """Uniform numbers, each with this chance the one its cluster shares, so that thresholds keep their margins."""
    own = rng.random(clusters.size)
    return np.where(rng.random(clusters.size) < correlation, rng.random(clusters.max() + 1)[clusters], own)


def _clustered_share(m: int, p: float, correlation: float) -> Draw:
    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        clusters = _clusters(rng, m)
        return rate(_shared_uniforms(rng, clusters, correlation) < p, clusters=clusters), p

    return draw


def _some_clusters(rng: np.random.Generator, m: int) -> NDArray[np.int64]:
    """Cluster of each row, of 2 to 20 rows each, 7 on average."""
    return np.repeat(np.arange(m), np.clip(2 + rng.negative_binomial(1.5, 1.5 / (1.5 + 5), size=m), 2, 20))


def _cluster_rates(rng: np.random.Generator, m: int, p: float, icc: float) -> Floats:
    """Chance of a success in each cluster (m,), p on average, beta so that two rows of one correlate by ``icc``."""
    spread = 1 / icc - 1 if icc else 0.0
    return rng.beta(p * spread, (1 - p) * spread, size=m) if icc else np.full(m, p)


def _rate_of_some(m: int, icc: float, p: float, equal: bool) -> Draw:
    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        clusters = np.repeat(np.arange(m), 7) if equal else _some_clusters(rng, m)
        return rate(rng.random(clusters.size) < _cluster_rates(rng, m, p, icc)[clusters], clusters=clusters), p

    return draw


def _mean_of_some(m: int, icc: float, sample: Callable[[np.random.Generator, int], Floats], truth: float) -> Draw:
    def draw(rng: np.random.Generator, resamples: int) -> tuple[Interval, float]:
        clusters = _some_clusters(rng, m)
        shared, own = sample(rng, m)[clusters] - truth, sample(rng, clusters.size) - truth
        values = icc**0.5 * shared + (1 - icc) ** 0.5 * own
        return bootstrap_mean(values, clusters=clusters, resamples=resamples, seed=rng), 0.0

    return draw


def _change_of_some(m: int, icc: float) -> Draw:
    """Won, unchanged or lost on each row, with 30, 50 and 20 %."""

    def draw(rng: np.random.Generator, resamples: int) -> tuple[Interval, float]:
        clusters = _some_clusters(rng, m)
        uniform = _shared_uniforms(rng, clusters, icc**0.5)
        before, after = (uniform > 0.8).astype(float), (uniform < 0.3).astype(float)
        return paired_bootstrap(before, after, clusters=clusters, resamples=resamples, seed=rng), 0.1

    return draw


def _kappa_of_some(m: int, icc: float, kappa: float) -> Draw:
    """Two raters' labels, half of each kind, who agree more in some clusters."""

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        clusters = _some_clusters(rng, m)
        agreed = rng.random(clusters.size) < _cluster_rates(rng, m, (1 + kappa) / 2, icc)[clusters]
        first = rng.random(clusters.size) < 0.5
        return cohens_kappa(first.tolist(), (first == agreed).tolist(), clusters=clusters), kappa

    return draw


def _ranks_of_some(m: int, icc: float, correlation: float) -> Draw:
    truth = 6 / np.pi * float(np.arcsin(correlation / 2))

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        clusters = _some_clusters(rng, m)
        shared, own = rng.normal(size=(2, m))[:, clusters], rng.normal(size=(2, clusters.size))
        x, noise = icc**0.5 * shared + (1 - icc) ** 0.5 * own
        return spearman(x, correlation * x + (1 - correlation**2) ** 0.5 * noise, clusters=clusters), truth

    return draw


def few_clusters() -> list[Setting]:
    """Eight, twenty and forty clusters, with no, some and much correlation within them."""
    exponential: Callable[[np.random.Generator, int], Floats] = lambda rng, n: rng.exponential(size=n)  # noqa: E731
    found = []
    for m, icc in itertools.product((8, 20, 40), (0.0, 0.1, 0.5)):
        data = f"{m} clusters, {icc:g}"
        for equal, p in itertools.product((False, True), (0.05, 0.1, 0.2, 0.5)):
            sizes, held = f"{m} clusters of 7, {icc:g}" if equal else data, not equal or m > 8 or icc < 0.5
            draw = _rate_of_some(m, icc, p, equal)
            found.append(Setting("rate", f"{sizes}, p = {p}", draw, claimed=held and m * p >= 1.5))
        found += [
            Setting("bootstrap_mean", f"{data}, normal", _mean_of_some(m, icc, lambda rng, n: rng.normal(size=n), 0.0)),
            Setting("bootstrap_mean", f"{data}, exponential", _mean_of_some(m, icc, exponential, 1.0)),
            Setting("paired_bootstrap", f"{data}, changes -1, 0, 1", _change_of_some(m, icc)),
            Setting("cohens_kappa", f"{data}, kappa 0.4", _kappa_of_some(m, icc, 0.4)),
            Setting("spearman", f"{data}, correlation 0.4", _ranks_of_some(m, icc, 0.4)),
        ]
    return found


def _shared_texts(texts: int, pairs: int, uneven: bool = False, kappa: bool = False) -> Draw:
    """A judge that sees each text's quality with an error of the text's own, on pairs that share texts."""
    truth = 0.5 + float(np.arcsin((2 / (2 + 2 * 0.5 + 0.2)) ** 0.5)) / np.pi  # two normals agree in sign

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        weights = rng.exponential(size=texts) ** 2 if uneven else np.ones(texts)
        first = rng.choice(texts, size=pairs, p=weights / weights.sum())
        second = (first + rng.integers(1, texts, size=pairs)) % texts
        quality, error = rng.normal(size=texts), rng.normal(0, 0.5**0.5, size=texts)
        better = quality[first] - quality[second]
        seen = better + error[first] - error[second] + rng.normal(0, 0.2**0.5, size=pairs)
        clusters = clusters_of_pairs([""] * pairs, first.astype(str).tolist(), second.astype(str).tolist())
        aligned = alignment(seen > 0, better > 0, clusters)
        found = aligned.kappa if kappa else aligned.share
        assert found is not None
        return found, 2 * truth - 1 if kappa else truth

    return draw


def _mean(n: int, sample: Callable[[np.random.Generator, int], Floats], truth: float) -> Draw:
    return lambda rng, resamples: (bootstrap_mean(sample(rng, n), resamples=resamples, seed=rng), truth)


def _clustered_mean(m: int) -> Draw:
    def draw(rng: np.random.Generator, resamples: int) -> tuple[Interval, float]:
        clusters = _clusters(rng, m)
        values = rng.exponential(size=m)[clusters] + rng.normal(size=clusters.size)
        return bootstrap_mean(values, clusters=clusters, resamples=resamples, seed=rng), 1.0

    return draw


def _difference(n: int, gain: float) -> Draw:
    """Two policies' rewards on the same prompts, correlated and skewed."""

    def draw(rng: np.random.Generator, resamples: int) -> tuple[Interval, float]:
        prompt = rng.normal(size=n)
        before, after = prompt + rng.exponential(0.5, size=n), prompt + gain + rng.exponential(0.7, size=n)
        return paired_bootstrap(before, after, resamples=resamples, seed=rng), gain + 0.2

    return draw


def _few_values(n: int, up: float, down: float) -> Draw:
    def draw(rng: np.random.Generator, resamples: int) -> tuple[Interval, float]:
        change = rng.choice([1.0, 0.0, -1.0], p=[up, 1 - up - down, down], size=n)
        return paired_bootstrap(np.zeros(n), change, resamples=resamples, seed=rng), up - down

    return draw


def _length(n: int, at_1: float, slope: float, scale: str, correlation: float = 0.0) -> Draw:
    """Preferences that follow the length ratio (median 1.2) and, apart from it, prefer the first at a rate at_1."""

    def draw(rng: np.random.Generator, resamples: int) -> tuple[Interval, float]:
        clusters = _clusters(rng, n // 4) if correlation else np.arange(n)
        ratio = np.exp(rng.normal(0.2, 0.4, size=clusters.size))
        pull = slope * (np.log(ratio) if scale == "log" else ratio - 1)
        wins = _shared_uniforms(rng, clusters, correlation) < 1 / (1 + (1 / at_1 - 1) * np.exp(-pull))
        result = length_control(
            wins,
            100 * ratio,
            np.full(ratio.size, 100.0),
            clusters=clusters if correlation else None,
            scale="log" if scale == "log" else "ratio",
            resamples=resamples,
            seed=rng,
        )
        return result.controlled, at_1

    return draw


def _length_of_shared(texts: int, pairs: int, correlation: float, counted: bool = True) -> Draw:
    """As `_length`, truth 0.6, between two systems of so many texts each, which differ in length and in appeal."""

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        first, second = rng.integers(0, texts, size=(2, pairs))
        ratio = np.exp(0.2 + rng.normal(0, 0.3, size=texts)[first] - rng.normal(0, 0.3, size=texts)[second])
        appeal = rng.normal(size=(2, texts))
        shared = (appeal[0, first] + appeal[1, second]) / 2**0.5
        uniform = ndtr(correlation**0.5 * shared + (1 - correlation) ** 0.5 * rng.normal(size=pairs))
        wins = uniform < 1 / (1 + (1 / 0.6 - 1) * np.exp(-1.5 * (ratio - 1)))
        names = [f"a{i}" for i in first], [f"b{i}" for i in second]
        clusters = clusters_of_pairs([""] * pairs, *names) if counted else None
        return length_control(
            wins, 100 * ratio, np.full(pairs, 100.0), clusters=clusters, resamples=400
        ).controlled, 0.6

    return draw


def _crossed(seeds: int, prompts: int, effect: float, kind: str) -> Draw:
    """Answers to the same prompts after several trainings: normal changes, wins with ties, wins that length helps."""

    def draw(rng: np.random.Generator, resamples: int) -> tuple[Interval, float]:
        rows = Crossed(*np.indices((seeds, prompts)).reshape(2, -1))
        variances = np.array([effect**2 * (0.5 * seeds + 0.5) / prompts, 0.5, 0.5])
        parts = rng.normal(size=seeds)[rows.seeds], rng.normal(size=prompts)[rows.prompts], rng.normal(size=len(rows))
        values = (variances / variances.sum()) ** 0.5 @ np.stack(parts)
        if kind == "bootstrap":
            return _pigeonhole(values.reshape(seeds, prompts), resamples, rng), 0.0
        if kind == "changes":
            return mean_interval(values, rows), 0.0
        uniform = ndtr(values)
        if kind == "wins":
            return rate(np.select([uniform < 0.55, uniform < 0.7], [1.0, 0.5]), clusters=rows), 0.625
        ratio = np.exp(rng.normal(0.2, 0.4, size=len(rows)))
        wins = uniform < 1 / (1 + (1 / 0.6 - 1) * np.exp(-1.5 * (ratio - 1)))
        return length_control(wins, 100 * ratio, np.full(len(rows), 100.0), clusters=rows).controlled, 0.6

    return draw


def _pigeonhole(values: Floats, resamples: int, rng: np.random.Generator) -> Interval:
    """Percentiles of the mean of values (S, B) over drawn seeds and drawn prompts (Owen 2007): what is not offered."""
    (seeds, prompts), resamples = values.shape, min(resamples, 1_000)
    by_seed, by_prompt = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in (seeds, prompts))
    low, high = np.quantile(np.einsum("rs,sp,rp->r", by_seed, values, by_prompt, optimize=True), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high), values.size, prompts)


def _ranks_over_seeds(seeds: int, prompts: int, differ: float) -> Draw:
    """Six answers to a prompt after each training; correlations whose Fisher z varies about 0.5 from seed to seed."""
    truth = float(np.tanh(0.5))

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        cells = np.indices((seeds, prompts, 6)).reshape(3, -1)
        rho = 2 * np.sin(np.pi / 6 * np.tanh(0.5 + rng.normal(0, differ, size=seeds)))[cells[0]]  # Pearson's of that
        shared, own = rng.normal(size=(2, prompts))[:, cells[1]], rng.normal(size=(2, cells.shape[1]))
        x, noise = 0.3**0.5 * shared + 0.7**0.5 * own
        return spearman(x, rho * x + (1 - rho**2) ** 0.5 * noise, clusters=Crossed(cells[0], cells[1])), truth

    return draw


def few_seeds() -> list[Setting]:
    """Two, three and five seeds that differ by nothing, some and much, on 64 and 128 prompts."""
    names = {
        "mean_interval": "changes",
        "rate, seeds": "wins",
        "length_control, seeds": "length",
        "pigeonhole bootstrap": "bootstrap",
    }
    return [
        Setting(name, f"{seeds} seeds, {prompts} prompts, seeds {effect}", _crossed(seeds, prompts, effect, kind), held)
        for (name, kind), seeds, prompts, effect in itertools.product(names.items(), (2, 3, 5), (64, 128), (0, 1, 4))
        for held in [kind != "bootstrap" and seeds > (FEWEST_SEEDS if effect == 0 else FEWEST_SEEDS - 1)]
    ] + [Setting("spearman, seeds", "3 seeds, 20 prompts, seeds 0.2", _ranks_over_seeds(3, 20, 0.2))]


def _raters(n: int, kappa: float, share: float) -> Draw:
    """The second rater repeats the first with chance kappa and else draws anew."""

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        first, anew = rng.random((2, n)) < share
        second = np.where(rng.random(n) < kappa, first, anew)
        return cohens_kappa(first.tolist(), second.tolist()), kappa

    return draw


def _detector(positive: int, negative: int, area: float, ties: bool = False) -> Draw:
    """Normal measures, sqrt(2) Phi^-1(area) apart; with ties only whether they are above the middle."""
    apart = float(np.sqrt(2) * ndtri(area))
    truth = area if not ties else float(ndtr(apart / 2))

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        found = np.arange(positive + negative) < positive
        values = rng.normal(size=found.size) + apart * found
        return auc(values > apart / 2 if ties else values, found), truth

    return draw


def _ranks(n: int, correlation: float) -> Draw:
    truth = 6 / np.pi * float(np.arcsin(correlation / 2))

    def draw(rng: np.random.Generator, _: int) -> tuple[Interval, float]:
        x, noise = rng.normal(size=(2, n))
        return spearman(x, correlation * x + np.sqrt(1 - correlation**2) * noise), truth

    return draw


def settings() -> list[Setting]:
    """The rows of the table."""
    exponential: Callable[[np.random.Generator, int], Floats] = lambda rng, n: rng.exponential(size=n)  # noqa: E731
    return [
        Setting("wilson", "n = 20, p = 0.5", _share(20, 0.5)),
        Setting("wilson", "n = 50, p = 0.2", _share(50, 0.2)),
        Setting("wilson", "n = 100, p = 0.9", _share(100, 0.9)),
        Setting("wilson", "n = 1000, p = 0.02", _share(1000, 0.02)),
        Setting("rate", "n = 20, wins 0.4, ties 0.2", _ties(20, 0.4, 0.2)),
        Setting("rate", "n = 50, wins 0.6, ties 0.3", _ties(50, 0.6, 0.3)),
        Setting("rate", "n = 200, wins 0.9, ties 0.05", _ties(200, 0.9, 0.05)),
        Setting("rate, clustered", "40 prompts, p = 0.5, correlation 0.5", _clustered_share(40, 0.5, 0.7)),
        Setting("rate, clustered", "40 prompts, p = 0.8, correlation 0.1", _clustered_share(40, 0.8, 0.32)),
        Setting("rate, clustered", "100 prompts, p = 0.9, correlation 0.5", _clustered_share(100, 0.9, 0.7)),
        Setting("rate, shared texts", "200 pairs of 40 texts", _shared_texts(40, 200)),
        Setting("rate, shared texts", "100 pairs of 100 texts", _shared_texts(100, 100)),
        Setting("rate, shared texts", "600 pairs of 200 texts", _shared_texts(200, 600)),
        Setting("rate, shared texts", "200 pairs of 40 texts, some in many", _shared_texts(40, 200, uneven=True)),
        Setting("rate, shared texts", "300 pairs of 100 texts, some in many", _shared_texts(100, 300, uneven=True)),
        Setting("bootstrap_mean", "n = 8, exponential", _mean(8, exponential, 1.0)),
        Setting("bootstrap_mean", "n = 30, normal", _mean(30, lambda rng, n: rng.normal(size=n), 0.0)),
        Setting("bootstrap_mean", "n = 30, exponential", _mean(30, exponential, 1.0)),
        Setting("bootstrap_mean", "n = 100, exponential", _mean(100, exponential, 1.0)),
        Setting("bootstrap_mean, clustered", "30 prompts, 1-7 rows each, skewed", _clustered_mean(30)),
        Setting("bootstrap_mean, clustered", "100 prompts, 1-7 rows each, skewed", _clustered_mean(100)),
        Setting("paired_bootstrap", "n = 8, skewed", _difference(8, 0.3)),
        Setting("paired_bootstrap", "n = 20, differences -1, 0, 1: 15, 60, 25 %", _few_values(20, 0.25, 0.15)),
        Setting("paired_bootstrap", "n = 30, skewed", _difference(30, 0.3)),
        Setting("paired_bootstrap", "n = 100, skewed", _difference(100, 0.0)),
        Setting("paired_bootstrap", "n = 50, differences -1, 0, 1: 15, 60, 25 %", _few_values(50, 0.25, 0.15)),
        Setting("paired_bootstrap", "n = 200, differences -1, 0, 1: 5, 90, 5 %", _few_values(200, 0.05, 0.05)),
        Setting("length_control, ratio", "n = 100, longer preferred, truth 0.5", _length(100, 0.5, 1.5, "ratio")),
        Setting("length_control, ratio", "n = 300, longer preferred, truth 0.6", _length(300, 0.6, 1.5, "ratio")),
        Setting("length_control, log", "n = 100, longer preferred, truth 0.5", _length(100, 0.5, 2.0, "log")),
        Setting("length_control, log", "n = 300, shorter preferred, truth 0.7", _length(300, 0.7, -1.0, "log")),
        Setting("length_control, clustered", "75 prompts, correlation 0.5", _length(300, 0.6, 1.5, "ratio", 0.7)),
        Setting("length_control, shared texts", "300 pairs of 100 texts", _length_of_shared(50, 300, 0.3)),
        Setting("length_control, shared texts", "600 pairs of 80 texts", _length_of_shared(40, 600, 0.6)),
        Setting("length_control, shared texts", "100 pairs of 200 texts", _length_of_shared(100, 100, 0.3)),
        Setting("cohens_kappa", "n = 40, kappa 0.4, labels 50:50", _raters(40, 0.4, 0.5)),
        Setting("cohens_kappa", "n = 100, kappa 0, labels 50:50", _raters(100, 0.0, 0.5)),
        Setting("cohens_kappa", "n = 100, kappa 0.6, labels 50:50", _raters(100, 0.6, 0.5)),
        Setting("cohens_kappa", "n = 300, kappa 0.8, labels 80:20", _raters(300, 0.8, 0.8)),
        Setting("cohens_kappa, shared texts", "600 pairs of 200 texts", _shared_texts(200, 600, kappa=True)),
        Setting("auc", "10 of 60 positive, 0.5", _detector(10, 50, 0.5)),
        Setting("auc", "10 of 60 positive, 0.8", _detector(10, 50, 0.8)),
        Setting("auc", "30 of 64 positive, 0.9", _detector(30, 34, 0.9)),
        Setting("auc", "30 of 64 positive, yes or no, 0.8", _detector(30, 34, 0.8, ties=True)),
        Setting("auc", "30 of 64 positive, 0.97", _detector(30, 34, 0.97), claimed=False),
        Setting("spearman", "n = 8, correlation 0.4", _ranks(8, 0.4)),
        Setting("spearman", "n = 50, correlation 0", _ranks(50, 0.0)),
        Setting("spearman", "n = 50, correlation 0.7", _ranks(50, 0.7)),
        Setting("spearman", "n = 200, correlation 0.9", _ranks(200, 0.9)),
        *few_clusters(),
        *few_seeds(),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table.

    Args:
        arguments: Command-line arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.stress.coverage", description="Coverage of every interval.")
    parser.add_argument(
        "--data-sets", type=int, default=2_000, help="data sets a row, 5 times as many where nothing is resampled"
    )
    parser.add_argument("--resamples", type=int, default=2_000, help="bootstrap resamples a data set (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose interval's name or data contain this")
    chosen = parser.parse_args(arguments)
    print(f"{'interval':28}{'data':46}{'coverage of 95 % [its own 95 %]':>34}")
    for setting in settings():
        if chosen.only in f"{setting.interval}: {setting.data}":
            data_sets = chosen.data_sets * (5 if setting.quick else 1)
            found = coverage(setting, data_sets, resamples=chosen.resamples, seed=chosen.seed)
            print(
                f"{setting.interval:28}{setting.data:46}{interval_text(found, '.3f'):>30}"
                + ("" if setting.claimed else " (not claimed)"),
                flush=True,
            )


if __name__ == "__main__":
    main()
