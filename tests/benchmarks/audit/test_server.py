"""A language model behind a server under audit: asked anew for the noise, whatever is stored; tokens and price told."""

from __future__ import annotations

import numpy as np

from benchmarks.audit.command import examine
from benchmarks.audit.config import checks_named
from benchmarks.audit.subject import Subject
from rewards.direct_score import DirectLLMScore
from rewards.endpoint.model import EndpointLM
from rlaif_env.servers.limits import Limits
from tests.benchmarks.audit import rewards
from tests.stress.endpoint_server import FaultServer


def test_a_server_is_asked_anew_and_its_tokens_are_told() -> None:
    materials = rewards.materials(texts=12, samples=8)
    limits = Limits(price_in=1.0, price_out=2.0)
    with FaultServer() as server, EndpointLM(server.url, "tiny", cache=False, limits=limits) as lm:
        subject = Subject(DirectLLMScore(lm, materials.task), materials)
        first = subject.score([""], ["a film"])
        before = sum(server.answered.values())
        assert np.array_equal(subject.score([""], ["a film"]), first) and sum(server.answered.values()) == before
        assert np.array_equal(subject.ask([""], ["a film"]), first)
        again = sum(server.answered.values())
        assert again > before
        subject.backend.score([""], ["a film"])  # what was stored before is stored still
        assert sum(server.answered.values()) == again
        found = examine(subject, checks_named(["noise", "cost"]))
    figures = {finding.name: finding.estimate.estimate for finding in found.findings}
    assert figures["tokens a judgement"] > 0 and figures["price of a judgement"] > 0
    assert 0 < figures["probability on the answers"] <= 1
    assert figures["spread of a row's reward over repeats"] == 0
