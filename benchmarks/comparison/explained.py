"""What decides between two rewards: gold at equal KL, what each reward sees of gold, and whose kin the judge is.

Policies trained for as many updates are not as far from SFT, so their win rates mix what a reward says with how hard
it pulls. Three tables take that apart:

1. At equal KL: gold of the training's samples against the root of the KL (the distance that Gao et al. 2023 write
   gold's course in), one slope an arm.
2. Signal: on N samples of each held-out prompt by the initial policy, how a reward and gold go together within a
   prompt, which is all that a policy gradient with a baseline sees of a reward; for the score of a language model also
   how it goes together with itself asked with another exemplar, which tells its noise from its bias; and what picking
   the best of N gains.
3. Other bases: the gold reward model made again on other language models. A reward model and a gold reward model on one
   base see texts through the same features, and may agree for that alone.

Notation: P prompts, N samples of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.audit.checks.best_of_n import best_of, kl_of
from benchmarks.audit.verdicts import LEVEL, mean_at, slope_at
from benchmarks.comparison.outcomes import WINDOW, Outcome, arms_of
from benchmarks.comparison.pipeline import GOLD_RM, Pipeline
from benchmarks.comparison.stages import Stage
from benchmarks.comparison.tables import PAPER, percent, share_of_wins, with_interval
from benchmarks.evaluation.judges import with_gold
from benchmarks.evaluation.systems import read_system
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import Floats, Interval
from rlaif_env.tables import Cell, Table, count_of

_KL = 8.0  # nats, at which the gain is read off


def ask_to_explain(pipeline: Pipeline) -> None:
    """Ask for every stage that the tables that are asked for need.

    Raises:
        RLAIFError: If there is nothing independent to hold rewards against, or no preferences for a gold reward model.
    """
    config, asked = pipeline.config, pipeline.config.ablation
    if asked.gold_bases and not pipeline.has_preferences("gold"):
        raise RLAIFError(
            f"expected people's preferences of the split 'gold' in task {pipeline.task.name!r} for "
            "ablation.gold_bases, found none"
        )
    judges = [judge for judge in _independent(pipeline) if judge != "gold"] if asked.equal_kl or asked.samples else []
    policies = [(arm, seed) for seed in config.seeds for arm in config.arms]
    for judge in judges if asked.equal_kl else ():
        for arm, seed in policies:
            pipeline.judgement(judge, pipeline.training(arm, seed))
    rewards = [arm for arm in config.arms if arm in pipeline.judges()]
    for stage in _sampled(pipeline, asked.samples):
        for name in (*judges, *rewards):
            pipeline.judgement(name, stage)
        for arm in rewards:
            if pipeline.other_shots(arm) is not None:
                pipeline.judgement(arm, stage, otherwise=True)
    for judge in _gold_models(asked.gold_bases):
        for arm, seed in [*(("sft", seed) for seed in config.seeds), *policies]:
            pipeline.judgement(judge, pipeline.answers(arm, seed))


def _gold_models(bases: Sequence[str]) -> dict[str, str]:
    """The gold reward models on the policy's base and on others, with the names of these; none without others."""
    others = {f"{GOLD_RM}:{base}": base for base in bases}
    return {GOLD_RM: "the policy's base"} | others if others else {}


def _sampled(pipeline: Pipeline, samples: int) -> list[Stage]:
    """The initial policy's answers, so many to each held-out prompt."""
    return [pipeline.answers("sft", seed) for seed in range(samples)]


def at_equal_kl(pipeline: Pipeline, outcomes: Sequence[Outcome]) -> Table:
    """What each arm gains for its distance from SFT, by every judge that is nobody's reward."""
    judges = _independent(pipeline)
    rows: list[list[Cell]] = []
    for arm in arms_of(outcomes)[1:]:
        trained = [(outcome, outcome.history) for outcome in outcomes if outcome.arm == arm and outcome.history]
        distance = [np.sqrt(np.maximum(history.curves["kl"], 0)) for _, history in trained]
        ends = sorted(float(history.curves["kl"][-WINDOW:].mean()) for _, history in trained)
        row: list[Cell] = [arm, f"{ends[0]:.1f} … {ends[-1]:.1f}"]
        which = np.repeat(np.arange(len(trained)), [len(part) for part in distance])
        blocks = np.concatenate([np.arange(len(part)) // WINDOW for part in distance]) + 1_000 * which
        for judge in judges:
            gold = []
            for outcome, history in trained:
                steps, values = history.samples.measures["step"], history.samples.measures["gold"]
                if judge != "gold":
                    values = pipeline.scores(judge, outcome.costs["training"])
                first = values[steps < history.steps[0] + WINDOW]
                means = np.array([np.nanmean(values[steps == step]) for step in history.steps])
                gold.append((means - np.nanmean(first)) / (float(np.nanstd(first)) or 1.0))
            others = [(which == training).astype(np.float64) for training in range(1, len(trained))]
            try:
                slope = slope_at(np.concatenate(distance), np.concatenate(gold), others, blocks)(LEVEL)
            except RLAIFError:  # the KL of so few updates does not vary
                row += ["too few updates", "-"]
            else:
                row += [with_interval(slope, sign=True), f"{slope.estimate * np.sqrt(_KL):+.2f}"]
        rows.append(row)
    return Table(
        "At equal KL: what distance from SFT buys",
        [
            "policy",
            "KL at the end, nats",
            *(f"{t}: {what}" for t in judges.values() for what in ("a root-nat", f"at {_KL:g} nats")),
        ],
        rows,
        "Least-squares slope of each update's mean on the root of its KL, each training with an intercept of its own, "
        f"in standard deviations of the first {WINDOW} updates' responses; 95 % intervals, {WINDOW} updates in a row "
        f"taken as one. At {_KL:g} nats: what the line gains there; a line is a rough picture of a way that bends.",
    )


def signal(pipeline: Pipeline, outcomes: Sequence[Outcome], samples: int) -> Table:
    """How each reward goes together with gold on the initial policy's samples, and what picking by it gains."""
    stages = _sampled(pipeline, samples)
    systems = [with_gold(read_system(stage.path / "answers.json"), pipeline.task) for stage in stages]

    def judged(name: str, *, otherwise: bool = False) -> Floats:
        """What a judge says of the samples, (P, N)."""
        if name == "gold":
            return np.stack([system.measures["gold"] for system in systems], axis=1)
        return np.stack([pipeline.scores(name, stage, otherwise=otherwise) for stage in stages], axis=1)

    judges = _independent(pipeline)
    gold = {name: judged(name) for name in judges}
    rows: list[list[Cell]] = []
    for arm in [arm for arm in arms_of(outcomes)[1:] if arm in pipeline.judges()]:
        reward = judged(arm)
        seen = [_within(reward, values) for values in gold.values()]
        itself = None if pipeline.other_shots(arm) is None else _within(reward, judged(arm, otherwise=True))
        root = np.sqrt(itself.estimate) if itself is not None and itself.estimate > 0 else np.nan
        free = ["-" if one is None or np.isnan(root) else f"{one.estimate / root:.2f}" for one in seen]
        picked = [_picked(reward, values) for values in gold.values()]
        row: list[Cell] = [arm, *(_told(one) for one in (*seen, itself)), *free]
        row += [_told(one, sign=True) for one in picked]
        rows.append(row)
    titles = list(judges.values())
    return Table(
        "Signal: what each reward sees of gold",
        [
            "reward",
            *(f"with {title}" for title in titles),
            "with itself, asked otherwise",
            *(f"with {title}, freed of that noise" for title in titles),
            *(f"best of {samples}: {title}" for title in titles),
        ],
        rows,
        f"On {samples} samples of each of {count_of(len(systems[0].prompts), 'held-out prompt')} by the initial "
        "policy: correlation within a prompt, 95 % intervals over prompts. Asked otherwise: with one exemplar more or "
        "less; what two askings do not share is noise, and the correlation divided by the root of theirs is what it "
        f"would be without (Spearman 1904): what is left to 1 is bias, and gold's own error. Best of {samples} (KL "
        f"{float(kl_of(np.array([samples]))[0]):.1f} nats): gained above one sample, in standard deviations of gold "
        "within a prompt.",
    )


def other_bases(pipeline: Pipeline, outcomes: Sequence[Outcome], bases: Sequence[str]) -> Table:
    """The main win rates by gold reward models on other language models than the policy's."""
    judges, arms = _gold_models(bases), arms_of(outcomes)
    rows: list[list[Cell]] = []
    for first, second, title, *_ in PAPER:
        if first not in arms or second not in arms:
            continue
        row: list[Cell] = [title]
        for judge in judges:
            scored = [_judged_by(pipeline, judge, outcome) for outcome in outcomes if outcome.arm in (first, second)]
            row.append(percent(share_of_wins(scored, first, second, f"judge:{judge}")))
        rows.append(row)
    models = [pipeline.reward_model("gold", base=base) for base in (None, *bases)]
    reports = [model.read_json("run/report.json")["figures"] for model in models]
    figures = [report.get("human") or next(iter(report.values())) for report in reports]
    told = [percent(figure["accuracy"]) for figure in figures]
    return Table(
        "Gold reward models on other bases: how often the first is preferred",
        ["first against second", *judges.values()],
        [["agrees with people on held-out pairs, %", *told], *rows],
        "Wins in % with 95 % intervals, ties ½. All gold reward models learned from the same human ratings, which no "
        "arm sees; an order that changes with the base is the judge's, not people's.",
    )


def _judged_by(pipeline: Pipeline, judge: str, outcome: Outcome) -> Outcome:
    """An outcome with what a judge says of its answers."""
    told = {f"judge:{judge}": pipeline.scores(judge, outcome.costs["answers"])}
    return replace(outcome, system=replace(outcome.system, measures=outcome.system.measures | told))


def _independent(pipeline: Pipeline) -> dict[str, str]:
    """The judges that are nobody's reward, with their names for people.

    Raises:
        RLAIFError: If there is none.
    """
    judges = {GOLD_RM: "gold RM"} if GOLD_RM in pipeline.judges() else {}
    if pipeline.task.gold is not None:
        judges["gold"] = pipeline.task.gold
    if not judges:
        raise RLAIFError(
            f"expected people's preferences of the split 'gold', or a gold measure, in task {pipeline.task.name!r}, to "
            "hold rewards against, found neither"
        )
    return judges


def _told(interval: Interval | None, *, sign: bool = False) -> str:
    return "-" if interval is None else with_interval(interval, sign=sign)


def _within(one: Floats, two: Floats) -> Interval | None:
    """Correlation of two figures of N samples of P prompts, (P, N) each, within the prompts; the jackknife over them.

    Samples that either has no figure of are left out; None where one of them says the same of all of a prompt's.
    """
    known = np.isfinite(one) & np.isfinite(two)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    a, b = (np.where(known, x - np.where(known, x, 0).sum(axis=1, keepdims=True) / count, 0) for x in (one, two))
    sums = np.stack([(a * b).sum(axis=1), (a * a).sum(axis=1), (b * b).sum(axis=1)])  # (3, P)

    def correlation(parts: Floats) -> Floats:
        r: Floats = parts[0] / np.sqrt(parts[1] * parts[2])
        return r

    total, prompts = sums.sum(axis=1, keepdims=True), sums.shape[1]
    if ((total - sums)[1:] <= 0).any():
        return None
    whole = correlation(total)[0]
    pseudo = prompts * whole - (prompts - 1) * correlation(total - sums)
    interval = mean_at(pseudo)(LEVEL)
    return replace(interval, estimate=float(whole))


def _picked(reward: Floats, gold: Floats) -> Interval | None:
    """Gold of the best of N samples by a reward, above a sample's, in SDs of gold within a prompt; (P, N) each.

    None where gold says the same of all of a prompt's.
    """
    gains, variances = [], []
    for values, golds in zip(reward, gold, strict=True):
        known = np.isfinite(values) & np.isfinite(golds)
        if known.sum() < 2:
            continue
        most = np.array([int(known.sum())])
        gains.append(float(best_of(values[known], golds[known], most)[0] - golds[known].mean()))
        variances.append(golds[known].var(ddof=1))
    if not any(variances):
        return None
    return mean_at(np.array(gains) / np.sqrt(np.mean(variances)))(LEVEL)
