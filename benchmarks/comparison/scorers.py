"""How well direct scores follow people: ``python -m benchmarks.comparison.scorers`` (by model, template and shots).

Each cell is the rank correlation of a model's expected score with the mean of 15 to 29 people's ratings, on the same
movie-review snippets of the test split for every cell, and the label mass: how much of its probability the model puts
on the scores of the scale. Rows of little mass count like all others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.comparison.tables import with_interval
from rewards.direct_score import DirectLLMScore
from rewards.language_model.local import LocalLM
from rlaif_env.api import RLAIFError
from rlaif_env.data.corpus import Snippet, movie_snippets
from rlaif_env.data.tasks import EVAL_SPLIT
from rlaif_env.models import MODELS, load_tokenizer
from rlaif_env.records import write_json
from rlaif_env.statistics import Interval, spearman
from rlaif_env.tables import Table


@dataclass(frozen=True)
class Cell:
    """One way to ask one model."""

    model: str
    chat: bool  # through its chat template, or plain
    shots: int  # scored exemplars before the sample
    spearman: Interval  # of the expected score with people's mean rating
    label_mass: float  # mean over the snippets
    least_mass: float  # of all snippets


def drawn(count: int, seed: int) -> list[Snippet]:
    """So many snippets of the split that policies are compared on.

    Raises:
        RLAIFError: If it has fewer, or less than four are asked for.
    """
    snippets = movie_snippets(EVAL_SPLIT)
    if not 4 <= count <= len(snippets):
        raise RLAIFError(f"expected 4 to {len(snippets)} snippets, found {count}")
    chosen = np.random.default_rng(seed).choice(len(snippets), count, replace=False)
    return [snippets[i] for i in chosen]


def cells(models: Sequence[str], shots: Sequence[int], snippets: Sequence[Snippet]) -> Iterator[Cell]:
    """Every cell, one after the other; a model without a chat template has the plain ones only."""
    texts, means = [snippet.text for snippet in snippets], [snippet.mean for snippet in snippets]
    for model in models:
        for chat in (False, True) if load_tokenizer(model).chat_template else (False,):
            scorer = LocalLM(model, chat=chat)
            for count in shots:
                backend = DirectLLMScore(scorer, "movie-review", shots=count, minimum_mass=0.0)
                scores = backend.score([""] * len(texts), texts)
                mass = scores.info["label_mass"]
                yield Cell(model, chat, count, spearman(scores.values, means), float(mass.mean()), float(mass.min()))


def table(found: Sequence[Cell], snippets: int) -> Table:
    """The cells, a row each."""
    return Table(
        "Direct scores and people's ratings",
        ["model", "template", "shots", "Spearman", "label mass", "least"],
        [
            [
                cell.model,
                "chat" if cell.chat else "plain",
                cell.shots,
                with_interval(cell.spearman),
                f"{cell.label_mass:.3f}",
                f"{cell.least_mass:.3f}",
            ]
            for cell in found
        ],
        f"{snippets} snippets, the same in every row; 95 % intervals.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a Markdown table."""
    parser = argparse.ArgumentParser("python -m benchmarks.comparison.scorers", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names or folders (default: %(default)s)")
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: %(default)s")
    parser.add_argument("--snippets", type=int, default=192, help="of the test split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which snippets (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(argv)
    snippets = drawn(options.snippets, options.seed)
    found: list[Cell] = []
    for cell in cells(options.models, options.shots, snippets):
        found.append(cell)
        print(" ".join(map(str, table(found, len(snippets)).rows[-1])), file=sys.stderr, flush=True)
        if options.out:
            write_json(
                options.out, {"snippets": len(snippets), "seed": options.seed, "cells": [asdict(c) for c in found]}
            )
    print(table(found, len(snippets)).markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
