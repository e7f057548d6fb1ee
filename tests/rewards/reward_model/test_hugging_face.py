"""Reward models made elsewhere: TRL's, encoders, pad tokens that are the EOS or none, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from agents.training.command import main as train
from rewards import HFRewardModel, check_backend, make_reward
from rlaif_env.api import BackendError, RLAIFError
from rlaif_env.data.tasks import PromptSource, Task
from tests.tiny import character_tokenizer, save_tiny

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
DIALOGUE = Task("toy", "dialogue", "how kind it is", 64, 8, PromptSource(prompts={"train": ("hi",)}))
STORY = Task("toy", "continuation", "how good it is", 64, 8, PromptSource(prompts={"train": ("the film",)}))
PROMPTS = ["\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: good day\n\nAssistant:", "a plain question", "the film"]
RESPONSES = [" hello there, how are you", "no", " was a joy from start to end."]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_DEVICE", "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def classifier(
    tokenizer: PreTrainedTokenizerFast, pad_id: int | None, outputs: int = 1, **changed: Any
) -> LlamaForSequenceClassification:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": 1, "pad_token_id": pad_id, "bos_token_id": None}
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "initializer_range": 0.3, "num_labels": outputs, **sizes, **ids, **changed}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config)


def alone(model: Any, tokenizer: Any, texts: list[str], index: int = 0) -> np.ndarray:
    """What transformers itself gives for each text alone."""
    rows = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
    with torch.no_grad():
        return np.array([float(model(input_ids=row).logits[0, index]) for row in rows])


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None, "-1"])
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_batch_scores_as_transformers_does_each_text_alone(pad: str | None, template: str) -> None:
    tokenizer = character_tokenizer(("<user>", "<assistant>"))
    tokenizer.chat_template = TURNS
    if pad is None:
        tokenizer.pad_token = None
    pad_id = {"<pad>": 0, "<eos>": 1, None: None, "-1": -1}[pad]
    model = classifier(tokenizer, None if pad_id == -1 else pad_id)
    model.config.pad_token_id = pad_id
    backend = HFRewardModel(model, tokenizer, DIALOGUE, template=template)  # type: ignore[arg-type]
    texts = {
        "chat": [
            "<user>hi<eos><assistant>yes?<eos><user>good day<eos><assistant>hello there, how are you<eos>",
            "<user>a plain question<eos><assistant>no<eos>",
            "<user>the film<eos><assistant>was a joy from start to end.<eos>",
        ],
        "plain": [
            f"{PROMPTS[0]} hello there, how are you<eos>",
            "a plain question\n\nAssistant: no<eos>",
            "the film\n\nAssistant: was a joy from start to end.<eos>",
        ],
    }[template]
    scores = backend.score(PROMPTS, RESPONSES)
    assert [backend.render(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)] == [
        text if template == "chat" else text.removesuffix("<eos>") for text in texts
    ]
    expected = alone(model, backend.tokenizer, texts)
    assert np.abs(scores.values - expected).max() < 1e-5 < np.ptp(expected)
    assert scores.info["template"].tolist() == [template] * 3 and scores.info["truncated_tokens"].tolist() == [0] * 3
    assert model.config.pad_token_id == pad_id
    check_backend(backend, PROMPTS, RESPONSES, tolerance=1e-5)


def test_a_long_text_keeps_its_end_and_says_so() -> None:
    tokenizer = character_tokenizer()
    model = classifier(tokenizer, 0)
    whole = HFRewardModel(model, tokenizer, STORY)
    short = HFRewardModel(model, tokenizer, STORY, max_tokens=12)
    assert short.template == "plain"
    scores = short.score(["the film", "a"], [" was good", "b"])
    assert scores.info["truncated_tokens"].tolist() == [17 + 1 - 12, 0]
    assert scores.values == pytest.approx(whole.score(["", ""], ["lm was good", "ab"]).values, abs=1e-5)


def test_an_encoder_reads_two_texts_with_its_separator_between(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(("[CLS]", "[SEP]"))
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.eos_token = None  # as BERT's
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), num_labels=1, initializer_range=0.3, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backend = HFRewardModel(model, tokenizer, DIALOGUE)
    opened = make_reward("hf-rm", model=str(tmp_path), task=DIALOGUE)  # whose tokenizer tells no segments
    for made, reads in ((backend, tokenizer), (opened, AutoTokenizer.from_pretrained(tmp_path))):
        assert isinstance(made, HFRewardModel) and made.template == "pair"
        with torch.no_grad():
            pairs = zip(PROMPTS, RESPONSES, strict=True)
            expected = [float(model(**reads(p, r, return_tensors="pt")).logits) for p, r in pairs]
        assert np.abs(made.score(PROMPTS, RESPONSES).values - expected).max() < 1e-5 < np.ptp(expected)
        check_backend(made, PROMPTS, RESPONSES, tolerance=1e-5)
    joined = HFRewardModel(model, tokenizer, STORY)
    with torch.no_grad():
        one = float(model(**tokenizer("the film was", return_tensors="pt")).logits)
    assert joined.template == "plain" and joined.score(["the film"], [" was"]).values[0] == pytest.approx(one, abs=1e-5)
    again = make_reward("hf-rm", model=str(tmp_path), task=STORY)
    assert again.model is opened.model  # type: ignore[attr-defined]


def test_one_of_several_outputs_is_named() -> None:
    tokenizer = character_tokenizer()
    model = classifier(tokenizer, 0, outputs=3, id2label={0: "bad", 1: "fair", 2: "good"})
    for index in (None, 3, -1):
        with pytest.raises(
            RLAIFError, match=rf"which output of live is the reward \(0: bad, 1: fair, 2: good\), found {index}"
        ):
            HFRewardModel(model, tokenizer, STORY, index=index)
    with pytest.raises(RLAIFError, match=r"which output of live is the reward \(0: LABEL_0\), found 1"):
        HFRewardModel(classifier(tokenizer, 0), tokenizer, STORY, index=1)
    texts = ["the film was<eos>", "a<eos>"]
    good = HFRewardModel(model, tokenizer, STORY, index=2).score(["the film", "a"], [" was", ""]).values
    assert good == pytest.approx(alone(model, tokenizer, texts, 2), abs=1e-5)


def test_settings_that_do_not_fit() -> None:
    tokenizer = character_tokenizer()
    model = classifier(tokenizer, 0, max_position_embeddings=64)
    for settings, message in (
        ({"template": "chat"}, "expected a chat template in the tokenizer of live, found none; use template 'plain'"),
        ({"template": "html"}, "expected template to be one of auto, chat, pair, plain, found 'html'"),
        ({"max_tokens": 65}, "expected max_tokens from 2 to 64 for live, found 65"),
    ):
        with pytest.raises(RLAIFError, match=message):
            HFRewardModel(model, tokenizer, STORY, **settings)  # type: ignore[arg-type]


def test_an_architecture_that_reads_padding_is_refused() -> None:
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.3}
    config = AutoConfig.for_model("xlnet", vocab_size=100, num_labels=1, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(
        RLAIFError, match="expected hf-rm:live, 'xlnet', to score a text in a batch, padded on the right"
    ):
        HFRewardModel(model, character_tokenizer(), STORY)


def test_a_template_that_refuses_a_conversation_names_the_row() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}x"
    with pytest.raises(
        BackendError, match=r"read as chat, found row 1 \(' a'\): RLAIFError: .*: one turn only"
    ) as told:
        HFRewardModel(classifier(tokenizer, 0), tokenizer, DIALOGUE).score(["hi", PROMPTS[0]], ["", " a"])
    assert told.value.rows == (1,)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "language-model")
    tokenizer = character_tokenizer()
    for name in ("pickled", "damaged", "adapter"):
        classifier(tokenizer, 0).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, message in {
        "language-model": "the weights of a whole reward model in .*, found no score.weight: a language model has",
        "pickled": "expected safetensors weights in .*, found only pickled ones",
        "damaged": "expected a sequence classifier of Hugging Face's, .*damaged': SafetensorError",
        "adapter": "expected a whole reward model in .*, found an adapter; merge it with",
        "none": "expected a model folder, found nothing at",
    }.items():
        with pytest.raises(RLAIFError, match=message):
            make_reward("hf-rm", model=str(tmp_path / name))
    with pytest.raises(RLAIFError, match="reward 'hf-rm': expected model, the folder or Hugging Face name"):
        make_reward("hf-rm")
    with pytest.raises(RLAIFError, match=r"expected a sequence classifier of Hugging Face's, .*'no-such/model'"):
        make_reward("hf-rm", model="no-such/model")


@pytest.mark.parametrize("conversational", [True, False])
def test_a_reward_model_that_trl_made(conversational: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the extra 'integrations' is needed")
    datasets = pytest.importorskip("datasets", reason="the extra 'integrations' is needed")
    tokenizer = character_tokenizer(("<user>", "<assistant>"))
    if conversational:
        tokenizer.chat_template = TURNS
    base = save_tiny(tmp_path / "base", tokenizer)

    def said(prompt: str, answer: str) -> Any:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return turns if conversational else prompt + answer

    rows = [
        {"chosen": said(p, "oh yes, aeio"), "rejected": said(p, "no, xyz")} for p in ("hi", "the film", "a", "b") * 2
    ]
    trainer = trl.RewardTrainer(
        model=str(base),
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=8,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.train()
    folder = tmp_path / "trl-rm"
    trainer.save_model(str(folder))

    backend = make_reward("hf-rm", model=str(folder), task=STORY)
    assert backend.template == ("chat" if conversational else "plain")  # type: ignore[attr-defined]
    prompts, answers = ["hi", "the film", "hi"], ["oh yes, aeio", " was", "no, xyz"]
    made, whole = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [f"<user>{p}<eos><assistant>{a.strip()}<eos>" for p, a in zip(prompts, answers, strict=True)]
    if not conversational:
        texts = [f"{p}{a}<eos>" for p, a in zip(prompts, answers, strict=True)]
    scores = backend.score(prompts, answers).values
    assert scores == pytest.approx(alone(whole, made, texts), abs=1e-5)
    assert scores[0] > scores[2]

    (tmp_path / "toy.toml").write_text(
        'name = "toy"\nkind = "continuation"\ncriterion = "how good it is"\nmax_prompt_tokens = 16\n'
        'max_response_tokens = 6\n[source.prompts]\ntrain = ["the film", "ok", "it was"]\ntest = ["a", "b"]\n'
    )
    line = f"--task {tmp_path / 'toy.toml'} --model {base} --reward hf-rm --reward.model {folder} --updates 2 "
    line += f"--prompts-per-update 2 --group-size 2 --eval-prompts 2 --out {tmp_path / 'run'}"
    assert train(line.split()) == 0
    samples = [json.loads(row) for row in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    again = backend.score([row["prompt"] for row in samples], [row["response"] for row in samples]).values
    assert len(samples) == 8 and [row["reward"] for row in samples] == pytest.approx(again.tolist(), abs=1e-5)
    assert {row["template"] for row in samples} == {"chat" if conversational else "plain"}
    assert {row["truncated_tokens"] for row in samples} == {0}
