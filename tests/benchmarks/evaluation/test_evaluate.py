"""`rlaif evaluate`: systems on the same prompts, judges that may fail, win rates, and the command from end to end."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rich.console import Console

import rlaif_env  # noqa: F401  (registers the ids)
from agents.policy import Policy
from agents.training.command import main as train_main
from agents.training.heldout import evaluate_policy
from benchmarks.evaluation.command import EvaluateConfig, evaluate, main
from benchmarks.evaluation.judge_panel import JudgePanel, OncePerText
from benchmarks.evaluation.judges import judged, pairwise_wins, score_rows, win_rates, with_gold
from benchmarks.evaluation.systems import System, answer, find_source, read_responses, read_system, write_system
from benchmarks.evaluation.tables import evaluation, write_evaluation
from rewards.endpoint.config import ServerConfig
from rewards.labeling.labeler import LabelingConfig, PreferenceLabeler
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import BackendError, DataError, RLAIFError, Scores
from rlaif_env.data.journal import Journal
from rlaif_env.data.tasks import PromptSource, Task, load_task
from rlaif_env.models import backbone
from rlaif_env.servers.limits import Limits
from tests.rewards.labeling.labelling import Judge, write_rows
from tests.stress.endpoint_server import FaultServer
from tests.tiny import character_tokenizer, tiny_backbone

PROMPTS = ("ab", "film", "xyz.", "Q", "good w", "oh no, not")
TASK = Task(
    name="toy",
    kind="continuation",
    criterion="how positive it is",
    max_prompt_tokens=16,
    max_response_tokens=6,
    source=PromptSource(prompts={"train": PROMPTS, "test": PROMPTS}),
    gold="vader",
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # an unknown model is not asked for at length


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: "base", "copy" (the same weights), "other" (others), "wider" (another tokenizer)."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed, extra in (("base", 0, ()), ("copy", 0, ()), ("other", 1, ()), ("wider", 2, ("film", "good"))):
        tiny_backbone(seed, extra).save_merged(None, folder / name)
    return folder


@pytest.fixture
def ask(models: Path) -> Callable[..., System]:
    """Asks a policy, with "base" as the reference."""

    def call(source: str | Path, name: str = "a", **options: Any) -> System:
        return answer(name, source, TASK, **{"prompts": 6, "reference": models / "base", **options})

    return call


class Length:
    """Likes long responses; fails on those with a "!" in them, naming the rows or not."""

    name = "length"

    def __init__(self, names_rows: bool = True) -> None:
        self.names_rows = names_rows
        self.calls = 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        self.calls += 1
        if bad := [i for i, response in enumerate(responses) if "!" in response]:
            raise BackendError("no score", bad if self.names_rows else ())
        return Scores(np.array([len(response) for response in responses], dtype=np.float32))


def system(name: str, responses: Sequence[str], **measures: Sequence[float]) -> System:
    columns = {"length": [max(1, len(r)) for r in responses], **measures}
    values = {key.replace("__", ":"): np.array(column, dtype=np.float64) for key, column in columns.items()}
    return System(name, "here", [f"prompt {i}" for i in range(len(responses))], list(responses), values)


# --- answering


def test_the_reference_and_its_copy_answer_alike_and_are_at_distance_zero(
    ask: Callable[..., System], models: Path
) -> None:
    one, two, other = ask("sft", "one"), ask(models / "copy", "two"), ask(models / "other", "three")
    assert one.responses == two.responses != other.responses
    assert (one.measures["kl"] == 0).all() and (two.measures["kl"] == 0).all() and other.measures["kl"].any()
    rows = win_rates([with_gold(one, TASK), with_gold(two, TASK)], "gold")
    assert [(row["raw"]["estimate"], row["ties"], row["p_value"]) for row in rows] == [(0.5, 6, 1.0)] * 2
    assert [row["length_controlled"]["estimate"] for row in rows] == [0.5, 0.5]


def test_answers_are_those_of_the_held_out_evaluation_of_training(ask: Callable[..., System], models: Path) -> None:
    envs = gym.make_vec(
        "RLAIF/TextGeneration-v0",
        num_envs=6,
        task=TASK,
        reward=lambda prompts, responses: [0.0] * len(prompts),
        tokenizer=str(models / "other"),
        split="test",
    )
    policy = Policy(models / "other", trainable="none", temperature=0.9)
    there = evaluate_policy(policy, envs, TASK, seed=3, batch=4)
    here = with_gold(ask(models / "other", seed=3, batch=4), TASK)
    assert here.responses == there.responses and here.prompts == there.prompts == list(PROMPTS)
    for name in ("gold", "distinct-2"):
        np.testing.assert_allclose(here.measures[name], there.measures[name])


def test_kl_and_perplexity_are_those_of_the_models_row_by_row(ask: Callable[..., System], models: Path) -> None:
    found = ask(models / "other", temperature=0.7)
    base, other = backbone(models / "base"), backbone(models / "other")

    def logprobs(model: Any, prompt: str, tokens: list[int], temperature: float) -> float:
        ids = torch.tensor([model.tokenizer(prompt, add_special_tokens=False)["input_ids"] + tokens])
        with torch.no_grad():
            rows = (model.model(input_ids=ids).logits[0, -len(tokens) - 1 : -1] / temperature).log_softmax(-1)
        return float(rows[torch.arange(len(tokens)), tokens].sum())

    for i, (prompt, response) in enumerate(zip(found.prompts, found.responses, strict=True)):
        tokens = base.tokenizer(response, add_special_tokens=False)["input_ids"]
        nll = -logprobs(base, prompt, tokens, 1.0)
        assert found.measures["reference_nll"][i] == pytest.approx(nll, abs=1e-3)
        assert found.measures["perplexity"][i] == pytest.approx(np.exp(nll / len(tokens)), rel=1e-3)
        assert found.measures["length"][i] == len(tokens)
        sampled = tokens + [base.tokenizer.eos_token_id] * (len(tokens) < TASK.max_response_tokens)
        kl = logprobs(other, prompt, sampled, 0.7) - logprobs(base, prompt, sampled, 0.7)
        assert found.measures["kl"][i] == pytest.approx(kl, abs=1e-3)


def test_long_prompts_are_cut_as_the_task_says(models: Path) -> None:
    options: dict[str, Any] = {"prompts": 6, "reference": models / "base"}
    cut = answer("a", models / "base", replace(TASK, max_prompt_tokens=3, truncate_prompts=True), **options)
    ends = {"test": tuple(prompt[-3:] for prompt in PROMPTS)}
    same = answer("a", models / "base", replace(TASK, source=PromptSource(prompts=ends)), **options)
    assert cut.responses == same.responses and cut.prompts == list(PROMPTS)


def test_a_policy_with_another_tokenizer_has_no_kl_but_all_else(ask: Callable[..., System], models: Path) -> None:
    found = ask(models / "wider")
    assert "kl" not in found.measures
    assert np.isfinite(found.measures["length"]).all() and len(found.responses) == 6


def test_a_checkpoint_is_its_run_s_policy_and_leaves_no_adapter(models: Path, tmp_path: Path) -> None:
    toml = tmp_path / "toy.toml"
    source = "".join(f"{split} = {json.dumps(PROMPTS)}\n" for split in ("train", "test"))
    toml.write_text(
        'name = "toy"\nkind = "continuation"\ncriterion = "c"\nmax_prompt_tokens = 16\nmax_response_tokens = 6\n'
        f"[source.prompts]\n{source}"
    )
    run, base = tmp_path / "run", backbone(models / "base")
    line = f"--task {toml} --model {models / 'base'} --reward.model {models / 'base'} --reward.minimum-mass 0.0 "
    line += f"--out {run} --updates 2 --prompts-per-update 2 --group-size 2 --eval-prompts 0 "
    line += "--agent.temperature 0.8 --agent.learning-rate 0.1"
    assert train_main(line.split()) == 0
    assert find_source(run).temperature == 0.8 and find_source(run / "policy").temperature == 0.8
    whole, adapter = (
        answer("a", source, load_task(toml), prompts=6, reference=models / "base")
        for source in (run, run / "checkpoints" / "000002")
    )
    assert whole.responses == adapter.responses and whole.measures["kl"].any()
    np.testing.assert_allclose(whole.measures["kl"], adapter.measures["kl"], atol=1e-3)
    assert base.adapters == []


def test_responses_made_elsewhere_are_matched_by_prompt(ask: Callable[..., System], tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": f" was {i}"} for i, p in enumerate(PROMPTS)]
    rows[2]["response"] = ""
    path = write_rows(tmp_path / "made.jsonl", rows[::-1])
    found = ask(path, prompts=4)  # the file may answer the rest of the split too
    assert found.responses == [" was 0", " was 1", "", " was 3"] and "kl" not in found.measures
    assert found.measures["length"].tolist() == [6, 6, 0, 6] and found.measures["words"].tolist() == [2, 2, 0, 2]
    assert np.isnan(found.measures["perplexity"]).tolist() == [False, False, True, False]
    shown = evaluation([found], [], {})
    assert shown["systems"][0]["empty"] == 1 and shown["measures"]["a"]["perplexity"]["failed"] == 1
    other = system("b", ["x"] * 4)
    rows = win_rates([found, System("b", "", found.prompts, other.responses, other.measures)], "length")
    assert rows[0]["wins"] == 3 and rows[0]["losses"] == 1 and rows[0]["length_controlled"] is not None


def test_responses_may_be_messages_and_come_in_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = (
        pytest.importorskip(name, reason="the extra 'data' is needed") for name in ("pyarrow", "pyarrow.parquet")
    )
    asked = "\n\nHuman: Q\n\nAssistant:"
    task = Task("toy", "dialogue", "c", 24, 8, PromptSource(prompts={"test": [asked]}))
    row = {"prompt": [{"role": "user", "content": "Q"}], "response": [{"role": "assistant", "content": "Y"}]}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "made.parquet")
    assert find_source(tmp_path / "made.parquet").kind == "file"
    assert read_responses(tmp_path / "made.parquet", task, prompts=1) == ["Y"]
    row["response"] = [{"role": "user", "content": "Y"}]
    with pytest.raises(RLAIFError, match="expected response to begin with a message of the assistant, found 'user'"):
        read_responses(write_rows(tmp_path / "made.jsonl", [row]), task, prompts=1)


GOOD = [{"prompt": p, "response": "x"} for p in PROMPTS]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[1:], "found 1 without a response \\(such as 'ab'\\)"),
        ([*GOOD, {"prompt": "new", "response": "x"}], "found 1 that split 'test' does not have \\(such as 'new'\\)"),
        ([*GOOD, GOOD[0]], "found 1 with more than one \\(such as 'ab'\\)"),
        ([GOOD[0], GOOD[0]], "found 5 without a response .*; 1 with more than one"),
        ([{"prompt": "ab"}], "line 1: expected a field 'response', found the fields prompt"),
        ([{"prompt": "ab", "response": None}], "line 1: expected a field 'response', found null"),
    ],
)
def test_a_file_that_does_not_answer_the_prompts_is_one_error(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RLAIFError, match=message):
        read_responses(write_rows(tmp_path / "made.jsonl", rows), TASK, prompts=6)


def test_what_is_no_policy_is_said_at_once(tmp_path: Path) -> None:
    for name in ("rm/model", "run/checkpoints/000004", "stray/checkpoints/000001", "bare", "sft-run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rm/model/reward_model.json").touch()
    (tmp_path / "run/config.json").write_text(json.dumps({"command": "train", "config": {"agent": {}}}))
    (tmp_path / "sft-run/config.json").write_text(json.dumps({"command": "sft", "config": {}}))
    for run in ("run/checkpoints/000004", "stray/checkpoints/000001"):
        (tmp_path / run / "agent.safetensors").touch()
    character_tokenizer().save_pretrained(tmp_path / "bare")
    (tmp_path / "bare/config.json").write_text('{"model_type": "llama"}')
    for source, message in (
        ("no-such-model", "unknown model 'no-such-model'"),
        ("./nothing", "expected a model folder, found nothing at nothing"),
        ("made.jsonl", "expected a file of responses at made.jsonl, found none"),
        (tmp_path / "rm", "expected a policy, found a reward model in"),
        (tmp_path / "run", "with the folder 'policy' .*000004 is its last checkpoint"),
        (tmp_path / "sft-run", "expected a finished run with the folder 'model'"),
        (tmp_path / "stray/checkpoints/000001", "inside its run folder"),
        (tmp_path / "bare", "expected safetensors weights in"),
    ):
        with pytest.raises(RLAIFError, match=message):
            find_source(source)


# --- judging


@pytest.mark.parametrize("names_rows", [True, False])
def test_rows_that_a_judge_fails_on_are_found_and_counted(names_rows: bool) -> None:
    texts = ["a", "bb!", "ccc", "dddd", "e!"]
    values, reasons = score_rows(Length(names_rows), ["p"] * 5, texts, batch=4)
    np.testing.assert_array_equal(values, [1, np.nan, 3, 4, np.nan])
    assert set(reasons) == {1, 4} and "no score" in reasons[1]


def test_a_judge_without_one_score_is_an_error_not_a_result() -> None:
    with pytest.raises(BackendError, match="expected scores of 'a' from the judge 'L', found that all 2 rows failed"):
        judged(system("a", ["!", "!!"]), "L", Length(), TASK)
    gone = Length(names_rows=True)
    with pytest.raises(BackendError, match=r"every row of 3 batches in a row failed .*no score"):
        score_rows(gone, ["p"] * 40, ["!"] * 40, batch=4)
    assert gone.calls == 3
    of_another_task = Length()
    of_another_task.task = load_task("helpful")  # type: ignore[attr-defined]
    with pytest.raises(RLAIFError, match="expected a judge of the task 'toy', found that 'L' judges 'helpful'"):
        judged(system("a", ["x", "y"]), "L", of_another_task, TASK)


def test_win_rates_by_hand() -> None:
    nan = np.nan
    a = system("a", ["x"] * 7, gold=[1, 2, 3, 4, nan, 0, 5])
    b = system("b", ["y"] * 7, gold=[0, 2, 5, 1, 9, nan, 5])
    c = system("c", ["z"] * 7, gold=[-1, -1, -1, -1, -1, -1, 6])
    rows = {(row["a"], row["b"]): row for row in win_rates([a, b, c], "gold", resamples=200)}
    assert len(rows) == 6
    ab, ba = rows["a", "b"], rows["b", "a"]
    assert [ab[key] for key in ("wins", "ties", "losses", "failed")] == [2, 2, 1, 2]
    assert ab["raw"]["estimate"] == 3 / 5 and ba["raw"]["estimate"] == 2 / 5 and ab["raw"]["units"] == 5
    assert (ab["raw"]["lowest"], ab["raw"]["highest"]) == (3 / 7, 5 / 7)  # no row is dropped from these
    assert ab["raw"]["low"] == pytest.approx(1 - ba["raw"]["high"])
    assert ab["p_value"] == ba["p_value"] == 1.0  # two to one
    assert rows["a", "c"]["p_value"] == rows["b", "c"]["p_value"] == pytest.approx(14 * 0.5**6)
    assert rows["a", "c"]["p_holm"] == pytest.approx(3 * 14 * 0.5**6)


def test_repeated_prompts_are_one_cluster_each() -> None:
    gold = {"a": [1, 1, 1, 1, 1, 0, 0], "b": [0, 0, 0, 0, 0, 1, 1]}
    once = [system(name, [name] * 7, gold=values) for name, values in gold.items()]
    twice = [
        System(s.name, s.source, s.prompts * 2, s.responses * 2, {k: np.tile(v, 2) for k, v in s.measures.items()})
        for s in once
    ]
    narrow, wide = (win_rates(systems, "gold", resamples=300)[0] for systems in (once, twice))
    assert wide["raw"]["estimate"] == narrow["raw"]["estimate"] == 5 / 7
    assert wide["raw"]["units"] == narrow["raw"]["units"] == 7
    shown = evaluation(twice, win_rates(twice, "gold", resamples=300), {"task": "toy"})["tables"]
    assert all("14 prompts (7 different)" in table["caption"] for table in shown if "Change" not in table["title"])
    assert wide["raw"]["low"] < 0.4 and wide["p_value"] > 0.1  # as fourteen prompts it would be 10 to 4, from 0.45


def test_four_prompts_have_figures_and_their_number_in_the_place_of_intervals() -> None:
    a = system("a", ["x", "yy", "z", "w"], gold=[1, 0.5, 1, 0])
    b = system("b", ["x", "y", "zz", "w"], gold=[0, 0.25, 0.5, 1])
    found = evaluation([a, b], win_rates([a, b], "gold", resamples=200), {"task": "toy"})
    assert found["measures"]["a"]["gold"] == {
        "estimate": 0.625, "low": None, "high": None, "n": 4, "units": 4, "failed": 0
    }  # fmt: skip
    against, _, change, wins, equal = (table["rows"] for table in found["tables"])
    assert against[0][2] == wins[1][1] == "0.250 (4 units only)" and "(4 units only)" in equal[1][1]
    assert change[0][1] == "-0.188 (4 units only)"


def test_a_pair_without_one_judged_row_is_shown_as_that() -> None:
    a, b = system("a", ["x"] * 2, gold=[1, np.nan]), system("b", ["y"] * 2, gold=[np.nan, 1])
    row = win_rates([a, b], "gold")[0]
    assert (row["raw"], row["length_controlled"], row["p_holm"], row["failed"]) == (None, None, None, 2)
    table = evaluation([a, b], win_rates([a, b], "gold"), {})["tables"][0]
    assert table["rows"][0][-1] == "not judged" and table["rows"][0][5] == "2"


def test_length_control_takes_away_what_length_alone_won() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, (2, 500))
    lengths[0] += rng.integers(0, 25, 500)
    wins = rng.random(500) < 1 / (1 + np.exp(-4 * (lengths[0] / lengths[1] - 1)))
    a, b = (
        system(name, [name] * 500, length=row, judge__j=score)
        for name, row, score in (("a", lengths[0], wins), ("b", lengths[1], ~wins))
    )
    row = win_rates([a, b], "judge:j")[0]
    assert row["raw"]["low"] > 0.6
    assert row["length_controlled"]["low"] < 0.5 < row["length_controlled"]["high"]
    assert row["length_controlled"]["slope"] > 0


def test_systems_that_cannot_be_compared_are_refused() -> None:
    a, b = system("a", ["x"]), system("b", ["x"])
    moved = System("c", "", ["elsewhere"], ["x"], a.measures)
    for systems, measure, message in (
        ([a, a], "length", "expected systems of different names, found a, a"),
        ([a, moved], "length", "the same prompts in the same order, found others in 'a' and 'c'"),
        ([a, b], "gold", "expected the measure 'gold' of system 'a', found length"),
    ):
        with pytest.raises(RLAIFError, match=message):
            win_rates(systems, measure)


# --- pairs


def labeler(judge: Judge, **options: Any) -> PreferenceLabeler:
    return PreferenceLabeler(judge, "helpful", **options)


def test_pairs_are_asked_in_both_orders_and_never_twice(tmp_path: Path) -> None:
    a, b, c = (system(name, [f"{name} {i}" for i in range(8)]) for name in "abc")
    same = System("same", "", a.prompts, a.responses, a.measures)
    judge = Judge(push=0.25)  # sees the first position so much better that it often wins in both orders
    with Journal(tmp_path / "pairs.jsonl") as journal:
        rows = pairwise_wins([a, b, c, same], labeler(judge), journal=journal, batch=5, resamples=200)
    # each of three pairs of different systems: neither "same" against the others nor against its equal is asked again
    assert len(judge.asked) == len(set(judge.asked)) == 8 * 3 * 2
    found = {(row["a"], row["b"]): row for row in rows}
    assert found["a", "same"]["raw"]["estimate"] == found["a", "same"]["soft"]["estimate"] == 0.5
    assert found["a", "same"]["ties"] == 8
    assert found["a", "same"]["position_bias"] is found["a", "same"]["label_mass"] is None
    assert found["a", "b"]["wins"] == found["b", "a"]["losses"]
    assert found["a", "b"]["soft"]["estimate"] == pytest.approx(1 - found["b", "a"]["soft"]["estimate"])
    # P("1") is 0.95 or 0.45: whoever is liked, no pair has the same position above ½ in both orders
    assert found["a", "b"]["position_bias"]["same_position"]["estimate"] == 0
    assert found["a", "b"]["label_mass"] == pytest.approx(0.8 * 1.0)
    again = Judge(push=0.25)
    with Journal(tmp_path / "pairs.jsonl") as journal:
        assert pairwise_wins([a, b, c, same], labeler(again), journal=journal, resamples=200) == rows
    assert again.asked == []


def test_win_rate_and_position_bias_count_the_same_prompts() -> None:
    prompts = [f"prompt {i % 6}" for i in range(24)]
    systems = [System(n, "", prompts, [f"{n} {i}" for i in range(24)], {"length": np.ones(24)}) for n in "ab"]
    row = pairwise_wins(systems, labeler(Judge(push=0.25)), resamples=200)[0]
    figures = [row["raw"], row["soft"], row["length_controlled"], row["position_bias"]["same_position"]]
    assert [(figure["n"], figure["units"]) for figure in figures] == [(24, 6)] * 4


def test_equal_texts_are_a_tie_though_their_scores_differ_by_what_batches_do() -> None:
    texts, others = [f"text {i}" for i in range(8)], [f"text {i}" if i < 4 else f"another text {i}" for i in range(8)]
    noise = 1e-6 * np.random.default_rng(0).normal(size=8)  # backends may differ by 1e-5 between batches
    a = system("a", texts, judge__j=[1.0] * 8)
    b = system("b", others, judge__j=np.array([1.0] * 4 + [2.0] * 4) + noise)
    row = win_rates([a, b], "judge:j", resamples=200)[0]
    assert [row[name] for name in ("wins", "ties", "losses")] == [0, 4, 4]
    row = pairwise_wins([a, b], labeler(judge := Judge(push=0.25)), resamples=200)[0]
    assert row["ties"] == 4 and row["position_bias"]["same_position"]["n"] == 4 and len(judge.asked) == 8
    unjudged = system("a", ["x", "y"], gold=[np.nan, 1.0]), system("b", ["x", "z"], gold=[np.nan, 2.0])
    assert [win_rates(unjudged, "gold")[0][name] for name in ("ties", "losses", "failed")] == [1, 1, 0]


def test_a_panel_s_judge_scores_a_text_once_and_names_the_rows_that_fail() -> None:
    judge = Length()
    once = OncePerText(judge)
    assert once.score(["p", "p", "q"], ["aa", "aa", "aa"]).values.tolist() == [2, 2, 2]
    assert once.score(["q", "p"], ["aa", "aa"]).values.tolist() == [2, 2] and judge.calls == 1
    with pytest.raises(BackendError, match="no score") as caught:
        once.score(["p", "p", "p", "p"], ["aa", "b!", "c", "b!"])
    assert caught.value.rows == (1, 3)
    assert once.score(["p"], ["c"]).values.tolist() == [1]  # it was not lost with the others


def test_pairs_without_an_answer_are_counted_with_their_reason() -> None:
    a, b = (system(name, [f"{name} {i}" for i in range(8)]) for name in "ab")
    judge = Judge()
    judge.fails = {"a 3"}
    rows = pairwise_wins([a, b], labeler(judge), resamples=200)
    assert [row["failed"] for row in rows] == [1, 1] and sum(rows[0][k] for k in ("wins", "ties", "losses")) == 7
    assert rows[0]["reasons"] == {"BackendError: no answer": 1}
    shown = evaluation([a, b], rows, {})["tables"]
    assert "1 ([0." in shown[0]["rows"][0][5] and "(1 failed)" in shown[3]["rows"][0][2]
    judge.fails = {"Response"}
    with pytest.raises(BackendError, match="every question of 3 batches in a row failed"):
        pairwise_wins([a, b], labeler(judge), batch=2)


# --- files and tables


def test_files_hold_every_row_and_text_stays_text(tmp_path: Path) -> None:
    nasty = ["<script>alert(1)</script>", "[bold]x[/bold]", "z" * 100_000]
    a = system("sft", nasty, judge__j=[1, np.nan, 3], kl=[0, 0, 0])
    b = system("b", ["one", "two", ""], judge__j=[2, 2, 2])
    write_evaluation(tmp_path, [a, b], win_rates([a, b], "judge:j", resamples=200), {"task": "toy", "seed": 0})
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["system"]) for row in rows] == [
        (f"prompt {i}", s) for i in range(3) for s in ("sft", "b")
    ]
    assert [row["response"] for row in rows[::2]] == nasty
    assert rows[2]["measures"] == {"length": 14, "judge:j": None, "kl": 0.0} and "kl" not in rows[1]["measures"]
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["title"] == "2 systems on toy" and found["facts"]["seed"] == 0
    assert found["measures"]["sft"]["judge:j"]["estimate"] == 2 and found["measures"]["sft"]["judge:j"]["failed"] == 1
    assert found["systems"][1] == {"name": "b", "source": "here", "responses": 3, "empty": 1}
    for table in found["tables"]:
        assert table["title"] and table["caption"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert all(isinstance(cell, str | int | float) for row in table["rows"] for cell in row)
    assert [table["title"] for table in found["tables"]] == [
        "Against sft", "Measures", "Change from sft", "Win rates: j", "Win rates at equal length: j"
    ]  # fmt: skip
    measures = {row[0]: row[1:] for row in found["tables"][1]["rows"]}
    assert "(1 of 3 without)" in measures["j"][0] and measures["empty responses"] == [0, 1]
    assert found["tables"][0]["rows"][0][-1] == "none shown"


def test_a_system_is_read_as_it_was_written_and_nothing_else_is(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    one = system("a", ["x", ""], gold=[0.25, np.nan], kl=[1e-300, -0.1])
    write_system(file, one)
    assert "NaN" not in file.read_text()
    again = read_system(file)
    assert (again.name, again.source, again.prompts, again.responses) == ("a", "here", one.prompts, one.responses)
    assert {*again.measures} == {*one.measures}
    for name, values in one.measures.items():
        np.testing.assert_array_equal(again.measures[name], values)
    for text in ("", "[]", '{"name": "a"}', '{"measures": {"gold": ["x"]}}', '{"prompt": "p", "measures": {}}\n{}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"expected a system's responses and measures in .*a\.json, found"):
            read_system(file)


# --- the command


@pytest.fixture
def options(models: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a whole evaluation on tiny models that judge themselves."""
    toml = tmp_path / "toy.toml"
    toml.write_text(
        'name = "toy"\nkind = "continuation"\ncriterion = "how good it is"\nmax_prompt_tokens = 16\n'
        f'max_response_tokens = 6\ngold = "vader"\n[source.prompts]\ntest = {json.dumps(PROMPTS)}\n'
    )
    made = write_rows(tmp_path / "made.jsonl", [{"prompt": p, "response": " is good"} for p in PROMPTS])
    return {
        "policies": ("sft", str(models / "other"), str(made)),
        "task": str(toml),
        "judges": ("direct-llm",),
        "judge": LanguageModelConfig(str(models / "base")),
        "label": LabelingConfig(scale=(0, 3), minimum_mass=1e-12),
        "reference": str(models / "base"),
        "prompts": 5,
        "resamples": 200,
        "out": tmp_path / "out",
    }


def arguments(options: dict[str, Any], prefix: str = "--") -> list[str]:
    line: list[str] = []
    for name, value in options.items():
        flag = prefix + name.replace("_", "-")
        if is_dataclass(value):
            usual = type(value)()
            changed = {k: v for k, v in vars(value).items() if v != getattr(usual, k)}
            line += arguments(changed, f"{flag}.")
        else:
            line += (
                [flag] if value is True else [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
            )
    return line


def test_the_command_writes_all_and_goes_on_after_any_stage(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"pairwise": True, "label": replace(options["label"], mode="score")}
    out = options["out"]
    assert main(arguments(options)) == 0
    shown = capsys.readouterr().out
    assert "Against sft" in shown and "direct-llm" in shown and "score pairs:" in shown and "made" in shown
    assert {p.name for p in (out / "systems").iterdir()} == {"00-sft.json", "01-other.json", "02-made.json"}
    first = (out / "evaluation.json").read_bytes()
    found = json.loads(first)
    assert found["measures"]["sft"]["kl"]["estimate"] == 0 and "kl" not in found["measures"]["made"]
    assert len(found["win_rates"]) == 3 * 6  # gold, direct-llm, pairs
    assert found["position_bias"] == []  # scores have no position
    assert len((out / "responses.jsonl").read_text().splitlines()) == 15

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was finished")

    # everything is there; then one system lacks its score; then one system and some answers are missing
    with monkeypatch.context() as finished:
        for place in ("command.answer", "judge_panel.make_reward", "command.score_rows"):
            finished.setattr(f"benchmarks.evaluation.{place}", never)
        finished.setattr("rewards.language_model.local.LocalLM.label_logprobs", never)
        assert main(arguments(options)) == 0
    assert (out / "evaluation.json").read_bytes() == first
    half = json.loads((out / "systems/01-other.json").read_text())
    del half["measures"]["judge:direct-llm"]
    (out / "systems/01-other.json").write_text(json.dumps(half))
    with monkeypatch.context() as answered:
        answered.setattr("benchmarks.evaluation.command.answer", never)
        assert main(arguments(options)) == 0
    assert (out / "evaluation.json").read_bytes() == first
    (out / "systems/00-sft.json").unlink()
    pairs = (out / "pairwise.jsonl").read_bytes()
    (out / "pairwise.jsonl").write_bytes(pairs[: len(pairs) // 2])
    assert main(arguments(options)) == 0
    again = json.loads((out / "evaluation.json").read_text())
    assert again["measures"] == found["measures"]
    for row, before in zip(again["win_rates"], found["win_rates"], strict=True):  # other batches of questions: rounding
        assert [row[k] for k in ("a", "b", "wins", "ties", "losses")] == [
            before[k] for k in ("a", "b", "wins", "ties", "losses")
        ]
        if "soft" in row:
            assert row["soft"]["estimate"] == pytest.approx(before["soft"]["estimate"], abs=1e-4)


def test_a_judge_behind_a_server_needs_its_key_and_keeps_it_secret(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_JUDGE", "sk-planted-0123456789")
    asked = ServerConfig(api_key_env="MY_JUDGE", cache=False, limits=Limits(retries=1), boundaries="prefix")
    with FaultServer(key="sk-planted-0123456789") as server:
        judge = LanguageModelConfig(server.model, server.url, server=asked)
        found = evaluate(EvaluateConfig(**{**options, "judge": judge, "label": LabelingConfig()}))
        assert any(path.endswith("completions") for path, _ in server.requests)
    rows = [row for row in found["win_rates"] if row["judge"] == "judge:direct-llm"]
    assert len(rows) == 6 and all(row["failed"] == 0 for row in rows)
    for file in options["out"].rglob("*.json*"):
        assert "sk-planted" not in file.read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"policies": ("sft", "no-such-model")}, "unknown model 'no-such-model'"),
        ({"policies": ("sft", "sft")}, "each of its own name, found sft, sft; write NAME=SOURCE"),
        ({"policies": ("a=sft", "a=sft")}, "each of its own name, found a, a"),
        ({"policies": ()}, "expected at least one policy, each of its own name, found none"),
        ({"judges": ("direct-llm", "nobody")}, "unknown reward 'nobody': expected one of compose, direct-llm"),
        ({"judges": ("human-rm", "human-rm")}, "judges of different names, found human-rm, human-rm; write LABEL:"),
        ({"judges": ("direct-llm", "human-rm")}, "expected the folder of a trained reward model, found none"),
        (
            {"judge_settings": {"direct-llm": 1}},
            "by name under the judges direct-llm, pairwise, found direct-llm: 1",
        ),
        (
            {"judge_settings": {"direct": {}}},
            "judge_settings by name under the judges direct-llm, pairwise, found direct: {}",
        ),
        ({"judge_settings": {"direct-llm": {"scales": 1}}}, "reward 'direct-llm': .*scales"),
        ({"pairwise": True, "judge_settings": {"pairwise": {"scales": 1}}}, "the pairwise judge: .*scales"),
        (
            {"judges": (), "pairwise": True, "label": LabelingConfig(scale=(1, 5))},
            r"a judge that scores for label.scale \(1, 5\), found the pairwise judge alone",
        ),
        ({"judges": ()}, "a language-model judge for the settings label.scale, label.minimum_mass, found none"),
        (
            {"label": LabelingConfig(cot=True)},
            "a pairwise judge for the settings label.cot, found none: give --pairwise",
        ),
        ({"prompts": 7}, "expected 1 to 6 prompts, as many as split 'test' of task 'toy' has, found 7"),
        ({"prompts": 1}, "expected at least 2 prompts, found 1"),
        ({"split": "gold"}, "expected prompts in the split 'gold', found none"),
    ],
)
def test_bad_settings_are_one_error_before_anything_slow(
    changed: dict[str, Any], message: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.evaluation.command.answer", lambda *a, **k: pytest.fail("a policy was asked"))
    with pytest.raises(RLAIFError, match=message):
        evaluate(EvaluateConfig(**{**options, **changed}))
    assert not options["out"].exists()


def test_settings_of_single_judges_are_json_at_the_command_line_only(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[EvaluateConfig] = []
    monkeypatch.setattr("benchmarks.evaluation.command.evaluate", lambda config, console: made.append(config))
    line = arguments(options)
    main([*line, "--judge-settings", '{"direct-llm": {"scale": [0, 5]}, "pairwise": {"shots": 2}}'])
    main(line)
    assert [config.judge_settings for config in made] == [
        {"direct-llm": {"scale": [0, 5]}, "pairwise": {"shots": 2}}, {}
    ]  # fmt: skip
    assert made[1] == EvaluateConfig(**options)
    for text in ("{", "[1]"):
        with pytest.raises(SystemExit):
            main([*line, "--judge-settings", text])
        assert "expected a JSON object" in capsys.readouterr().err


def test_settings_under_a_judge_s_name_go_before_the_shared_ones(models: Path) -> None:
    panel = JudgePanel(
        TASK,
        ["direct-llm", "short:direct-llm"],
        judge=LanguageModelConfig(str(models / "base")),
        label=LabelingConfig(scale=(0, 3), shots=0, mode="score"),
        settings={"short": {"scale": [0, 1]}, "pairwise": {"scale": [0, 2], "minimum_mass": 0.5}},
        pairwise=True,
    )
    whole, short = (panel.backend(name).backend for name in ("direct-llm", "short"))  # type: ignore[attr-defined]
    pairs = panel.labeler()
    assert [tuple(judge.scale) for judge in (whole, short, pairs)] == [(0, 3), (0, 1), (0, 2)]
    assert pairs.config.mode == "score" and pairs.config.minimum_mass == 0.5
    assert whole.language_model is short.language_model is pairs.language_model


def test_code_judges_under_its_name_or_a_label(options: dict[str, Any], tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text("def length(prompts, responses, weight=1.0):\n    return [weight * len(r) for r in responses]\n")
    options |= {"policies": ("sft",), "judges": (f"{code}:length", f"heavy:{code}:length"), "label": LabelingConfig()}
    options |= {"judge_settings": {"heavy": {"weight": 3}}}
    evaluate(EvaluateConfig(**options))
    rows = [json.loads(line) for line in (options["out"] / "responses.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["measures"]["judge:length"] == len(row["response"]) and row["measures"]["judge:heavy"] == 3 * len(
            row["response"]
        )
    code.write_text(code.read_text().replace("len(r)", "-len(r)"))
    with pytest.raises(RLAIFError, match=r"content\.judge\.length: 'sha256:") as told:
        evaluate(EvaluateConfig(**options))
    assert "content.judge.heavy" in str(told.value)


def test_a_changed_policy_is_another_evaluation(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"policies": ("sft", str(tmp_path / "made.jsonl")), "judges": (), "label": LabelingConfig()}
    screen = io.StringIO()
    evaluate(EvaluateConfig(**options), Console(file=screen, width=150))
    assert "Win rates:" not in screen.getvalue() and "Against sft" in screen.getvalue()  # two systems need no matrix
    write_rows(tmp_path / "made.jsonl", [{"prompt": p, "response": " is bad"} for p in PROMPTS])
    with pytest.raises(RLAIFError, match=r"\(content\.policy\.made: 'sha256:"):
        evaluate(EvaluateConfig(**options))


def test_changed_weights_of_a_judge_or_the_reference_are_another_evaluation(
    options: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    for name in ("judge", "own", "reference"):
        shutil.copytree(models / "base", tmp_path / name)
    options |= {"policies": (str(models / "other"),), "reference": str(tmp_path / "reference"), "pairwise": True}
    options |= {"judge": LanguageModelConfig(str(tmp_path / "judge"))}
    options |= {"judges": ("direct-llm", f"own:direct-llm={tmp_path / 'own'}")}
    evaluate(EvaluateConfig(**options))
    changes = {"judge": ["judge.direct-llm", "judge.pairwise"], "own": ["judge.own"], "reference": ["reference"]}
    for changed, names in changes.items():
        weights = tmp_path / changed / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes((models / "other" / "model.safetensors").read_bytes())
        with pytest.raises(RLAIFError, match="to hold a run of this configuration, found another") as told:
            evaluate(EvaluateConfig(**options))
        assert sorted(re.findall(r"content\.(\S+): 'sha256:", str(told.value))) == names
        weights.write_bytes(before)
    evaluate(EvaluateConfig(**options))  # another time of the same bytes is no change
