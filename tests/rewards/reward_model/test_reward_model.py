"""Reward models: one encoding, row-wise scores, files that plain transformers opens, provenance, clear errors."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rewards import check_backend, make_reward
from rewards.reward_model.data import Judged
from rewards.reward_model.features import encode_for_reward, extract, last_states, lora_targets
from rewards.reward_model.model import RewardModel, any_rm, distilled_rm, human_rm
from rewards.reward_model.record import LabelRecord, Normalization
from rlaif_env.api import Preference, RLAIFError
from rlaif_env.data.tasks import PromptSource, Task
from rlaif_env.models import Backbone, backbone
from tests.tiny import character_tokenizer, tiny_backbone, tiny_model

TEXTS = [
    "a fine film.",
    "bad",
    "so so, but long enough to be padded to",
    "",
    "x",
    "never again; it was dull and it was loud",
]
PROMPTS = ["the film was ", "", "it is ", "ok ", "a ", "no "]
HUMAN, AI, MIXED = {"human": 7}, {"ai:tiny": 5}, {"human": 3, "ai:tiny": 4}
TASK = Task("toy", "continuation", "how good it is", 24, 6, PromptSource(prompts={"train": ("the film", "ok")}))


def pads_with_eos(base: Backbone) -> Backbone:
    base.tokenizer.pad_token = base.tokenizer.eos_token
    return base


def reward_model(base: Backbone, labels: dict[str, int] = HUMAN, **settings: Any) -> RewardModel:
    weight = torch.randn(32, generator=torch.Generator().manual_seed(3)) / 4
    return RewardModel(base, weight, TASK, labels=LabelRecord(labels), **settings)


def with_adapter(base: Backbone, depth: int = 1) -> str:
    parameters = base.add_lora("mine", rank=2, alpha=4.0, targets=lora_targets(base.model, depth))
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return "mine"


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A tiny base model on disk."""
    folder = tmp_path / "base"
    tiny_backbone().save_merged(None, folder)
    return folder


@pytest.fixture
def saved(base_folder: Path, tmp_path: Path) -> Path:
    """A reward model on the tiny base, trained on human labels."""
    reward_model(backbone(base_folder), layers=1).save(tmp_path / "rm")
    return tmp_path / "rm"


# --- encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("response", ["good", "", "<eos>", "a<eos>b<eos><eos>"])
def test_an_encoded_text_ends_in_exactly_one_eos(pad_is_eos: bool, response: str) -> None:
    tokenizer = character_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    row, cut = encode_for_reward(tokenizer, TASK, "it is ", response, 64)
    assert row.count(tokenizer.eos_token_id) == 1
    assert row[-1] == tokenizer.eos_token_id
    assert cut == 0
    assert tokenizer.decode(row[:-1]) == "it is " + response.replace("<eos>", "")


def test_what_is_too_long_keeps_its_end_and_is_counted() -> None:
    tokenizer = character_tokenizer()
    row, cut = encode_for_reward(tokenizer, TASK, "the film was ", "wonderful", 8)
    assert (tokenizer.decode(row[:-1]), len(row), cut) == ("nderful", 8, 15)
    model = reward_model(tiny_backbone(), max_tokens=8)
    scores = model.score(["the film was ", ""], ["wonderful", "fine"])
    assert scores.info["truncated_tokens"].tolist() == [15, 0]
    assert model.score([""], ["nderful"]).values[0] == pytest.approx(scores.values[0], abs=1e-5)


def test_a_million_characters_are_scored_and_counted() -> None:
    scores = reward_model(tiny_backbone(), max_tokens=32).score([""], ["ab" * 500_000])
    assert scores.info["truncated_tokens"].tolist() == [1_000_000 - 31]
    assert np.isfinite(scores.values).all()


@pytest.mark.parametrize(
    ("kind", "prompt", "text"),
    [
        ("continuation", "It was", "It was fun"),
        ("summary", "A long post.", "A long post.\n\nSummary:  fun"),
        ("dialogue", "\n\nHuman: hi\n\nAssistant:", "\n\nHuman: hi\n\nAssistant: fun"),
        ("dialogue", "hi", "hi\n\nAssistant: fun"),
        ("dialogue", "", " fun"),
    ],
)
def test_prompt_and_response_make_one_text(kind: Any, prompt: str, text: str) -> None:
    tokenizer = character_tokenizer()
    task = Task("toy", kind, "how good it is", 24, 6)
    assert tokenizer.decode(encode_for_reward(tokenizer, task, prompt, " fun", 99)[0][:-1]) == text


def test_a_bos_stays_where_a_text_is_cut() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = character_tokenizer(("<s>",))
    tokenizer.bos_token = "<s>"
    ids = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=["<s>", "$A"], special_tokens=ids)
    row, cut = encode_for_reward(tokenizer, TASK, "", "abcdef", 5)
    assert (row[0], tokenizer.decode(row[1:-1]), cut) == (tokenizer.bos_token_id, "def", 3)


def test_training_and_service_feed_the_model_the_same_ids() -> None:
    base = pads_with_eos(tiny_backbone())
    model = reward_model(base)
    seen: list[list[int]] = []
    hook = base.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    record = Preference("the film was ", "good<eos>", "bad", 0.7)
    judged = Judged.encode(base.tokenizer, model.task, [record], model.max_tokens)
    extract(base, judged.rows, [2])
    trained, seen[:] = list(seen), []
    model.score([record.prompt] * 2, [record.response_1, record.response_2])
    hook.remove()
    assert trained == seen
    assert len(seen) == 2


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens_per_batch", [1, 60, 4096])
def test_scores_do_not_depend_on_batch_padding_side_or_order(
    pad_is_eos: bool, side: str, tokens_per_batch: int
) -> None:
    base = tiny_backbone()
    expected = [reward_model(base).score([p], [r]).values[0] for p, r in zip(PROMPTS, TEXTS, strict=True)]
    if pad_is_eos:
        pads_with_eos(base)
    base.tokenizer.padding_side = side
    model = reward_model(base, tokens_per_batch=tokens_per_batch)
    assert model.score(PROMPTS, TEXTS).values == pytest.approx(expected, abs=1e-4)
    assert model.score(PROMPTS[::-1], TEXTS[::-1]).values[::-1] == pytest.approx(expected, abs=1e-4)
    assert np.std(expected) > 0.1


def test_states_of_several_depths_are_those_of_each_alone() -> None:
    base = tiny_backbone()
    rows = [encode_for_reward(base.tokenizer, TASK, p, r, 99)[0] for p, r in zip(PROMPTS, TEXTS, strict=True)]
    both = extract(base, rows, [1, 2])
    for place, depth in enumerate((1, 2)):
        assert torch.allclose(both[:, place], extract(base, rows, [depth])[:, 0], atol=1e-5)
    whole = base.model(input_ids=torch.tensor([rows[0]]), output_hidden_states=True)
    assert torch.allclose(both[0, 1], whole.hidden_states[-1][0, -1], atol=1e-5)
    assert len(base.model.base_model.layers) == 2


def test_a_failure_inside_leaves_all_layers_on_the_model() -> None:
    base = tiny_backbone()
    with pytest.raises(IndexError):
        last_states(base.model, [[10_000]], [1])
    assert len(base.model.base_model.layers) == 2


def test_normalisation_is_explicit_and_the_raw_score_stays_visible() -> None:
    base = tiny_backbone()
    raw = reward_model(base).score(PROMPTS, TEXTS)
    assert raw.values == pytest.approx(raw.info["raw_score"])
    scaled = reward_model(base, normalization=Normalization("standardize", 2.0, 4.0)).score(PROMPTS, TEXTS)
    assert scaled.values == pytest.approx((raw.info["raw_score"] - 2) / 4, abs=1e-5)
    assert scaled.info["raw_score"] == pytest.approx(raw.info["raw_score"])


def test_the_preference_is_the_logistic_function_of_the_difference() -> None:
    model = reward_model(tiny_backbone())
    raw = model.score(["a ", "a "], ["good", "bad"]).info["raw_score"]
    assert model.p_first(["a "], ["good"], ["bad"])[0] == pytest.approx(1 / (1 + np.exp(raw[1] - raw[0])))


def test_it_keeps_the_contract_of_a_backend() -> None:
    model = reward_model(tiny_backbone())
    assert copy.deepcopy(model) is model
    assert "rewards come in the order of the rows" in check_backend(model)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    model = reward_model(tiny_backbone())
    model.weight[0] = np.nan
    with pytest.raises(
        RLAIFError, match="expected finite scores from human-rm:tiny, found nan in row 0 for response 'a'"
    ):
        model.score([""], ["a"])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("kind", ["head", "middle layer", "lora"])
def test_plain_transformers_opens_the_merged_model_and_finds_the_same_scores(
    kind: str, pad_is_eos: bool, tmp_path: Path
) -> None:
    base = pads_with_eos(tiny_backbone()) if pad_is_eos else tiny_backbone()
    adapter = with_adapter(base) if kind == "lora" else None
    model = reward_model(base, layers=None if kind == "head" else 1, adapter=adapter)
    expected = model.score([""] * 6, TEXTS).info["raw_score"]
    model.save(tmp_path / "rm")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert whole.config.num_hidden_layers == (2 if kind == "head" else 1)
    assert tokenizer(TEXTS)["input_ids"] == model.encode([""] * 6, TEXTS)[0]
    for side in ("right", "left"):
        batch = tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            found = whole(**batch).logits[:, 0].numpy()
        assert found == pytest.approx(expected, abs=1e-4)
    assert not list((tmp_path / "rm").glob("*.bin"))


def test_the_base_model_is_as_it_was_after_saving() -> None:
    base = tiny_backbone()
    adapter = with_adapter(base)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    model = reward_model(base, adapter=adapter, layers=1)
    scores = model.score(PROMPTS, TEXTS).values
    reward_model(base).score(PROMPTS, TEXTS)
    assert (model.score(PROMPTS, TEXTS).values == scores).all()
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_reward_models_share_the_base_model_in_memory(base_folder: Path, tmp_path: Path) -> None:
    base = backbone(base_folder)
    adapter = with_adapter(base, 2)
    first = reward_model(base, adapter=adapter)
    first.save(tmp_path / "people", merged=False)
    reward_model(base, AI).save(tmp_path / "machine", merged=False)
    people, machine = (
        human_rm(task=TASK, model=tmp_path / "people"),
        distilled_rm(task=TASK, model=tmp_path / "machine"),
    )
    assert people.backbone is machine.backbone is base
    assert people.adapter not in (None, adapter)
    assert people.score(PROMPTS, TEXTS).values == pytest.approx(first.score(PROMPTS, TEXTS).values, abs=1e-6)
    assert not (tmp_path / "people" / "model.safetensors").exists()


def test_a_merged_model_stands_alone(saved: Path, base_folder: Path, tmp_path: Path) -> None:
    expected = RewardModel.load(saved).score(PROMPTS, TEXTS)
    shutil.rmtree(base_folder)
    alone = RewardModel.load(saved, standalone=True)
    assert alone.backbone.tokenizer.pad_token == "<pad>"
    assert alone.score(PROMPTS, TEXTS).values == pytest.approx(expected.values, abs=1e-5)
    alone.save(tmp_path / "again")
    assert RewardModel.load(tmp_path / "again").score(PROMPTS, TEXTS).values == pytest.approx(expected.values, abs=1e-5)


def test_the_run_folder_that_holds_a_model_is_as_good_as_its_folder(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    saved.rename(run / "model")
    assert RewardModel.load(run).labels.sources == HUMAN


def test_everything_that_matters_is_read_back(base_folder: Path, tmp_path: Path) -> None:
    normalization = Normalization("standardize", -1.5, 3.0)
    model = reward_model(backbone(base_folder), layers=1, max_tokens=9, normalization=normalization)
    model.save(tmp_path / "rm", figures={"human": {"accuracy": 0.9}})
    found = RewardModel.load(tmp_path / "rm")
    assert (found.layers, found.max_tokens, found.normalization) == (1, 9, normalization)
    assert (found.labels, found.task.name, found.name) == (LabelRecord(HUMAN), "toy", f"human-rm:{base_folder}")
    assert json.loads((tmp_path / "rm" / "reward_model.json").read_text())["figures"] == {"human": {"accuracy": 0.9}}


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (HUMAN, "labels by people: 7 pairs from 'human'."),
        (AI, "labels by a language model (no human label among them): 5 pairs from 'ai:tiny'."),
        (MIXED, "labels by people and language models together: 3 pairs from 'human', 4 pairs from 'ai:tiny'."),
    ],
)
def test_the_card_says_which_labels_it_was_trained_on(labels: dict[str, int], says: str, tmp_path: Path) -> None:
    reward_model(tiny_backbone(), labels).save(tmp_path / "rm")
    assert f"Trained on {says}" in (tmp_path / "rm" / "README.md").read_text()


# --- provenance and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "provenance"),
    [
        (HUMAN, "human"),
        (AI, "ai"),
        (MIXED, "mixed"),
        ({"human:panel": 1}, "human"),
        ({"somebody": 1}, "mixed"),
        ({}, "mixed"),
    ],
)
def test_provenance(labels: dict[str, int], provenance: str) -> None:
    assert LabelRecord(labels).provenance == provenance


@pytest.mark.parametrize(
    ("factory", "accepts"), [(human_rm, [HUMAN]), (distilled_rm, [AI]), (any_rm, [HUMAN, AI, MIXED])]
)
def test_a_backend_takes_models_of_its_own_provenance_only(factory: Callable[..., RewardModel], accepts: Any) -> None:
    for labels in (HUMAN, AI, MIXED):
        model = reward_model(tiny_backbone(), labels)
        if labels in accepts:
            assert factory(task=TASK, model=model) is model
        else:
            with pytest.raises(RLAIFError, match="expected a reward model whose labels were all made by"):
                factory(task=TASK, model=model)


def test_what_is_mistaken_for_another_names_the_right_backend(saved: Path) -> None:
    message = (
        "reward 'distilled-rm': expected a reward model whose labels were all made by a language model, found one "
        "trained on 7 pairs from 'human'; use reward 'human-rm'"
    )
    with pytest.raises(RLAIFError) as error:
        make_reward("distilled-rm", task=TASK, model=str(saved))
    assert str(error.value) == message
    assert make_reward("human-rm", task=TASK, model=str(saved)).name.startswith("human-rm:")


@pytest.mark.parametrize("name", ["human-rm", "distilled-rm"])
def test_without_a_model_the_error_says_how_to_train_one(name: str) -> None:
    with pytest.raises(
        RLAIFError, match=rf"reward '{name}': expected the folder of a trained .* `rlaif train-rm --labels"
    ):
        make_reward(name)


def drop_head(folder: Path) -> None:
    tensors = load_file(folder / "head.safetensors")
    save_file({"score.other": tensors["score.weight"]}, folder / "head.safetensors")


def pickled_head(folder: Path) -> None:
    (folder / "head.safetensors").write_bytes(pickle.dumps({"score.weight": [1.0] * 64}))


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "reward_model.json").read_text())
        (folder / "reward_model.json").write_text(json.dumps(record | changes))

    return change


def other_base(folder: Path) -> None:
    """Another model under the name of the base."""
    base = Path(json.loads((folder / "reward_model.json").read_text())["base"]["name"])
    Backbone(tiny_model(79, seed=8), character_tokenizer()).save_merged(None, base)


def other_tokenizer(folder: Path) -> None:
    """The same weights with a tokenizer that numbers its characters in another way."""
    base = Path(json.loads((folder / "reward_model.json").read_text())["base"]["name"])
    file = base / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocab = tokens["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokens))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "expected the folder of a reward model, found none at"),
    "no record": (
        lambda folder: (folder / "reward_model.json").unlink(),
        "found no reward_model.json there: it says which base model, labels and encoding",
    ),
    "a record that is none": (
        lambda folder: (folder / "reward_model.json").write_text("[1]"),
        "to describe a reward model, found something else",
    ),
    "another format": (edit(format=99), "in format 1, found 99; use the version that wrote it"),
    "no head file": (
        lambda folder: (folder / "head.safetensors").unlink(),
        "found no such file; train the model again",
    ),
    "no head in it": (drop_head, r"expected a head \(score.weight\) in .* found score.other; without it"),
    "a pickle for a head": (pickled_head, "expected safetensors in .*head.safetensors, found something else"),
    "only pickles": (only_pickles, r"found only pickled ones \(pytorch_model.bin\), which can run code when opened"),
    "another base": (other_base, r"expected the base model that the reward model in .* was trained on"),
    "another tokenizer": (other_tokenizer, "expected the tokenizer that the reward model in .* was trained with"),
    "no base": (
        edit(base={"name": "/nowhere/at/all", "fingerprint": "0"}),
        "found: expected a model folder, found nothing at .* Say where it is with base=",
    ),
    "another kind of task": (
        edit(task=Task("t", "summary", "c", 9, 9).to_json()),
        "expected a task of kind 'summary' .* found 'toy' of kind 'continuation'",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_model_that_cannot_be_trusted_is_a_clear_error(what: str, saved: Path) -> None:
    breaks, message = BROKEN[what]
    breaks(saved)
    with pytest.raises(RLAIFError, match=message):
        human_rm(task=TASK, model=saved)


def test_a_merged_model_without_its_head_is_an_error(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors.pop("score.weight")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RLAIFError, match=r"found no score.weight; without its head a model has no scores"):
        RewardModel.load(saved, standalone=True)


def test_other_things_that_do_not_fit(saved: Path, tmp_path: Path, base_folder: Path) -> None:
    base = tiny_backbone()
    table: list[tuple[Callable[[], object], str]] = [
        (lambda: RewardModel(base, torch.zeros(5), TASK), r"expected a head of shape \(32,\) for tiny, found \(5,\)"),
        (lambda: reward_model(base, layers=3), "expected layers from 1 to 2 for tiny, found 3"),
        (lambda: reward_model(base, max_tokens=1), "expected max_tokens of at least 2, found 1"),
        (lambda: reward_model(base).save(saved), "to be new or empty, found files in it"),
        (
            lambda: make_reward("human-rm", model=saved, colour="red"),
            "reward 'human-rm': .* unexpected keyword argument 'colour'",
        ),
        (lambda: human_rm(model=reward_model(base), device="cpu"), "expected no other settings with a live model"),
        (lambda: RewardModel.load(saved, base=tiny_backbone(seed=4)), "found another \\(tiny,"),
    ]
    for call, message in table:
        with pytest.raises(RLAIFError, match=message):
            call()
    reward_model(backbone(base_folder)).save(tmp_path / "bare", merged=False)
    with pytest.raises(RLAIFError, match=r"expected a merged model .* save it with merged=True"):
        RewardModel.load(tmp_path / "bare", standalone=True)


def test_an_environment_makes_it_from_json(saved: Path, base_folder: Path) -> None:
    envs = gym.make_vec(
        "rlaif_env:RLAIF/TextGeneration-v0",
        num_envs=2,
        task=TASK,
        reward="human-rm",
        reward_kwargs={"model": str(saved)},
        tokenizer=str(base_folder),
    )
    envs.reset(seed=0)
    actions = np.full((2, 6), 10)
    _, rewards, _, _, infos = envs.step(actions)
    assert rewards == pytest.approx(infos["final_info"]["raw_score"], abs=1e-5)
    assert infos["final_info"]["truncated_tokens"].tolist() == [0, 0]
