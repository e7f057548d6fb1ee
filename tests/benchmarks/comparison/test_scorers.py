"""The table of direct scores beside people's ratings, on a tiny model and real ratings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison import scorers
from rewards import LocalLM
from rewards.direct_score import DirectLLMScore
from rlaif_env.api import RLAIFError
from rlaif_env.statistics import spearman
from tests.tiny import byte_tokenizer, save_tiny

CHAT = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


def test_each_cell_is_a_score_beside_peoples_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    with_chat = str(save_tiny(tmp_path / "chat", tokenizer, max_position_embeddings=2048))
    tokenizer.chat_template = None
    without = str(save_tiny(tmp_path / "plain", tokenizer, max_position_embeddings=2048))
    arguments = ["--models", with_chat, without, "--shots", "0", "4", "--snippets", "8", "--out", str(tmp_path / "f")]
    assert scorers.main(arguments) == 0
    found = json.loads((tmp_path / "f").read_text())
    ways = [(Path(cell["model"]).name, cell["chat"], cell["shots"]) for cell in found["cells"]]
    assert ways == [
        *(("chat", chat, shots) for chat in (False, True) for shots in (0, 4)),
        ("plain", False, 0),
        ("plain", False, 4),
    ]
    snippets = scorers.drawn(8, 0)
    means = [float(np.mean(snippet.ratings)) for snippet in snippets]
    backend = DirectLLMScore(LocalLM(with_chat, chat=True), "movie-review", shots=4, minimum_mass=0.0)
    scores = backend.score([""] * 8, [snippet.text for snippet in snippets])
    cell = found["cells"][3]
    assert cell["spearman"]["estimate"] == pytest.approx(spearman(scores.values, means).estimate)
    assert cell["label_mass"] == pytest.approx(float(scores.info["label_mass"].mean()))
    assert cell["least_mass"] == pytest.approx(float(scores.info["label_mass"].min()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| model | template | shots | Spearman | label mass | least |" and len(lines) == 12


def test_the_same_snippets_for_every_cell() -> None:
    ids = [snippet.id for snippet in scorers.drawn(192, 0)]
    assert len(set(ids)) == 192 and {s.split for s in scorers.drawn(192, 0)} == {"test"}
    assert ids == [s.id for s in scorers.drawn(192, 0)] != [s.id for s in scorers.drawn(192, 1)]
    for count in (3, 10**6):
        with pytest.raises(RLAIFError, match=f"expected 4 to 1600 snippets, found {count}"):
            scorers.drawn(count, 0)
