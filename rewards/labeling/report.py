"""What a labelling run says about its labels: position bias, label mass, and agreement with people.

Figures are computed from the labelled pairs; the others are counted beside them. Agreement is with people's choices,
where there are any and they are no ties; a tie of the labeler counts one half. Intervals count in that pairs share
prompts or texts (`clusters_of_pairs`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewards.labeling.answers import Label
from rewards.labeling.pair_source import Pair
from rewards.labeling.probabilities import log_odds
from rlaif_env.statistics import (
    Clusters,
    Dyads,
    Floats,
    Interval,
    accuracy,
    brier,
    clusters_of_pairs,
    cohens_kappa,
    excess_cross_entropy,
    expected_calibration_error,
    interval_text,
    position_bias,
    reliability_table,
    taken,
)
from rlaif_env.tables import Table, count_of


@dataclass(frozen=True)
class Alignment:
    """How a judge's choices agree with people's."""

    ties: int  # pairs on which people are tied; they are left out
    # Of the others, those on which both prefer the same response, a tie of the judge counting one half; None
    # without any
    share: Interval | None
    kappa: Interval | None  # Cohen's kappa of the two choices


def alignment(p_first: ArrayLike, human: ArrayLike, clusters: Clusters | Dyads) -> Alignment:
    """AI labeler alignment (section 2.3), of a person's choices as of a labeler's.

    Kappa is that of both orders of each pair: which response is listed first says nothing, and a file that lists the
    preferred one first would leave a judge no agreement beyond chance.

    Args:
        p_first: (n,) the judge's probability that the first response is better.
        human: (n,) people's.
        clusters: (n,) which pairs belong together.
    """
    judge, people = np.asarray(p_first, dtype=np.float64), np.asarray(human, dtype=np.float64)
    decided = people != 0.5
    ties = int((~decided).sum())
    if not decided.any():
        return Alignment(ties, None, None)
    rows = np.flatnonzero(decided)
    share = accuracy(judge[rows], people[rows], clusters=taken(clusters, rows))
    sides = (np.sign(side[rows] - 0.5) for side in (judge, people))
    both = taken(clusters, np.tile(rows, 2))
    kappa = cohens_kappa(*(np.concatenate([side, -side]).tolist() for side in sides), clusters=both)
    return Alignment(ties, share, replace(kappa, n=rows.size))


class Tally:
    """Collects the labels of a run, some numbers a pair, and makes the report."""

    def __init__(self) -> None:
        self._status: Counter[str] = Counter()
        self._masses: list[float] = []
        # p_first, the same without calibration, human, longer, labelled pair: where both are
        self._judged: list[tuple[float, float, float, float, int]] = []
        self._positions: list[tuple[float, float]] = []  # P("1") in both orders
        self._orders: list[tuple[float, float]] = []  # p_first by either order alone, of the judged ones
        self._texts: list[tuple[str, str, str]] = []  # what stands for prompt and responses of each labelled pair

    def add(self, pair: Pair, label: Label) -> None:
        """Count one pair."""
        self._status[label.status] += 1
        if not np.isnan(label.mass):
            self._masses.append(label.mass)
        if label.status != "ok":
            return
        if pair.human is not None:
            longer = 0.5 + 0.5 * float(np.sign(len(pair.response_1) - len(pair.response_2)))
            raw = label.record.get("calibration", {}).get("raw_p_first", label.p_first)
            self._judged.append((label.p_first, raw, pair.human, longer, len(self._texts)))
        self._texts.append((_stand_in(pair.prompt), _stand_in(pair.response_1), _stand_in(pair.response_2)))
        if label.record["mode"] == "pairwise":
            one, two = label.record["answers"]
            self._positions.append((one["p_1"], two["p_1"]))
            if pair.human is not None:
                alone = (one["p_1"], 1 - two["p_1"])
                inverted = label.record["parameters"]["inverted"]
                self._orders.append((1 - alone[0], 1 - alone[1]) if inverted else alone)

    def report(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The report, JSON-able, what the run knows of itself (``facts``) in front."""
        masses, mass = np.array(self._masses), None
        clusters = clusters_of_pairs(*zip(*self._texts, strict=True)) if self._texts else ()
        if masses.size:
            low, median = np.quantile(masses, [0.05, 0.5]).tolist()
            mass = {"mean": float(masses.mean()), "median": median, "5 %": low, "minimum": float(masses.min())}
        return {
            **facts,
            "pairs": self._status.total(),
            "labelled": self._status["ok"],
            **{name: self._status[name] for name in _WITHOUT},
            "label_mass": mass,
            "position_bias": self._position_bias(clusters),
            "human": self._against_people(clusters),
        }

    def _position_bias(self, clusters: Clusters | Dyads) -> dict[str, Any] | None:
        if not self._positions:
            return None
        one, two = np.array(self._positions).T
        bias = position_bias(one, two, clusters=clusters)  # a run has one mode: all labelled pairs or none
        return {
            "same_position": asdict(bias.same_position),
            "of_those_first": asdict(bias.first) if bias.first else None,
            "mean_p_first_position": float((one + two).mean() / 2),
        }

    def _against_people(self, clusters: Clusters | Dyads) -> dict[str, Any] | None:
        if not self._judged:
            return None
        p, raw, human, longer, rows = (np.array(column) for column in zip(*self._judged, strict=True))
        judges = {"alignment": p, "always_longer": longer, "always_first": np.ones_like(p)}
        of_rows = taken(clusters, rows)
        aligned = {name: alignment(choice, human, of_rows) for name, choice in judges.items()}
        labeler = aligned["alignment"]
        if labeler.share is None:
            return None
        decided = np.flatnonzero(human != 0.5)
        either = self._one_order_alone(decided, human, of_rows)
        p, raw, human, of_decided = p[decided], raw[decided], human[decided], taken(of_rows, decided)
        return {
            "pairs": labeler.share.n,
            "units": labeler.share.units,
            "ties_left_out": labeler.ties,
            **{name: asdict(judge.share) for name, judge in aligned.items() if judge.share},
            "kappa": asdict(labeler.kappa) if labeler.kappa else None,
            "one_order_alone": either,
            **_distance(p, human),
            "without_calibration": _distance(raw, human),
            "reliability": [
                {"from": b.low, "to": b.high, "pairs": b.n, "predicted": b.predicted, "observed": asdict(b.observed)}
                for b in reliability_table(p, human, clusters=of_decided)
                if b.observed
            ],
        }

    def _one_order_alone(
        self, rows: NDArray[np.int64], human: Floats, clusters: Clusters | Dyads
    ) -> dict[str, Any] | None:
        """How some of the judged pairs (n,) would agree were each asked in one order only, either as likely."""
        if not self._orders:
            return None
        choices, people = np.array(self._orders)[rows].T.ravel(), human[rows]
        share = accuracy(choices, np.tile(people, 2), clusters=taken(clusters, np.tile(rows, 2)))
        return asdict(replace(share, n=rows.size))


def _distance(p_first: Floats, human: Floats) -> dict[str, float]:
    """How far labels are from people's choices."""
    return {
        "brier": brier(p_first, human),
        "calibration_error": expected_calibration_error(p_first, human),
        "excess_cross_entropy": excess_cross_entropy(log_odds(p_first), human),
    }


def _stand_in(text: str) -> str:
    """Short, and different for different texts, so that a run of any length is counted in little memory."""
    return str(hash(text)) if text.strip() else ""


_WITHOUT = {
    "low mass": "with too little label mass",
    "too long": "too long for the labeler's context",
    "failed": "failed",
}


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page to read."""
    without = [f"{report[name]} {words}" for name, words in _WITHOUT.items() if report[name]]
    counted = ", ".join([count_of(report["pairs"], "pair"), f"{report['labelled']} labelled", *without])
    errors = "\nThe pairs without a label are in errors.jsonl, each with its reason." if without else ""
    parts = [f"# Labels of {report['model']} on {report['task']}", f"Mode {report['mode']}. {counted}.{errors}"]
    if mass := report["label_mass"]:
        parts.append(
            "**Label mass** (probability on the labels, the lesser of a pair's two questions): mean "
            f"{mass['mean']:.3f}, median {mass['median']:.3f}, 5 % of pairs under {mass['5 %']:.3f}, "
            f"least {mass['minimum']:.3g}."
        )
    if fitted := report.get("calibration"):
        parts.append(
            f"**Calibrated** at the temperature {fitted['temperature']:.3g}, fitted on {fitted['pairs']} of "
            f"{fitted['asked']} pairs that people judged and that are not labelled here."
        )
    parts += ["## Position bias", *_bias_parts(report["position_bias"], report["mode"])]
    parts += _people_parts(report["human"], calibrated=report.get("calibration") is not None)
    if tokens := report.get("tokens"):
        cost = "" if report.get("cost") is None else f"; {report['cost']:.4f} at the prices given"
        about = "" if tokens["exact"] else "about "
        parts.append(f"Tokens: {about}{tokens['input']:,} read, {about}{tokens['output']:,} written{cost}.")
    return "\n\n".join(parts) + "\n"


def _bias_parts(bias: Mapping[str, Any] | None, mode: str) -> list[str]:
    if bias is None:
        return ["None: each response was scored by itself." if mode == "score" else "No pair was labelled."]
    same, first = bias["same_position"], bias["of_those_first"]
    share = interval_text(same, ".1%")
    text = f"The same position is preferred after the swap in {share} of {_pairs(same)}."
    text += (
        "" if first is None else f" Of those {_pairs(first)}, {interval_text(first, '.1%')} prefer the first position."
    )
    text += f" Mean probability of the first position: {bias['mean_p_first_position']:.3f} (0.5 without bias)."
    warning = (
        "**Most of these choices follow the position, not the responses: what the mean of both orders leaves may be "
    )
    warning += "noise; hold it to people's choices.**"
    return [text, warning] if same["estimate"] >= 0.5 else [text]


def _people_parts(human: Mapping[str, Any] | None, *, calibrated: bool) -> list[str]:
    if human is None:
        return ["## Agreement with people", "There are no human choices to compare with."]
    ties = f" ({human['ties_left_out']} ties of people left out)" if human["ties_left_out"] else ""
    kappa = "not defined" if human["kappa"] is None else interval_text(human["kappa"], ".3f")
    judges = {"labeler": "alignment"}
    if human["one_order_alone"] is not None:
        judges["labeler, in one order alone"] = "one_order_alone"
    judges |= {"always the longer": "always_longer", "always the first": "always_first"}
    agreement = Table(
        "Agreement with people",
        ("choice", "agrees with people"),
        [(name, interval_text(human[key], ".1%")) for name, key in judges.items()],
        f"{_pairs(human['alignment'])}{ties}; 95 % intervals. Cohen's kappa {kappa}; Brier score "
        f"{human['brier']:.3f}; calibration error {human['calibration_error']:.3f}.",
    )
    bins = [
        (
            f"{b['from']:.1f} to {b['to']:.1f}",
            _pairs(b["observed"]),
            f"{b['predicted']:.2f}",
            interval_text(b["observed"], ".2f"),
        )
        for b in human["reliability"]
    ]
    reliability = Table("Predicted and observed", ("confidence", "pairs", "mean confidence", "people agree"), bins)
    if not calibrated:
        return [agreement.markdown(), reliability.markdown()]
    names = {"brier": "Brier score", "calibration_error": "calibration error"}
    names["excess_cross_entropy"] = "excess cross-entropy, nats"
    distances = {"as answered": human["without_calibration"], "calibrated": human}
    calibration = Table(
        "Calibration",
        ("labels", *names.values()),
        [(labels, *(f"{figures[name]:.3f}" for name in names)) for labels, figures in distances.items()],
        "On these pairs, which the temperature was not fitted on.",
    )
    return [agreement.markdown(), calibration.markdown(), reliability.markdown()]


def _pairs(figure: Mapping[str, Any]) -> str:
    """How many pairs a figure is of, and so many of them are independent."""
    return count_of(figure["n"], "pair") + (f", {figure['units']} independent" if figure["units"] < figure["n"] else "")
