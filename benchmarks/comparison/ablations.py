"""Ablations of a comparison: how the labeler is asked, how many pairs, whether a reward goes stale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison.config import CompareConfig
from benchmarks.comparison.explained import ask_to_explain, at_equal_kl, other_bases, signal
from benchmarks.comparison.outcomes import Outcome
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.stages import Stage
from benchmarks.comparison.tables import percent, with_interval
from rewards.labeling.config import LabelConfig, LabelOptions
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import Floats, group_codes, spearman
from rlaif_env.tables import Cell, Table

_WINDOWS = ("first third", "middle third", "last third")


def ask_for_ablations(pipeline: Pipeline) -> None:
    """Ask for every stage of the ablations that are asked for.

    Raises:
        RLAIFError: If there is no gold measure for staleness; and whatever a stage raises.
    """
    config, asked = pipeline.config, pipeline.config.ablation
    for labeler, way in _ways(config):
        _labelled(pipeline, labeler, way)
    for who, count in _counts(config):
        pipeline.reward_model(who, count)
    if asked.staleness and pipeline.task.gold is None:
        raise RLAIFError(
            f"expected a gold measure in task {pipeline.task.name!r} for the staleness ablation, found none"
        )
    if asked.staleness:
        for seed in config.seeds:
            for arm in config.arms:
                for judge in pipeline.judges():
                    pipeline.judgement(judge, pipeline.training(arm, seed))
    ask_to_explain(pipeline)


def ablations(pipeline: Pipeline, outcomes: Sequence[Outcome]) -> list[Table]:
    """The tables of the ablations that are asked for.

    Raises:
        RLAIFError: If nobody judged the pairs for the labelers.
    """
    asked = pipeline.config.ablation
    tables = []
    if _ways(pipeline.config):
        tables.append(_labelling(pipeline))
    if asked.pair_counts:
        tables.append(_pairs(pipeline))
    if asked.staleness:
        tables.append(_staleness(pipeline, outcomes))
    if asked.equal_kl:
        tables.append(at_equal_kl(pipeline, outcomes))
    if asked.samples:
        tables.append(signal(pipeline, outcomes, asked.samples))
    if asked.gold_bases:
        tables.append(other_bases(pipeline, outcomes, asked.gold_bases))
    return tables


def _labelling(pipeline: Pipeline) -> Table:
    """Agreement with people by labeler and labelling prompt (sections 4.5 and 4.6, tables 2 and 3 of the paper)."""
    rows = [[labeler.model, *_agreement(pipeline, labeler, way)] for labeler, way in _ways(pipeline.config)]
    how, agreement = ["labeler", "mode", "preamble", "shots", "rationale"], ["labelled", "agrees with people, %"]
    position, rules = ["same position after the swap, %", "label mass"], ["always the longer, %", "always the first, %"]
    return Table(
        "Ablation: how the labeler is asked",
        [*how, *agreement, *position, *rules],
        rows,
        f"{pipeline.config.ablation.pairs} pairs that people judged, 95 % intervals; always the longer and always the "
        "first are what these rules would get. The paper's (PaLM 2 L, summaries): base 76.1, detailed 77.4, detailed "
        "with a rationale 78.0, eight shots 69.8; the same position after the swap: L 18 %, S 21 %, XS 56 %.",
    )


def _ways(config: CompareConfig) -> list[tuple[LanguageModelConfig, LabelOptions]]:
    """Which labelers are asked, and how; none where that is not to be measured."""
    asked = config.ablation
    if asked.prompt_grid < 0 and not asked.labelers:
        return []
    plain = replace(config.label, mode="pairwise", cot=False, samples=1, temperature=None, template=None)
    ways = [config.label]
    for prompt in ("base", "detailed"):
        for shots in range(asked.prompt_grid + 1):
            for cot in (False, True) if asked.grid_cot else (False,):
                ways.append(replace(plain, prompt=prompt, shots=shots, cot=cot))
    return [(labeler, way) for labeler in (config.labeler, *map(LanguageModelConfig, asked.labelers)) for way in ways]


def _labelled(pipeline: Pipeline, labeler: LanguageModelConfig, way: LabelOptions) -> Stage:
    asked, task = pipeline.config.ablation, pipeline.config.task
    plain = replace(way.preference, calibrate=0, calibration=None)
    settings = LabelConfig(**vars(plain), task=task, split="test", pairs=asked.pairs, labeler=labeler)
    return pipeline.labelled("labels-ablation", settings)


def _agreement(pipeline: Pipeline, labeler: LanguageModelConfig, way: LabelOptions) -> list[Cell]:
    """How a labeler is asked, and how well it agrees with people then."""
    report = _labelled(pipeline, labeler, way).read_json("report.json")
    human, bias = report.get("human"), report["position_bias"]
    if human is None:
        raise RLAIFError(f"expected pairs that people judged in the split 'test' of {pipeline.task.name!r}, found none")
    return [
        way.mode,
        way.prompt if way.mode == "pairwise" else "-",
        report["parameters"]["shots"],
        "yes" if way.cot else "no",
        report["labelled"],
        percent(human["alignment"]),
        "-" if bias is None else percent(bias["same_position"]),
        f"{report['label_mass']['mean']:.2f}",
        percent(human["always_longer"]),
        percent(human["always_first"]),
    ]


def _counts(config: CompareConfig) -> list[tuple[str, int]]:
    """On whose preferences reward models are trained again, and on how many."""
    return [(who, count) for who in ("human", "ai") for count in sorted(set(config.ablation.pair_counts))]


def _pairs(pipeline: Pipeline) -> Table:
    """Reward model accuracy by number of preferences (the paper's first version has the curve)."""
    rows: list[list[Cell]] = []
    for who, count in _counts(pipeline.config):
        report = pipeline.reward_model(who, count).read_json("run/report.json")
        for judged_by, figures in report["figures"].items():
            rows.append([who, count, report["training"]["pairs"], judged_by, percent(figures["accuracy"], units=True)])
    return Table(
        "Ablation: number of preference pairs",
        ["labels", "pairs asked for", "pairs", "tested on", "accuracy, %"],
        rows,
        "Pairwise accuracy on held-out pairs, 95 % intervals and the number of independent pairs, ties ½. The "
        "paper's: about 60 at 128 pairs, nearly full "
        "at 5,000.",
    )


def _staleness(pipeline: Pipeline, outcomes: Sequence[Outcome]) -> Table:
    """How well each judge follows the gold measure on what the policies wrote early and late (section 2.2.2).

    A reward model that goes stale follows it less on late samples, far from what it learned on; the score of a language
    model has nothing to go stale by.
    """
    rows: list[list[Cell]] = []
    for outcome in outcomes:
        if (history := outcome.history) is None:
            continue
        steps, gold = (history.samples.measures[name] for name in ("step", "gold"))
        prompts = group_codes(history.samples.prompts, len(gold))
        windows = [np.isin(steps, part) for part in np.array_split(history.steps, len(_WINDOWS))]
        for name in pipeline.judges():
            scores = pipeline.scores(name, outcome.costs["training"])
            rows.append([outcome.system.name, name, *(_correlation(scores[w], gold[w], prompts[w]) for w in windows)])
    return Table(
        "Ablation: does the reward go stale?",
        ["policy", "judge", *_WINDOWS],
        rows,
        "Spearman correlation of each judge with the gold measure on the samples of each part of the training, 95 % "
        "intervals, and over how many prompts.",
    )


def _correlation(scores: Floats, gold: Floats, prompts: NDArray[np.int64]) -> str:
    """Rank correlation of scores with the gold measure, all (n,); rows that the judge failed on are counted apart."""
    scored = np.isfinite(scores)
    failed = "" if scored.all() else f"; {int((~scored).sum())} failed"
    scores, gold, prompts = scores[scored], gold[scored], prompts[scored]
    if len(gold) < 4:
        return "too few" + failed
    if np.ptp(gold) == 0 or np.ptp(scores) == 0:
        return "one value only" + failed
    return with_interval(spearman(scores, gold, clusters=prompts), sign=True, units=True) + failed
