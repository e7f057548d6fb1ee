"""The speed figures: their arithmetic, and that the command prints them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from benchmarks import throughput


def test_contenders_are_compared_with_the_first() -> None:
    slow, fast = throughput.side_by_side(
        {"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}, steps=5, blocks=2
    )
    assert (slow.name, slow.ratio, fast.name) == ("slow", 1.0, "fast")
    assert slow.median_us >= 4000 > fast.median_us >= 1000 and fast.ratio == fast.median_us / slow.median_us
    assert slow.quartiles_us[0] <= slow.median_us <= slow.quartiles_us[1]


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
