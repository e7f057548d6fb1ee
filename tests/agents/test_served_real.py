"""A stock vLLM server with the built-in model: what it draws, what it is refused for, and a run that outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from agents.policy import Policy
from agents.sampler import SamplerConfig, make_sampler
from agents.served import ServedSampler
from agents.settings import ReinforceConfig
from agents.training.command import train
from agents.training.config import TrainConfig
from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL, LoraConfig, encode, pad_rows
from rlaif_env.models.assets import model_folder
from rlaif_env.records import read_metrics
from tests import ROOT
from tests.stress.survival import samples

VLLM = os.environ.get("RLAIF_VLLM") or str(ROOT / ".venv" / "vllm" / "bin" / "vllm")
PROMPTS = ("The film is", "The food at the inn", "Once upon a time there was a king who")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(VLLM).is_file(), reason=f"vLLM is not installed in {VLLM}: make test-vllm"),
]


class Server:
    """The command of docs/scale.md, on a port of its own; it can be killed as a whole."""

    def __init__(self, log: Path, *flags: str, rank: int = 16, runtime: str = "1") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/v1", log
        command = f"serve {model_folder()} --served-model-name base --enable-lora --max-lora-rank {rank} --max-loras 2"
        command += " --logprobs-mode processed_logprobs --max-logprobs 20 --generation-config vllm --host 127.0.0.1"
        command += f" --port {self.port} --dtype float32 --enforce-eager"
        self.command = [VLLM, *command.split(), *flags]
        cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        self.environment = {**os.environ, **cpu, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": runtime, "HF_HUB_OFFLINE": "1"}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=stream, stderr=stream, start_new_session=True
            )
        end = time.monotonic() + 400
        while wait and time.monotonic() < end:
            try:
                httpx.get(f"{self.url}/models", trust_env=False).raise_for_status()
                return
            except httpx.HTTPError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(1.0)
        assert not wait, self.log.read_text()[-3000:]

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("vllm") / "log")
    running.start()
    yield running
    running.kill()


def opened(server: Server, folder: Path, rank: int = 8) -> tuple[ServedSampler, Policy]:
    policy = Policy(BUILTIN_MODEL, lora=LoraConfig(rank), device="cpu", dtype="float32")
    sampler = make_sampler(SamplerConfig(url=(server.url,)), policy)
    assert isinstance(sampler, ServedSampler)
    try:
        sampler.open(folder, name="real", tokens=64, tell=print)
    except BaseException:
        sampler.close()
        raise
    return sampler, policy


def move(policy: Policy, seed: int) -> None:
    """About as far as an update at the default learning rate."""
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=1.2e-3)


def test_it_draws_from_the_policy_of_now(server: Server, tmp_path: Path) -> None:
    sampler, policy = opened(server, tmp_path)
    rows = [row for row in encode(policy.tokenizer, PROMPTS) for _ in range(4)]
    ids, mask = pad_rows(rows, policy.tokenizer.pad_token_id, side="left")
    uniform = np.random.default_rng(0).random((len(rows), 24))
    seen = []
    for version in range(3):
        drawn = sampler.sample(ids, mask, uniform=uniform, group_size=4)
        real = np.arange(24) < drawn.lengths[:, None]
        tensors = (torch.from_numpy(array) for array in (ids, mask, drawn.ids, real.astype(np.float32)))
        gap = np.abs(drawn.logprobs - policy.evaluate(*tensors).logprobs.numpy()).max()
        print(f"version {version}: largest gap {gap:.1e}")
        assert gap < 1e-3
        assert len({tuple(row) for row in drawn.ids[:4]}) > 1  # a seed of its own each
        seen.append(drawn.ids)
        move(policy, version)
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()
    listed = httpx.get(f"{server.url}/models", trust_env=False).json()["data"]
    assert len(listed) == 2  # the base and one adapter
    sampler.close()
    assert len(httpx.get(f"{server.url}/models", trust_env=False).json()["data"]) == 1


def test_an_adapter_of_the_update_before_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, policy = opened(server, tmp_path)
    move(policy, 0)
    old = {name: value.clone() for name, value in policy.state().items()}
    sampler._refresh()
    move(policy, 1)
    new, write = policy.state(), policy.backbone.save_adapter

    def stale(adapter: str, folder: Path) -> None:
        policy.load_state(old)
        write(adapter, folder)
        policy.load_state(new)

    monkeypatch.setattr(policy.backbone, "save_adapter", stale)
    with pytest.raises(RLAIFError, match="another or an older adapter") as caught:
        sampler._refresh()
    print(caught.value)
    sampler.close()


def test_flags_that_are_wrong_are_named(tmp_path: Path) -> None:
    """Two servers, each wrong in two ways that are found one after the other."""
    wrong = Server(tmp_path / "log", "--logprobs-mode", "raw_logprobs", rank=8)
    wrong.start()
    try:
        with pytest.raises(RLAIFError, match=r"found HTTP 500: .*max_lora_rank.*larger --max-lora-rank"):
            opened(wrong, tmp_path, rank=16)
        with pytest.raises(RLAIFError, match="--logprobs-mode processed_logprobs"):
            opened(wrong, tmp_path)
    finally:
        wrong.kill()
    wrong = Server(tmp_path / "log", "--max-model-len", "48", runtime="0")
    wrong.start()
    try:
        with pytest.raises(RLAIFError, match="found 48; start the server with --max-model-len 64"):
            opened(wrong, tmp_path)
    finally:
        wrong.kill()
    wrong = Server(tmp_path / "log", runtime="0")
    wrong.start()
    try:
        with pytest.raises(RLAIFError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            opened(wrong, tmp_path)
    finally:
        wrong.kill()


def test_a_run_outlives_its_server_twice(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed: list[int] = []

    def killing() -> None:
        """Kill the server while it samples the second and the fourth update's batch; start it again."""
        for update in (1, 3):
            while not (out / "metrics.jsonl").is_file() or len(read_metrics(out)) < update:
                time.sleep(0.01)
            time.sleep(0.5)
            server.kill()
            killed.append(update)
            time.sleep(2.0)
            server.start()

    thread = threading.Thread(target=killing, daemon=True)
    thread.start()
    train(
        TrainConfig(
            updates=5,
            prompts_per_update=2,
            group_size=3,
            eval_prompts=0,
            out=out,
            agent=ReinforceConfig(lora=LoraConfig(8)),
            sampler=SamplerConfig(url=(server.url,), patience=400.0),
        )
    )
    thread.join(400)
    assert killed == [1, 3]
    metrics = read_metrics(out)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5]
    assert all(row["sampler_drift"] < 1e-3 for row in metrics)
    rows = samples(out)
    counts: dict[Any, int] = {}
    for row in rows:
        counts[row["step"]] = counts.get(row["step"], 0) + 1
    assert counts == {step: 6 for step in (1, 2, 3, 4, 5)}
