"""A training that is killed, told to end, or refused its disk goes on to the same figures and weights, bit by bit."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlaif_env  # noqa: F401
from agents import ReinforceAgent, ReinforceConfig
from agents.sampler import SamplerConfig
from agents.training import checkpoints
from agents.training.checkpoints import CheckpointError
from agents.training.command import main, train
from agents.training.config import TrainConfig
from rlaif_env.api import RLAIFError
from rlaif_env.models import LoraConfig, OptimizerConfig
from rlaif_env.records import RunError, read_metrics
from rlaif_env.runs import RunFolder
from tests import ROOT
from tests.stress.survival import differences, prepared
from tests.tiny import shape_of, tiny_backbone

# --- environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Text", "Token"])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_environments_go_on_from_their_state(name: str, mode: str, toy: dict[str, Any]) -> None:
    def made() -> Any:
        return gym.make_vec(f"RLAIF/{name}Generation-v0", num_envs=6, group_size=3, autoreset_mode=mode, **toy)

    one, other = made(), made()
    one.reset(seed=3)
    one.action_space.seed(0)
    for steps in (1, 3, 7):
        for _ in range(steps):
            if mode == "Disabled" and not (one.unwrapped._state == 1).any():
                one.reset()
            one.step(one.action_space.sample())
        state = json.loads(json.dumps(one.unwrapped.state()))
        seen = other.unwrapped.set_state(state)
        assert other.unwrapped.state() == one.unwrapped.state()
        for _ in range(9):
            if mode == "Disabled" and not (one.unwrapped._state == 1).any():
                a, b = one.reset()[0], other.reset()[0]
            else:
                action = one.action_space.sample()
                (a, *paid), (b, *also) = one.step(action), other.step(action)
                assert all(np.array_equal(x, y) for x, y in zip(paid[:3], also[:3], strict=True))
            assert all(np.array_equal(a[key], b[key]) for key in a)
        assert set(seen) == {"input_ids", "attention_mask"}


def test_a_state_of_other_environments_is_refused_and_nothing_changed(toy: dict[str, Any]) -> None:
    small = gym.make_vec("RLAIF/TextGeneration-v0", num_envs=2, **toy).unwrapped
    large = gym.make_vec("RLAIF/TextGeneration-v0", num_envs=3, **toy).unwrapped
    small.reset(seed=0), large.reset(seed=0)
    before = small.state()
    cases: dict[str, Any] = {
        "expected a state of 2 rows over 6 prompts": large.state(),
        "found another: KeyError": {},
        "found another: ": {**before, "stream": [0, 7]},
        "expected a state of 2 rows": {**before, "prompts": 5},
    }
    for message, state in cases.items():
        with pytest.raises(RLAIFError, match=message):
            small.set_state(state)
        assert small.state() == before


# --- the agent and the files ------------------------------------------------------------------------------------------


def agent_of(tmp_path: Path, settings: dict[str, Any]) -> ReinforceAgent:
    model: Any = tiny_backbone(0)
    if settings.get("trainable") == "full":
        if not (tmp_path / "tiny").exists():
            model.save_merged(None, tmp_path / "tiny")
        model = str(tmp_path / "tiny")
    settings = {"lora": LoraConfig(2), **settings}
    return ReinforceAgent(model, ReinforceConfig(**settings), envs=shape_of(tiny_backbone(0)))


def updates(agent: ReinforceAgent, numbers: Sequence[int]) -> list[dict[str, float]]:
    found = []
    for number in numbers:
        rng = np.random.default_rng(number)
        ids = rng.integers(3, 40, (2, 5)).repeat(2, axis=0)
        agent.act({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        found.append(agent.update(rng.standard_normal(4)))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"baseline": "value"},
        {"baseline": "moving-average", "optimizer": OptimizerConfig("adafactor")},
        {"trainable": "full", "optimizer": OptimizerConfig("adafactor")},
    ],
    ids=str,
)
def test_an_agent_goes_on_from_its_files(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, first, second = (agent_of(tmp_path, settings) for _ in range(3))
    expected = updates(whole, range(4))
    assert updates(first, range(2)) == expected[:2]
    (tmp_path / "c").mkdir()
    checkpoints.write(tmp_path / "c", checkpoints.agent_tensors(first), {"agent": checkpoints.agent_values(first)})
    read = checkpoints.read(tmp_path / "c")
    assert read.update == 2
    checkpoints.load_agent(second, read.tensors, read.values["agent"])
    assert updates(second, range(2, 4)) == expected[2:]
    one, other = checkpoints.agent_tensors(whole), checkpoints.agent_tensors(second)
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert checkpoints.agent_values(whole) == checkpoints.agent_values(second)


def test_the_state_of_another_agent_is_refused(tmp_path: Path) -> None:
    one, other = agent_of(tmp_path, {}), agent_of(tmp_path, {"lora": LoraConfig(2, 1.0), "baseline": "value"})
    updates(one, range(1))
    with pytest.raises(CheckpointError, match="expected the state of an agent of this model and configuration"):
        checkpoints.load_agent(other, checkpoints.agent_tensors(one), checkpoints.agent_values(one))
    with pytest.raises(RLAIFError, match="expected the parameters of adapter"):
        checkpoints.load_agent(one, {}, checkpoints.agent_values(one))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with checkpoints of updates 1 and 2."""
    with RunFolder.create(tmp_path / "run", {}) as run:
        for update in (1, 2):
            with run.checkpoint(update) as folder:
                tensors = {"policy/a": torch.arange(50.0) * update, "optimizer/0/step": torch.tensor(float(update))}
                checkpoints.write(folder, tensors, {"agent": {"updates": update}, "x": [0.1, 1e300, 2**120]})
    return tmp_path / "run"


FILES = ["agent.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_in_any_file_is_noticed_and_the_checkpoint_before_used(name: str, saved: Path) -> None:
    file = saved / "checkpoints" / "000002" / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        for bit in (1, 128):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            found, damaged = checkpoints.newest(saved)
            assert found is not None and found.update == 1
            (message,) = damaged
            assert re.search(rf"checkpoints/000002 is damaged: .*{name}", message)
    file.write_bytes(whole)
    found, damaged = checkpoints.newest(saved)
    assert found is not None and (found.update, damaged) == (2, [])
    assert found.values["x"] == [0.1, 1e300, 2**120] and torch.equal(found.tensors["policy/a"], torch.arange(50.0) * 2)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def another_beside(file: Path) -> None:
    file.with_name("more.bin").write_bytes(b"x")


@pytest.mark.parametrize("damage", [cut, emptied, Path.unlink, another_beside])
@pytest.mark.parametrize("name", FILES)
def test_files_cut_lost_or_added_are_noticed(damage: Callable[[Path], object], name: str, saved: Path) -> None:
    damage(saved / "checkpoints" / "000002" / name)
    found, damaged = checkpoints.newest(saved)
    assert found is not None and found.update == 1 and len(damaged) == 1


def test_none_that_is_whole_is_an_error_and_none_at_all_is_none(saved: Path) -> None:
    for update in (1, 2):
        cut(saved / "checkpoints" / f"{update:06d}" / "state.json")
    with pytest.raises(CheckpointError, match=r"found none: .*000002 is damaged.*000001 is damaged.*another folder"):
        checkpoints.newest(saved)
    assert checkpoints.newest(saved.parent) == (None, [])


def test_half_written_ones_are_never_picked_and_go(saved: Path) -> None:
    folder = saved / "checkpoints"
    shutil.copytree(folder / "000002", folder / ".unfinished-abc")
    shutil.copytree(folder / "000002", folder / ".old-000009")
    (folder / "000002").rename(folder / ".replaced-000002")  # killed while a second 000002 was to take its place
    found, _ = checkpoints.newest(saved)
    assert found is not None and found.update == 2
    checkpoints.prune(saved, 1, None, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["000002"]


def test_the_last_and_the_best_are_kept_and_those_of_a_run_cut_back_go(saved: Path) -> None:
    folder = saved / "checkpoints"
    for update in range(3, 9):
        shutil.copytree(folder / "000002", folder / f"{update:06d}")
    checkpoints.prune(saved, 2, 4, 7)
    assert sorted(p.name for p in folder.iterdir()) == ["000004", "000006", "000007"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    agent = agent_of(tmp_path, {})
    with torch.no_grad():
        agent.policy.parameters[0][0, 0] = float("nan")
    with pytest.raises(RLAIFError, match=r"expected finite weights after update 0, found others in 1 tensors"):
        checkpoints.agent_tensors(agent)


def test_files_are_cut_back_to_a_position_or_left_alone(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        run.log(1, {"reward": 1.0})
        at = checkpoints.position(run)
        run.log(2, {"reward": 2.0})
        run.record("warnings.jsonl", {"kind": "kl"})
    checkpoints.cut_back(run.path, at)
    assert read_metrics(run.path) == [{"step": 1, "reward": 1.0}]
    assert not (run.path / "warnings.jsonl").exists()
    (run.path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl to hold at least the \d+ bytes it had .* found 0"):
        checkpoints.cut_back(run.path, at)


# --- whole runs, in this process --------------------------------------------------------------------------------------

HOOKED = """
import numpy as np
from rlaif_env.api import Scores
hook = None
class Vowels:
    name = "vowels"
    def __init__(self, weight):
        self.weight, self.calls = weight, 0
    def score(self, prompts, responses):
        self.calls += 1
        if hook is not None:
            hook(self.calls, len(responses))
        return Scores(np.array([self.weight * sum(c in "aeiou" for c in r) / 4 for r in responses], dtype=np.float32))
def make(task, weight=1.0, model=None):
    return Vowels(weight)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An installed reward "vowels" that calls a test's hook before it scores: where a run is stopped."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "vowels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vowels\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlaif_env.rewards]\nvowels = vowels_hook:make\n")
    (folder / "vowels_hook.py").write_text(HOOKED)
    sys.path.insert(0, str(folder))
    import vowels_hook  # type: ignore[import-not-found]

    yield vowels_hook
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def job(plugin: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TrainConfig]]:
    """Configurations of six updates of a tiny model."""
    folder = prepared(tmp_path_factory.mktemp("job"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLAIF_DEVICE", "cpu")

        def config(out: Path, **changed: Any) -> TrainConfig:
            agent = ReinforceConfig(**{"lora": LoraConfig(2), "learning_rate": 1e-2, **changed.pop("agent", {})})
            settings: dict[str, Any] = {
                "updates": 6,
                "prompts_per_update": 2,
                "group_size": 2,
                "eval_prompts": 2,
                "checkpoint_every": 2,
            }
            settings |= {"task": str(folder / "task.toml"), "model": str(folder / "model"), "reward": "vowels"}
            return TrainConfig(**{**settings, "out": out, "agent": agent, **changed})

        yield config


@pytest.fixture(autouse=True)
def no_hook(plugin: Any) -> Iterator[None]:
    yield
    plugin.hook = None


@pytest.fixture(scope="module")
def whole(job: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert not train(job(out)).interrupted
    return out


def at(call: int, do: Callable[[], object]) -> Callable[[int, int], None]:
    """A hook that does something in a scoring of the training (4 responses), counted from 1."""
    return lambda calls, n: do() if n == 4 and calls == call else None  # type: ignore[func-returns-value]


def test_ctrl_c_and_on_and_a_finished_run_gives_its_result(
    job: Callable[..., TrainConfig], whole: Path, plugin: Any, tmp_path: Path
) -> None:
    config = job(tmp_path / "run")
    plugin.hook = at(3, lambda: signal.raise_signal(signal.SIGINT))
    cut_short = train(config)
    assert cut_short.interrupted and len(read_metrics(cut_short.folder)) == 3
    plugin.hook = None
    result = train(config)
    assert not result.interrupted and differences(whole, result.folder) == []
    assert [row["step"] for row in read_metrics(result.folder)] == [1, 2, 3, 4, 5, 6]

    def never() -> None:
        raise AssertionError("a finished run was computed again")

    plugin.hook = lambda calls, n: never()
    before = {p: p.stat().st_mtime_ns for p in (result.folder / "policy").iterdir()}
    again = train(config)
    assert again.after is not None and result.after is not None and again.before is not None
    assert np.array_equal(again.after.measures["reward"], result.after.measures["reward"])
    assert {p: p.stat().st_mtime_ns for p in (result.folder / "policy").iterdir()} == before


def test_sampling_in_bfloat16_goes_on_to_the_same_figures(
    job: Callable[..., TrainConfig], plugin: Any, tmp_path: Path
) -> None:
    once, twice = (
        job(tmp_path / name, sampler=SamplerConfig(dtype="bfloat16"), updates=4) for name in ("once", "twice")
    )
    train(once)
    plugin.hook = at(3, lambda: signal.raise_signal(signal.SIGINT))
    assert train(twice).interrupted
    plugin.hook = None
    with pytest.raises(RunError, match=r"sampler.dtype: 'bfloat16' there, '' here"):
        train(job(tmp_path / "twice", updates=4))
    assert main(["--resume", str(tmp_path / "twice")]) == 0
    assert differences(tmp_path / "once", tmp_path / "twice") == []
    assert all(row["importance_weight"] > 0 for row in read_metrics(tmp_path / "twice"))


def test_a_failing_reward_loses_nothing_and_its_batch_is_told(
    job: Callable[..., TrainConfig], whole: Path, plugin: Any, tmp_path: Path
) -> None:
    def fails() -> None:
        raise RuntimeError("the server is down")

    config = job(tmp_path / "run", checkpoint_every=0)
    plugin.hook = at(4, fails)
    with pytest.raises(RLAIFError, match=r"the server is down.*are in .*failed-update-000004\.json"):
        train(config)
    dump = json.loads((tmp_path / "run" / "failed-update-000004.json").read_text())
    assert dump["rewards"] is None and len(dump["batch"]) == 4
    assert set(dump["batch"][0]) == {"row", "prompt", "response", "ids", "logprobs"}
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000003"]
    plugin.hook = at(3, fails)  # update 6: the fourth is the first call of the process that goes on
    with pytest.raises(RLAIFError, match=r"failed-update-000006\.json"):
        train(config)
    plugin.hook = None
    assert [name for name in differences(whole, train(config).folder) if "checkpoints" not in name] == []


def test_another_configuration_is_refused_by_name_and_another_split_is_told(
    job: Callable[..., TrainConfig], plugin: Any, tmp_path: Path
) -> None:
    config = job(tmp_path / "run")
    plugin.hook = at(3, lambda: signal.raise_signal(signal.SIGINT))
    train(config)
    plugin.hook = None
    message = r"found another \(agent.learning_rate: 0.01 there, 0.5 here; seed: 0 there, 1 here\)"
    with pytest.raises(RunError, match=message):
        train(job(tmp_path / "run", seed=1, agent={"learning_rate": 0.5}))
    model = Path(config.model) / "model.safetensors"
    weights = model.read_bytes()
    model.write_bytes(weights[:-4] + b"\0\0\0\0")
    gc.collect()  # the model in memory would be taken instead
    try:
        with pytest.raises(RLAIFError, match=r"expected the policy this run began with .* found others"):
            train(config)
    finally:
        model.write_bytes(weights)
        gc.collect()
    train(job(tmp_path / "run", agent={"micro_batch": 1}, keep_checkpoints=1))
    (warning,) = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert warning["kind"] == "not-identical" and warning["step"] == 3
    assert "no longer bit-identical" in warning["text"] and "agent.micro_batch 16 -> 1" in warning["text"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000006"]


def test_a_row_that_cannot_be_scored_does_not_end_a_training_for_ever(
    job: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = job(tmp_path / "x"), tmp_path / "run"
    line = ["--task", config.task, "--model", config.model, "--updates", "6", "--prompts-per-update", "2"]
    line += ["--group-size", "2", "--eval-prompts", "2", "--checkpoint-every", "2", "--agent.lora.rank", "2"]
    line += ["--agent.learning-rate", "1e-2", "--reward.model", config.model, "--reward.scale", "1", "5"]
    assert main([*line, "--out", str(tmp_path / "free"), "--reward.minimum-mass", "0"]) == 0
    masses: dict[int, float] = {}
    for row in map(json.loads, (tmp_path / "free" / "samples.jsonl").read_text().splitlines()):
        masses[row["step"]] = min(row["label_mass"], masses.get(row["step"], 1.0))
    before = json.loads((tmp_path / "free" / "before.json").read_text())["measures"]["label_mass"]
    lows = {step: least for step, least in masses.items() if least < min([*before, *list(masses.values())[: step - 1]])}
    fails = max(lows)  # the last update with a mass under all before it
    least = lows[fails]
    assert fails > 1
    mass = str(np.nextafter(least, 1.0))
    for _ in range(2):  # the same command fails again
        with pytest.raises(RLAIFError, match=r"to put at least .* of its probability .*; use another .* minimum_mass"):
            main([*line, "--out", str(run), "--reward.minimum-mass", mass])
    with pytest.raises(RLAIFError, match="minimum_mass") as told:
        main(["--resume", str(run)])
    command = re.search(r"`rlaif train (--resume \S+ --change-reward) --reward.NAME VALUE` goes on", str(told.value))
    assert command is not None
    with pytest.raises(
        RunError, match=r"\(reward_options.minimum_mass: .* here\); with --change-reward it goes on with"
    ):
        main(["--resume", str(run), "--reward.minimum-mass", "1e-12"])
    capsys.readouterr()
    assert main([*command[1].split(), "--reward.minimum-mass", "1e-12"]) == 0
    what = f"reward_options.minimum_mass {mass} -> 1e-12"
    record = json.loads((run / "config.json").read_text())
    assert record["reward_changes"] == {str(fails - 1): what}
    assert record["config"]["reward_options"]["minimum_mass"] == 1e-12
    (alarm,) = map(json.loads, (run / "warnings.jsonl").read_text().splitlines())
    assert (alarm["kind"], alarm["step"]) == ("reward-changed", fails - 1) and alarm["text"].endswith(what)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"the reward was changed after update {fails - 1}" in shown
    with pytest.raises(RunError, match=r"reward_options\.minimum_mass"):  # a finished run is what it is
        main(["--resume", str(run), "--change-reward", "--reward.minimum-mass", "1e-9"])
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    for name in ("metrics.jsonl", "samples.jsonl"):  # the mass decided only whether a row has a score
        assert _without_times(run / name) == _without_times(tmp_path / "free" / name)


def test_a_held_out_row_that_cannot_be_scored_does_not_either(job: Callable[..., TrainConfig], tmp_path: Path) -> None:
    model = str(job(tmp_path).model)
    settings: dict[str, Any] = {"reward": "direct-llm", "updates": 1}
    with pytest.raises(RLAIFError, match=r"at least 0\.9 of its probability .* --change-reward --reward\.NAME VALUE`"):
        train(job(tmp_path / "run", reward_options={"model": model, "minimum_mass": 0.9}, **settings))
    mended = job(tmp_path / "run", reward_options={"model": model, "minimum_mass": 0}, change_reward=True, **settings)
    assert train(mended).after is not None
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["reward_options"]["minimum_mass"] == 0
    assert record["reward_changes"] == {}  # no update was made under the other


def _without_times(file: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, file.read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def test_a_reward_is_changed_when_asked_for_and_its_updates_are_known(
    job: Callable[..., TrainConfig], plugin: Any, tmp_path: Path
) -> None:
    out, model = tmp_path / "run", tmp_path / "rm"
    model.mkdir()
    (model / "weights").write_text("one")

    def settings(weight: float, **changed: Any) -> TrainConfig:
        changed |= {"reward_options": {"weight": weight, "model": str(model)}, "validation_prompts": 2}
        return job(out, checkpoint_every=1, keep_checkpoints=9, validate_every=1, **changed)

    def changes() -> Any:
        return json.loads((out / "config.json").read_text()).get("reward_changes", {})

    def stopped(config: TrainConfig, after: int) -> None:
        plugin.hook = at(after, lambda: signal.raise_signal(signal.SIGINT))
        assert train(config).interrupted
        plugin.hook = None

    stopped(settings(1.0), 2)
    old = json.loads((out / "before.json").read_text())["measures"]["reward"]
    with pytest.raises(RunError, match=r"\(reward_options.weight: 1.0 there, 2.0 here\); with --change-reward"):
        train(settings(2.0))
    with pytest.raises(RunError, match=r"\(seed: 0 there, 1 here\)$"):
        train(settings(2.0, change_reward=True, seed=1))
    stopped(settings(2.0, change_reward=True), 2)
    assert changes() == {"2": "reward_options.weight 1.0 -> 2.0"}
    assert json.loads((out / "before.json").read_text())["measures"]["reward"] == [2 * value for value in old]
    best = json.loads((out / "checkpoints" / "best.json").read_text())
    assert best["step"] > 2  # what was best under the other reward is not compared with
    (model / "weights").write_text("two")
    with pytest.raises(RunError, match=r"\(content.reward.model: 'sha256:.*' here\); with --change-reward"):
        train(settings(2.0))
    stopped(settings(2.0, change_reward=True), 1)
    assert list(changes()) == ["2", "4"] and changes()["4"].startswith("content.reward.model sha256:")
    stopped(settings(2.0), 1)  # not asked for again
    assert list(changes()) == ["2", "4"]
    stopped(settings(2.0, resume=str(out / "checkpoints" / "000003")), 1)  # what came later is undone
    assert list(changes()) == ["2", "3"]
    stopped(settings(2.0, resume=str(out / "checkpoints" / "000001")), 1)
    assert list(changes()) == ["1"]
    kinds = [json.loads(line)["kind"] for line in (out / "warnings.jsonl").read_text().splitlines()]
    assert kinds == ["reward-changed"]
    (model / "weights").write_text("one")
    stopped(settings(1.0, change_reward=True, resume=str(out / "checkpoints" / "000001")), 1)
    assert changes() == {} and not (out / "warnings.jsonl").exists()


def test_a_damaged_checkpoint_is_passed_over_with_a_message(
    job: Callable[..., TrainConfig], whole: Path, plugin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin.hook = at(5, lambda: signal.raise_signal(signal.SIGINT))
    train(job(tmp_path / "run"))
    plugin.hook = None
    cut(tmp_path / "run" / "checkpoints" / "000005" / "agent.safetensors")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    shown = "".join(capsys.readouterr().out.split())  # lines are broken anywhere in a long path
    assert "000005isdamaged:agent.safetensorsandmanifest.jsondonotagree" in shown
    assert "goingonafterupdate4of6" in shown
    assert differences(whole, tmp_path / "run") == []


def test_resume_by_name(
    job: Callable[..., TrainConfig], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RLAIFError, match=r"expected a training to go on with under .*runs, found none"):
        main(["--resume"])
    shutil.copytree(whole, "runs/one")
    cases = {
        "expected a training to go on with in nowhere, found none": ["--resume", "nowhere"],
        "expected out to be the folder to resume, runs/one, found elsewhere": [
            *("--resume", "runs/one", "--out", "elsewhere")
        ],
        "expected a checkpoint at .*000099, found no folder": ["--resume", "runs/one/checkpoints/000099"],
        "updates: 6 there, 7 here": ["--resume", "latest", "--updates", "7"],
    }
    for message, arguments in cases.items():
        with pytest.raises(RLAIFError, match=message):
            main(arguments)
    assert main(["--resume", "runs/one/checkpoints/000004"]) == 0  # back to an earlier one
    assert differences(whole, Path("runs/one")) == []
    assert sorted(p.name for p in Path("runs/one/checkpoints").iterdir()) == ["000004", "000006"]


def test_the_best_by_validation_is_kept_and_named(job: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = job(tmp_path / "run", validate_every=1, validation_prompts=2, keep_checkpoints=1, eval_prompts=0)
    assert train(config).after is None
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    top = max(rows[1:], key=lambda row: row["reward"])  # the start is no result of the training
    assert best == {"step": top["step"], "reward": top["reward"]}
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"best.json", "000006", f"{best['step']:06d}"}
    with pytest.raises(RLAIFError, match=r"expected 1 to 2 prompts, .* found 3; give --validation-prompts 2"):
        train(job(tmp_path / "other", validate_every=1, validation_prompts=3))


# --- processes that die -----------------------------------------------------------------------------------------------

NURSERY = """
import json, mmap, os, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.stress import survival as s
from agents.training.command import train
from agents.reinforce import ReinforceAgent
from rlaif_env.api import RLAIFError
from rlaif_env.envs.core import Core
from rlaif_env.runs import RunFolder

folder, moments = s.prepared(Path(sys.argv[1])), json.loads(sys.argv[2])
s._load_libraries()

def job(name, updates=4):
    return s.settings(folder, folder / name, updates, 2)

def at(owner, name, count, number):
    inner, left = getattr(owner, name), [count]
    def call(*arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return inner(*arguments, **named)
    setattr(owner, name, call)

OWNERS = {"act": ReinforceAgent, "score": Core, "_step": ReinforceAgent, "fsync": os, "rename": Path, "rmtree": shutil,
          "log_samples": RunFolder, "truncate": os, "step": torch.optim.AdamW}
found = {"moments": []}
assert s.ended(s.started(job("whole")))[0] == 0
for number, (name, count, signal_number) in enumerate(moments):
    out = f"run-{number}"
    begin = time.monotonic()
    code = s.ended(s.started(job(out), None, lambda: at(OWNERS[name], name, count, signal_number)))[0]
    seconds = time.monotonic() - begin
    again = s.ended(s.started(job(out)))[0]
    found["moments"].append([name, count, code, again, seconds, s.differences(folder / "whole", folder / out)])
busy = s.started(job("busy", 10000))
while not (folder / "busy" / "metrics.jsonl").exists():
    time.sleep(0.05)
try:
    train(job("busy", 10000))
except RLAIFError as error:
    found["second"] = str(error)
os.kill(busy, signal.SIGKILL)
found["killed"] = s.ended(busy)[0]
found["lock"] = (folder / "busy" / "run.lock").exists()
saved = set((folder / "busy" / "checkpoints").glob("0*"))
after = s.started(job("busy", 10000))
while set((folder / "busy" / "checkpoints").glob("0*")) <= saved and os.waitpid(after, os.WNOHANG) == (0, 0):
    time.sleep(0.05)  # until it is at work, which it says by a checkpoint of its own
begin = time.monotonic()
os.kill(after, signal.SIGTERM)
found["terminated"] = s.ended(after)[0]
found["seconds"] = time.monotonic() - begin
print(json.dumps(found))
"""

KILL, TERM = int(signal.SIGKILL), int(signal.SIGTERM)
SOME = [["score", 3, KILL], ["rename", 2, KILL], ["step", 2, TERM]]


def nursery(folder: Path, moments: list[list[Any]]) -> dict[str, Any]:
    """Fork trainings that die at given moments in a fresh process; what came of them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RLAIF_DEVICE": "cpu"}
    command = [sys.executable, "-c", NURSERY, str(folder), json.dumps(moments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return nursery(tmp_path_factory.mktemp("nursery"), SOME)


def check_moments(found: dict[str, Any]) -> None:
    for (name, count, code, again, _, different), (*_, number) in zip(found["moments"], found["asked"], strict=True):
        assert code in (0, -KILL if number == KILL else 143), (name, count, code)
        assert (again, different) == (0, []), (name, count)


def test_killed_or_terminated_at_any_moment_it_goes_on_to_the_same(processes: dict[str, Any]) -> None:
    check_moments(processes | {"asked": SOME})
    assert [code for _, _, code, *_ in processes["moments"]] == [-KILL, -KILL, 143]


def test_a_second_run_in_the_folder_is_refused_and_a_dead_one_holds_nobody_up(processes: dict[str, Any]) -> None:
    assert re.search("busy is being written by another run: wait for its end, or name another", processes["second"])
    assert processes["killed"] == -KILL and processes["lock"]  # the lock's file is there, and holds nobody up


def test_sigterm_saves_and_ends_within_ten_seconds(processes: dict[str, Any]) -> None:
    assert processes["terminated"] == 143
    assert processes["seconds"] < 10


@pytest.mark.slow
def test_every_moment_of_the_files_and_the_update(tmp_path: Path) -> None:
    names = {"fsync": 22, "rename": 8, "rmtree": 6, "log_samples": 4, "act": 4, "score": 7, "_step": 4, "step": 4}
    moments = [[name, count, KILL] for name, times in names.items() for count in range(1, times + 1)]
    moments += [["act", 2, TERM], ["score", 4, TERM], ["fsync", 5, TERM], ["log_samples", 3, TERM]]
    check_moments(nursery(tmp_path, moments) | {"asked": moments})


@pytest.mark.slow
def test_random_moments_of_a_process_from_its_start_to_its_end(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.stress.survival",
        "--kills",
        "5",
        "--updates",
        "8",
        "--checkpoint-every",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"] == found["kills"] == 5 and found["two_uninterrupted_runs_differ_in"] == []
