"""What is done with a model and its tokenizer, each against plain forward passes or the tokenizer's joint encoding.

    python -m tests.conformance        checks everything and writes the tables of docs/models.md

A check raises AssertionError, or whatever the thing checked raises.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rlaif_env  # noqa: F401
from agents.answers import answer
from agents.policy import Policy
from agents.sft import Demonstration, SFTConfig, sft, tokenize
from rewards.language_model.answer_tree import answer_tree, word_start_mask
from rewards.language_model.local import LocalLM
from rewards.prompts import leads_after
from rewards.reward_model.data import LabelledData
from rewards.reward_model.features import depth_of, encode_for_reward
from rewards.reward_model.model import RewardModel
from rewards.reward_model.training import RewardModelConfig, train_rm
from rlaif_env import Task
from rlaif_env.api import Preference, RLAIFError
from rlaif_env.data.preferences import split_of
from rlaif_env.data.tasks import PromptSource
from rlaif_env.models import Backbone, LoraConfig, encode, pad_rows, takes_any_mask, trunk_of
from rlaif_env.models import backbone as load
from tests import ROOT
from tests.families import FAMILIES, REFUSED, TOKENIZERS, family, tokenizer_of
from tests.tiny import character_tokenizer

CLOSE = 1e-4
SCORES = [str(i) for i in range(1, 11)]
PREAMBLE = "A review is rated from 1 to 10.\n\n"
PROMPTS = [f"{PREAMBLE}Review: {text}\nScore: " for text in ("fine", "dull and far too long", "so so")]


def plain_logprobs(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of a response by one forward pass over the whole row: no padding, no cache, no mask."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(list(response))[:, None])[:, 0].numpy()


def close(found: Any, expected: Any, within: float = CLOSE) -> None:
    """Raise AssertionError if two arrays differ by more than ``within`` anywhere."""
    apart = float(np.abs(np.asarray(found, dtype=np.float64) - np.asarray(expected, dtype=np.float64)).max())
    assert apart < within, f"{apart:.2g} apart"


def spellings(tokenizer: Any, prompt: str, label: str) -> set[tuple[int, ...]]:
    """Ways to write a label after a prompt: as the tokenizer writes it, and a token a character where there are such.

    By encodings of prompt and label together; where the label merges into the prompt's end, behind a line break.
    """

    def tail(text: str) -> tuple[int, ...]:
        for start in (prompt, "\n"):
            before, whole = (tokenizer.encode(t, add_special_tokens=False) for t in (start, start + text))
            if whole[: len(before)] == before:
                return tuple(whole[len(before) :])
        raise AssertionError(f"{text!r} merges into a line break")

    found = set()
    for lead in leads_after(prompt):
        found.add(tail(lead + label))
        rest = [tail(character) for character in label[1:]]
        if all(len(ids) == 1 for ids in rest):
            found.add(sum(rest, tail(lead + label[0])))
    return found


def label_logprobs(model: Backbone, prompt: str, labels: Sequence[str]) -> list[float]:
    """log of the sum over spellings of p(tokens) (1 - sum of q(word character | tokens)), a plain pass for each."""
    ids, word = encode(model.tokenizer, [prompt])[0], word_start_mask(model.tokenizer, model.logit_width)
    out = []
    for label in labels:
        total = 0.0
        for tokens in spellings(model.tokenizer, prompt, label):
            with torch.no_grad():
                q = model.model(torch.tensor([[*ids, *tokens]]), use_cache=False).logits[0].double().softmax(-1)
            p = np.prod([q[len(ids) - 1 + i, token].item() for i, token in enumerate(tokens)])
            total += p * (1 - q[-1, torch.from_numpy(word)].sum().item())
        out.append(np.log(total))
    return out


# --- what is done with a model ----------------------------------------------------------------------------------------


def labels(backbone: Backbone, folder: Path) -> None:
    """Past a sliding window; with a shared beginning longer than it, without one, and of a row alone."""
    expected = [label_logprobs(backbone, prompt, SCORES) for prompt in PROMPTS]
    shared = LocalLM(backbone)
    for scorer in (shared, LocalLM(backbone, share_prefix=False)):
        close(scorer.label_logprobs(PROMPTS, SCORES), expected)
    close(shared.label_logprobs(PROMPTS[:1], SCORES), expected[:1])


def _rows(backbone: Backbone, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    return pad_rows(encode(backbone.tokenizer, prompts), backbone.tokenizer.pad_token_id, side="left")


def _perturb(parameters: Iterable[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def lora(backbone: Backbone, folder: Path) -> None:
    """Sampled with the adapter folded in, evaluated with it on, saved and opened by transformers and peft: all one."""
    policy = Policy(backbone, lora=LoraConfig(2, 4.0))
    _perturb(policy.parameters)
    ids, mask = _rows(backbone, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    drawn = policy.sample(ids, mask, uniform=np.random.default_rng(0).random((4, 12)), group_size=2)
    seen = (np.arange(12) < drawn.lengths[:, None]).astype(np.float32)
    tensors = [torch.from_numpy(array) for array in (ids, mask, drawn.ids, seen)]
    with policy.training():
        logprobs = policy.evaluate(*tensors).logprobs
        (logprobs * tensors[3]).sum().backward()
    gradient = [p.grad.clone() for p in policy.parameters]
    reference = policy.evaluate(*tensors, reference=True).logprobs
    policy.save(folder / "saved")
    backbone.save_merged(None, folder / "base")
    merged = AutoModelForCausalLM.from_pretrained(folder / "saved").eval()
    start = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    written = [(ids[i][mask[i] > 0].tolist(), drawn.ids[i, :n].tolist()) for i, n in enumerate(drawn.lengths)]
    for i, row in enumerate(written):
        opened = plain_logprobs(merged, *row, 0.9)
        close(opened, drawn.logprobs[i, : len(row[1])])
        close(opened, logprobs[i, : len(row[1])].detach())
        close(plain_logprobs(start, *row, 0.9), reference[i, : len(row[1])])
    adapted = PeftModel.from_pretrained(start, folder / "saved" / "adapter").eval()
    for row in written:
        close(plain_logprobs(adapted, *row), plain_logprobs(merged, *row))
    for parameter in policy.parameters:
        parameter.grad = None
    with backbone.using(policy.adapter) as model:
        for prompt, response in written:
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            (logits.float() / 0.9).log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in policy.parameters)
    for parameter, found in zip(policy.parameters, gradient, strict=True):
        close(found, parameter.grad, CLOSE * largest)


def full(backbone: Backbone, folder: Path) -> None:
    """All weights: the own copy evaluates as the plain model does and is saved as it is."""
    backbone.save_merged(None, folder / "start")
    policy = Policy(load(folder / "start", device="cpu", dtype="float32"), trainable="full")
    ids, mask = _rows(backbone, PROMPTS)
    responses = np.random.default_rng(0).integers(3, 40, (3, 6))
    tensors = [torch.from_numpy(array) for array in (ids, mask, responses, np.ones((3, 6), np.float32))]
    with policy.training():
        policy.evaluate(*tensors).logprobs.sum().backward()
        with torch.no_grad():
            for parameter in policy.parameters:
                if parameter.grad is not None:
                    parameter.sub_(1e-2 * parameter.grad.sign())
        logprobs = policy.evaluate(*tensors).logprobs.detach()
    policy.save(folder / "saved")
    plain = AutoModelForCausalLM.from_pretrained(folder / "saved").eval()
    for i in range(3):
        close(plain_logprobs(plain, ids[i][mask[i] > 0].tolist(), responses[i].tolist(), 0.9), logprobs[i])


def demonstrations(backbone: Backbone, folder: Path) -> None:
    """Fine-tuned, saved, opened: the held-out loss that was told is the opened model's on the joint encoding."""
    words = ("good", "bad", "so so")
    rows = [Demonstration(f"Review {n}:", f" {words[n % 3]}") for n in range(48)]
    config = SFTConfig(lora=LoraConfig(2, 4.0), batch=16, learning_rate=1e-2)
    policy, figures = sft(config, rows, base=backbone)
    assert figures["validation_loss"] < figures["validation_loss_before"]
    policy.save(folder / "sft")
    plain = AutoModelForCausalLM.from_pretrained(folder / "sft").eval()
    held_out = [row for row in rows if split_of(row.prompt, {"train": 0.95, "validation": 0.05}, 1) == "validation"]
    terms = []
    for row in held_out:
        before, after = continued(backbone.tokenizer, row.prompt, row.response)
        terms.append(plain_logprobs(plain, before, [*after, backbone.tokenizer.eos_token_id]))
    assert len(held_out) == figures["validation_rows"]
    close(figures["validation_loss"], -np.concatenate(terms).mean())


def reward_model(backbone: Backbone, folder: Path) -> None:
    """Trained with an adapter on a middle layer, saved, opened on its base, and as a plain sequence classifier."""
    backbone.save_merged(None, folder / "base")
    base, task = load(folder / "base", device="cpu", dtype="float32"), Task("toy", "continuation", "x", 24, 8)
    pairs = [Preference(f"say {n} ", "a a a"[: 1 + n % 5], "b b", 0.9, "ai:toy") for n in range(40)]
    data = LabelledData(pairs[:24], pairs[24:32], {"labels": pairs[32:]}, {})
    layers = max(1, depth_of(base.model) - 1)
    config = RewardModelConfig(
        max_tokens=64,
        trainable="lora",
        epochs=1,
        batch_pairs=8,
        learning_rate=1e-2,
        layers=layers,
        lora=LoraConfig(2, 4.0),
    )
    model = train_rm(config, base, task, data).model
    texts = [p.prompt for p in pairs[:4]], [p.response_1 for p in pairs[:4]]
    raw = model.score(*texts).info["raw_score"]
    model.save(folder / "rm", merged=False)
    close(RewardModel.load(folder / "rm").score(*texts).info["raw_score"], raw)
    try:
        model.save(folder / "merged")
    except RLAIFError as refusal:
        layers = depth_of(base.model)
        whole = RewardModel(base, model.weight, task, layers=layers, adapter=model.adapter)
        with base.using(model.adapter) as running, torch.no_grad():
            states = [
                trunk_of(running)(torch.tensor([row])).last_hidden_state[0, -1] for row in whole.encode(*texts)[0]
            ]
        close(whole.score(*texts).info["raw_score"], [float(state @ model.weight) for state in states])
        raise Unsupported("saved with merged=False: transformers has no classifier of it") from refusal
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    batch = AutoTokenizer.from_pretrained(folder / "merged")(
        [p + r for p, r in zip(*texts, strict=True)], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        kept = {key: value for key, value in batch.items() if key != "token_type_ids"}
        close(plain(**kept).logits[:, 0], raw)


class Unsupported(Exception):
    """A check that ended in a refusal that its documentation states."""


MODEL_CHECKS: Mapping[str, Callable[[Backbone, Path], None]] = {
    "label likelihoods": labels,
    "LoRA policy": lora,
    "full policy": full,
    "SFT": demonstrations,
    "reward model": reward_model,
}

# --- what is done with a tokenizer ------------------------------------------------------------------------------------

PROMPT, RESPONSE = "The film was", " good. Score: 10, un café à la crème\nYes"
TEXTS = ((PROMPT, RESPONSE), ("Is it good?\n", "Yes, it is."), (PROMPT, "ly good"))


def continued(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and those that follow it in the tokenizer's encoding of both together."""
    before, whole = (encode(tokenizer, [text])[0] for text in (prompt, prompt + response))
    assert whole[: len(before)] == before
    return before, whole[len(before) :]


def environment(task: Task, tokenizer: Any, **keywords: Any) -> tuple[Any, list[str]]:
    """An environment of a task, and the list of what its judge will read."""
    read: list[str] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        read.extend(task.judged(p, r) for p, r in zip(prompts, responses, strict=True))
        return [0.0] * len(responses)

    return gym.make("RLAIF/TextGeneration-v0", task=task, reward=reward, tokenizer=tokenizer, **keywords), read


def judged_text(tokenizer: Any) -> None:
    """The environment and the judge read what the policy wrote, ended by the EOS or another end of turn."""
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    for (prompt, response), end in itertools.product(TEXTS, (tokenizer.eos_token_id, turn)):
        task = Task("t", "continuation", "x", 64, 128, source=PromptSource(prompts={"train": (prompt,)}))
        env, read = environment(task, tokenizer, end_ids=[turn])
        env.reset(seed=0)
        ids = continued(tokenizer, prompt, response)[1]
        action = np.full(env.action_space.shape, end, dtype=np.int64)
        action[: len(ids)] = ids
        info = env.step(action)[4]
        assert (info["response"], info["finish_reason"]) == (response, "stop")
        assert info["response_length"] == len(ids) + 1
        assert read == [prompt + response]


def demonstration(tokenizer: Any) -> None:
    """A demonstration is encoded as the policy meets it."""
    (example,) = tokenize([Demonstration(PROMPT, RESPONSE)], tokenizer, 64, 128)
    before, after = continued(tokenizer, PROMPT, RESPONSE)
    assert list(example.prompt) == before
    assert list(example.response) == [*after, tokenizer.eos_token_id]


def cut_prompt(tokenizer: Any) -> None:
    """A prompt that is cut keeps its beginning of sequence."""
    task = Task("t", "continuation", "x", 6, 4, source=PromptSource(prompts={"train": (PROMPT * 4,)}))
    observation, _ = environment(task, tokenizer, truncate_prompts=True)[0].reset(seed=0)
    (example,) = tokenize([Demonstration(PROMPT * 4, RESPONSE)], tokenizer, 6, 4)
    whole = encode(tokenizer, [PROMPT * 4])[0]
    bos = [whole[0]] if whole[0] == tokenizer.bos_token_id else []
    expected = [*bos, *whole[len(whole) - (6 - len(bos)) :]]
    assert observation["input_ids"].tolist() == expected
    assert list(example.prompt) == expected


def scored_text(tokenizer: Any) -> None:
    """A reward model reads the joint text and one EOS."""
    task = Task("t", "continuation", "x", 64, 128)
    ids, cut = encode_for_reward(tokenizer, task, PROMPT, RESPONSE, 256)
    assert (ids, cut) == ([*encode(tokenizer, [PROMPT + RESPONSE])[0], tokenizer.eos_token_id], 0)


def written_answers(tokenizer: Any) -> None:
    """The way the tokenizer writes an answer after a prompt is among those that are counted."""
    for prompt in ("Score: ", "Score:", "Score:\n"):
        tree = answer_tree(tokenizer, SCORES, leads_after(prompt))
        for label, ends in zip(SCORES, tree.ends, strict=True):
            before, whole = (
                encode(tokenizer, [text])[0] for text in (prompt, prompt + leads_after(prompt)[-1] + label)
            )
            if whole[: len(before)] != before:
                continue  # the answer merges into the prompt's last token: nobody who is asked can write it so
            counted = set()
            for node in ends:
                path: list[int] = []
                while node >= 0:
                    path.insert(0, tree.tokens[node])
                    node = tree.parents[node]
                counted.add(tuple(path))
            assert tuple(whole[len(before) :]) in counted


TOKENIZER_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "text that is judged": judged_text,
    "demonstrations": demonstration,
    "cut prompts": cut_prompt,
    "text that is scored": scored_text,
    "answers": written_answers,
}


def together(backbone: Backbone) -> None:
    """A family and a kind of tokenizer: likelihoods, rationales, sampling to either end, text as the judge reads it."""
    tokenizer, model = backbone.tokenizer, backbone.model
    close(
        LocalLM(backbone).label_logprobs(PROMPTS[:2], SCORES),
        [label_logprobs(backbone, p, SCORES) for p in PROMPTS[:2]],
    )
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert backbone.end_ids == [tokenizer.eos_token_id, turn]
    task = Task("t", "continuation", "x", 64, 8, source=PromptSource(prompts={"train": (PROMPT,)}))
    env = environment(task, tokenizer, vocab_size=backbone.logit_width, end_ids=backbone.end_ids)[0]
    observation, _ = env.reset(seed=0)
    drawn = answer(
        Policy(backbone, trainable="none"),
        np.repeat(observation["input_ids"][None], 6, 0),
        np.repeat(observation["attention_mask"][None], 6, 0),
        max_new_tokens=8,
        seed=0,
    )
    prompt = encode(tokenizer, [PROMPT])[0]
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    for ids, length, logprobs in zip(drawn.ids, drawn.lengths, drawn.logprobs, strict=True):
        close(plain_logprobs(model, prompt, ids[:length], 0.9), logprobs[:length])
        ended = ids[length - 1] in backbone.end_ids
        assert ended or length == 8
        assert not set(ids[: length - 1].tolist()) & set(backbone.end_ids)
        env.reset()
        info = env.step(ids)[4]
        assert (info["finish_reason"], info["response_length"]) == ("stop" if ended else "length", length)
        kept = ids[: length - 1] if ended else ids[:length]
        assert start + info["response"] == tokenizer.decode([*prompt, *kept], skip_special_tokens=True)
    (text,) = LocalLM(backbone).generate([PROMPT], max_new_tokens=6)
    ids = list(prompt)
    while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] not in backbone.end_ids):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert start + text == tokenizer.decode(ids, skip_special_tokens=True)


# --- the tables -------------------------------------------------------------------------------------------------------


def made(name: str, kind: str | None = None) -> Backbone:
    """A tiny model of a family with one kind of tokenizer, or with a token a character."""
    tokenizer = character_tokenizer() if kind is None else tokenizer_of(kind)
    if tokenizer.pad_token is None:  # what loading by name does
        tokenizer.pad_token = tokenizer.eos_token
    model = family(name, tokenizer)
    if kind is not None:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn>")]
    return Backbone(model, tokenizer, name=name)


def _outcome(check: Callable[..., None], *arguments: Any) -> str:
    try:
        check(*arguments)
    except Unsupported as reason:
        return str(reason)
    return "✓"


def model_table() -> str:
    """Families by what is done with them, in Markdown."""
    head = ["family", "answers are read", *MODEL_CHECKS, f"with {len(TOKENIZERS)} kinds of tokenizer"]
    rows = [head, ["---"] * len(head)]
    for name in FAMILIES:
        print(name, file=sys.stderr)
        cells = [f"`{name}`", "in one pass" if takes_any_mask(made(name).model) else "a pass each"]
        for check in MODEL_CHECKS.values():
            with tempfile.TemporaryDirectory() as folder:
                cells.append(_outcome(check, made(name), Path(folder)))
        for kind in TOKENIZERS:
            together(made(name, kind))
        rows.append([*cells, "✓"])
    for name in REFUSED:
        try:
            made(name)
        except RLAIFError as error:
            reason = re.search(r"which (.*); use another", str(error))
            rows.append([f"`{name}`", f"refused: it {reason[1] if reason else error}", *[""] * (len(head) - 2)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tokenizer_table() -> str:
    """Kinds of tokenizers by what is done with them, in Markdown."""
    head = ["tokenizer", *TOKENIZER_CHECKS]
    rows = [head, ["---"] * len(head)]
    for kind in TOKENIZERS:
        tokenizer = made("llama", kind).tokenizer
        rows.append([kind, *(_outcome(check, tokenizer) for check in TOKENIZER_CHECKS.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    """Run every check and put the tables between the marks of docs/models.md."""
    page = ROOT / "docs" / "models.md"
    text = page.read_text(encoding="utf-8")
    for mark, table in (("families", model_table()), ("tokenizers", tokenizer_table())):
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        text = f"{before}<!-- {mark} -->\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
