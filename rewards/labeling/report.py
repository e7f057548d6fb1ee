"""What a labelling run says about its labels: position bias, label mass, and agreement with people.

Figures are computed from the labelled pairs; the others are counted beside them. Agreement is with people's choices,
where there are any and they are no ties; a tie of the labeler counts one half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rewards.labeling.answers import Label
from rewards.labeling.pair_source import Pair
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import (
    accuracy,
    brier,
    cohens_kappa,
    expected_calibration_error,
    position_bias,
    reliability_table,
)

__all__ = ["Tally", "as_markdown"]


class Tally:
    """Collects the labels of a run, some numbers a pair, and makes the report."""

    def __init__(self) -> None:
        self._status = {"ok": 0, "low mass": 0, "too long": 0, "failed": 0}
        self._rows: list[tuple[float, float, float, float]] = []  # p_first, human, longer, mass of the labelled
        self._prompts: list[int] = []
        self._positions: list[tuple[float, float]] = []  # P("1") in both orders
        self._all_masses: list[float] = []

    def add(self, pair: Pair, label: Label) -> None:
        """Count one pair."""
        self._status[label.status] += 1
        if not np.isnan(label.mass):
            self._all_masses.append(label.mass)
        if label.status != "ok":
            return
        longer = 0.5 + 0.5 * np.sign(len(pair.response_1) - len(pair.response_2))
        human = np.nan if pair.human is None else pair.human
        self._rows.append((label.p_first, human, float(longer), label.mass))
        self._prompts.append(hash(pair.prompt))
        if label.record["mode"] == "pairwise":
            one, two = label.record["answers"]
            self._positions.append((one["p_1"], two["p_1"]))

    @property
    def labelled(self) -> int:
        """How many pairs have a label."""
        return self._status["ok"]

    def report(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The report, JSON-able.

        Args:
            facts: What the run knows of itself; goes to the front.
        """
        masses = np.array(self._all_masses)
        mass = None
        if masses.size:
            low, median = np.quantile(masses, [0.05, 0.5]).tolist()
            mass = {"mean": float(masses.mean()), "median": median, "5 %": low, "minimum": float(masses.min())}
        return {
            **facts,
            "pairs": sum(self._status.values()),
            "labelled": self.labelled,
            **{name: n for name, n in self._status.items() if name != "ok"},
            "label_mass": mass,
            "position_bias": self._position_bias(),
            "human": self._against_people(),
        }

    def _position_bias(self) -> dict[str, Any] | None:
        if not self._positions:
            return None
        one, two = np.array(self._positions).T
        found = position_bias(one, two)
        return {
            "same_position": asdict(found.same_position),
            "of_those_first": asdict(found.first) if found.first else None,
            "mean_p_first_position": float((one + two).mean() / 2),
        }

    def _against_people(self) -> dict[str, Any] | None:
        if not self._rows:
            return None
        p, human, longer, _ = np.array(self._rows).T
        ties = int((human == 0.5).sum())
        asked = ~np.isnan(human) & (human != 0.5)
        if not asked.any():
            return None
        prompts = np.array(self._prompts)[asked]
        distinct = np.unique(prompts).size
        clusters = prompts if 1 < distinct < prompts.size else None  # one prompt for all is no prompt
        p, human, longer = p[asked], human[asked], longer[asked]

        def right(choice: Any) -> dict[str, float]:
            return asdict(accuracy(choice, human, clusters=clusters))

        return {
            "pairs": int(asked.sum()),
            "ties_left_out": ties,
            "alignment": right(p),
            "always_longer": right(longer),
            "always_first": right(np.ones_like(p)),
            "kappa": _kappa(p, human),
            "brier": brier(p, human),
            "calibration_error": expected_calibration_error(p, human),
            "reliability": [
                {"from": b.low, "to": b.high, "pairs": b.n, "predicted": b.predicted, "observed": asdict(b.observed)}
                for b in reliability_table(p, human)
                if b.observed
            ],
        }


def _kappa(p: Any, human: Any) -> dict[str, float] | None:
    """Cohen's kappa of the two choices; None where it is not defined."""
    names = np.array(["second", "tie", "first"])
    try:
        a, b = (names[np.sign(x - 0.5).astype(int) + 1].tolist() for x in (p, human))
        return asdict(cohens_kappa(a, b))
    except RLAIFError:  # both gave one and the same answer throughout
        return None


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page to read."""
    lines = [f"# Labels of {report['model']} on {report['task']}", ""]
    counted = [f"{report['pairs']} pairs", f"{report['labelled']} labelled"]
    counted += [f"{report[name]} {words}" for name, words in _WITHOUT if report[name]]
    lines += [f"Mode {report['mode']}. {', '.join(counted)}."]
    if any(report[name] for name, _ in _WITHOUT):
        lines += ["The pairs without a label are in errors.jsonl, each with its reason."]
    if report["label_mass"]:
        mass = report["label_mass"]
        lines += [
            "",
            "**Label mass** (probability on the labels, the lesser of a pair's two questions): mean "
            f"{mass['mean']:.3f}, median {mass['median']:.3f}, 5 % of pairs under {mass['5 %']:.3f}, "
            f"least {mass['minimum']:.3g}.",
        ]
    lines += ["", "## Position bias", "", *_bias_lines(report["position_bias"], report["mode"])]
    lines += ["", "## Agreement with people", "", *_people_lines(report["human"])]
    if report.get("tokens"):
        tokens = report["tokens"]
        cost = "" if report.get("cost") is None else f"; {report['cost']:.4f} at the prices given"
        about = "" if tokens["exact"] else "about "
        lines += ["", f"Tokens: {about}{tokens['input']:,} read, {about}{tokens['output']:,} written{cost}."]
    return "\n".join(lines) + "\n"


_WITHOUT = (
    ("low mass", "with too little label mass"),
    ("too long", "too long for the labeler's context"),
    ("failed", "failed"),
)


def _bias_lines(bias: Mapping[str, Any] | None, mode: str) -> Sequence[str]:
    if bias is None:
        return ["None: each response was scored by itself." if mode == "score" else "No pair was labelled."]
    same, first = bias["same_position"], bias["of_those_first"]
    lines = [f"The same position is preferred after the swap in {_percent(same)} of {same['n']} pairs."]
    if first is not None:
        lines[0] += f" Of those, {_percent(first)} prefer the first position."
    mean = bias["mean_p_first_position"]
    lines[0] += f" Mean probability of the first position: {mean:.3f} (0.5 without bias)."
    if same["estimate"] >= 0.5:
        lines += ["", "**Most of these choices follow the position, not the responses: use these labels with care.**"]
    return lines


def _people_lines(human: Mapping[str, Any] | None) -> Sequence[str]:
    if human is None:
        return ["There are no human choices to compare with."]
    ties = f" ({human['ties_left_out']} ties of people left out)" if human["ties_left_out"] else ""
    kappa = "not defined" if human["kappa"] is None else _interval(human["kappa"])
    return [
        f"{human['pairs']} pairs{ties}; 95 % intervals.",
        "",
        "| choice | agrees with people |",
        "|---|---|",
        f"| labeler | {_percent(human['alignment'])} |",
        f"| always the longer | {_percent(human['always_longer'])} |",
        f"| always the first | {_percent(human['always_first'])} |",
        "",
        f"Cohen's kappa {kappa}; Brier score {human['brier']:.3f}; calibration error {human['calibration_error']:.3f}.",
        "",
        "| p_first | pairs | mean p_first | people |",
        "|---|---|---|---|",
        *(
            f"| {row['from']:.1f} to {row['to']:.1f} | {row['pairs']} | {row['predicted']:.2f} "
            f"| {_interval(row['observed'], 2)} |"
            for row in human["reliability"]
        ),
    ]


def _interval(figure: Mapping[str, float], digits: int = 3) -> str:
    return f"{figure['estimate']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def _percent(figure: Mapping[str, float]) -> str:
    return f"{figure['estimate']:.1%} [{figure['low']:.1%}, {figure['high']:.1%}]"
