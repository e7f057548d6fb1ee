"""What an arm cost: tokens as the model really reads them, and a table worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.comparison.config import CompareConfig
from benchmarks.comparison.outcomes import Outcome, cost_table
from benchmarks.comparison.stages import Stage
from benchmarks.evaluation.asked import Tokens, asked_in_training, priced
from benchmarks.evaluation.systems import System
from rewards import make_reward
from rewards.endpoint.config import ServerConfig
from rewards.language_model.config import LanguageModelConfig
from rewards.language_model.local import LocalLM
from rlaif_env.api import RLAIFError
from rlaif_env.records import write_json
from rlaif_env.servers.limits import Limits
from tests.tiny import tiny_backbone


class Read(LocalLM):
    """A model that notes how many tokens it was given to read."""

    tokens = asked = 0

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        self.tokens += sum(self.count_tokens(prompts))
        self.asked += len(prompts)
        return super().label_logprobs(prompts, labels)


SAMPLES = System(
    name="samples",
    source="",
    prompts=["a film", "a film", "a film", "the plot", "the plot", "the plot"] * 2,
    responses=[" good", " good", " bad!", " of it", " is", " of it", " x", " y", " z", " one", " two", ""],
    measures={"step": np.repeat([1.0, 2.0], 6)},
)


@pytest.mark.parametrize(
    ("reward", "asked"),
    [
        ("direct-llm", {"scale": (1, 3), "shots": 1}),
        ("group-preference", {"mode": "score", "scale": (1, 3)}),
        ("group-preference", {"mode": "pairwise", "opponents": 1}),
    ],
)
def test_the_tokens_of_a_training_are_those_that_its_model_reads(
    reward: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    tiny_backbone(0).save_merged(None, tmp_path / "scorer")
    model = LanguageModelConfig(str(tmp_path / "scorer"))
    options = {"model": model.model, "url": None, "chat": False, **asked, "minimum_mass": 1e-12}
    found = asked_in_training(reward, options, model, "movie-review", SAMPLES)
    live = Read(tmp_path / "scorer")
    backend = make_reward(reward, model=live, **asked, minimum_mass=1e-12)
    for part in (slice(0, 6), slice(6, 12)):
        backend.score(SAMPLES.prompts[part], SAMPLES.responses[part])
    assert (found.input, found.output) == (live.tokens, live.asked)
    assert found.exact and found.price is None and live.asked > 0


def test_tokens_of_a_server_are_a_guess_and_have_its_price() -> None:
    server = ServerConfig(limits=Limits(price_in=2.0, price_out=10.0))
    model = LanguageModelConfig("judge", "http://localhost:8000/v1", server=server)
    options = {"template": "{text}" + "." * 20, "scale": (1, 3)}
    alike = System("s", "", ["a film"] * 2, [" is bad at it!"] * 2, {"step": np.ones(2)})  # 20 characters, then 20 more
    found = asked_in_training("direct-llm", options, model, "movie-review", alike)
    assert found == Tokens(20, 2, exact=False, price=(20 * 2 + 2 * 10) / 1e6)
    assert str(found) == "about 20 + 2"


def stage(folder: Path, name: str, seconds: float, **files: Any) -> Stage:
    for file, content in files.items():
        path = folder / name / {"labels": "report.json", "model": "run/report.json"}[file]
        path.parent.mkdir(parents=True)
        write_json(path, content)
    return Stage(name, name, folder / name, seconds, 0.0)


def test_the_table_of_costs_by_hand(tmp_path: Path) -> None:
    system = System("", "", ["a"], ["b"], {})
    people = stage(tmp_path, "rm-human", 1800.0, model={"labels": {"sources": {"human": 300}}})
    labels = stage(tmp_path, "labels", 900.0, labels={"labelled": 200, "calibration": {"asked": 10}})
    both = stage(tmp_path, "rm-both", 1800.0, model={"labels": {"sources": {"human": 300, "ai:judge": 200}}})
    server = LanguageModelConfig(
        "judge", "http://localhost:1", server=ServerConfig(limits=Limits(price_in=1.0, price_out=100.0))
    )
    labelling = {"labels": priced(1_000_000, 10_000, server, exact=True)}  # 1 + 1 dollars
    training = [{"training": priced(read, 5_000, server, exact=False)} for read in (1_000_000, 2_000_000)]  # 1.5 + 2.5
    outcomes = [
        Outcome("sft", 0, system, None, {}),
        Outcome("human-rm", 0, system, None, {"reward model": people, "training": stage(tmp_path, "t0", 600.0)}),
        Outcome("human-rm", 1, system, None, {"reward model": people, "training": stage(tmp_path, "t1", 1200.0)}),
        Outcome(
            "combined-rm",
            0,
            system,
            None,
            {"labels": labels, "reward model": both, "training": stage(tmp_path, "t2", 900.0)},
            labelling,
        ),
        *(
            Outcome("direct-llm", i, system, None, {"training": stage(tmp_path, f"d{i}", 3600.0)}, training[i])
            for i in (0, 1)
        ),
    ]
    table = cost_table(outcomes, price_per_hour=4.0)
    rows = {row[0]: list(row[1:]) for row in table.rows}
    # people, AI labels, tokens for labels and in training, four times, price of people, tokens, machine, all; by PaLM 2
    assert rows["human-rm"] == [300, 0, "0", "0", 0, 1800, 900, 2700, "201.00", "0.00", "3.00", "204.00", "0.00"]
    assert rows["combined-rm"][:4] == [310, 200, "1,000,000 + 10,000", "0"]
    assert rows["combined-rm"][4:] == [900, 1800, 900, 3600, "207.70", "2.00", "4.00", "213.70", "12.00"]
    assert rows["direct-llm"][:4] == [0, 0, "0", "about 1,500,000 + 5,000"]
    assert rows["direct-llm"][4:] == [0, 0, 3600, 3600, "0.00", "2.00", "4.00", "6.00", "0.00"]
    without = cost_table(outcomes[:3])
    assert list(without.rows[0]) == ["human-rm", 300, 0, "0", "0", 0, 1800, 900, 2700, "201.00", "0.00"]
    assert "no price" in without.caption and "no price" not in table.caption
    assert all(len(row) == len(shown.columns) for shown in (table, without) for row in shown.rows)


def test_a_price_is_no_debt() -> None:
    with pytest.raises(RLAIFError, match="price_per_hour of at least 0, found -1"):
        CompareConfig(price_per_hour=-1.0)
