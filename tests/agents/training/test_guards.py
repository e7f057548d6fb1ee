"""What stops, mends or warns: numbers that are not finite, memory and disks that do not suffice, bad training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import ReinforceAgent, ReinforceConfig
from agents.passes import is_out_of_memory
from agents.rollout import NonFiniteError, nonfinite_rows, plain
from agents.watch import Block, Watch, clearly_above
from rlaif_env.api import RLAIFError
from rlaif_env.models import LoraConfig
from tests import ROOT
from tests.tiny import shape_of, tiny_backbone


def acted(**settings: Any) -> ReinforceAgent:
    """A tiny agent that has answered three prompts twice."""
    model = tiny_backbone(0)
    agent = ReinforceAgent(model, ReinforceConfig(lora=LoraConfig(2), **settings), envs=shape_of(model))
    ids = np.random.default_rng(0).integers(3, 40, (3, 5)).repeat(2, axis=0)
    agent.act({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return agent


def weights(agent: ReinforceAgent) -> list[torch.Tensor]:
    return [p.detach().clone() for p in agent.policy.parameters]


# --- numbers that are not finite --------------------------------------------------------------------------------------


def test_rows_and_spelling() -> None:
    nan, inf = float("nan"), float("inf")
    assert nonfinite_rows(torch.tensor([1.0, nan, 2.0, -inf])) == [1, 3]
    assert nonfinite_rows(torch.tensor([[1.0, 2.0], [inf, 1.0], [0.0, nan]])) == [1, 2]
    assert plain(np.array([[1.5, nan], [inf, -inf]])) == [[1.5, "nan"], ["inf", "-inf"]]


def test_a_reward_that_is_not_finite_names_its_rows_and_changes_nothing() -> None:
    agent = acted()
    before = weights(agent)
    with pytest.raises(NonFiniteError, match="expected 6 finite rewards") as failure:
        agent.update(np.array([0.0, 1.0, np.nan, 0.0, np.inf, 0.0]))
    assert failure.value.rows == (2, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(agent), strict=True))
    batch = agent.batch()
    assert [row["row"] for row in batch] == list(range(6))
    assert all(len(row["logprobs"]) == len(row["ids"]) >= 1 and row["prompt"] for row in batch)
    agent.update(np.array([0.0, 1.0, 0.5, 0.0, 1.0, 0.0]))
    assert agent.batch() == []


def test_a_gradient_that_is_not_finite_names_the_row_it_comes_from() -> None:
    agent = acted(beta=0.0)
    before, assigned = weights(agent), agent.policy.evaluate
    target = agent._rollout.responses[3] if agent._rollout else torch.zeros(4)

    def evaluate(ids: Any, mask: Any, responses: Any, *rest: Any, **named: Any) -> Any:
        output = assigned(ids, mask, responses, *rest, **named)
        odd = (responses == target[: responses.shape[1]]).all(1)
        # a finite value whose gradient is not: the square root at 0
        zero = torch.where(odd[:, None], output.logprobs - output.logprobs.detach(), torch.ones_like(output.logprobs))
        return type(output)(output.logprobs + zero.sqrt() - zero.sqrt().detach(), output.entropy, output.features)

    agent.policy.evaluate = evaluate  # type: ignore[method-assign]
    with pytest.raises(
        NonFiniteError, match=r"gradient norm nan in rows 3 at update 1; the weights are as before"
    ) as e:
        agent.update(np.arange(6.0) % 4)
    assert e.value.rows == (3,) and agent.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(agent), strict=True))
    assert all(p.grad is None for p in agent.policy.parameters)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_noticed_when_sampling(value: float) -> None:
    agent = acted()
    agent.update(np.arange(6.0))
    with torch.no_grad():
        agent.policy.parameters[-1].fill_(value)
    ids = np.full((2, 3), 5)
    with pytest.raises(NonFiniteError, match=r"expected finite log-probabilities of the sampled tokens.*rows 0, 1"):
        agent.act({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert agent.batch()[0]["logprobs"][0] == "nan"


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import ctypes, gc, json, resource, sys
sys.path.insert(0, ".")
import numpy as np, torch, warnings
torch.set_num_threads(1)
from tests.tiny import character_tokenizer, shape_of, tiny_model
from agents import ReinforceAgent, ReinforceConfig
from rlaif_env.models import Backbone, LoraConfig, OptimizerConfig

def gradient(limit):
    tokenizer = character_tokenizer()
    model = Backbone(tiny_model(30_000), tokenizer)
    agent = ReinforceAgent(model, ReinforceConfig(lora=LoraConfig(2), micro_batch=64, learning_rate=0.0,
        optimizer=OptimizerConfig(max_grad_norm=1e9)), envs=shape_of(model, 2, 12))
    ids = np.random.default_rng(0).integers(3, 40, (32, 160)).repeat(2, axis=0)
    rewards = np.random.default_rng(1).standard_normal(64)
    agent.act({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    kept = {}
    step = agent.optimizer.step
    agent.optimizer.step = lambda *a: kept.update(g=[p.grad.clone() for p in agent.policy.parameters])
    if limit:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator has put by would be memory beyond the limit
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, -1))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            agent.update(rewards)
        except Exception as error:
            return None, agent.passes.micro_batch, str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return torch.cat([g.flatten() for g in kept["g"]]), agent.passes.micro_batch, [str(w.message) for w in seen]

whole, size, _ = gradient(0)
found = {"plenty": size}
for limit in (48, 32, 24, 16):
    less, size, shown = gradient(limit << 20)
    if less is not None and size < 64:
        found |= {"limit": limit, "size": size, "shown": shown}
        found["apart"] = float((whole - less).abs().max() / whole.abs().max())
        break
none, size, shown = gradient(1 << 20)
found["hopeless"] = [none is None, size, shown]
print(json.dumps(found))
"""


def test_a_real_lack_of_memory_halves_the_micro_batch_and_keeps_the_gradient() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plenty"] == 64 and found["size"] < 64, found
    assert any(f"going on with {found['size']} rows" in text for text in found["shown"])
    assert found["apart"] < 1e-4  # float32
    none, size, shown = found["hopeless"]
    assert (
        none and size == 1 and shown.startswith("expected memory for an update of one row at a time, found too little")
    )


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_a_lack_of_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


@pytest.mark.parametrize("settings", [{}, {"baseline": "value"}], ids=str)
def test_memory_that_fails_in_the_middle_leaves_the_same_update(settings: dict[str, Any]) -> None:
    """The allocation failure is made here: it comes in the third gradient pass, and in the reference pass."""
    plainly, short = acted(micro_batch=2, **settings), acted(micro_batch=4, **settings)
    inner, calls = short.policy.evaluate, []

    def evaluate(*inputs: Any, **named: Any) -> Any:
        calls.append(len(inputs[0]))
        if calls[-1] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return inner(*inputs, **named)

    short.policy.evaluate = evaluate  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="out of memory: going on with 2 rows in a gradient pass, same gradient"):
        metrics = short.update(np.arange(6.0) % 4)
    assert short.passes.micro_batch == 2 and max(calls) > 2
    assert metrics == plainly.update(np.arange(6.0) % 4)
    assert all(torch.equal(a, b) for a, b in zip(weights(short), weights(plainly), strict=True))


# --- disks ------------------------------------------------------------------------------------------------------------

DISK = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.stress import survival as s
from agents.training.command import train
from rlaif_env.api import RLAIFError
folder = s.prepared(Path(sys.argv[1]))
for _ in range(int(sys.argv[3])):
    try:
        train(s.settings(folder, Path(sys.argv[2]), 6, 2))
        print("finished")
    except RLAIFError as error:
        print("error:", " ".join(str(error).split()))
"""


def mounted(folder: Path, *arguments: str) -> bool:
    folder.mkdir(exist_ok=True)
    return subprocess.run(["mount", *arguments, str(folder)], capture_output=True, check=False).returncode == 0


def trained(tmp_path: Path, out: Path, times: int = 1) -> list[str]:
    (tmp_path / "job").mkdir(exist_ok=True)
    command = [sys.executable, "-c", DISK, str(tmp_path / "job"), str(out), str(times)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RLAIF_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for the start of a run, not for its checkpoints."""
    if not mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=150k", "tmpfs"):
        pytest.skip("this system does not let us mount a small disk")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_with_a_reason_and_with_more_room_it_goes_on(tmp_path: Path, small_disk: Path) -> None:
    (line,) = trained(tmp_path, small_disk / "run")
    assert re.match(r"error: cannot write .*(No space left on device).*", line), line
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert trained(tmp_path, small_disk / "run") == ["finished"]
    assert trained(tmp_path, tmp_path / "whole") == ["finished"]
    from tests.stress.survival import differences

    assert differences(tmp_path / "whole", small_disk / "run") == []


@pytest.mark.slow
def test_a_read_only_folder_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    if not mounted(tmp_path / "disk", "--bind", "-o", "ro", str(tmp_path / "disk")):
        pytest.skip("this system does not let us mount a folder read-only")
    try:
        (line,) = trained(tmp_path, tmp_path / "disk" / "run")
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)
    assert line == f"error: cannot write {tmp_path / 'disk' / 'run'}: Read-only file system"


# --- training gone wrong ----------------------------------------------------------------------------------------------


def test_welchs_test_against_numbers_worked_by_hand() -> None:
    # means 2 and 1, variances 1, n = 10 each: t = 1 / sqrt(0.2) = 2.236 with 18 degrees of freedom, p = 0.0191
    high, low = Block(10, 2.0, 1.0), Block(10, 1.0, 1.0)
    assert clearly_above(high, low, 0.0195) and not clearly_above(high, low, 0.0187)
    assert not clearly_above(low, high, 0.4)
    assert clearly_above(Block(2, 1.0, 0.0), Block(2, 0.9, 0.0), 1e-9)
    assert Block.of([1.0, 2.0, 3.0]) == Block(3, 2.0, 1.0)
    assert Block(3, 2.0, 1.0).scaled(0.5) == Block(3, 1.0, 0.25)


def watched(updates: int, seed: int = 0, **rises: float) -> list[tuple[str, int]]:
    """Alarms over updates of 4 prompts x 6 responses that scatter as real ones do, with linear changes by the end."""
    rng, watch, found = np.random.default_rng(seed), Watch(6), []
    for step in range(1, updates + 1):
        done = step / updates
        noise = {"entropy": 0.3, "length": 0.4, "kl": 1.5}
        start = {"entropy": 3.0, "length": 12.0, "kl": 0.0}
        metrics = {name: max(0.1, rng.normal(start[name] + rises.get(name, 0) * done, noise[name])) for name in noise}
        rewards = rng.normal(rises.get("reward", 0) * done, 0.5, 24)
        gold = rng.normal(rises.get("gold", 0) * done, 0.45, 24)
        found += [(alarm.kind, alarm.step) for alarm in watch.observe(step, metrics, rewards, gold)]
    return found


def test_noise_never_warns() -> None:
    false = [alarm for seed in range(20) for alarm in watched(200, seed)]
    assert false == []  # 20 runs of 200 updates; the levels allow less than one in a hundred of each kind
    ordinary = {"kl": 10.0, "entropy": -0.8, "length": -2.5, "reward": 0.6, "gold": 0.25}
    assert [alarm for seed in range(10) for alarm in watched(100, seed, **ordinary)] == []


@pytest.mark.parametrize(
    ("kind", "rises"),
    [
        ("kl", {"kl": 40.0}),
        ("entropy", {"entropy": -4.0}),
        ("length", {"length": -11.0}),
        ("over-optimisation", {"reward": 2.0, "gold": -0.5}),
    ],
)
def test_each_way_to_go_wrong_is_warned_about_once(kind: str, rises: dict[str, float]) -> None:
    for seed in range(5):
        found = watched(100, seed, **rises)
        assert [name for name, _ in found].count(kind) == 1
        assert all(step % 10 == 0 for _, step in found)


def test_gold_down_without_reward_up_is_not_over_optimisation() -> None:
    assert [watched(100, seed, gold=-0.5, reward=-1.0) for seed in range(5)] == [[]] * 5
    assert [watched(100, seed, gold=0.5, reward=2.0) for seed in range(5)] == [[]] * 5


def test_the_watch_goes_on_from_its_state() -> None:
    rng = np.random.default_rng(0)
    seen = [
        (
            {"entropy": 3 - 0.05 * i, "length": 12.0, "kl": i / 2},
            rng.normal(i / 10, 0.5, 24),
            rng.normal(-i / 80, 0.4, 24),
        )
        for i in range(60)
    ]
    whole, first, second = Watch(6), Watch(6), Watch(6)
    expected = [whole.observe(i, *row) for i, row in enumerate(seen)]
    got = [first.observe(i, *row) for i, row in enumerate(seen[:33])]
    second.set_state(json.loads(json.dumps(first.state())))
    got += [second.observe(i, *row) for i, row in enumerate(seen[33:], start=33)]
    assert got == expected and any(expected)
    assert {alarm.kind for alarms in expected for alarm in alarms} >= {"kl", "over-optimisation"}
    assert all(re.search(r"agent\.beta", alarm.text) for alarms in expected for alarm in alarms)


def test_an_alarm_without_kl_or_gold_is_possible() -> None:
    watch = Watch(2)
    for step in range(30):
        watch.observe(step, {"entropy": 1.0, "length": 5.0}, np.arange(4.0), None)
    with pytest.raises(ValueError, match="reshape"):
        watch.observe(31, {"entropy": 1.0, "length": 5.0}, np.arange(3.0), None)
    assert issubclass(NonFiniteError, RLAIFError)
