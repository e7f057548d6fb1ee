"""Ablations of a comparison: how the labeler is asked, how many pairs, whether a reward goes stale."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from benchmarks.comparison.arms import CompareConfig
from benchmarks.comparison.outcomes import Outcome, percent
from benchmarks.comparison.stages import Stage, Stages, content_of
from rewards import make_reward
from rewards.labeling.command import LabelConfig, label
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import Task
from rlaif_env.runs import write_json
from rlaif_env.statistics import Interval, spearman

if TYPE_CHECKING:
    from benchmarks.comparison.pipeline import Judge

__all__ = ["labelling", "pairs", "staleness"]

_WINDOWS = 3


def labelling(stages: Stages, task: Task, config: CompareConfig) -> dict[str, Any]:
    """Agreement with people by labeler and labelling prompt (sections 4.5 and 4.6, tables 2 and 3 of the paper).

    Args:
        stages: Each cell is a stage.
        task: Must have people's preferences of its test split.
        config: Which labelers, and how far the grid goes.

    Raises:
        RLAIFError: If nobody judged the pairs.
    """
    ways: list[dict[str, Any]] = [
        {"mode": config.label_mode, "prompt": config.label_prompt, "shots": config.label_shots, "cot": config.label_cot}
    ]
    for prompt in ("base", "detailed"):
        for shots in range(config.prompt_grid + 1):
            for cot in (False, True) if config.grid_cot else (False,):
                ways.append({"mode": "pairwise", "prompt": prompt, "shots": shots, "cot": cot})
    labelers = [(config.labeler, config.labeler_url), *((name, None) for name in config.labelers)]
    rows = []
    for name, url in labelers:
        for way in ways:
            settings = {"split": "test", "pairs": config.ablation_pairs, "scale": list(config.scale)} | way
            settings["minimum_mass"] = config.minimum_mass

            def make(
                folder: Path, name: str = name, url: str | None = url, settings: dict[str, Any] = settings
            ) -> None:
                chosen = {**settings, "scale": tuple(settings["scale"])}
                labeler = LanguageModelConfig(name, url)
                label(LabelConfig(task=config.task, labeler=labeler, out=folder, **chosen), Console(quiet=True))

            key = {**settings, "model": content_of(name), "task": task.to_json()}
            stage = stages.run("labels-ablation", key, make, goes_on=True)
            report = json.loads((stage.path / "report.json").read_text(encoding="utf-8"))
            if report.get("human") is None:
                raise RLAIFError(f"expected pairs that people judged in the split 'test' of {task.name!r}, found none")
            rows.append([name, *_way(way), *_agreement(report)])
    return {
        "title": "Ablation: how the labeler is asked",
        "caption": (
            f"{config.ablation_pairs} pairs that people judged, 95 % intervals; always the longer and always the first "
            "are what these rules would get. The paper's (PaLM 2 L, summaries): base 76.1, detailed 77.4, detailed "
            "with a rationale 78.0, eight shots 69.8; the same position after the swap: L 18 %, S 21 %, XS 56 %."
        ),
        "columns": [
            "labeler",
            "mode",
            "preamble",
            "shots",
            "rationale",
            "labelled",
            "agrees with people, %",
            "same position after the swap, %",
            "label mass",
            "always the longer, %",
            "always the first, %",
        ],
        "rows": rows,
    }


def _way(way: Mapping[str, Any]) -> list[Any]:
    if way["mode"] == "score":
        return ["score", "-", way["shots"], "yes" if way["cot"] else "no"]
    return ["pairwise", way["prompt"], way["shots"], "yes" if way["cot"] else "no"]


def _agreement(report: Mapping[str, Any]) -> list[Any]:
    human, bias = report["human"], report["position_bias"]
    return [
        report["labelled"],
        percent(Interval(**human["alignment"])),
        "-" if bias is None else percent(Interval(**bias["same_position"])),
        f"{report['label_mass']['mean']:.2f}",
        percent(Interval(**human["always_longer"])),
        percent(Interval(**human["always_first"])),
    ]


def pairs(models: Mapping[tuple[str, int], Stage]) -> dict[str, Any]:
    """Reward model accuracy by number of preferences (the paper's first version has the curve).

    Args:
        models: By whose labels and how many pairs, the reward model's stage.
    """
    rows = []
    for (who, count), stage in models.items():
        report = json.loads((stage.path / "run" / "report.json").read_text(encoding="utf-8"))
        for judged_by, figures in report["figures"].items():
            rows.append([who, count, report["training"]["pairs"], judged_by, percent(Interval(**figures["accuracy"]))])
    return {
        "title": "Ablation: number of preference pairs",
        "caption": (
            "Pairwise accuracy on held-out pairs, 95 % intervals, ties ½. The paper's: about 60 at 128 pairs, nearly "
            "full at 5,000."
        ),
        "columns": ["labels", "pairs asked for", "pairs", "tested on", "accuracy, %"],
        "rows": rows,
    }


def staleness(stages: Stages, task: Task, judges: Mapping[str, Judge], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How well each judge follows the gold measure on what the policies wrote early and late (section 2.2.2).

    A reward model that goes stale follows it less on late samples, far from what it learned on; the score of a language
    model has nothing to go stale by.

    Raises:
        RLAIFError: If the task has no gold measure.
    """
    rows = []
    for outcome in outcomes:
        history = outcome.history
        if history is None:
            continue
        if "gold" not in history.samples:
            raise RLAIFError(f"expected a gold measure in task {task.name!r} for the staleness ablation, found none")
        windows = np.array_split(np.array(history.steps), _WINDOWS)
        training = outcome.costs["training"]
        for name, judge in judges.items():

            def make(folder: Path, judge: Judge = judge, outcome: Outcome = outcome) -> None:
                history = outcome.history
                assert history is not None
                backend = make_reward(judge.reward, task=task, **judge.kwargs)
                scores: list[float] = []
                for start in range(0, len(history.prompts), 32):
                    part = slice(start, start + 32)
                    scores += backend.score(history.prompts[part], history.responses[part]).values.tolist()
                write_json(folder / "scores.json", scores)

            stage = stages.run(f"judge-{name}-of-samples", {"judge": judge.key}, make, needs=(*judge.needs, training))
            scores = np.array(json.loads((stage.path / "scores.json").read_text(encoding="utf-8")), np.float64)
            cells = []
            for window in windows:
                chosen = np.isin(history.samples["step"], window)
                gold = history.samples["gold"][chosen]
                if np.ptp(gold) == 0 or np.ptp(scores[chosen]) == 0:
                    cells.append("one value only")
                    continue
                found = spearman(scores[chosen], gold)
                cells.append(f"{found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}]")
            rows.append([outcome.system.name, name, *cells])
    names = ["first third", "middle third", "last third"]
    return {
        "title": "Ablation: does the reward go stale?",
        "caption": (
            "Spearman correlation of each judge with the gold measure on the samples of each part of the training, 95 "
            "% intervals (samples of one prompt counted as independent, so they are somewhat too narrow)."
        ),
        "columns": ["policy", "judge", *names],
        "rows": rows,
    }
