"""The speed figures: their arithmetic, and that the command prints them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.speed import model_speed, one_update, throughput, timing, versus_trl
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import PromptSource, Task
from rlaif_env.models import encode, load_tokenizer
from tests.tiny import save_tiny, tiny_backbone


class Clock:
    """A clock that goes on when it is told to, and by ``tick`` seconds whenever it is read."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def read(self) -> float:
        self.now += self.tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock.read, process_time=lambda: 0.0))
    return clock


def test_contenders_are_compared_with_the_first(clock: Clock) -> None:
    naps = iter([0.004, 0.008, 0.016] * 2)
    slow, fast = throughput.microseconds(
        {"slow": lambda: clock.sleep(next(naps)), "fast": lambda: clock.sleep(0.002)}, steps=3, blocks=2
    )
    assert (slow["name"], slow["ratio"], fast["name"], fast["ratio"]) == ("slow", 1.0, "fast", pytest.approx(0.25))
    assert (slow["median_us"], fast["median_us"]) == (pytest.approx(8000), pytest.approx(2000))
    assert slow["quartiles_us"] == pytest.approx([5000, 14000])


def test_the_table_of_words_gives_back_what_it_took() -> None:
    table = throughput.WordTable()
    assert table.decode([*table.encode("the film was good"), table.eos_token_id, 0]) == "the film was good"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_command_prints_every_contender(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, show = throughput.PARTS["env"]

    def small() -> dict[str, Any]:
        return throughput.environments(rows=2, prompt_tokens=4, response_tokens=4, steps=6, blocks=2, memory_steps=1000)

    monkeypatch.setitem(throughput.PARTS, "env", (small, show))
    assert throughput.main(["env", *flags]) == 0
    printed = capsys.readouterr().out
    for name in ("SAME_STEP", "NEXT_STEP", "DISABLED", "action masks", "SyncVectorEnv"):
        assert name in printed
    if flags:
        found = json.loads(printed)
        assert found["memory"]["grown_bytes"] < 10_000_000 and found["token"][0]["ratio"] == 1.0


# --- figures of what runs the model ---


def test_contenders_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    times = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repetitions=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(times[name].wall) for name in "ab"] == [2, 2]


def test_summaries_by_hand() -> None:
    times = timing.Times([9.0, 1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 6).without(1)
    assert times.summary() == {"median_s": 3.0, "quartiles_s": [2.0, 4.0], "median_cpu_s": 1.0, "runs": 5}


def test_the_machines_rates_are_work_over_time(clock: Clock) -> None:
    clock.tick = 0.5
    found = timing.machine(hidden=8, inner=16, rows=4, copied=1000)
    assert found.flops == pytest.approx(2 * 8 * 16 * 4 * 8 / 0.5), "two operations a product, eight products a run"
    assert found.bytes == pytest.approx(2 * 4 * 1000 / 0.5), "float32, read and written"


def test_two_sides_are_compared_turn_by_turn() -> None:
    ours, theirs = timing.Times([1.0, 2.0, 4.0], [1.0] * 3), timing.Times([2.0, 6.0, 4.0], [3.0] * 3)
    assert timing.beside(ours, theirs) == {"ratio": 2.0, "ratio_quartiles": [1.5, 2.5], "ratio_cpu": 3.0}


PAIR = {"ours": {"median_s": 1.0}, "ratio": 2.5, "ratio_quartiles": [2.0, 3.0], "ratio_cpu": 2.4}
PRINTED: dict[str, tuple[dict[str, Any], str]] = {
    "score": (
        {"texts": 8, "parts": [{**PAIR, "plain": {"median_s": 2.5}, "exemplars": 3}]},
        "score 8 snippets, 3 exemplars",
    ),
    "sample": (
        {
            "rows": 4,
            "shortest": 4,
            "response": 64,
            "parts": [{**PAIR, "generate": {"median_s": 2.5}, "early": True, "samples_per_prompt": 1}],
        },
        "sample 4 rows, 1 a prompt, ends at 4 to 64",
    ),
    "groups": (
        {
            "model": "tiny",
            "group": 6,
            "shared": {"median_cpu_s": 1.0},
            "whole": {"median_cpu_s": 2.5},
            "ratio": {"estimate": 0.4, "low": 0.35, "high": 0.45, "units": 8},
        },
        "tiny, groups of 6, 15 pairs in both orders | 1.0 | 2.5 | 0.40 [0.35, 0.45] (8)",
    ),
    "overhead": ({"updates": 2, "around_s": 0.01, "update_s": 10.0, "share": 0.001}, "0.100%"),
    "floor": (
        {
            "parts": [
                {
                    "phase": "learn",
                    "took": {"median_s": 3.0},
                    "floor_s": 2.0,
                    "gigaflop": 1.0,
                    "gigaflops": 9.0,
                    "gigabytes": 8.0,
                    "over_floor": 1.5,
                }
            ]
        },
        "x 1.50",
    ),
}


@pytest.mark.parametrize("part", PRINTED)
def test_every_part_prints_and_writes_its_figures(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, expected = PRINTED[part]
    monkeypatch.setitem(throughput.PARTS, part, (lambda: found, throughput.PARTS[part][1]))
    assert throughput.main([part, "--out", str(tmp_path / "figures.json")]) == 0
    assert expected in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text()) == found


def test_groups_are_judged_alike_with_and_without_their_shared_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    save_tiny(tmp_path / "model", max_position_embeddings=2048)
    task = Task("toy", "continuation", "how good it is", 24, 6, PromptSource(prompts={"train": ("a",)}))
    found = model_speed.judging(model=str(tmp_path / "model"), group=3, repetitions=5, task=task)
    assert found["apart"] < 1e-4 and found["shared"]["runs"] == found["whole"]["runs"] == 5
    assert 0 < found["ratio"]["low"] <= found["ratio"]["estimate"] <= found["ratio"]["high"]
    with pytest.raises(SystemExit):
        throughput.main(["env", "--model", "tiny"])


def test_responses_end_where_planned_for_both_samplers() -> None:
    base = tiny_backbone(1)
    prompts, ends = [[5], [6, 7, 8]], [3, 0, 1]
    ids = torch.tensor([[0, 0, 5], [6, 7, 8]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    with model_speed._planned(base.model, ends, 3, 1):
        drawn = model_speed.sample(
            base.model,
            prompts,
            max_new_tokens=5,
            stop_ids=[1],
            pad_id=0,
            uniform=torch.rand(2, 5, generator=torch.Generator().manual_seed(0)).double().numpy(),
        )
        written = base.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=5, eos_token_id=1, pad_token_id=0
        )[:, 3:]
    assert drawn.lengths.tolist() == [3, 1]
    assert [(row == 1).int().argmax().item() + 1 for row in written] == [3, 1]
    assert not base.model._forward_hooks, "the hook must not stay"


# --- beside TRL ---


def test_prompts_have_exactly_their_length() -> None:
    tokenizer = load_tokenizer()
    for length in (5, 32, 256):
        rows = encode(tokenizer, one_update.prompts_of(tokenizer, 4, length))
        assert {len(row) for row in rows} == {length} and len({tuple(row) for row in rows}) == 4


def test_the_six_settings_and_their_bars() -> None:
    assert len({(s.beta, s.prompt, s.response) for s in one_update.SETTINGS}) == 6
    assert all((s.rows, s.group) == (16, 4) for s in one_update.SETTINGS)
    rows = [{"ratio": ratio, "memory": {"ratio": 0.5}} for ratio in (1.1, 2.0, 3.0)]
    found = versus_trl.summarise(rows)
    assert (found["median_ratio"], found["least_ratio"], found["largest_memory_ratio"]) == (2.0, 1.1, 0.5)
    assert found["met"] == {"median": True, "each": False, "memory": True}
    assert versus_trl.summarise([{"memory": {"ratio": 0.8}}])["met"] == {"memory": False}
    side = {"median_s": 1.0, "quartiles_s": [0.5, 2.0]}
    row = {"name": "s", "ours": side, "trl": side, "ratio": 1.5, "ratio_quartiles": [1.25, 1.75], "ratio_cpu": 1.0}
    sizes = {"ours": 2**20, "trl": 2**21, "ratio": 0.5}
    shown = versus_trl.table({"trl_version": "1", "settings": [{**row, "memory": sizes}, row], "summary": found})
    assert shown.rows[0] == ["s", *["1.00 [0.50, 2.00]"] * 2, "1.50 [1.25, 1.75]", "1.00", "1", "2", "0.50"]
    assert shown.rows[1][5:] == [None] * 3
    assert shown.caption == "median of the settings 2.00 (bar 1.5), least 1.10 (bar 1.2), largest memory 0.50 (bar 0.7)"


def test_rewards_tell_texts_apart() -> None:
    assert one_update.reward(["p", "p"], ["a", "b"]) == [0.0, 1 / 97]


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_both_sides_find_the_same_advantages_and_do_the_same_work(
    trainable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="the extra 'integrations' is needed")
    tokenizer = load_tokenizer()
    save_tiny(tmp_path, tokenizer)
    setting = one_update.Setting(0.05, 8, 4, rows=4, group=2, trainable=trainable, rank=2)
    found = versus_trl.measure(setting, str(tmp_path), repetitions=1, warmup=1, device="cpu")
    assert found["advantages_apart"] < 1e-3 and found["ratio"] > 0
    assert found["ours"]["runs"] == found["trl"]["runs"] == 1
    from agents import functional as F

    monkeypatch.setattr(F, "leave_one_out_advantages", lambda returns, group_size: returns)
    with pytest.raises(RLAIFError, match="expected equal leave-one-out advantages on the same completions"):
        versus_trl.measure(setting, str(tmp_path), repetitions=1, warmup=0, device="cpu")
