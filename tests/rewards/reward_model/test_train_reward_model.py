"""Training reward models: the loss by hand, the head, what is held out, figures, the command."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.reward_model.command import TrainRMConfig, describe, main, train_and_save
from rewards.reward_model.data import HoldOut, Judged, LabelledData, load_labels
from rewards.reward_model.head import Pairs, centred, fit_head, preference_loss
from rewards.reward_model.model import RewardModel, distilled_rm, human_rm
from rewards.reward_model.report import curve_plot, pair_accuracy, pair_figures, reliability_plot
from rewards.reward_model.training import RewardModelConfig, train_rm
from rlaif_env.api import DataError, Preference, RLAIFError
from rlaif_env.data.preferences import SPLITS, split_of, write_preferences
from rlaif_env.data.tasks import PromptSource, Task, load_task
from rlaif_env.models import backbone
from rlaif_env.statistics import excess_cross_entropy
from tests.tiny import tiny_backbone

TASK = Task("toy", "continuation", "how many a there are", 24, 8)
LETTERS = "aaabcdxyz "


def toy_preferences(n: int, seed: int, source: str = "ai:toy", prompt: bool = True) -> list[Preference]:
    """Pairs of random words; the one that has more of the letter a is preferred, softly."""
    random = np.random.default_rng(seed)
    rows: list[Preference] = []
    while len(rows) < n:
        first, second = ("".join(random.choice(list(LETTERS), size=8)) for _ in range(2))
        if first != second:
            p = 1 / (1 + math.exp(second.count("a") - first.count("a")))
            rows.append(Preference(f"say {len(rows)} " if prompt else "", first, second, p, source))
    return rows


def toy_data(n: int = 400) -> LabelledData:
    rows = toy_preferences(n + 200, seed=0)
    return LabelledData(rows[:n], rows[n : n + 100], {"labels": rows[n + 100 :]}, {})


def config(**settings: Any) -> RewardModelConfig:
    return RewardModelConfig(**{"max_tokens": 64, **settings})


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [-30.0, -2.0, 0.0, 0.5, 40.0])
def test_at_hard_labels_the_loss_is_bradley_terry(difference: float) -> None:
    margin = torch.tensor([difference], dtype=torch.float64)
    for p, sign in ((1.0, 1), (0.0, -1)):
        expected = math.log1p(math.exp(-abs(difference))) + max(0.0, -sign * difference)  # -log s(sign * difference)
        assert float(preference_loss(margin, torch.tensor([p], dtype=torch.float64))) == pytest.approx(
            expected, abs=1e-6
        )


def test_at_one_half_and_equal_scores_the_gradient_is_zero() -> None:
    scores = torch.zeros(2, requires_grad=True)
    preference_loss((scores[0] - scores[1])[None], torch.tensor([0.5])).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.0, 0.0]


def test_the_soft_loss_by_hand_and_its_minimum() -> None:
    margin = torch.tensor([math.log(3.0)], requires_grad=True)  # s(log 3) = 3/4
    loss = preference_loss(margin, torch.tensor([0.75]))
    assert loss.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-6)
    loss.backward()
    assert margin.grad is not None
    assert float(margin.grad) == pytest.approx(0.0, abs=1e-7)


def test_exchanging_the_responses_changes_nothing() -> None:
    margins, p = torch.randn(20), torch.rand(20)
    assert float(preference_loss(margins, p)) == pytest.approx(float(preference_loss(-margins, 1 - p)), abs=1e-6)


# --- the head ---------------------------------------------------------------------------------------------------------


def random_pairs(n: int, m: int, score: torch.Tensor, seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(n, (m,), generator=generator) for _ in range(2))
    return Pairs(first, second, torch.sigmoid(score[first] - score[second]).float())


def test_the_head_finds_the_direction_that_made_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 2, 8)
    features = torch.randn(600, 8, generator=generator) * scale + 5
    truth = torch.randn(8, generator=generator) / scale
    score = features @ truth
    train, validation = random_pairs(400, 3000, score[:400], 1), random_pairs(200, 1000, score[400:], 2)
    fit = fit_head(features[:400], train, features[400:], validation, penalties=(1.0, 0.01, 1e-5))
    assert fit.penalty == 1e-5
    assert torch.allclose(fit.weight * scale, truth * scale, atol=0.03)
    again = fit_head(features[:400], train, features[400:], validation, penalties=(1.0, 0.01, 1e-5))
    assert torch.equal(fit.weight, again.weight)


def test_the_path_stops_early_on_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    features, noise = torch.randn(260, 60, generator=generator), torch.randn(260, generator=generator) * 3
    train, validation = random_pairs(130, 80, noise[:130], 1), random_pairs(130, 500, noise[130:], 2)
    assert fit_head(features[:130], train, features[130:], validation).penalty >= 0.1


def test_a_centred_head_has_mean_zero_and_the_same_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 12, generator=generator) * 0.3
    features[:, 0] = 4.0  # the direction in which all are alike
    weight = torch.randn(12, generator=generator) + 2
    before, after = features @ weight, features @ centred(weight, features)
    assert float(after.mean()) == pytest.approx(0.0, abs=1e-4)
    assert torch.allclose(after[1:] - after[:-1], before[1:] - before[:-1], atol=1e-3)


# --- data -------------------------------------------------------------------------------------------------------------


def labels_of(path: Path, rows: list[Preference], task: Task = TASK, **settings: Any) -> LabelledData:
    write_preferences(path / "p.jsonl", rows)
    limits = {"pairs": 10_000, "texts": 0, "test_pairs": 1000, "seed": 0, **settings}
    return load_labels(task, path / "p.jsonl", **limits)


def test_a_prompt_is_never_on_two_sides(tmp_path: Path) -> None:
    rows = [Preference(f"q{i % 40}", f"a{i}", f"b{i}", 0.7, "ai:x") for i in range(400)]
    data = labels_of(tmp_path, rows, hold_out=HoldOut("prompt"))
    sides = [{r.prompt for r in side} for side in (data.train, data.validation, data.tests["labels"])]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 40
    assert len(data.train) + len(data.validation) + len(data.tests["labels"]) == 400
    assert data.left_out == {}
    assert data.division["sides"]["labels"] == {"pairs": 40, "prompts": 4, "texts": 80}
    assert any("40 pairs (labels) have 4 independent prompts" in warning for warning in data.division["warnings"])


def test_whole_texts_are_divided_by_text_and_what_crosses_is_counted(tmp_path: Path) -> None:
    rows = [Preference("", f"text {i}", f"text {j}", 0.7, "ai:x") for i in range(60) for j in range(i)]
    data = labels_of(tmp_path, rows, hold_out=HoldOut("text"))
    sides = [
        {t for r in side for t in (r.response_1, r.response_2)}
        for side in (data.train, data.validation, data.tests["labels"])
    ]
    assert sides[0].isdisjoint(sides[1] | sides[2]) and sides[1].isdisjoint(sides[2])
    kept = len(data.train) + len(data.validation) + len(data.tests["labels"])
    assert kept + data.left_out["texts of two sides"] == len(rows)
    for held in (data.validation, data.tests["labels"]):
        assert abs(len(held) / kept - 0.1) < 0.02


def test_labels_of_corpus_texts_are_divided_by_hash(tmp_path: Path) -> None:
    rows = [Preference("", f"text {i}", f"text {i + 1}", 0.7, "ai:x") for i in range(300)]
    write_preferences(tmp_path / "p.jsonl", rows)
    limits = {"pairs": 10_000, "texts": 0, "test_pairs": 50, "seed": 0}
    data = load_labels(load_task("movie-review"), tmp_path / "p.jsonl", **limits)
    sides = [
        {split_of(t, {"train": 0.8, "validation": 0.1, "test": 0.1}, 1) for t in (r.response_1, r.response_2)}
        for r in rows
    ]
    assert len(data.train) == sum(side == {"train"} for side in sides)
    assert len(data.validation) == sum(side == {"validation"} for side in sides)
    assert data.left_out["texts of two sides"] == sum(len(side) == 2 for side in sides)
    asked = load_labels(load_task("movie-review"), tmp_path / "p.jsonl", **limits, hold_out=HoldOut("text"))
    assert len(asked.validation) > len(data.validation)


def test_a_test_file_of_ones_own(tmp_path: Path) -> None:
    rows = toy_preferences(200, seed=0, prompt=False)
    write_preferences(tmp_path / "test.jsonl", [*rows[:20], Preference("", rows[30].response_1, "another", 1.0)])
    data = labels_of(tmp_path, rows, test=tmp_path / "test.jsonl")
    assert set(data.tests) == {"test file"} and len(data.tests["test file"]) == 21
    tested = {t for r in data.tests["test file"] for t in (r.response_1, r.response_2)}
    trained = {t for r in (*data.train, *data.validation) for t in (r.response_1, r.response_2)}
    assert trained.isdisjoint(tested)
    assert data.left_out["texts of the test file"] >= 21
    assert len(data.train) + len(data.validation) == 200 - data.left_out["texts of the test file"]


def test_folds_test_each_pair_once_on_what_was_not_trained_on(tmp_path: Path) -> None:
    rows = [Preference(f"q{i % 30}", f"a{i}", f"b{i}", 0.7, "ai:x") for i in range(300)]
    data = labels_of(tmp_path, rows, hold_out=HoldOut(folds=10))
    assert data.tests == {} and data.division["unit"] == "prompt"
    assert len(data.train) + len(data.validation) == 300
    assert sorted(r.response_1 for fold in data.folds for r in fold.tests["labels"]) == sorted(
        r.response_1 for r in rows
    )
    for fold in data.folds:
        sides = [{r.prompt for r in side} for side in (fold.train, fold.validation, fold.tests["labels"])]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 30


def test_several_raters_equal_responses_and_equal_texts(tmp_path: Path) -> None:
    rows = [Preference(f"q{i}", f"a{i}", f"b{i}", float(k), "human") for i in range(100) for k in (0, 1, 1)]
    data = labels_of(tmp_path, [*rows, Preference("q", "same", "same", 0.5)])
    kept = [*data.train, *data.validation, *data.tests["labels"]]
    assert len(kept) == 100 and {record.p_first for record in kept} == {2 / 3}
    assert data.left_out == {"two equal responses": 1, "further judgements of a pair, averaged": 200}


def test_of_a_file_sorted_by_prompt_some_of_all_prompts_are_taken(tmp_path: Path) -> None:
    rows = [Preference(f"q{i // 100}", f"a{i}", f"b{i}", 0.7, "ai:x") for i in range(4000)]
    data = labels_of(tmp_path, rows, pairs=400, test_pairs=200)
    assert len({r.prompt for r in data.train}) == len({r.prompt for r in data.tests["labels"]}) == 40
    folded = labels_of(tmp_path, rows, test_pairs=400, hold_out=HoldOut(folds=10))
    assert len({r.prompt for fold in folded.folds for r in fold.tests["labels"]}) == 40
    assert folded.division["folds"] == {"pairs": 400, "of": 4000, "dropped": 0}


def test_the_tasks_own_splits_make_no_folds() -> None:
    limits = {"pairs": 10, "texts": 0, "test_pairs": 5, "seed": 0}
    with pytest.raises(RLAIFError, match="expected a file of labels to make folds of, found the task's own"):
        load_labels(load_task("movie-review"), "human", **limits, hold_out=HoldOut(folds=5))


def test_a_file_made_from_one_split_of_a_task_can_still_be_divided(tmp_path: Path) -> None:
    prompts = [f"q{i}" for i in range(400) if split_of(f"q{i}") == "train"]
    data = labels_of(tmp_path, [Preference(prompt, "a", "b", 0.7, "ai:x") for prompt in prompts])
    assert len(data.train) < 0.9 * len(prompts)
    assert len(data.validation) > 10
    assert len(data.tests["labels"]) > 10


def test_conversations_are_not_read_as_reviews(tmp_path: Path) -> None:
    rows = [Preference(f"\n\nHuman: q{i}\n\nAssistant:", f" a{i}", f" b{i}", 1.0) for i in range(400)]
    write_preferences(tmp_path / "hh.jsonl", rows)
    limits: dict[str, Any] = {"pairs": 400, "texts": 0, "test_pairs": 9, "seed": 0}
    message = r"expected a dialogue task, such as helpful .* in .*hh.jsonl, found movie-review, a continuation task"
    with pytest.raises(RLAIFError, match=message):
        load_labels(load_task("movie-review"), tmp_path / "hh.jsonl", **limits)
    assert len(load_labels(load_task("helpful"), tmp_path / "hh.jsonl", **limits).train) > 200


def test_what_is_beyond_a_limit_is_counted(tmp_path: Path) -> None:
    rows = toy_preferences(200, seed=1)
    everything = labels_of(tmp_path, rows)
    data = labels_of(tmp_path, rows, pairs=50)
    assert len(data.train) == 50
    assert data.left_out == {"beyond the number of pairs": len(everything.train) - 50}
    fewer = labels_of(tmp_path, rows, texts=30)
    assert len({(r.prompt, t) for r in fewer.train for t in (r.response_1, r.response_2)}) <= 30
    assert fewer.left_out["beyond the number of texts"] == len(everything.train) - len(fewer.train)


def test_a_training_on_few_texts_reads_few_for_its_choices(tmp_path: Path) -> None:
    rows = toy_preferences(3000, seed=1)
    assert (len(labels_of(tmp_path, rows).validation), len(labels_of(tmp_path, rows, pairs=50).validation)) == (
        250,
        100,
    )


def test_the_tasks_own_preferences_are_the_human_labels(tmp_path: Path) -> None:
    files = {}
    for number, split in enumerate(SPLITS):
        files[split] = str(tmp_path / f"{split}.jsonl")
        write_preferences(files[split], toy_preferences(30, seed=number, source="human"))
    task = Task("toy", "continuation", "c", 24, 8, PromptSource(preferences=files))
    with pytest.raises(RLAIFError, match="expected preferences in the train split of human, found none"):
        load_labels(task, "human", pairs=0, texts=0, test_pairs=9, seed=0)
    data = load_labels(task, "human", pairs=20, texts=0, test_pairs=9, seed=0)
    assert (len(data.train), len(data.validation)) == (20, 30)
    # all splits have the prompts "say 0" to "say 29": those of the training are taken out of the test
    assert data.left_out["human test pairs with a text of the training"] == 9
    assert data.tests == {}


def test_too_few_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RLAIFError, match=r"expected preferences in the \w+ split of .*, found none; about 20 pairs"):
        labels_of(tmp_path, toy_preferences(1, seed=0))


def test_bad_rows_are_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    write_preferences(file, toy_preferences(3, seed=0))
    with file.open("a") as stream:
        stream.write('{"prompt": "q", "response_1": "a", "response_2": "b", "p_first": 1.5}\n')
    with pytest.raises(DataError, match=r"line 4: expected p_first to be a number from 0 to 1, found 1.5"):
        load_labels(TASK, file, pairs=9, texts=0, test_pairs=9, seed=0)


def test_each_text_is_encoded_once() -> None:
    rows = [
        Preference("p ", "one", "two", 0.6),
        Preference("p ", "two", "three", 0.4),
        Preference("q ", "one", "two", 1),
    ]
    judged = Judged.encode(tiny_backbone().tokenizer, TASK, rows, 6)
    assert len(judged.rows) == 5
    assert judged.pairs.first.tolist() == [0, 1, 3]
    assert judged.pairs.second.tolist() == [1, 2, 4]
    assert judged.truncated == 1  # "p three" has 7 characters


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head() -> Any:
    return train_rm(config(), tiny_backbone(), TASK, toy_data())


def test_a_head_learns_the_labels(head: Any) -> None:
    figures = head.figures["labels"]
    assert figures.accuracy.low > 0.55  # one pair in four is a tie, which counts one half
    target = [r.p_first for r in toy_data().tests["labels"]]
    assert figures.excess_cross_entropy < excess_cross_entropy(np.zeros(100), target)
    assert head.report["training"]["layers"] in (1, 2)
    assert [row["pairs"] for row in head.report["curve"]] == [128, 256, 400]


def test_the_figures_are_those_of_the_model_in_service(head: Any) -> None:
    tests = toy_data().tests["labels"]
    p = head.model.p_first([r.prompt for r in tests], [r.response_1 for r in tests], [r.response_2 for r in tests])
    target = np.array([r.p_first for r in tests])
    assert head.figures["labels"].brier == pytest.approx(float(np.mean((p - target) ** 2)), abs=1e-4)


def test_scores_have_mean_zero_on_the_training_responses(head: Any) -> None:
    texts = {(r.prompt, t) for r in toy_data().train for t in (r.response_1, r.response_2)}
    prompts, responses = zip(*texts, strict=True)
    assert head.model.score(prompts, responses).values.mean() == pytest.approx(0.0, abs=1e-3)


def test_standardised_rewards_have_deviation_one_on_the_training_responses() -> None:
    data = toy_data(120)
    model = train_rm(config(normalize="standardize", center=False), tiny_backbone(), TASK, data).model
    texts = {(r.prompt, t) for r in data.train for t in (r.response_1, r.response_2)}
    values = model.score(*zip(*texts, strict=True)).values
    assert (values.mean(), values.std()) == (pytest.approx(0.0, abs=1e-3), pytest.approx(1.0, abs=1e-3))


def test_training_twice_with_a_seed_gives_the_same_model() -> None:
    weights = [train_rm(config(), tiny_backbone(), TASK, toy_data(60)).model.weight for _ in range(2)]
    assert torch.equal(*weights)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_gradients_through_the_model_lower_the_loss_and_save_what_they_learned(trainable: Any, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_backbone().save_merged(None, folder)
    base = backbone(folder) if trainable == "lora" else tiny_backbone()  # a live model, shared with others
    before = base.fingerprint()
    data = toy_data(200)
    logged: list[dict[str, float]] = []
    settings = config(trainable=trainable, epochs=2, learning_rate=3e-3, batch_pairs=16, layers=2)
    trained = train_rm(settings, base, TASK, data, log=lambda step, metrics: logged.append(dict(metrics)))
    base._fingerprint = None
    assert base.fingerprint() == before
    validation = [row["validation_loss"] for row in logged if "validation_loss" in row]
    assert min(validation) < validation[0] - 0.01
    training = trained.report["training"]
    assert training["best_step"] > 0
    assert (
        abs(
            float(
                torch.as_tensor(
                    trained.model.raw_scores(
                        trained.model.encode([r.prompt for r in data.train], [r.response_1 for r in data.train])[0]
                    )
                ).mean()
            )
        )
        < 0.5
    )
    trained.model.save(tmp_path / "rm")
    tests = data.tests["labels"]
    texts = [r.prompt for r in tests], [r.response_1 for r in tests]
    opened = RewardModel.load(tmp_path / "rm")
    assert opened.score(*texts).values == pytest.approx(trained.model.score(*texts).values, abs=1e-4)
    assert opened.owns_weights == (trainable == "full")


def test_a_step_is_the_same_for_any_size_of_gradient_pass(tmp_path: Path) -> None:
    weights = []
    for micro_pairs in (2, 16):
        settings = config(trainable="lora", epochs=1, batch_pairs=16, micro_pairs=micro_pairs, layers=2)
        weights.append(train_rm(settings, tiny_backbone(), TASK, toy_data(32)).model.weight)
    assert torch.allclose(*weights, atol=1e-5)


def test_folds_are_measured_as_models_trained_without_them(tmp_path: Path) -> None:
    rows = toy_preferences(120, seed=0)
    data = labels_of(tmp_path, rows, hold_out=HoldOut(folds=4))
    trained = train_rm(config(folds=4), tiny_backbone(), TASK, data)
    figures = trained.figures["labels, 4 folds"]
    assert (figures.pairs, figures.prompts, figures.texts) == (120, 120, 240)
    right = []
    for fold in data.folds:
        p = train_rm(config(), tiny_backbone(), TASK, fold).model.p_first(
            *([getattr(r, name) for r in fold.tests["labels"]] for name in ("prompt", "response_1", "response_2"))
        )
        right.append(float(pair_accuracy(p, fold.tests["labels"])) * len(fold.tests["labels"]))
    assert float(figures.accuracy) == pytest.approx(sum(right) / 120, abs=1e-9)
    assert trained.report["held_out"]["folds"] == {"pairs": 120, "of": 120, "dropped": 0}


def test_truncated_texts_are_counted() -> None:
    report = train_rm(config(max_tokens=8), tiny_backbone(), TASK, toy_data(60)).report
    cut = report["training"]["truncated_texts"]
    assert cut == {"train": 120, "validation": 200, "test labels": 200}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_backbone().save_merged(None, tmp_path / "base")
    write_preferences(tmp_path / "p.jsonl", toy_preferences(300, seed=0))
    (tmp_path / "toy.toml").write_text(
        'name = "toy"\nkind = "continuation"\ncriterion = "c"\nmax_prompt_tokens = 24\nmax_response_tokens = 8\n'
    )
    arguments = ["--task", tmp_path / "toy.toml", "--labels", tmp_path / "p.jsonl", "--model", tmp_path / "base"]
    out = tmp_path / "run"
    for wrong in (["--labels", tmp_path / "typo.jsonl"], ["--task", "typo.toml"], ["--model", tmp_path / "typo"]):
        with pytest.raises(RLAIFError, match="typo"):
            main([str(a) for a in [*arguments, *wrong, "--out", out]])
    assert not out.exists()  # the command put right goes into the same folder
    assert main([str(a) for a in [*arguments, "--out", out, "--pairs", 200, "--max-tokens", 64]]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"divided by prompt \(train .*% of the pairs\): train 200 pairs of 200 prompts and 400 texts; validation ", said
    )
    assert re.search(r"on (\d+) held-out pairs \(labels\) of \1 prompts and \d+ texts: accuracy 0\.\d+ \[", said)
    assert re.search(r"pairs left out: \d+ beyond the number of pairs\n", said)
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "report.json",
        "reliability.png",
        "accuracy-by-pairs.png",
        "model",
    }
    report = json.loads((out / "report.json").read_text())
    assert report["training"]["pairs"] == 200
    assert set(report["figures"]["labels"]) >= {"accuracy", "excess_cross_entropy", "brier", "ece", "reliability"}
    assert "from 'ai:toy'" in (out / "model" / "README.md").read_text()
    model = distilled_rm(task=TASK, model=out)
    assert model.labels.sources == {"ai:toy": 200}
    with pytest.raises(RLAIFError, match="use reward 'distilled-rm'"):
        human_rm(task=TASK, model=out)


def test_a_dry_run_says_what_would_be_done_and_loads_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_backbone().save_merged(None, tmp_path / "base")
    for weights in (tmp_path / "base").glob("*.safetensors"):
        weights.unlink()
    rows = [Preference(f"topic {i % 30}", f"a{i}", f"b{i}", 1.0) for i in range(1500)]
    write_preferences(tmp_path / "p.jsonl", rows)
    (tmp_path / "toy.toml").write_text(
        'name = "toy"\nkind = "continuation"\ncriterion = "c"\nmax_prompt_tokens = 24\nmax_response_tokens = 8\n'
    )
    arguments = ["--task", tmp_path / "toy.toml", "--labels", tmp_path / "p.jsonl", "--model", tmp_path / "base"]
    before = set(tmp_path.iterdir())
    assert main([str(a) for a in [*arguments, "--dry-run"]]) == 0
    said = capsys.readouterr().out
    assert "divided by text (train 80.0%, validation 10.0%, test 10.0% of the pairs): train 1200 pairs of 30 " in said
    assert "in the test and in the training too: 30 prompts\n" in said
    assert "labels: 3" in said and "tokens, the longest text" in said
    assert main([str(a) for a in [*arguments, "--dry-run", "--split-by", "prompt"]]) == 0
    said = capsys.readouterr().out
    assert "warning: 150 pairs (labels) have 3 independent prompts" in said and "--folds 10" in said
    assert "are chosen on 150 validation pairs of 3 prompts and 300 texts only" in said
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 2}, "expected folds from 3"),
        ({"validation_share": 0.5, "test_share": 0.5}, "expected shares of validation and test that leave something"),
        ({"pairs": 0}, "expected pairs of at least 1, found 0"),
        ({"epochs": -1}, "expected epochs of at least 0, found -1"),
        ({"max_tokens": 1}, "expected max_tokens of at least 2, found 1"),
        ({"learning_rate": float("nan")}, "expected learning_rate of at least 0, found nan"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RLAIFError, match=message):
        RewardModelConfig(**settings)


def test_more_layers_than_there_are() -> None:
    with pytest.raises(RLAIFError, match="expected layers from 1 to 2 for tiny, or 0 to choose, found 3"):
        train_rm(config(layers=3), tiny_backbone(), TASK, toy_data(40))


# --- figures ----------------------------------------------------------------------------------------------------------


def whole(p_first: float, first: str = "a", second: str = "b", gap: float | None = None) -> Preference:
    return Preference("", first, second, p_first, "human", {} if gap is None else {"means": [gap, 0.0]})


def test_figures_by_hand() -> None:
    records = [
        whole(1.0, "aaa", "b", 0.6),
        whole(0.0, "c", "dd", -0.4),
        whole(0.5, "e", "f", 2.0),
        whole(0.75, "g", "h", 0.5),
    ]
    found = pair_figures([2.0, 1.0, 1.0, 0.0], records, min_gap=0.5)
    assert float(found.accuracy) == (1 + 0 + 0.5 + 0.5) / 4
    assert found.accuracy_at_gap is not None
    assert (float(found.accuracy_at_gap), found.accuracy_at_gap.n) == ((1 + 0.5 + 0.5) / 3, 3)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, 1.0, 0.0)]
    squares = [(s - r.p_first) ** 2 for s, r in zip(sigmoid, records, strict=True)]
    assert found.brier == pytest.approx(sum(squares) / 4)
    assert float(found.longer) == (1 + 1 + 0.5 + 0.5) / 4
    assert "accuracy_at_gap" in found.to_json()
    json.dumps(found.to_json())


def test_a_calibrated_model_is_calibrated_whatever_response_a_file_lists_first() -> None:
    random = np.random.default_rng(3)
    margin = random.normal(scale=2.0, size=4000)
    first_wins = random.random(4000) < 1 / (1 + np.exp(-margin))
    drawn = [whole(float(won), f"a{i}", f"b{i}") for i, won in enumerate(first_wins)]
    chosen_first = [record if won else record.swapped() for record, won in zip(drawn, first_wins, strict=True)]
    one = pair_figures(margin, drawn, min_gap=0.5)
    other = pair_figures(np.where(first_wins, margin, -margin), chosen_first, min_gap=0.5)
    assert {record.p_first for record in chosen_first} == {1.0}
    assert one.ece < 0.02
    assert all(row.observed and row.observed.low <= row.predicted <= row.observed.high for row in other.reliability)
    for name in ("ece", "brier", "excess_cross_entropy"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-12)
    assert other.accuracy == one.accuracy
    assert [row.n for row in other.reliability] == [row.n for row in one.reliability]


def test_too_few_independent_pairs_have_no_interval() -> None:
    records = [Preference(f"topic {i % 3}", f"a{i}", f"b{i}", 1.0) for i in range(150)]
    found = pair_figures(np.random.default_rng(0).normal(1, 1, 150), records, min_gap=0.5)
    assert (found.pairs, found.prompts, found.texts, found.accuracy.units) == (150, 3, 300, 3)
    assert found.accuracy.low is found.accuracy.high is found.longer.low is None
    assert str(found.accuracy).endswith(" (3 units only) (n = 150)")
    assert all(row.observed is None or row.observed.low is None for row in found.reliability)
    reliability_plot({"few": found})
    curve_plot([{"pairs": 128, "accuracy": asdict(found.accuracy)}], "few")
    enough = [replace(record, prompt=f"topic {i % 8}") for i, record in enumerate(records)]
    found = pair_figures(np.random.default_rng(0).normal(1, 1, 150), enough, min_gap=0.5)
    assert found.accuracy.low > 0 and found.accuracy.units == 8


def test_pairs_that_share_texts_have_the_wider_interval() -> None:
    random = np.random.default_rng(0)
    disjoint = [whole(1.0, f"x{i}", f"y{i}") for i in range(200)]
    star = [whole(1.0, f"x{i % 10}", f"y{i % 20}") for i in range(200)]
    texts_good = random.random(10) < 0.7
    p_star = [0.9 if texts_good[i % 10] else 0.1 for i in range(200)]
    p_disjoint = [0.9 if random.random() < 0.7 else 0.1 for _ in range(200)]
    wide, narrow = pair_accuracy(p_star, star), pair_accuracy(p_disjoint, disjoint)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert (wide.n, narrow.n) == (200, 200)


def test_the_dyadic_interval_covers() -> None:
    """Two-way dependence: each text has an error of its own. 400 data sets; coverage 95 % has a spread of 1.1 %."""
    random, covered = np.random.default_rng(1), 0
    pairs = [(i, j) for i in range(40) for j in range(i) if (i + j) % 6 == 0]
    records = [whole(1.0, f"t{i}", f"t{j}") for i, j in pairs]
    for _ in range(400):
        error = random.normal(size=40)
        margin = np.array([1.0 + error[i] + error[j] for i, j in pairs]) + random.normal(size=len(pairs))
        found = pair_accuracy(1 / (1 + np.exp(-margin)), records)
        covered += found.low <= 0.718 <= found.high  # P(N(1, 3) > 0) = 0.718
    assert 0.90 <= covered / 400 <= 0.985


def test_figures_need_pairs() -> None:
    with pytest.raises(RLAIFError, match="expected a prediction for each of at least one pair, found 0 and 0"):
        pair_figures([], [], min_gap=0.5)


def test_the_report_in_words(head: Any) -> None:
    said = describe(head)
    assert re.search(r"pairs: \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", said)
    assert "distilled-rm:tiny: 400 pairs of 800 texts (400 pairs from 'ai:toy')" in said
    assert "ECE" in said


@pytest.mark.slow
def test_people_prefer_what_the_model_prefers(tmp_path: Path) -> None:
    """The built-in model and corpus: a human reward model reaches 0.82 where ratings differ by half a point."""
    trained, _ = train_and_save(TrainRMConfig(merged=False, out=str(tmp_path / "run")), quiet=True)
    found = trained.figures["human"].accuracy_at_gap
    assert found is not None
    assert float(found) >= 0.82
