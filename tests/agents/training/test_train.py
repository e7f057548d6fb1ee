"""`rlaif train`, from the command's arguments to the run folder, on a tiny model and once on the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from agents.training.arguments import parsed
from agents.training.command import main, train
from agents.training.config import TrainConfig
from agents.training.heldout import changes, distinct_shares
from rewards.direct_score import DirectLLMScore
from rewards.language_model.local import LocalLM
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import load_task
from rlaif_env.records import read_metrics
from tests.tiny import save_tiny, tiny_backbone

TASK = """
name = "toy"
kind = "continuation"
criterion = "how positive it is"
max_prompt_tokens = 8
max_response_tokens = 4
gold = "vader"
[source]
prompts = ["ab", "film", "xyz.", "Q"]
"""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # an unknown model is not asked for at length


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a run of seconds on a tiny model that scores itself."""
    tiny_backbone(0).save_merged(None, tmp_path / "tiny")
    prompts = json.dumps({split: ["ab", "film", "xyz.", "Q"] for split in ("train", "validation", "test", "gold")})
    (tmp_path / "toy.toml").write_text(
        TASK.replace('prompts = ["ab", "film", "xyz.", "Q"]', "prompts = " + prompts.replace('":', '" ='))
    )
    model = str(tmp_path / "tiny")
    line = (
        f"--task {tmp_path / 'toy.toml'} --model {model} --updates 3 --prompts-per-update 2 --eval-prompts 4 "
        f"--group-size 2 --reward.model {model} --reward.minimum-mass 0.0"
    )
    return line.split()


def test_the_run_folder_is_whole(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*arguments, "--out", str(out), "--checkpoint-every", "2"]) == 0
    shown = capsys.readouterr().out
    assert "before / after on 4 held-out prompts" in shown and "gold measure" in shown and "3/3" in shown
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"reward", "kl", "entropy", "length", "time/sample", "time/score", "time/update"} <= set(rows[0])
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 4 and {"prompt", "response", "reward", "score", "label_mass"} <= set(samples[0])
    for row in rows:
        rewards = [s["reward"] for s in samples if s["step"] == row["step"]]
        assert np.mean(rewards) == pytest.approx(row["reward"], abs=1e-6)
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert {"reward", "score", "gold", "length", "kl", "distinct-2"} <= set(evaluation)
    assert (out / "curves.png").stat().st_size > 1000
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["000002", "000003"]
    assert AutoModelForCausalLM.from_pretrained(out / "policy").config.vocab_size > 0
    assert list((out / "tensorboard").iterdir())


def test_a_judge_that_cannot_read_the_longest_prompt_is_an_error_before_the_first_response(
    arguments: list[str], tmp_path: Path
) -> None:
    at = arguments.index("--reward.model")
    question = DirectLLMScore(LocalLM(tiny_backbone(0)), load_task(tmp_path / "toy.toml")).render("film", "")
    for positions, fits in (
        (len(question) + 6, True),
        (len(question) + 5, False),
    ):  # a character a token; T is 4, "10" is 2
        judge = save_tiny(tmp_path / f"judge-{positions}", max_position_embeddings=positions)
        line = [*arguments[: at + 1], str(judge), *arguments[at + 2 :], "--out", str(tmp_path / f"run-{positions}")]
        if fits:
            assert main([*line, "--updates", "1", "--eval-prompts", "0"]) == 0
            continue
        with pytest.raises(RLAIFError, match=r"to read every prompt whole beside a response of 4 tokens, .*'film'"):
            main(line)
        assert not (tmp_path / f"run-{positions}" / "samples.jsonl").exists()


def test_the_held_out_prompts_are_as_many_as_there_are(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = arguments.index("--eval-prompts")
    toml = tmp_path / "toy.toml"
    toml.write_text(
        toml.read_text().replace('gold = "vader"\n', "").replace('"film"', json.dumps("word " * 70 + "end"))
    )
    toml.write_text(toml.read_text().replace("[source", "truncate_prompts = true\n[source"))
    rest = ["--out", str(tmp_path / "run"), "--updates", "1", "--validate-every", "1"]
    assert main([*arguments[:at], *arguments[at + 2 :], *rest]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "eval_prompts: 4, all that split 'test' has (by default 128)" in shown
    assert "validation_prompts: 4, all that split 'validation' has (by default 32)" in shown
    assert "on 4 held-out prompts" in shown
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (recorded["eval_prompts"], recorded["validation_prompts"]) == (4, 4)
    assert "gold measure" not in shown  # the task has none
    assert shown.count("word") < 70 and "…" in shown and "end" in shown  # a long prompt is shown by its end
    assert "word " * 70 + "end" in (tmp_path / "run" / "evaluation.jsonl").read_text()


def test_training_twice_with_one_seed_is_the_same(arguments: list[str], tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([*arguments, "--out", str(tmp_path / name), "--seed", seed]) == 0
        rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(tmp_path / name)]
        found.append(
            (rows, (tmp_path / name / "samples.jsonl").read_text(), (tmp_path / name / "evaluation.json").read_text())
        )
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_ctrl_c_ends_cleanly_with_a_checkpoint(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = "import sys; from rlaif_env.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", *arguments, "--updates", "100000", "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, shown
    assert "Traceback" not in shown and "then saving a checkpoint" in " ".join(shown.split())
    checkpoint = max((out / "checkpoints").iterdir())
    assert int(checkpoint.name) == len(read_metrics(out)) and (checkpoint / "agent.safetensors").exists()


def test_settings_that_cannot_work(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "unknown reward 'gpt5': expected one of": ["--reward", "gpt5"],
        "unknown model 'no-such-model'": ["--model", "no-such-model"],
        "expected a task .movie-review.*found 'poetry'": ["--task", "poetry"],
        "expected 1 to 4 prompts, as many as split 'test' .* found 5; give --eval-prompts 4": ["--eval-prompts", "5"],
        "reward 'direct-llm': expected options among model, url, .*, found colour": ["--reward.colour", "1"],
    }
    for message, changed in cases.items():
        with pytest.raises(RLAIFError, match=message):
            main([*arguments, *changed, "--out", str(tmp_path / "none")])
    for text in ("{", "3"):
        with pytest.raises(SystemExit):
            main([*arguments, "--reward.server", text, "--out", str(tmp_path / "none")])
        assert "parsing --reward.server: expected a JSON object, found" in capsys.readouterr().err
    with pytest.raises(RLAIFError, match="expected updates of at least 1, found 0"):
        TrainConfig(updates=0)


def test_help_lists_the_options_of_the_reward_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    for reward, there, not_there in (
        ("compose", "--reward.parts JSON", "--reward.model"),
        (None, "--reward.model", "parts"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*(["--reward", reward] if reward else []), "--help"])
        shown = capsys.readouterr().out
        assert end.value.code == 0 and there in shown and not_there not in shown
        assert "--group-size INT" in shown and "--agent.lora.rank INT" in shown and "reward-options" not in shown


def test_an_unknown_option_names_the_valid_ones(arguments: list[str]) -> None:
    message = "reward 'compose': expected options among parts, calibration, calibration_samples, found colour"
    with pytest.raises(RLAIFError, match=message):
        main(["--reward", "compose", "--reward.parts", "{}", "--reward.colour=1"])


def test_a_resumed_run_keeps_its_options_unless_others_are_given(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*arguments, "--out", str(out), "--eval-prompts", "0"]) == 0
    recorded = parsed(["--resume", str(out)])
    assert recorded.reward_options == {"model": str(tmp_path / "tiny"), "minimum_mass": 0.0}
    assert (recorded.group_size, recorded.updates, recorded.out) == (2, 3, out)
    assert main(["--resume", str(out)]) == 0  # finished: its result is given
    with pytest.raises(RLAIFError, match=r"reward_options.minimum_mass: 0.0 there, 0.5 here"):
        main(["--resume", str(out), "--reward.minimum-mass", "0.5"])
    assert parsed(["--resume", str(out), "--reward", "human-rm"]).reward_options == {}


LENGTH = """
def length(prompts, responses, weight=1.0):
    if weight < 0:
        raise ValueError("a negative weight")
    return [weight * len(response) for response in responses]
"""


def test_code_in_a_file_is_a_reward_and_a_change_of_it_is_noticed(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = tmp_path / "own.py", tmp_path / "run"
    code.write_text(LENGTH)
    line = [*arguments[: arguments.index("--reward.model")], "--reward", f"{code}:length", "--out", str(out)]
    with pytest.raises(
        RLAIFError, match=rf"a negative weight .*`rlaif train --resume {out} --reward {code}:length` asks"
    ):
        main([*line, "--reward.weight", "-1"])
    assert main([*line, "--reward.weight", "2", "--change-reward"]) == 0
    samples = [json.loads(row) for row in (out / "samples.jsonl").read_text().splitlines()]
    assert all(row["reward"] == 2 * len(row["response"]) for row in samples) and len(samples) == 12
    recorded = json.loads((out / "config.json").read_text())["config"]
    assert recorded["reward_options"] == {"weight": 2.0} and list(recorded["content"]["code"]) == [f"{code}:length"]
    resume = ["--resume", str(out)]
    with pytest.raises(
        RLAIFError, match=rf"expected {code}:length on the command line too.*add --reward {code}:length$"
    ):
        main(resume)
    assert main([*resume, "--reward", f"{code}:length"]) == 0
    code.write_text(LENGTH.replace("len(response)", "len(response) + 1"))
    with pytest.raises(RLAIFError, match=r"content\.code\..*own\.py:length: 'sha256:"):
        main([*resume, "--reward", f"{code}:length"])


def test_no_file_of_a_run_has_code_run(arguments: list[str], tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text("raise SystemExit('it ran')")
    assert main([*arguments, "--out", str(tmp_path / "run"), "--eval-prompts", "0"]) == 0
    file = tmp_path / "run" / "config.json"
    honest = json.loads(file.read_text())
    for reward, options in ((f"{code}:f", {}), ("compose", {"parts": {"a": [1.0, f"{code}:f"]}})):
        changed = {**honest["config"], "reward": reward, "reward_options": options}
        file.write_text(json.dumps({**honest, "config": changed}))
        with pytest.raises(RLAIFError, match="this run's reward is code, which runs only where you name it; add --rew"):
            main(["--resume", str(tmp_path / "run")])


def test_distinct_shares_average_to_distinct_n() -> None:
    texts = ["a b c", "a b d e", "", "x", "a b"]  # six 2-grams, four of them different
    assert distinct_shares(texts).mean() == pytest.approx(4 / 6)
    assert distinct_shares(["", "a"]).tolist() == [0, 0]


def test_one_update_of_the_real_model_on_the_real_task(tmp_path: Path) -> None:
    config = TrainConfig(updates=1, prompts_per_update=1, eval_prompts=2, out=tmp_path / "run")
    result = train(config)
    assert result.before is not None and result.after is not None
    assert 1 <= result.before.measures["score"].min() <= result.before.measures["score"].max() <= 10
    assert np.abs(result.before.measures["kl"]).max() < 1e-3
    rows = changes(result.before, result.after)
    assert rows["kl"][2].estimate == pytest.approx(rows["kl"][1].estimate, abs=1e-3)
