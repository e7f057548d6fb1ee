"""Supervised fine-tuning of the initial policy: ``rlaif sft`` (appendix A.1).

The loss is on responses only: a prompt is read, never predicted. Rows are ``{"prompt": ..., "response": ...}`` (or
``"completion"``, as TRL writes it), or ``{"text": ...}``, all of which is response but its first token. A response ends
with the EOS, so that the policy learns to stop.

How this differs from the paper: AdamW by default (``optimizer.name="adafactor"`` is the paper's), a linear decay of the
learning rate, and a LoRA adapter unless ``trainable="full"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from agents.policy import Policy
from agents.rollout import by_length
from rlaif_env.api import DataError, RLAIFError
from rlaif_env.batches import shares
from rlaif_env.data.jsonl import check_text, read_jsonl
from rlaif_env.data.preferences import movie_snippets, split_of
from rlaif_env.data.tasks import DEFAULT_TASK, TaskLike, load_task
from rlaif_env.data.templates import encode_prompts, turn_end
from rlaif_env.models import (
    BUILTIN_MODEL,
    Backbone,
    LoraConfig,
    OptimizerConfig,
    context_of,
    continuation_ids,
    encode,
    linear_schedule,
    make_optimizer,
    pad_rows,
    tokens_that_fit,
    within,
)
from rlaif_env.ranks import Ranks, facts_of
from rlaif_env.records import write_json
from rlaif_env.runs import RunFolder

_SIDES = {"train": 0.95, "validation": 0.05}
_DIVISION = 1  # not the tasks' own, of which the built-in demonstrations are one split
_WARMUP = 0.05  # of all steps


@dataclass(frozen=True)
class SFTConfig:
    """Fine-tune a language model on demonstrations: prompts and what should be written after them.

    Attributes:
        data: A JSON lines file of text or prompt/response rows; by default the built-in corpus of movie reviews, whose
            opening words are the prompts.
        task: Says in which template prompts are put, nothing else: its keys template and system.
        model: The model to start from: a name or a folder.
        out: The run folder; by default one under runs/. The model is in its folder "model".
        trainable: "lora": an adapter, folded in when saved. "full": all weights.
        lora: The adapter.
        optimizer: Of whatever is trained.
        rows: Train on at most so many rows; 0 is all.
        epochs: Passes over the rows.
        learning_rate: Rises over the first twentieth of the steps, then falls linearly to 0. For "full", 1e-5 is the
            paper's.
        batch: Rows in one step.
        micro_batch: Rows in one gradient pass, at most, and no more tokens than fit into memory; the step is the same.
        max_prompt_tokens: Of a longer prompt the end is kept.
        max_response_tokens: Of a longer response the beginning is kept, without an EOS. Both are counted.
        seed: Of the order of the rows and of the adapter.
        device: "cpu", "cuda", ...; by default the GPU where there is one.
        dtype: Of the frozen weights; by default bfloat16 on a GPU that has it and float32 elsewhere.
    """

    data: str | None = None
    task: str = DEFAULT_TASK
    model: str = BUILTIN_MODEL
    out: str | None = None
    trainable: Literal["lora", "full"] = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rows: int = 0
    epochs: int = 1
    learning_rate: float = 2e-4
    batch: int = 16
    micro_batch: int = 8
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 128
    seed: int = 0
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "micro_batch", "max_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise RLAIFError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if self.rows < 0 or not self.learning_rate >= 0:
            raise RLAIFError(f"expected rows >= 0 and learning_rate >= 0, found {self.rows} and {self.learning_rate}")


@dataclass(frozen=True)
class Demonstration:
    """What the policy should write after a prompt; a text of its own has the prompt ""."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Example:
    """A demonstration as token ids, at least one each: the EOS last unless it was cut; ``cut`` tokens were left out."""

    prompt: Sequence[int]
    response: Sequence[int]
    cut: int


def demonstrations(data: str | Path | None) -> Iterator[Demonstration]:
    """Demonstrations of a JSON lines file (DataError for all its bad rows together), or of the built-in corpus."""
    if data is not None:
        yield from read_jsonl(data, _row)
        return
    openings = set(load_task("movie-review").prompts("train"))
    sizes = {len(opening.split()) for opening in openings}
    for snippet in movie_snippets("train"):
        words = snippet.text.split()
        for size in sizes:
            if (opening := " ".join(words[:size])) in openings and len(words) > size:
                yield Demonstration(opening, " " + " ".join(words[size:]))


def _row(row: Mapping[str, Any]) -> Demonstration:
    if "text" in row:
        if "prompt" in row:
            raise DataError("expected text, or prompt and response, found both in a row")
        return Demonstration("", check_text(row, "text", may_be_empty=False))
    name = "completion" if "completion" in row and "response" not in row else "response"
    response = check_text(row, name, may_be_empty=False)
    return Demonstration(check_text(row, "prompt", may_be_empty=False), response)


def tokenize(
    rows: Iterable[Demonstration], tokenizer: Any, max_prompt: int, max_response: int, task: TaskLike = DEFAULT_TASK
) -> list[Example]:
    """Token ids of demonstrations, prompts as the task's template has them.

    A text's prompt is its BOS, or its first token where the tokenizer adds none.

    Raises:
        DataError: If a text has no token to predict.
    """
    examples, known = [], load_task(task)
    turn_ends, eos = [turn_end(known, tokenizer)], [tokenizer.eos_token_id]
    for number, row in enumerate(rows, start=1):
        end = turn_ends if row.prompt else eos
        if row.prompt:
            (prompt,), (text,) = encode_prompts(known, tokenizer, [row.prompt])
            response = continuation_ids(tokenizer, text, row.response)
            cut_prompt = prompt
            if len(prompt) > max_prompt:
                (cut_prompt,), _ = encode_prompts(known, tokenizer, [row.prompt], max_prompt)
        else:
            whole = encode(tokenizer, [row.response])[0]
            prompt, response, cut_prompt = whole[:1], whole[1:], whole[:1]
        if not prompt or not response:
            raise DataError(
                f"row {number}: expected at least two tokens, found {len(prompt) + len(response)} in {row!r:.80}"
            )
        cut_response = (response + end)[:max_response]
        left_out = len(prompt) - len(cut_prompt) + len(response) + 1 - len(cut_response)
        examples.append(Example(cut_prompt, cut_response, left_out))
    return examples


def response_loss(policy: Policy, examples: Sequence[Example]) -> Tensor:
    """Sum of -log π over the response tokens of some examples: a scalar, with gradient within `Policy.training`."""
    pad = policy.tokenizer.pad_token_id
    prompts = pad_rows([example.prompt for example in examples], pad, side="left")
    arrays = (*prompts, *pad_rows([example.response for example in examples], pad))
    ids, mask, responses, response_mask = (torch.from_numpy(array).to(policy.backbone.device) for array in arrays)
    return -policy.evaluate(ids, mask, responses, response_mask.float()).logprobs.sum()


def sft(
    config: SFTConfig,
    rows: Iterable[Demonstration],
    *,
    base: Backbone | None = None,
    ranks: Ranks | None = None,
    log: Callable[[int, dict[str, float]], object] = lambda step, metrics: None,
    advance: Callable[[int], object] = lambda rows: None,
) -> tuple[Policy, dict[str, float]]:
    """Fine-tune a model on demonstrations.

    Args:
        config: The settings.
        rows: One in twenty, chosen by its prompt (or text), is held out.
        base: The model, if it is in memory already.
        ranks: The processes that train together, each called with the same; this one alone where not given.
        log: Called with the step and its metrics.
        advance: Called with the number of rows done since.

    Returns:
        The policy at temperature 1, and figures: the held-out loss in nats a token before and after, counts.

    Raises:
        RLAIFError: If there is nothing to train on or to hold out, or a loss is not finite.
    """
    ranks = ranks or Ranks()
    sides: dict[str, list[Demonstration]] = {side: [] for side in _SIDES}
    for row in rows:
        side = split_of(row.prompt or row.response, _SIDES, _DIVISION)
        if side != "train" or not config.rows or len(sides["train"]) < config.rows:
            sides[side].append(row)
    if not sides["train"] or not sides["validation"]:
        raise RLAIFError(
            f"expected rows to train on and to hold out, found {len(sides['train'])} and {len(sides['validation'])}; "
            "about 60 rows with different prompts are the least that can be divided"
        )
    settings: dict[str, Any] = {n: getattr(config, n) for n in ("trainable", "lora", "seed", "device", "dtype")}
    policy = ranks.agree(lambda: Policy(base or config.model, temperature=1.0, adapter="sft", **settings))
    if ranks.size > 1:
        ranks.check_same({"policy": policy.fingerprint()})
    limits = (config.max_prompt_tokens, config.max_response_tokens, config.task)
    train, held_out = (tokenize(sides[side], policy.tokenizer, *limits) for side in ("train", "validation"))
    context = context_of(policy.backbone.model)
    longest = max(len(example.prompt) + len(example.response) for example in (*train, *held_out))
    if context is not None and longest > context:
        raise RLAIFError(
            f"expected rows of at most {context} tokens, the model's context, found {longest}; lower max_prompt_tokens "
            "or max_response_tokens"
        )
    before = held_out_loss(policy, held_out, config.micro_batch, ranks)
    log(0, {"validation_loss": before})
    optimizer = make_optimizer(config.optimizer, policy.parameters, config.learning_rate)
    rng, fit = np.random.default_rng(config.seed), tokens_that_fit(policy.backbone.model)
    per_epoch = -(-len(train) // config.batch)
    step, total, after = 0, config.epochs * per_epoch, before
    for _ in range(config.epochs):
        order = rng.permutation(len(train))
        for start in range(0, len(order), config.batch):
            step += 1
            rate = config.learning_rate * linear_schedule(step, warmup=_WARMUP * total, total=total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            members = [train[i] for i in order[start : start + config.batch]]
            log(step, {**_step(policy, optimizer, members, config, fit, ranks), "learning_rate": rate})
            advance(len(members))
        after = held_out_loss(policy, held_out, config.micro_batch, ranks)
        log(step, {"validation_loss": after})
    return policy, {
        "validation_loss_before": before,
        "validation_loss": after,
        "rows": len(train),
        "validation_rows": len(held_out),
        "response_tokens": sum(len(e.response) for e in train),
        "cut_rows": sum(e.cut > 0 for e in [*train, *held_out]),
        "cut_tokens": sum(e.cut for e in [*train, *held_out]),
        "steps": step,
    }


def held_out_loss(policy: Policy, examples: Sequence[Example], micro_batch: int, ranks: Ranks | None = None) -> float:
    """Mean of -log π over the response tokens, nats."""
    ranks, fit = ranks or Ranks(), tokens_that_fit(policy.backbone.model)

    def own() -> float:
        with policy.training(), torch.no_grad():
            return sum(float(response_loss(policy, part)) for part in _micro_batches(examples, micro_batch, fit, ranks))

    return sum(ranks.gather(own)) / sum(len(example.response) for example in examples)


def _micro_batches(examples: Sequence[Example], size: int, tokens: int, ranks: Ranks) -> list[list[Example]]:
    """The passes over this process's examples."""
    both = [len(example.prompt) for example in examples], [len(example.response) for example in examples]
    examples = [examples[i] for i in shares(*both, 1, ranks.size)[ranks.rank]]
    lengths = [(len(example.response), len(example.prompt)) for example in examples]
    widths = [sum(both) for both in lengths]
    passes = [part for rows in by_length(lengths, size) for part in within(rows, widths, tokens)]
    return [[examples[i] for i in rows] for rows in passes]


def _step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    config: SFTConfig,
    fit: int,
    ranks: Ranks,
) -> dict[str, float]:
    """One optimiser step on the mean loss of the response tokens of some examples; so many tokens fit in a pass."""
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(example.response) for example in examples)

    def own() -> float:
        total = 0.0
        with policy.training():
            for part in _micro_batches(examples, config.micro_batch, fit, ranks):
                loss = response_loss(policy, part) / tokens
                loss.backward()
                total += float(loss.detach())
        return total

    total = sum(ranks.gather(own))
    ranks.sum_gradients(policy.parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters, config.optimizer.max_grad_norm))
    if not math.isfinite(total) or not math.isfinite(norm):
        raise RLAIFError(
            f"expected a finite loss and gradient, found loss {total} and gradient norm {norm}; lower learning_rate, "
            "or use float32"
        )
    optimizer.step()
    return {"loss": total, "grad_norm": norm}


def train_and_save(
    config: SFTConfig, *, quiet: bool = False, ranks: Ranks | None = None
) -> tuple[dict[str, float], Path]:
    """Fine-tune into a run folder, the policy in its folder "model"; the figures of `sft`, and the folder.

    Of several processes the first has the demonstrations, the folder and the display.
    """
    ranks = ranks or Ranks()
    rows = ranks.given(lambda: list(demonstrations(config.data)))
    if not ranks.leader:
        return sft(config, rows, ranks=ranks)[1], Path()
    with RunFolder.create(config.out, asdict(config), command="sft") as run, Progress(disable=quiet) as bars:
        expected = min(config.rows or len(rows), len(rows)) * config.epochs
        task = bars.add_task("rows", total=expected)
        policy, figures = sft(config, rows, ranks=ranks, log=run.log, advance=lambda rows: bars.advance(task, rows))
        policy.save(run.path / "model")
        write_json(run.path / "report.json", figures)
    return figures, run.path


def main(argv: Sequence[str]) -> int:
    """``rlaif sft``: fine-tune, save, and say what the held-out loss was before and after."""
    import tyro

    with Ranks.started() as ranks:

        def work() -> tuple[dict[str, float], Path]:
            ranks.check_same(facts_of(argv))
            config = ranks.given(lambda: tyro.cli(SFTConfig, args=list(argv), prog="rlaif sft"))
            return train_and_save(config, ranks=ranks)

        if not ranks.leader:
            return ranks.follow(lambda: 0 if work() else 1)
        figures, folder = work()
    print(
        f"{figures['rows']:.0f} rows, {figures['response_tokens']:.0f} response tokens, {figures['steps']:.0f} steps; "
        f"held-out loss {figures['validation_loss_before']:.3f} before, {figures['validation_loss']:.3f} after (nats a "
        f"token, {figures['validation_rows']:.0f} rows); cut: {figures['cut_tokens']:.0f} tokens in "
        f"{figures['cut_rows']:.0f} rows"
    )
    print(f"saved in {folder / 'model'}")
    return 0
