"""Responses sampled by vLLM servers: exactly what the policy would draw from, whatever becomes of the servers."""

from __future__ import annotations

import gc
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from agents.policy import Policy
from agents.sampler import SamplerConfig, make_sampler
from agents.served import ServedSampler
from agents.training.command import train
from agents.training.config import TrainConfig
from benchmarks.evaluation.systems import answer
from rewards.labeling.command import label
from rewards.labeling.config import LabelConfig
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import load_task
from rlaif_env.models import LoraConfig, pad_rows
from rlaif_env.records import read_metrics
from rlaif_env.servers.vllm import VLLMConfig
from tests.fake_vllm import FakeVLLM
from tests.stress.survival import prepared, samples
from tests.stress.survival import settings as survival_settings
from tests.tiny import tiny_backbone, tiny_model

IDS, MASK = pad_rows([[5, 6, 7], [5, 6, 7], [9], [9], [8, 4], [8, 4]], 0, side="left")
UNIFORM = np.random.default_rng(0).random((6, 5))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif_env.servers.vllm._FIRST_PAUSE", 0.02)
    monkeypatch.setattr("rlaif_env.servers.vllm._LONGEST_PAUSE", 0.2)


def policy_of(rank: int = 4, trainable: str = "lora") -> Policy:
    return Policy(tiny_backbone(), trainable=trainable, lora=LoraConfig(rank), temperature=0.8)


def base() -> Any:
    """The same weights as `tiny_backbone`'s, not the same objects."""
    return tiny_model(tiny_backbone().logit_width).eval()


def move(policy: Policy, seed: int) -> None:
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1)


class Opened:
    """A sampler on some servers, with what it told."""

    def __init__(self, policy: Policy, *servers: FakeVLLM, folder: Path, tokens: int = 16, **settings: Any) -> None:
        self.told: list[str] = []
        config = SamplerConfig(url=tuple(s.url for s in servers), **{"patience": 5.0, "timeout": 10.0} | settings)
        made = make_sampler(config, policy)
        assert isinstance(made, ServedSampler)
        self.sampler, self.policy, self.folder = made, policy, folder
        self.sampler.open(folder, name="my run", tokens=tokens, tell=self.told.append)

    def sample(self) -> Any:
        return self.sampler.sample(IDS, MASK, uniform=UNIFORM, group_size=2)

    def check(self) -> Any:
        """Sample; each token's log-probability must be the trainer's."""
        drawn = self.sample()
        seen = np.arange(drawn.ids.shape[1]) < drawn.lengths[:, None]
        tensors = (torch.from_numpy(array) for array in (IDS, MASK, drawn.ids, seen.astype(np.float32)))
        np.testing.assert_allclose(drawn.logprobs, self.policy.evaluate(*tensors).logprobs.numpy(), atol=1e-4)
        assert (drawn.ids[~seen] == 0).all()
        whole = drawn.lengths == drawn.ids.shape[1]
        last = drawn.ids[np.arange(len(drawn.ids)), drawn.lengths - 1]
        assert (whole | np.isin(last, self.policy.backbone.end_ids)).all()
        return drawn


def test_it_samples_from_the_policy_of_now_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with FakeVLLM(base()) as server:
        opened = Opened(policy_of(), server, folder=tmp_path / "adapters")
        assert not opened.sampler.exact
        first = opened.check()
        assert server.served == {next(iter(server.adapters)): 6}
        for name in ("prompt", "seed"):
            assert server.bodies[0][name] == ([5, 6, 7] if name == "prompt" else int(UNIFORM[0, 0] * 2**53))
        assert {body["top_p"] for body in server.bodies} == {1.0} and {body["top_k"] for body in server.bodies} == {0}
        np.testing.assert_array_equal(opened.sample().ids, first.ids)  # the same numbers, the same request
        move(opened.policy, 1)
        assert (opened.check().ids != first.ids).any()
        assert len(server.adapters) == 1 and len(list((tmp_path / "adapters").glob("*/*"))) == 1
        assert [count for _, count in sorted(server.served.items())] == [12, 6]
        opened.sampler.close()
        assert not server.adapters and not list(tmp_path.iterdir()) and opened.told == []


def test_a_model_without_an_adapter_is_the_servers_own(tmp_path: Path) -> None:
    with FakeVLLM(base()) as server:
        opened = Opened(policy_of(trainable="none"), server, folder=tmp_path)
        opened.check()
        assert server.served == {"base": 6} and not server.adapters


def test_rows_are_divided_by_open_work(tmp_path: Path) -> None:
    with FakeVLLM(base()) as one, FakeVLLM(base()) as two:
        opened = Opened(policy_of(), one, two, folder=tmp_path)
        opened.check()
        assert sorted(sum(server.served.values()) for server in (one, two)) == [3, 3]


def test_a_replica_that_dies_is_left_out_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    with FakeVLLM(base()) as one, FakeVLLM(base()) as two:

        def die(number: int) -> int | None:
            if number == 2:
                threading.Thread(target=one.kill).start()
                time.sleep(0.3)
            return None

        opened = Opened(policy_of(), one, two, folder=tmp_path)
        expected = opened.sample()
        one.served.clear(), two.served.clear()
        one.fail = die
        drawn = opened.check()
        np.testing.assert_array_equal(drawn.ids, expected.ids)
        assert sum(two.served.values()) >= 4 and one.url in opened.told[0] and "left out" in opened.told[0]
        move(opened.policy, 1)
        opened.check()  # without it
        one.fail = lambda number: None
        one.start()
        opened.check()
        assert any(text == f"{one.url} is back" for text in opened.told) and sum(one.served.values()) >= 3
        assert len(one.adapters) == len(two.adapters) == 1


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_fails_once_is_asked_again(status: int, tmp_path: Path) -> None:
    with FakeVLLM(base(), fail=lambda number: status if number == 3 else None) as server:
        opened = Opened(policy_of(), server, folder=tmp_path)
        opened.check()
        assert sum(server.served.values()) == 7


def test_a_row_that_no_server_answers_ends_the_run_and_not_in_a_circle(tmp_path: Path) -> None:
    with FakeVLLM(base(), fail=lambda number: 500) as server:
        opened = Opened(policy_of(), server, folder=tmp_path)
        with pytest.raises(RLAIFError, match="found after 8 attempts: HTTP 500: told to fail; see the server's log"):
            opened.sample()
        assert 8 <= server.served.total() <= 48


def test_a_server_that_was_started_again_gets_the_adapter_before_it_is_asked(tmp_path: Path) -> None:
    with FakeVLLM(base()) as server:
        opened = Opened(policy_of(), server, folder=tmp_path)
        move(opened.policy, 1)
        expected = opened.check()
        for _ in range(2):
            server.kill()
            server.start()
            np.testing.assert_array_equal(opened.check().ids, expected.ids)
        assert "started again" in opened.told[0]


def test_without_any_server_it_waits_and_then_says_so(tmp_path: Path) -> None:
    with FakeVLLM(base()) as server:
        opened = Opened(policy_of(), server, folder=tmp_path, patience=60.0)
        expected = opened.check()
        server.kill()
        timer = threading.Timer(0.15, server.start)
        timer.start()
        np.testing.assert_array_equal(opened.check().ids, expected.ids)
        assert any(text.startswith("waiting up to 60 s for a server") for text in opened.told)
        server.kill()
        opened.sampler._servers.patience = 0.1
        with pytest.raises(RLAIFError, match=r"a vLLM server at .* within 0 s, found none .*last whole update"):
            opened.sample()
        server.start()


def test_an_adapter_that_is_not_the_one_of_now_is_refused(tmp_path: Path) -> None:
    with FakeVLLM(base(), stale=True) as server:
        opened = Opened(policy_of(), server, folder=tmp_path)
        move(opened.policy, 1)
        with pytest.raises(RLAIFError, match=r"nats a token\), found .*: it has another or an older adapter"):
            opened.sample()


@pytest.mark.parametrize("what", ["raw", "weights"])
def test_what_goes_wrong_after_the_adapter_was_shown_to_be_right_is_refused(what: str, tmp_path: Path) -> None:
    with FakeVLLM(base()) as server:
        policy = policy_of()
        move(policy, 1)
        opened = Opened(policy, server, folder=tmp_path)
        opened.check()
        if what == "raw":
            server.raw = True
        else:
            server.adapters = {name: (root, server.model) for name, (root, _) in server.adapters.items()}
        with pytest.raises(RLAIFError, match=r"drawn from the policy of now, .* found one .* off \(row \d"):
            opened.sample()


def test_an_answer_of_another_model_is_refused(tmp_path: Path) -> None:
    with FakeVLLM(base()) as server:
        opened = Opened(policy_of(), server, folder=tmp_path)
        server.renamed = "another"
        with pytest.raises(RLAIFError, match=r"expected a response of 'my-run-\w+-1' from .*, found one of 'another'"):
            opened.sample()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime_loading": False}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"max_lora_rank": 2}, "larger --max-lora-rank"),
        ({"raw": True}, "--logprobs-mode processed_logprobs"),
        ({"blind": True}, "to see the folder .*--sampler.adapters"),
        ({"context": 8}, "context of at least 16 tokens.*found 8; start the server with --max-model-len 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_server_lacks_is_said_at_the_start(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    told: list[str] = []
    with FakeVLLM(base(), **settings) as server:
        sampler = make_sampler(SamplerConfig(url=(server.url,)), policy_of())
        assert isinstance(sampler, ServedSampler)
        with pytest.raises(RLAIFError, match=message):
            sampler.open(tmp_path / "adapters", name="my run", tokens=16, tell=told.append)
        sampler.close()
        assert told == [] and not server.adapters and not list(tmp_path.iterdir())


def test_one_that_was_never_opened_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("kept")
    sampler = make_sampler(SamplerConfig(url=("http://127.0.0.1:1",)), policy_of())
    assert isinstance(sampler, ServedSampler)
    with pytest.raises(RLAIFError, match=r"expected open\(\) before"):
        sampler.sample(IDS, MASK, uniform=UNIFORM)
    sampler.close()
    assert (tmp_path / "mine").read_text() == "kept"


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    other = tiny_model(tiny_backbone().logit_width, seed=1).eval()
    with FakeVLLM(other) as server, pytest.raises(RLAIFError, match="one that scores a text differently, by"):
        Opened(policy_of(), server, folder=tmp_path)


def test_what_is_no_vllm_or_not_there_is_refused(tmp_path: Path) -> None:
    with FakeVLLM(base()) as server:
        server.list_models = lambda: (200, {"data": [{"id": "x", "owned_by": "llamacpp"}]})  # type: ignore[method-assign]
        with pytest.raises(RLAIFError, match="expected a vLLM server at"):
            Opened(policy_of(), server, folder=tmp_path)
        server.list_models = lambda: (200, "<html>")  # type: ignore[method-assign]
        with pytest.raises(RLAIFError, match="expected a vLLM server at"):
            Opened(policy_of(), server, folder=tmp_path)
    with pytest.raises(RLAIFError, match=r"expected a vLLM server at .*, found ConnectError.*; start it"):
        Opened(policy_of(), server, folder=tmp_path)


def test_full_fine_tuning_and_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RLAIFError, match=r"full fine-tuning: .*--agent.trainable lora"):
        make_sampler(SamplerConfig(url=("http://127.0.0.1:1",)), policy_of(trainable="full"))
    for settings, message in (
        ({"url": ("ftp://x",)}, "expected a server's address"),
        ({"url": ("http://x", "http://x/v1")}, "each once"),
        ({"url": ("http://x",), "dtype": "bfloat16"}, "found both"),
        ({"adapters": "folder"}, "sampler.url beside sampler.adapters"),
        ({"concurrency": 0}, "concurrency of at least 1"),
    ):
        with pytest.raises(RLAIFError, match=message):
            SamplerConfig(**settings)  # type: ignore[arg-type]


# --- a whole training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("served"))


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def job(folder: Path, out: Path, *servers: FakeVLLM, **settings: Any) -> TrainConfig:
    sampler = SamplerConfig(url=tuple(server.url for server in servers), **{"patience": 30.0} | settings)
    return replace(survival_settings(folder, out, updates=4, checkpoint_every=2), sampler=sampler)


def check_run(out: Path) -> None:
    """Every update once, every row once, and each drawn from the policy that learned from it."""
    metrics = read_metrics(out)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(row["sampler_drift"] < 1e-3 and row["importance_capped"] == 0 for row in metrics)
    rows = samples(out)
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3, 4) for _ in range(6)]
    assert (out / "policy" / "adapter").is_dir() and not (out / "adapters").exists()


def killed_at(server: FakeVLLM, number: int, back: float | None) -> None:
    """Kill a server while it answers its completion of this number, and start it again after some seconds."""

    def fail(count: int) -> int | None:
        if count == number:
            threading.Thread(target=restart).start()
            time.sleep(0.1)
        return None

    def restart() -> None:
        server.kill()
        if back is not None:
            time.sleep(back)
            server.start()

    server.fail = fail


@pytest.fixture(scope="module")
def run(prepared_folder: Path) -> Path:
    """A run whose only server was killed in mid-batch, and started again."""
    with FakeVLLM(loaded(prepared_folder)) as server:
        killed_at(server, 15, back=0.2)
        train(job(prepared_folder, prepared_folder / "run", server))
        assert not server.adapters and len(server.served) == 5  # the policy before training and after each update
    return prepared_folder / "run"


def test_a_run_goes_on_when_its_only_server_is_killed_and_started_again(run: Path) -> None:
    check_run(run)
    assert "kl" in json.loads((run / "after.json").read_text())["measures"]


def test_a_run_loses_a_replica_and_goes_on(prepared_folder: Path, tmp_path: Path) -> None:
    with FakeVLLM(loaded(prepared_folder)) as one, FakeVLLM(loaded(prepared_folder)) as two:
        killed_at(two, 6, back=None)
        train(job(prepared_folder, tmp_path / "run", one, two))
        check_run(tmp_path / "run")


def test_a_run_that_waited_in_vain_goes_on_from_its_last_whole_update(prepared_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with FakeVLLM(loaded(prepared_folder)) as server:
        killed_at(server, 24, back=None)
        with pytest.raises(RLAIFError, match="last whole update"):
            train(job(prepared_folder, out, server, patience=0.2))
        done = len(read_metrics(out))
        assert 1 <= done < 4
        server.fail = lambda number: None
        server.start()
        train(job(prepared_folder, out, server))
        check_run(out)


def test_the_next_batch_is_sampled_beside_the_gradient_by_the_policy_before_it(
    prepared_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(
        "def own(prompts, responses):\n    return [sum(map(ord, r)) / 1e3 for r in responses]"
    )
    out = tmp_path / "run"
    with FakeVLLM(loaded(prepared_folder)) as one, FakeVLLM(loaded(prepared_folder)) as two:
        killed_at(two, 6, back=60.0)
        config = job(prepared_folder, out, one, two)
        train(replace(config, reward=f"{tmp_path / 'own.py'}:own", reward_options={}, overlap=True))
        two.start = lambda: None  # type: ignore[method-assign]
        assert not one.adapters
    metrics = read_metrics(out)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[0]["sampler_drift"] < 1e-3 < min(row["sampler_drift"] for row in metrics[1:])
    rows = samples(out)
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3, 4) for _ in range(6)]


def test_saved_policies_are_evaluated_on_servers(prepared_folder: Path, run: Path, tmp_path: Path) -> None:
    with FakeVLLM(loaded(prepared_folder)) as server:
        task, reference = load_task(str(prepared_folder / "task.toml")), str(prepared_folder / "model")
        servers = VLLMConfig(url=(server.url,))
        asked: dict[str, Any] = {"prompts": 4, "reference": reference, "servers": servers, "adapters": tmp_path / "a"}
        final, last, plain = (
            answer("a", source, task, **asked) for source in (run, run / "checkpoints" / "000004", "sft")
        )
        assert final.responses == last.responses and (np.abs(final.measures["kl"]) > 0).any()
        np.testing.assert_allclose(final.measures["kl"], last.measures["kl"], atol=1e-3)
        assert len(server.served) == 3 and server.served["base"] == 4 and plain.responses != final.responses
        assert not server.adapters and not (tmp_path / "a").exists()


def test_pairs_are_sampled_by_servers(prepared_folder: Path, run: Path, tmp_path: Path) -> None:
    with FakeVLLM(loaded(prepared_folder)) as server:
        labelling: dict[str, Any] = {"task": str(prepared_folder / "task.toml"), "policy": str(run / "policy")}
        labeler = LanguageModelConfig(str(prepared_folder / "model"))
        labelling |= {"labeler": labeler, "minimum_mass": 1e-12, "pairs": 2, "out": tmp_path / "labels"}
        report = label(LabelConfig(**labelling, sampler=VLLMConfig(url=(server.url,))), Console(quiet=True))
        assert report["pairs"] == 2 and sum(server.served.values()) >= 4 and "base" not in server.served
        assert not server.adapters
        with pytest.raises(RLAIFError, match=r"expected a policy .*sampler\.url"):
            LabelConfig(sampler=VLLMConfig(url=(server.url,)))


# --- policies that are collected as garbage --------------------------------------------------------------------------


def test_a_policy_collected_while_another_adapter_is_put_on_or_in_another_thread_is_taken_off_later() -> None:
    """The servers' thread collects garbage as any does; peft walks the modules that an adapter is taken off."""
    model = tiny_backbone()

    def lost() -> None:
        policy = Policy(model)
        policy.itself = policy  # type: ignore[attr-defined]  # a cycle: only the collector finds it

    lost()
    put_on = model.model.add_adapter

    def collecting(*arguments: Any, **named: Any) -> None:
        gc.collect()
        assert model.adapters == ["policy"]
        put_on(*arguments, **named)

    model.model.add_adapter = collecting
    second = Policy(model, adapter="second")
    model.model.add_adapter = put_on
    third = Policy(model, adapter="third")
    assert model.adapters == ["second", "third"]
    del second
    lost()
    thread = threading.Thread(target=gc.collect)
    thread.start(), thread.join()
    assert model.adapters == ["third", "policy"] and third.adapter == "third"
    Policy(model, adapter="fourth")
    assert model.adapters == ["third"]
