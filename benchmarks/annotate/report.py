"""The report of an annotation project: people's verdicts, how reliable they are, and AI labelers beside them.

Items are counted as `benchmarks.annotate.results` says. A judge's agreement is with what people chose: for a person,
what the others did. People's ties are left out of it and counted; a tie of the judge counts one half.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.annotate.items import Form
from benchmarks.annotate.project import Judgement
from benchmarks.annotate.results import Labels, People
from benchmarks.annotate.store import Store
from benchmarks.evaluation.aggregates import fleiss_kappa, krippendorff_alpha
from benchmarks.evaluation.length_control import length_control
from benchmarks.evaluation.metrics import harmless_rate, win_rate
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import bootstrap_mean, cohens_kappa, position_bias, rate, wilson

__all__ = ["report", "show"]

T = TypeVar("T")


def report(store: Store, people: People, labelers: Mapping[str, Labels]) -> dict[str, Any]:
    """Everything measured, JSON-able: every figure with its 95 % interval and n, None where it is not defined.

    Raises:
        RLAIFError: If nothing was judged yet.
    """
    if not people.answers:
        raise RLAIFError(f"expected judgements in {store.path}, found none yet")
    form = store.plan.form
    counted = [j for given in people.answers.values() for j in given.values()]
    names = list(dict.fromkeys(j.annotator for j in people.everything))
    found: dict[str, Any] = {
        "form": form,
        "items": sum(item.kind == "item" for item in people.items.values()),
        "judged": len(people.answers),
        "identical": sum(item.kind == "identical" for item in people.items.values()),
        "answers": len(counted),
        "skips": sum(j.kind == "item" and j.choice == "skip" for j in people.everything),
        "ties": sum(j.choice == "0" for j in counted) if form == "preference" else None,
        "seconds": _spread([j.seconds for j in counted]),
        "annotators": {name: _annotator(form, people, name) for name in names},
        "agreement": _agreement(form, people),
    }
    if form != "preference":
        return found | {"systems": _rated_systems(form, people)}
    judges = {f"{name} (person)": _person(people, name) for name in names}
    if len(names) > 1:
        judges = {"people": _everybody(people, found["seconds"]), **judges}
    judges |= {name: _labeler(people, labels) for name, labels in labelers.items()}
    return found | {"judges": judges, "win_rates": list(_win_rates(people))}


def _annotator(form: Form, people: People, name: str) -> dict[str, Any]:
    """What one annotator did, and how far they are to be relied on."""
    first = {j.item: j for j in people.of_kind(name, "item")}
    again = [(first[j.item], j) for j in people.of_kind(name, "repeat") if j.item in first]
    again = [(one, two) for one, two in again if "skip" not in (one.choice, two.choice)]
    checks = [(people.items[j.item].expected, j.choice) for j in people.of_kind(name, "check")]
    judged = [j for j in first.values() if j.choice != "skip"]
    same = sum(one.value(form) == two.value(form) for one, two in again)
    return {
        "judged": len(judged),
        "skips": len(first) - len(judged),
        "self_consistency": asdict(wilson(same, len(again))) if again else None,
        "checks": {"passed": sum(right == given for right, given in checks), "of": len(checks)},
        "seconds": _spread([j.seconds for j in judged]),
    }


def _person(people: People, name: str) -> dict[str, Any]:
    """A person as a judge: agreement with the others, position bias, consistency, time."""
    own = {number: given[name] for number, given in people.answers.items() if name in given}
    others = {
        number: float(np.mean([j.p_first for who, j in people.answers[number].items() if who != name]))
        for number in own
        if len(people.answers[number]) > 1
    }
    first = {j.item: j for j in people.of_kind(name, "item") if j.choice != "skip"}
    repeats = [(first[j.item], j) for j in people.of_kind(name, "repeat") if j.item in first and j.choice != "skip"]
    return {
        "kind": "person",
        **_against(people, {number: j.p_first for number, j in own.items()}, others),
        **_first_shown(list(own.values()), repeats),
        "seconds": _spread([j.seconds for j in own.values()]),
    }


def _everybody(people: People, seconds: Any) -> dict[str, Any]:
    """All people together: what they agree on is the yardstick, so there is nothing to hold it against."""
    first = {(j.annotator, j.item): j for j in people.everything if j.kind == "item" and j.choice != "skip"}
    repeats = [
        (first[j.annotator, j.item], j)
        for j in people.everything
        if j.kind == "repeat" and j.choice != "skip" and (j.annotator, j.item) in first
    ]
    counted = [j for given in people.answers.values() for j in given.values()]
    nothing = {"pairs": len(people.answers), "ties_left_out": 0, "agreement": None, "kappa": None}
    return {"kind": "people", **nothing, **_first_shown(counted, repeats), "seconds": seconds}


def _first_shown(judged: Sequence[Judgement], repeats: Sequence[tuple[Judgement, Judgement]]) -> dict[str, Any]:
    """Position bias: how often the response shown first wins, and how often a choice follows the position."""
    decided = [j.choice == "1" for j in judged if j.choice != "0"]
    value = {"1": 1.0, "2": 0.0, "0": 0.5}
    bias = (
        position_bias(*zip(*[(value[a.choice], value[b.choice]) for a, b in repeats], strict=True)) if repeats else None
    )
    return {
        "first_shown": asdict(wilson(sum(decided), len(decided))) if decided else None,
        "same_position": asdict(bias.same_position) if bias else None,
    }


def _labeler(people: People, labels: Labels) -> dict[str, Any]:
    """An AI labeler as a judge, measured as a person is."""
    verdicts = people.labels()
    numbers = [number for number in labels.positions if number in people.answers]
    bias = first = None
    if numbers:
        pairs = np.array([labels.positions[number] for number in numbers])  # (n, 2)
        bias = asdict(position_bias(pairs[:, 0], pairs[:, 1]).same_position)
        decided = pairs != 0.5
        if decided.any():
            asked = np.repeat(np.arange(len(numbers)), 2).reshape(-1, 2)[decided]
            first = asdict(rate((pairs > 0.5)[decided].astype(float), clusters=asked.tolist()))
    return {
        "kind": "ai",
        **_against(people, labels.p_first, verdicts),
        "first_shown": first,
        "same_position": bias,
        "seconds": None,
        "unmatched": labels.unmatched,
    }


def _against(people: People, own: Mapping[int, float], people_say: Mapping[int, float]) -> dict[str, Any]:
    """How one judge's choices agree with people's; people's ties are left out and counted, the judge's count ½."""
    both = [number for number in own if number in people_say]
    numbers = [number for number in both if people_say[number] != 0.5]
    found: dict[str, Any] = {"pairs": len(both), "ties_left_out": len(both) - len(numbers)}
    if not numbers:
        return found | {"agreement": None, "kappa": None}
    mine = np.sign(np.array([own[number] for number in numbers]) - 0.5)
    theirs = np.sign(np.array([people_say[number] for number in numbers]) - 0.5)
    agreement = rate((1 + mine * theirs) / 2, clusters=people.clusters(numbers))
    kappa = _defined(lambda: asdict(cohens_kappa(mine.tolist(), theirs.tolist())))
    return found | {"agreement": asdict(agreement), "kappa": kappa}


def _agreement(form: Form, people: People) -> dict[str, Any]:
    """Agreement between annotators beyond chance."""
    names = list(dict.fromkeys(j.annotator for given in people.answers.values() for j in given.values()))
    table = np.full((len(names), len(people.answers)), np.nan)  # (raters, units)
    for unit, given in enumerate(people.answers.values()):
        for name, judgement in given.items():
            table[names.index(name), unit] = judgement.value(form)
    raters = (~np.isnan(table)).sum(axis=0)
    several = raters[raters > 1]
    commonest = int(np.bincount(several).argmax()) if several.size else 0
    chosen = table[:, raters == commonest] if several.size else table[:, :0]
    counts = np.stack([(chosen == value).sum(axis=0) for value in np.unique(table[~np.isnan(table)])], axis=1)
    pairs = []
    for a, b in combinations(range(len(names)), 2):
        shared = ~np.isnan(table[[a, b]]).any(axis=0)
        left, right = table[a, shared].tolist(), table[b, shared].tolist()
        kappa = _defined(partial(cohens_kappa, left, right))
        pairs.append(
            {"annotators": [names[a], names[b]], "items": len(left), "kappa": None if kappa is None else asdict(kappa)}
        )
    scale = "ordinal" if form == "score" else "nominal"
    return {
        "items_with_several": int(several.size),
        "cohens_kappa": pairs,
        "fleiss_kappa": _defined(lambda: fleiss_kappa(counts)) if several.size else None,
        "fleiss_raters": commonest,
        "fleiss_items": int(chosen.shape[1]),
        "krippendorff_alpha": _defined(lambda: krippendorff_alpha(table, scale=scale)),  # type: ignore[arg-type]
        "scale": scale,
    }


def _win_rates(people: People) -> Iterator[dict[str, Any]]:
    """Every two systems: how often people prefer the first, as it is and at equal length."""
    labels = people.labels()
    by_pair: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, item in people.items.items():
        if len(item.systems) == 2 and item.kind != "check":
            by_pair[item.systems[0], item.systems[1]].append(number)
    for (a, b), numbers in by_pair.items():
        p = [0.5 if people.items[n].kind == "identical" else labels.get(n, np.nan) for n in numbers]
        failed = np.isnan(p)
        row: dict[str, Any] = {"systems": [a, b], "prompts": len({people.items[n].prompt for n in numbers})}
        if failed.all():
            yield row | {"win_rate": None, "unjudged": len(numbers), "length_controlled": None, "reason": "none judged"}
            continue
        clusters = people.clusters(numbers)
        found = win_rate(p, failed=failed, clusters=clusters)
        row |= {"win_rate": asdict(found.interval), "unjudged": found.failed}
        row |= {name: getattr(found, name) for name in ("wins", "ties", "losses")}
        judged = [n for n, missing in zip(numbers, failed, strict=True) if not missing]
        lengths = [[max(1, len(people.items[n].responses[side])) for n in judged] for side in (0, 1)]
        try:
            control = length_control(np.array(p)[~failed], *lengths, clusters=people.clusters(judged))
            row |= {"length_controlled": asdict(control.controlled), "length_slope": control.slope}
            row |= {"separated": control.separated, "extrapolated": control.extrapolated}
        except RLAIFError as error:
            row |= {"length_controlled": None, "reason": str(error)}
        yield row


def _rated_systems(form: Form, people: People) -> dict[str, Any]:
    """The harmless rate or the mean score of each system's responses ("all" where nobody said whose they are)."""
    by_system: dict[str, list[int]] = defaultdict(list)
    for number in people.answers:
        by_system[(*people.items[number].systems, "all")[0]].append(number)
    found = {}
    for system, numbers in by_system.items():
        means = [float(np.mean([j.value(form) for j in people.answers[n].values()])) for n in numbers]
        clusters = people.clusters(numbers)
        if form == "harmless":
            figure: Any = asdict(harmless_rate(means, clusters=clusters).interval)
        else:
            mean = _defined(partial(bootstrap_mean, means, clusters=clusters))
            figure = None if mean is None else asdict(mean)
        found[system] = {"responses": len(numbers), "mean": float(np.mean(means)), form: figure}
    return found


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"quarter": low, "median": middle, "three_quarters": high, "n": len(values)}


def _defined(figure: Callable[[], T]) -> T | None:
    """What a function gives; None where the figure is not defined on such data."""
    try:
        return figure()
    except RLAIFError:
        return None


# --- to read ----------------------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print a report as tables."""
    counts = f"{found['judged']} of {found['items']} items judged, {found['answers']} answers"
    for name, words in (("ties", "ties"), ("skips", "skipped"), ("identical", "with two equal responses (ties)")):
        counts += f", {found[name]} {words}" if found[name] else ""
    console.print(counts, highlight=False, soft_wrap=True)
    _print(
        console,
        "annotators",
        ("name", "judged", "skipped", "consistent on repeats", "checks passed", "seconds an item"),
        (
            (
                name,
                str(row["judged"]),
                str(row["skips"]),
                _share(row["self_consistency"]),
                f"{row['checks']['passed']} of {row['checks']['of']}" if row["checks"]["of"] else "-",
                _seconds(row["seconds"]),
            )
            for name, row in found["annotators"].items()
        ),
    )
    if "judges" in found:
        _print(
            console,
            "judges",
            ("judge", "pairs", "agrees with people", "kappa", "prefers the first", "same position, swapped", "seconds"),
            (
                (
                    name,
                    str(row["pairs"]),
                    _share(row["agreement"]),
                    _figure(row["kappa"]),
                    _share(row["first_shown"]),
                    _share(row["same_position"]),
                    "-" if row["seconds"] is None else f"{row['seconds']['median']:.1f}",
                )
                for name, row in found["judges"].items()
            ),
        )
    if found.get("win_rates"):
        _print(
            console,
            "human win rates",
            ("first", "against", "win rate", "at equal length", "wins / ties / losses", "unjudged"),
            (
                (
                    *row["systems"],
                    _share(row["win_rate"]),
                    _share(row["length_controlled"]) + ("*" if row.get("separated") else ""),
                    f"{row.get('wins', 0)} / {row.get('ties', 0)} / {row.get('losses', 0)}",
                    str(row["unjudged"]),
                )
                for row in found["win_rates"]
            ),
        )
        if any(row.get("separated") for row in found["win_rates"]):
            console.print("* length tells wins from losses: the figure rests on the model's prior", highlight=False)
    for system, row in found.get("systems", {}).items():
        figure = _figure(row["score"]) if found["form"] == "score" else _share(row["harmless"])
        console.print(f"{system}: {found['form']} {figure} ({row['responses']} responses)", highlight=False)
    console.print(_agreement_line(found["agreement"]), highlight=False, soft_wrap=True)


def _agreement_line(found: Mapping[str, Any]) -> str:
    if not found["items_with_several"]:
        return "agreement between annotators: no item has two annotators"
    alpha, fleiss = (found[name] for name in ("krippendorff_alpha", "fleiss_kappa"))
    words = [f"Krippendorff's alpha {'not defined' if alpha is None else f'{alpha:.3f}'}"]
    words += [] if fleiss is None else [f"Fleiss' kappa {fleiss:.3f} ({found['fleiss_items']} items)"]
    words += [f"Cohen's kappa {' and '.join(p['annotators'])} {_figure(p['kappa'])}" for p in found["cohens_kappa"][:6]]
    return f"agreement between annotators on {found['items_with_several']} items: {'; '.join(words)}"


def _print(console: Console, title: str, heads: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for at, head in enumerate(heads):
        table.add_column(head, justify="left" if at == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    console.print(table)


def _plain(text: str) -> str:
    """Text that the console shows as it is: names are people's, not markup."""
    return text.replace("[", "\\[")


def _share(figure: Mapping[str, float] | None) -> str:
    return "-" if figure is None else f"{figure['estimate']:.0%} [{figure['low']:.0%}, {figure['high']:.0%}]"


def _figure(figure: Mapping[str, float] | None) -> str:
    return "-" if figure is None else f"{figure['estimate']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def _seconds(spread: Mapping[str, float] | None) -> str:
    return (
        "-" if spread is None else f"{spread['median']:.1f} ({spread['quarter']:.1f} to {spread['three_quarters']:.1f})"
    )
