"""What the tests of the labelling command share: a judge, pairs, a run in a folder."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rewards.labeling.command import LabelConfig, label
from rlaif_env.api import BackendError


class Judge:
    """Likes the response whose text hashes higher; sees the first position a little better than it is."""

    name = "judge"

    def __init__(self, mass: float = 0.8, push: float = 0.1) -> None:
        self.mass, self.push = mass, push
        self.asked: list[str] = []
        self.fails: set[str] = set()

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
        self.asked += prompts
        if bad := [i for i, p in enumerate(prompts) if any(word in p for word in self.fails)]:
            raise BackendError("no answer", bad)
        rows = []
        for prompt in prompts:
            one, two = re.findall(r"Response [12] - (.*)", prompt)
            p = (
                0.7 if hashlib.sha256(one.encode()).digest() > hashlib.sha256(two.encode()).digest() else 0.2
            ) + self.push
            rows.append([self.mass * p, self.mass * (1 - p)])
        return np.log(rows)

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        return [f"because {hashlib.sha256(p.encode()).hexdigest()[:4]}" for p in prompts]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_rows(n: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "response_1": f"one {i}", "response_2": f"two {i}", **more} for i in range(n)]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(tmp_path: Path, judge: Judge | None = None, console: Console | None = None, **options: Any) -> dict[str, Any]:
    config = LabelConfig(**{"task": "helpful", "out": tmp_path / "out", "batch": 4, **options})
    return label(config, console or quiet(), Judge() if judge is None else judge)
