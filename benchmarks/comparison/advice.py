"""Which reward to take, from the figures of a comparison: a few sentences, each "what: why".

Pure functions of the outcomes. The judge is the first of `benchmarks.comparison.tables.judges_of`: one that no arm was
trained on, where there is one. Wins are shares of the held-out prompts, ties ½, with the 95 % intervals of the tables;
two arms are told apart where the interval of the one against the other leaves out ½.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from benchmarks.comparison.outcomes import Cost, Outcome, arms_of, cost_of, over_optimised_from
from benchmarks.comparison.tables import INDEPENDENT, judges_of, percent, share_of_wins, with_interval
from benchmarks.evaluation.systems import System
from rlaif_env.data.tasks import Task
from rlaif_env.statistics import FEWEST_SEEDS, Interval, measure_change
from rlaif_env.tables import count_of

_SHOWN = 2  # disagreements of judges
_FAULTS = {
    "over-optimised": "over-optimised",
    "alike": "responses alike",
    "own reward alone": "its own reward rose, gold did not for sure",
}


@dataclass(frozen=True)
class Fault:
    """What a training did to its policy that its reward does not tell."""

    arm: str
    seed: int
    kind: str  # one of `_FAULTS`
    note: str  # a sentence with its figures
    since: int | None = None  # the update since which it is over-optimised


def faults_of(outcomes: Sequence[Outcome], task: Task) -> list[Fault]:
    """Trainings that were over-optimised, whose responses have become alike, or whose own reward alone rose."""
    starts = {outcome.seed: outcome.system for outcome in outcomes if outcome.arm == "sft"}
    faults = list[Fault]()
    for outcome in outcomes:
        if (history := outcome.history) is None:
            continue
        whose = outcome.arm, outcome.seed
        if "gold" in history.curves:
            since = over_optimised_from(history.steps, history.curves["reward"], history.curves["gold"])
            if since is not None:
                note = f"over-optimised: since update {since} the reward rises and the gold measure falls."
                faults.append(Fault(*whose, "over-optimised", note, since))
        faults += _changes(*whose, starts[outcome.seed], outcome.system, task)
    return faults


def _changes(arm: str, seed: int, start: System, end: System, task: Task) -> Iterator[Fault]:
    """Faults by what a training has changed on the held-out prompts."""
    before, after, own = start.measures, end.measures, f"judge:{arm}"
    if "distinct-2" in after:
        change = measure_change("distinct-2", before["distinct-2"], after["distinct-2"], start.prompts)
        if change.high is not None and change.high < -0.1:
            note = f"the responses have become alike: distinct-2 {with_interval(change, sign=True)} against SFT."
            yield Fault(arm, seed, "alike", note)
    if own in after and "gold" in after:
        judged = np.flatnonzero(np.isfinite(before[own]) & np.isfinite(after[own])).tolist()
        prompts = [start.prompts[i] for i in judged]
        reward = measure_change(own, before[own][judged], after[own][judged], prompts)
        gold = measure_change("gold", before["gold"], after["gold"], start.prompts)
        if reward.low is not None and reward.low > 0 and gold.low is not None and gold.low <= 0:
            note = f"its own reward rose ({with_interval(reward, sign=True)}), gold ({task.gold}) did not for sure "
            yield Fault(arm, seed, "own reward alone", note + f"({with_interval(gold, sign=True)}).")


@dataclass(frozen=True)
class _Standing:
    """How the arms stand by one judge."""

    judge: str  # its measure
    title: str
    wins: Mapping[str, Interval]  # against SFT, by arm, the highest first
    head: Mapping[str, Interval]  # of the best arm against each other one

    @property
    def better(self) -> list[str]:
        """Arms that are surely preferred to SFT."""
        return [arm for arm, share in self.wins.items() if _low(share) > 0.5]

    @property
    def level(self) -> list[str]:
        """The best of these and those that it is not surely ahead of."""
        return [arm for arm in self.better if arm not in self.head or _low(self.head[arm]) <= 0.5]

    def listed(self, arms: Sequence[str]) -> str:
        """Arms with their wins against SFT."""
        return _and([f"{arm} ({percent(self.wins[arm])} %)" for arm in arms])


def advice_of(outcomes: Sequence[Outcome], task: Task) -> list[str]:
    """Which arm to take, which is cheapest, which needs no people, which to keep away from, and what is not sure.

    Args:
        outcomes: Of the initial policy ("sft") and at least one arm, for each seed.
        task: What they answered.

    Returns:
        Sentences, the most important first; the words before the first ": " say what one is about.
    """
    judges = judges_of(outcomes, task)
    standing = _standing(outcomes, *next(iter(judges.items())))
    wins, better = standing.wins, standing.better
    if any(share.low is None for share in wins.values()):
        units = min(share.units for share in wins.values())
        return [f"Too few prompts: {count_of(units, 'held-out prompt')} tell no arms apart; see --train.eval-prompts."]
    advice = [*_best(standing)]
    if better:
        costs = {arm: cost_of(outcomes, arm) for arm in wins}
        advice += [_cheapest(standing.level, costs), *_without_people(standing, costs)]
    if worse := [arm for arm, share in wins.items() if share.high is not None and share.high < 0.5]:
        advice.append(f"Keep away from: {standing.listed(worse)}, to which SFT is preferred.")
    if better and (unclear := [arm for arm in wins if arm not in (*better, *worse)]):
        advice.append(f"No gain shown: {standing.listed(unclear)} against SFT.")
    advice += [*_stop_early(faults_of(outcomes, task), outcomes), *_disagreements(outcomes, judges)]
    seeds = [str(seed) for seed in dict.fromkeys(outcome.seed for outcome in outcomes)]
    if len(seeds) < FEWEST_SEEDS:
        number, plural = (("One seed", ""), ("Two seeds", "s"))[len(seeds) - 1]
        advice.append(
            f"{number}: all this is about the trainings of seed{plural} {_and(seeds)}; others may end otherwise."
        )
    return advice


def _standing(outcomes: Sequence[Outcome], judge: str, title: str) -> _Standing:
    wins = {arm: share_of_wins(outcomes, arm, "sft", judge) for arm in arms_of(outcomes)[1:]}
    wins = dict(sorted(wins.items(), key=lambda entry: (_low(entry[1]) <= 0.5, -entry[1].estimate)))
    best, *others = wins
    return _Standing(judge, title, wins, {arm: share_of_wins(outcomes, best, arm, judge) for arm in others})


def _best(standing: _Standing) -> Iterator[str]:
    """The arm that is preferred to SFT most often, and those it is not surely ahead of."""
    if not standing.better:
        yield f"No arm is shown to help: {standing.listed([*standing.wins])} against SFT, by {standing.title}."
    else:
        (best, *level), head = standing.level, standing.head
        behind = [f"{arm} ({percent(head[arm])} %)" for arm in standing.better if arm not in (best, *level)]
        text = f"Best by {standing.title}: {best}, preferred to SFT on {percent(standing.wins[best])} % of the prompts"
        text += f"; not to be told from it: {standing.listed(level)}" if level else ""
        yield text + (f"; {best} is preferred to {_and(behind)}." if behind else ".")
    if standing.judge not in INDEPENDENT:
        yield (
            f"No independent judge: neither a gold measure nor a gold reward model; {standing.title} is the labeler's "
            "own score, kindest to what was trained on it."
        )


def _cheapest(arms: Sequence[str], costs: Mapping[str, Cost]) -> str:
    """What arms cost, the one with the least seconds first."""

    def price(arm: str) -> str:
        people = f"{costs[arm].people:,}" if costs[arm].people else "no"
        return f"{arm}, {costs[arm].seconds:.0f} s from labels to policy and {people} judgements by people"

    first, *others = map(price, sorted(arms, key=lambda arm: costs[arm].seconds))
    unpaid = " (their own time is not in the seconds)" if any(costs[arm].people for arm in arms) else ""
    return f"{'Cheapest of these' if others else 'Its cost'}: {'; '.join([first, *others])}{unpaid}."


def _without_people(standing: _Standing, costs: Mapping[str, Cost]) -> Iterator[str]:
    """The best arm that needs no judgements by people, where others do."""
    free = [arm for arm in standing.wins if not costs[arm].people]
    if not free or len(free) == len(standing.wins):
        return
    chosen, head = free[0], "Without people's judgements"
    if chosen not in standing.better:
        yield f"{head}: no arm is shown to help; the highest is {standing.listed([chosen])} against SFT."
    elif chosen not in standing.head:
        yield f"{head}: {chosen} all the same, it needs none."
    else:
        told = "not to be told from" if chosen in standing.level else "behind"
        best, share = standing.level[0], percent(standing.head[chosen])
        yield f"{head}: {standing.listed([chosen])} against SFT, {told} {best}, which is preferred to it on {share} %."


def _stop_early(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The arms whose training went wrong, and how."""
    found = list[str]()
    for arm in arms_of(outcomes):
        trainings, what = sum(outcome.arm == arm for outcome in outcomes), list[str]()
        for kind, text in _FAULTS.items():
            if those := [fault for fault in faults if (fault.arm, fault.kind) == (arm, kind)]:
                since = [fault.since for fault in those if fault.since is not None]
                text += f" since update {min(since)}" if since else ""
                what.append(text + (f" in {len(those)} of {trainings}" if trainings > 1 else ""))
        found += [f"{arm} ({', '.join(what)})"] if what else []
    if found:
        yield f"Stop early, or raise --train.agent.beta: {'; '.join(found)}."


def _disagreements(outcomes: Sequence[Outcome], judges: Mapping[str, str]) -> Iterator[str]:
    """Two arms that the first judge surely puts in one order and another judge surely in the other."""
    found = list[str]()
    (judge, title), *others = judges.items()
    for a, b in permutations(arms_of(outcomes)[1:], 2):
        share = share_of_wins(outcomes, a, b, judge)
        if _low(share) <= 0.5:
            continue
        against = {other: share_of_wins(outcomes, a, b, other) for other, _ in others}
        whose = [
            f"{percent(opposite)} % by {judges[other]}" + (f" (the reward of {b})" if other == f"judge:{b}" else "")
            for other, opposite in against.items()
            if opposite.high is not None and opposite.high < 0.5
        ]
        found += [f"{a} is preferred to {b} on {percent(share)} % by {title}, {_and(whose)}"] if whose else []
    if found:
        more = f"; and {count_of(len(found) - _SHOWN, 'more pair')} of arms" if len(found) > _SHOWN else ""
        yield f"Judges disagree: {'; '.join(found[:_SHOWN])}{more}."


def _low(share: Interval) -> float:
    return 0.0 if share.low is None else share.low


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
