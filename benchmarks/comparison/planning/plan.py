"""The stages of a comparison before any is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.comparison.ablations import ask_for_ablations
from benchmarks.comparison.config import same_arms
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.stages import Job, Plan


def planned(pipeline: Pipeline) -> list[Job]:
    """All stages of a comparison, each once and after those that it needs; none is made.

    As long as the initial policy is yet to be fine-tuned, only the first of them, "sft", has its final key.
    """
    with _planning(pipeline) as plan:
        for seed in pipeline.config.seeds:
            for arm in ("sft", *pipeline.config.arms):
                answers = pipeline.answers(arm, seed)
                for judge in pipeline.judges():
                    pipeline.judgement(judge, answers)
        ask_for_ablations(pipeline)
    return plan.jobs


def twins(pipeline: Pipeline) -> list[str]:
    """Which arms come to the same thing as another one, and why, before any is made."""
    with _planning(pipeline):
        return same_arms({arm: pipeline.training(arm, pipeline.config.seeds[0]).key for arm in pipeline.config.arms})


@contextmanager
def _planning(pipeline: Pipeline) -> Iterator[Plan]:
    """What is asked for is planned, not made."""
    stages = pipeline.stages
    pipeline.stages = plan = Plan(stages.folder)
    try:
        yield plan
    finally:
        pipeline.stages = stages
