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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console

from benchmarks.annotate.items import Form
from benchmarks.annotate.results import Labels, People
from benchmarks.annotate.store import Store
from benchmarks.evaluation.length_control import length_control
from benchmarks.evaluation.metrics import harmless_rate, win_rate
from benchmarks.evaluation.raters import fleiss_kappa, krippendorff_alpha
from rewards.labeling.report import alignment
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import (
    Clusters,
    Dyads,
    Interval,
    bootstrap_mean,
    clusters_of_pairs,
    cohens_kappa,
    interval_text,
    position_bias,
    rate,
    taken,
)
from rlaif_env.tables import Cell, Table, count_of

Groups = Clusters | Dyads


def report(store: Store, people: People, labelers: Mapping[str, Labels]) -> dict[str, Any]:
    """Everything measured, JSON-able: every figure with its 95 % interval and n, None where it is not defined.

    Raises `RLAIFError` where nothing was judged yet.
    """
    if not people.answers:
        raise RLAIFError(f"expected judgements in {store.path}, found none yet")
    form, counted = store.plan.form, people.counted()
    names = list(dict.fromkeys(j.annotator for j in people.everything))
    result: dict[str, Any] = {
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
        return result | {"systems": _rated_systems(form, people)}
    judges = {"people": _person(people)} if len(names) > 1 else {}
    judges |= {f"{name} (person)": _person(people, name) for name in names}
    judges |= {name: _labeler(people, labels) for name, labels in labelers.items()}
    return result | {"judges": judges, "win_rates": list(_win_rates(people))}


def _annotator(form: Form, people: People, name: str) -> dict[str, Any]:
    """What one annotator did, and how far they are to be relied on."""
    judged, again = people.counted(name), people.repeats(name)
    own = [j for j in people.everything if j.annotator == name]
    checks = [people.items[j.item].expected == j.choice for j in own if j.kind == "check"]
    same = [float(one.value(form) == two.value(form)) for one, two in again]
    groups = _clusters(people, [one.item for one, _ in again])
    return {
        "judged": len(judged),
        "skips": sum(j.kind == "item" and j.choice == "skip" for j in own),
        "self_consistency": asdict(rate(same, clusters=groups)) if again else None,
        "checks": {"passed": sum(checks), "of": len(checks)},
        "seconds": _spread([j.seconds for j in judged]),
    }


def _person(people: People, name: str | None = None) -> dict[str, Any]:
    """A person as a judge, or all together: what they agree on is the yardstick, and held against nothing."""
    against: dict[str, Any] = {"pairs": len(people.answers), "ties_left_out": 0, "agreement": None, "kappa": None}
    if name is not None:
        own = {number: given[name].p_first for number, given in people.answers.items() if name in given}
        others = {number: [j.p_first for j in people.answers[number].values() if j.annotator != name] for number in own}
        against = _against(people, own, {number: float(np.mean(p)) for number, p in others.items() if p})
    judged = people.counted(name)
    repeats = people.repeats(name)
    bias = _positions(
        [j.p_shown_first for j in judged],
        _clusters(people, [j.item for j in judged]),
        [(one.p_shown_first, two.p_shown_first) for one, two in repeats],
        _clusters(people, [one.item for one, _ in repeats]),
    )
    return {"kind": "person" if name else "people", **against, **bias, "seconds": _spread([j.seconds for j in judged])}


def _labeler(people: People, labels: Labels) -> dict[str, Any]:
    """An AI labeler as a judge, measured as a person is."""
    numbers = [number for number in labels.positions if number in people.answers]
    both = [labels.positions[number] for number in numbers]
    shown = _clusters(people, np.repeat(numbers, 2).tolist())
    bias = _positions(np.ravel(both), shown, both, _clusters(people, numbers))
    against = _against(people, labels.p_first, people.labels())
    return {"kind": "ai", **against, **bias, "seconds": None, "unmatched": labels.unmatched}


def _positions(
    shown_first: ArrayLike, clusters: Groups, both: Sequence[tuple[float, float]], clusters_of_both: Groups
) -> dict[str, Any]:
    """Position bias: how often the response shown first wins, and how often a choice follows the position.

    ``shown_first`` are (n,) preferences for the response shown first, ½ for a tie, and ``both`` are the preferences of
    m pairs in one order and after the swap; each with what makes them dependent.
    """
    shown = np.asarray(shown_first, dtype=np.float64)
    decided = np.flatnonzero(shown != 0.5)
    first = rate(shown[decided] > 0.5, clusters=taken(clusters, decided)) if decided.size else None
    same = position_bias(*zip(*both, strict=True), clusters=clusters_of_both).same_position if both else None
    return {"first_shown": _json(first), "same_position": _json(same)}


def _against(people: People, own: Mapping[int, float], verdicts: Mapping[int, float]) -> dict[str, Any]:
    """How one judge's choices agree with people's; people's ties are left out and counted, the judge's count ½."""
    numbers = [number for number in own if number in verdicts]
    judge, verdict = ([labels[number] for number in numbers] for labels in (own, verdicts))
    aligned = alignment(judge, verdict, _clusters(people, numbers))
    counts = {"pairs": len(numbers), "ties_left_out": aligned.ties}
    return {**counts, "agreement": _json(aligned.share), "kappa": _json(aligned.kappa)}


def _clusters(people: People, numbers: Sequence[int]) -> Groups:
    """What makes items, by their numbers, depend on each other; one that is judged twice is twice in the same.

    Whether that is prompts or texts, all items say together, so that every figure is over the same.
    """
    asked = {number: item for number, item in people.items.items() if item.kind != "check"}
    texts = ((i.prompt, i.responses[0], i.responses[-1]) for i in asked.values())
    places = {number: place for place, number in enumerate(asked)}
    rows = np.array([places[number] for number in numbers], dtype=np.int64)
    return taken(clusters_of_pairs(*zip(*texts, strict=True)), rows)


def _agreement(form: Form, people: People) -> dict[str, Any]:
    """Agreement between annotators beyond chance."""
    names = list(dict.fromkeys(j.annotator for j in people.counted()))
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
        groups = _clusters(people, [number for number, both in zip(people.answers, shared, strict=True) if both])
        kappa = _json(_defined(partial(cohens_kappa, left, right, clusters=groups)))
        pairs.append({"annotators": [names[a], names[b]], "items": len(left), "kappa": kappa})
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
        row: dict[str, Any] = {"systems": [a, b]}
        if failed.all():
            yield row | {"win_rate": None, "unjudged": len(numbers), "length_controlled": None, "reason": "none judged"}
            continue
        won = win_rate(p, failed=failed, clusters=_clusters(people, numbers))
        row |= {"win_rate": asdict(won.interval), "unjudged": won.failed}
        row |= {"wins": won.wins, "ties": won.ties, "losses": won.losses}
        judged = [n for n, missing in zip(numbers, failed, strict=True) if not missing]
        lengths = [[max(1, len(people.items[n].responses[side])) for n in judged] for side in (0, 1)]
        control = length_control(np.array(p)[~failed], *lengths, clusters=_clusters(people, judged))
        row |= {"length_controlled": asdict(control.controlled), "length_slope": control.slope}
        yield row | {"separated": control.separated, "extrapolated": control.extrapolated}


def _rated_systems(form: Form, people: People) -> dict[str, Any]:
    """The harmless rate or the mean score of each system's responses ("all" where nobody said whose they are)."""
    by_system: dict[str, list[int]] = defaultdict(list)
    for number in people.answers:
        by_system[(*people.items[number].systems, "all")[0]].append(number)
    systems = {}
    for system, numbers in by_system.items():
        means = [float(np.mean([j.value(form) for j in people.answers[n].values()])) for n in numbers]
        clusters = _clusters(people, numbers)
        assert not isinstance(clusters, Dyads)  # one response an item: no two texts to share
        if form == "harmless":
            figure: Any = asdict(harmless_rate(means, clusters=clusters).interval)
        else:
            figure = asdict(bootstrap_mean(means, clusters=clusters))
        systems[system] = {"responses": len(numbers), "mean": float(np.mean(means)), form: figure}
    return systems


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"quarter": low, "median": middle, "three_quarters": high, "n": len(values)}


def _defined(figure: Callable[[], Any]) -> Any:
    """What a function gives; None where the figure is not defined on such data."""
    try:
        return figure()
    except RLAIFError:
        return None


def _json(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print a report as tables."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    counts = f"{result['judged']} of {result['items']} items judged, {result['answers']} answers"
    for name, words in (("ties", "ties"), ("skips", "skipped"), ("identical", "with two equal responses (ties)")):
        counts += f", {result[name]} {words}" if result[name] else ""
    say(counts)
    columns = ["name", "judged", "skipped", "consistent on repeats", "checks passed", "seconds an item"]
    rows = [_annotator_row(*one) for one in result["annotators"].items()]
    tables = [Table("annotators", columns, rows, "95 % intervals, then how many prompts or texts are independent")]
    if judges := result.get("judges"):
        columns = ["judge", "pairs", "agrees with people", "kappa", "prefers the first", "same position, swapped"]
        tables.append(Table("judges", [*columns, "seconds"], [_judge_row(*judge) for judge in judges.items()]))
    if wins := result.get("win_rates"):
        star = "* length tells wins from losses: the figure rests on the model's prior"
        caption = star if any(row.get("separated") for row in wins) else ""
        columns = ["first", "against", "win rate", "at equal length", "wins / ties / losses", "unjudged"]
        tables.append(Table("human win rates", columns, [_win_row(row) for row in wins], caption))
    for shown in (table.rich() for table in tables):
        for column in shown.columns:
            column.overflow = "fold"  # no name of a judge is cut
        console.print(shown)
    for system, row in result.get("systems", {}).items():
        figure = _figure(row["score"]) if result["form"] == "score" else _share(row["harmless"])
        say(f"{system}: {result['form']} {figure} ({count_of(row['responses'], 'response')})")
    say(_agreement_line(result["agreement"]))


def _annotator_row(name: str, row: Mapping[str, Any]) -> list[Cell]:
    checks, spread = row["checks"], row["seconds"]
    passed = f"{checks['passed']} of {checks['of']}" if checks["of"] else None
    seconds = spread and "{median:.1f} ({quarter:.1f} to {three_quarters:.1f})".format(**spread)
    return [name, row["judged"], row["skips"], _share(row["self_consistency"]), passed, seconds]


def _judge_row(name: str, row: Mapping[str, Any]) -> list[Cell]:
    shares = [_share(row[key]) for key in ("first_shown", "same_position")]
    seconds = row["seconds"] and f"{row['seconds']['median']:.1f}"
    return [name, row["pairs"], _share(row["agreement"]), _figure(row["kappa"]), *shares, seconds]


def _win_row(row: Mapping[str, Any]) -> list[Cell]:
    equal = _share(row["length_controlled"]) + ("*" if row.get("separated") else "")
    counts = " / ".join(str(row.get(name, 0)) for name in ("wins", "ties", "losses"))
    return [*row["systems"], _share(row["win_rate"]), equal, counts, row["unjudged"]]


def _agreement_line(agreement: Mapping[str, Any]) -> str:
    if not agreement["items_with_several"]:
        return "agreement between annotators: no item has two annotators"
    alpha, fleiss = agreement["krippendorff_alpha"], agreement["fleiss_kappa"]
    words = [f"Krippendorff's alpha {'not defined' if alpha is None else f'{alpha:.3f}'}"]
    words += [] if fleiss is None else [f"Fleiss' kappa {fleiss:.3f} ({agreement['fleiss_items']} items)"]
    two = agreement["cohens_kappa"][:6]
    words += [f"Cohen's kappa {' and '.join(pair['annotators'])} {_figure(pair['kappa'])}" for pair in two]
    return f"agreement between annotators on {agreement['items_with_several']} items: {'; '.join(words)}"


_share = partial(interval_text, form=".0%", units=True)
_figure = partial(interval_text, form=".2f", units=True)
