"""Win rate at equal length: the paper's logistic regression on the length ratio, with the fit's own uncertainty.

Appendix J fits P(A preferred) = σ(a + b·(length of A / length of B)) and reads it off at ratio 1. Two departures:

1. The interval comes from refitting in each bootstrap resample (prompts drawn whole), studentised on the logit scale
   with the refit's own sandwich error, so that the regression's uncertainty is in it. ``python -m
   tests.stress.coverage`` shows 93-97 % from 100 pairs, at least 20 wins and 20 losses, ratios on both sides of 1.
   Pairs that share texts cannot be drawn whole: there it is the dyadic sandwich error with Student's t. So it is where
   seeds and prompts cross: how far each row moves the fit is a mean with the error of `Crossed`, on the logit scale.
2. Where the ratio separates wins from losses (or all outcomes are alike) the likelihood has no finite maximum. A
   ridge of `RIDGE` / 2 times the squared coefficients (intercept at ratio 1, slope per standard deviation) keeps it
   finite; at 100 pairs it moves no figure in the third decimal. The result says ``separated`` then, and since every
   resample repeats the same fit, its interval is that of the profile likelihood, which ignores clusters. It is often
   near [0, 1]: such data may not say what happens at equal length.

The model is the assumption: `scale="ratio"` is the paper's; `scale="log"` regresses on the logarithm, which alone
makes A against B and B against A add up to 1. If preferences follow the one and the other is fitted, the figure can
be wrong by some hundredths whatever the interval; report both where they differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from rlaif_env.api import RLAIFError
from rlaif_env.statistics import (
    FEWEST_UNITS,
    Clusters,
    Crossed,
    Dyads,
    Floats,
    Interval,
    StudentisedBootstrap,
    checked_array,
    group_codes,
    half_width,
    mean_error,
    normal_quantile,
    rate,
    resampled_counts,
)

RESAMPLES = 2_000
"""Of a bootstrap in which every resample has a fit of its own."""

RIDGE = 0.01
_STEP_LIMITS = tuple(4 * 0.93**k for k in range(80))


@dataclass(frozen=True)
class LengthControl:
    """A win rate as it is and at equal length."""

    raw: Interval  # win rate of A, ties ½
    controlled: Interval  # the regression's prediction at length ratio 1
    slope: float  # change in log-odds per unit of the ratio (or of its logarithm); positive: the longer is preferred
    # Whether the ratio separates wins from losses or all outcomes are alike, so that the fit rests on the ridge and
    # the interval on the profile likelihood
    separated: bool
    extrapolated: bool  # whether all ratios are on one side of 1, so that the prediction there rests on the model alone


def _fit(x: Floats, y: Floats, weights: Floats, start: Floats) -> Floats:
    """Ridge-penalised logistic regressions of y on [1, x], one for each row of weights, by Newton's method.

    The longest step allowed shrinks slowly, so that an overshooting pair of steps cannot repeat for ever. x: (n,);
    y: (n,) in [0, 1]; weights: (R, n), how often each row counts; start: (2,). Returns (R, 2), intercept and slope.
    """
    beta = np.repeat(start[None], len(weights), axis=0)
    active = np.arange(len(weights))
    for step_limit in _STEP_LIMITS:
        w, b = weights[active], beta[active]
        p = expit(b[:, :1] + b[:, 1:] * x)
        residual = w * (y - p)
        g0, g1 = residual.sum(axis=1) - RIDGE * b[:, 0], residual @ x - RIDGE * b[:, 1]
        h00, h01, h11 = _hessian(x, w * p * (1 - p))
        step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1) / (h00 * h11 - h01**2)[:, None]
        size = np.abs(step).max(axis=1)
        beta[active] += step * np.minimum(1.0, step_limit / np.maximum(size, 1e-300))[:, None]
        active = active[size > 1e-6]
        if not active.size:
            break
    return beta


def _hessian(x: Floats, curvature: Floats) -> tuple[Floats, Floats, Floats]:
    """The three entries of each resample's information matrix, ridge included. curvature: (R, n) w·p·(1-p)."""
    return curvature.sum(axis=1) + RIDGE, curvature @ x, curvature @ (x * x) + RIDGE


def _error(x: Floats, y: Floats, beta: Floats, weights: Floats, starts: NDArray[np.int64]) -> Floats:
    """Cluster-robust standard error of the intercept, (R,); the ridge counts as an observation of its own.

    Rows are sorted by cluster; `starts` are the first rows of each, and a drawn cluster's rows share one weight.
    """
    p = expit(beta[:, :1] + beta[:, 1:] * x)
    counts = weights[:, starts]
    m = starts.size
    u0, u1 = np.add.reduceat(y - p, starts, axis=1), np.add.reduceat((y - p) * x, starts, axis=1)
    m00, m01, m11 = ((counts * a * b).sum(axis=1) * m / (m - 1) for a, b in ((u0, u0), (u0, u1), (u1, u1)))
    h00, h01, h11 = _hessian(x, weights * p * (1 - p))
    variance = h11**2 * (m00 + RIDGE) - 2 * h11 * h01 * m01 + h01**2 * (m11 + RIDGE)
    return np.asarray(np.sqrt(np.maximum(variance, 0.0)) / (h00 * h11 - h01**2))


def _influences(x: Floats, y: Floats, beta: Floats) -> Floats:
    """How far each of n rows moves the intercept of a fit, beta (2,), times n: their mean has the error of that."""
    p = expit(beta[0] + beta[1] * x)
    h00, h01, h11 = _hessian(x, (p * (1 - p))[None])
    return np.asarray(x.size * (y - p) * (h11 - h01 * x) / (h00 * h11 - h01**2))


def _profile_limits(x: Floats, y: Floats, z: float) -> tuple[float, float]:
    """Logits at ratio 1 whose penalised profile likelihood is within z² / 2 of the best, on a grid from -12 to 12."""
    a = np.linspace(-12.0, 12.0, 481)[:, None]
    b = np.zeros_like(a)
    for step_limit in _STEP_LIMITS:
        p = expit(a + b * x)
        step = ((y - p) @ x[:, None] - RIDGE * b) / ((p * (1 - p)) @ (x * x)[:, None] + RIDGE)
        b += np.clip(step, -step_limit, step_limit)
        if np.abs(step).max() < 1e-6:
            break
    logit = a + b * x
    loss = (y * np.logaddexp(0.0, -logit) + (1 - y) * np.logaddexp(0.0, logit)).sum(axis=1, keepdims=True)
    loss += RIDGE / 2 * (a**2 + b**2)
    inside = a[loss - loss.min() <= z * z / 2]
    low, high = float(inside.min()), float(inside.max())
    return low if low > -12 else -math.inf, high if high < 12 else math.inf


def length_control(
    p_first: ArrayLike,
    lengths_1: ArrayLike,
    lengths_2: ArrayLike,
    *,
    clusters: Clusters | Dyads | Crossed | None = None,
    scale: Literal["ratio", "log"] = "ratio",
    resamples: int = RESAMPLES,
    seed: int | np.random.Generator = 0,
    level: float = 0.95,
) -> LengthControl:
    """Win rate of the first of two responses, raw and predicted at equal length (appendix J).

    Args:
        p_first: (n,) in [0, 1]: above ½ a win, at ½ a tie (counted ½), below a loss. Failed rows left out.
        lengths_1: (n,) lengths of the first responses, positive, in any unit; count an empty response as 1.
        lengths_2: (n,) lengths of the second.
        clusters: (n,) which rows belong together.
        scale: Regress on the ratio (the paper) or on its logarithm.
        resamples: R, each with its own fit.
        seed: A seed, or the generator to draw from.
        level: Nominal coverage.

    Raises:
        RLAIFError: If arrays differ in length, are empty or out of range, or a length is not positive.
    """
    p = checked_array("p_first", p_first, low=0.0, high=1.0)
    n = p.size
    lengths = [checked_array(name, v, length=n) for name, v in (("lengths_1", lengths_1), ("lengths_2", lengths_2))]
    for name, values in zip(("lengths_1", "lengths_2"), lengths, strict=True):
        if (bad := np.flatnonzero(values <= 0)).size:
            raise RLAIFError(
                f"expected positive {name}, found {values[bad[0]]:g} in row {bad[0]} ({bad.size} such rows); count an "
                "empty response as 1"
            )
    if scale not in ("ratio", "log"):
        raise RLAIFError(f"expected scale 'ratio' or 'log', found {scale!r}")
    ratio = lengths[0] / lengths[1]
    feature = np.log(ratio) if scale == "log" else ratio - 1
    spread = float(feature.std()) or 1.0
    wins = (1 + np.sign(p - 0.5)) / 2

    codes = group_codes(None if isinstance(clusters, Dyads | Crossed) else clusters, n)
    order = np.argsort(codes, kind="stable")
    codes, x, y = codes[order], feature[order] / spread, wins[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    beta = _fit(x, y, np.ones((1, n)), np.zeros(2))
    separated, raw = _separated(x, y), rate(wins, clusters=clusters, level=level)
    if raw.units < FEWEST_UNITS:
        low, high = None, None
    elif separated:
        low, high = expit(_profile_limits(x, y, normal_quantile(level))).tolist()
    elif isinstance(clusters, Dyads | Crossed):
        half = half_width(mean_error(_influences(x, y, beta[0]), clusters), level)
        low, high = expit(beta[0, 0] + np.array([-half, half])).tolist()
    else:
        logit = _bootstrap(x, y, beta, codes, starts, resamples, np.random.default_rng(seed)).interval(level)
        low, high = expit(np.array([logit.low, logit.high])).tolist()
    controlled = Interval(float(expit(beta[0, 0])), low, high, n, raw.units)
    extrapolated = bool((feature > 0).all() or (feature < 0).all())
    return LengthControl(raw, controlled, float(beta[0, 1]) / spread, separated, extrapolated)


def _bootstrap(
    x: Floats,
    y: Floats,
    beta: Floats,
    codes: NDArray[np.int64],
    starts: NDArray[np.int64],
    resamples: int,
    rng: np.random.Generator,
) -> StudentisedBootstrap:
    """The intercept of the fit ``beta``, (1, 2), refitted in each resample; ``codes`` (n,) are the sorted clusters."""
    n, m = x.size, starts.size
    t: list[Floats] = []
    # the counts of clusters come in chunks sized for m columns; rows are n, so halve again where clusters are large
    for chunk in resampled_counts(m, resamples, rng):
        for counts in np.array_split(chunk, math.ceil(n / m)):
            weights = counts[:, codes]
            refit = _fit(x, y, weights, beta[0])
            t.append((refit[:, 0] - beta[0, 0]) / _error(x, y, refit, weights, starts))
    error = float(_error(x, y, beta, np.ones((1, n)), starts)[0])
    return StudentisedBootstrap(float(beta[0, 0]), error, np.sort(np.concatenate(t)), m - 1, n, m)


def _separated(x: Floats, y: Floats) -> bool:
    """Whether some threshold on x has all wins on one side and all losses on the other, or all outcomes are alike.

    A tie is both a win and a loss here.
    """
    if (y == y[0]).all():
        return True
    won, lost = x[y > 0], x[y < 1]
    return bool(won.min() >= lost.max() or won.max() <= lost.min())
