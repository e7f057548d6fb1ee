"""One update of this project beside one of TRL's RLOOTrainer: ``python -m benchmarks.speed.versus_trl``.

Both sides do the same work and are held to it: the same model folder, prompts of P tokens and responses of exactly T,
K samples of each prompt, dtype (float32 unless asked for), threads, AdamW, beta, LoRA of the same rank on the same
modules (or all weights), and a reward that costs nothing. Before anything is timed, both are given the same completions
and must find the same leave-one-out advantages. TRL runs in its best setting: no gradient checkpointing, no dropout,
one gradient pass over the whole batch, no logging, no saving, its default fused AdamW.

Steps take turns in one process. Peak memory is taken in a process of its own for each side. So that every response has
all its T tokens, both sides are told that the end of a text is a token which the model never writes.

Notation: n rows of B prompts with K samples each, P prompt tokens, T response tokens.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.memory import apart, peak
from benchmarks.speed.one_update import SETTINGS, Ours, Setting, model_folder, prompts_of, reward
from benchmarks.speed.timing import Times, beside, stopwatch
from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL
from rlaif_env.records import write_json
from rlaif_env.tables import Cell, Table

_SIDES = ("ours", "trl")
_BARS = {"median": 1.5, "each": 1.2, "memory": 0.7}


def trl_trainer(folder: Path, setting: Setting, steps: int, *, cpu: bool) -> Any:
    """TRL's side: its trainer in its best setting for this work."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    s = setting
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = prompts_of(tokenizer, s.rows // s.group, s.prompt)
    adapter = LoraConfig(
        r=s.rank, lora_alpha=2 * s.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    trl: Any = importlib.import_module("trl")
    return trl.RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, s.dtype)),
        processing_class=tokenizer,
        reward_funcs=reward,
        peft_config=adapter if s.trainable == "lora" else None,
        args=trl.RLOOConfig(
            output_dir=str(folder / "trl"),
            max_steps=steps,
            per_device_train_batch_size=s.rows // s.passes,
            gradient_accumulation_steps=s.passes,
            num_generations=s.group,
            num_iterations=1,
            max_completion_length=s.response,
            temperature=1.0,
            beta=s.beta,
            learning_rate=1e-5,
            disable_dropout=True,
            gradient_checkpointing=False,
            use_cpu=cpu,
            bf16=s.dtype == "bfloat16",
            shuffle_dataset=False,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
    )


def _run_trl(trainer: Any, times: Times, between: Callable[[], None]) -> None:
    """Run the trainer's steps, timing each, and something else after each."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.watch = stopwatch(times)
            self.watch.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.watch.__exit__(None, None, None)
            between()

    trainer.add_callback(Turns())
    trainer.train()


def equal_work(trainer: Any, ours: Ours) -> float:
    """Give both sides the same completions; the largest difference between their leave-one-out advantages.

    Raises:
        RLAIFError: If prompts, adapters or numbers of weights differ, a response is short, or advantages differ.
    """
    import torch

    from agents import functional as F

    s, policy = ours.setting, ours.agent.policy
    theirs = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if sum(p.numel() for p in theirs.values()) != sum(p.numel() for p in policy.parameters):
        raise RLAIFError("expected as many trained weights on both sides, found others; check the LoRA targets")
    theirs = {name.removeprefix("base_model.model.").replace(".default.", "."): p for name, p in theirs.items()}
    saved = policy.state()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # adapters away from zero, so that there is a KL to compare
        for p in theirs.values() if s.trainable == "lora" else ():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.002)
    policy.load_state({name: p.detach().cpu().clone() for name, p in theirs.items()})
    rows = [{"prompt": prompt} for prompt in ours.prompts for _ in range(s.group)]
    made = trainer._generate_and_score_completions(rows)
    ids, mask, answers = made["prompt_ids"], made["prompt_mask"], made["completion_ids"]
    answer_mask = made["completion_mask"].float()
    if ids.shape[1] != s.prompt or int(mask.sum()) != ids.numel():
        raise RLAIFError(f"expected {s.prompt} prompt tokens in each of TRL's rows, found {mask.sum(1).tolist()}")
    if answers.shape[1] != s.response or int(answer_mask.sum()) != answers.numel():
        lengths = answer_mask.sum(1).tolist()
        raise RLAIFError(f"expected {s.response} tokens in each of TRL's responses, found {lengths}")
    texts = trainer.processing_class.batch_decode(answers, skip_special_tokens=True)
    rewards = torch.tensor(reward([], texts), device=ids.device)
    with policy.training(), torch.no_grad():
        own = policy.evaluate(ids, mask, answers, answer_mask).logprobs
    reference = policy.evaluate(ids, mask, answers, answer_mask, reference=True).logprobs
    kl = F.kl_per_token(own, reference, answer_mask)
    # TRL's objective is r - beta KL, this project's (1 - beta) r - beta KL
    returns = F.returns_to_go(rewards / (1 - s.beta), kl, answer_mask, s.beta)
    advantages = F.leave_one_out_advantages(returns[:, 0], s.group)
    apart = float((advantages - made["advantages"]).abs().max())
    # the KL of one response, sampled in bfloat16, is known to some tenths of a nat only
    if apart > (1e-3 if s.dtype == "float32" else s.beta) or (
        s.beta and s.trainable == "lora" and float(kl.abs().sum()) == 0
    ):
        raise RLAIFError(f"expected equal leave-one-out advantages on the same completions, found {apart} between them")
    policy.load_state(saved)
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(saved[name].to(p))
    return apart


def measure(setting: Setting, model: str, *, repetitions: int, warmup: int, device: str) -> dict[str, Any]:
    """Time both sides in turn: seconds, ratio of the medians, and what held that the work was equal."""
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(model, Path(name))
        ours, times, theirs = Ours(folder, setting, device), Times(), Times()
        trainer = trl_trainer(folder, setting, warmup + repetitions, cpu=device == "cpu")
        apart = equal_work(trainer, ours)

        def between() -> None:
            with stopwatch(times):
                ours.step()

        _run_trl(trainer, theirs, between)
        lengths = trainer._metrics["train"]["completions/mean_length"]
        whole = (setting.rows * setting.prompt, setting.rows * setting.response)
        if ours.tokens() != whole or any(length != setting.response for length in lengths):
            raise RLAIFError(f"expected {setting.rows} full responses on both sides, found {ours.tokens()}, {lengths}")
    times, theirs = times.without(warmup), theirs.without(warmup)
    return {
        **asdict(setting),
        "name": setting.name,
        "threads": torch.get_num_threads(),
        "advantages_apart": apart,
        "ours": times.summary(),
        "trl": theirs.summary(),
        **beside(times, theirs),
    }


def _memory_here(side: str, setting: Setting, model: str, device: str) -> dict[str, float]:
    """Peak size of this process after updates of one side: two, so that the optimiser's state counts."""
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(model, Path(name))
        if side == "ours":
            ours = Ours(folder, setting, device)
            ours.step()
            ours.step()
        else:
            trl_trainer(folder, setting, 2, cpu=device == "cpu").train()
    on_device = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    return {"peak": float(on_device or peak())}


def memory(setting: Setting, model: str, device: str) -> dict[str, float]:
    """Peak bytes of each side, each in a process of its own, and their ratio."""
    peaks = {side: apart(_memory_here, side, setting, model, device)["peak"] for side in _SIDES}
    return {**peaks, "ratio": peaks["ours"] / peaks["trl"]}


def summarise(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures over all settings, of what was measured, and whether each bar is met."""
    summary, met = dict[str, Any](), dict[str, bool]()
    if ratios := [float(row["ratio"]) for row in settings if "ratio" in row]:
        summary |= {"median_ratio": float(np.median(ratios)), "least_ratio": min(ratios)}
        met |= {"median": summary["median_ratio"] >= _BARS["median"], "each": min(ratios) >= _BARS["each"]}
    if sizes := [row["memory"]["ratio"] for row in settings if "memory" in row]:
        summary["largest_memory_ratio"] = max(sizes)
        met["memory"] = max(sizes) <= _BARS["memory"]
    return {**summary, "bars": _BARS, "met": met}


def table(figures: Mapping[str, Any]) -> Table:
    """The figures as a table."""
    rows: list[list[Cell]] = []
    for row in figures["settings"]:
        cells: list[Cell] = [row["name"], *[None] * 4]
        if "ratio" in row:
            cells[1:3] = (_with_quartiles(row[side]["median_s"], row[side]["quartiles_s"]) for side in _SIDES)
            cells[3:] = _with_quartiles(row["ratio"], row["ratio_quartiles"]), f"{row['ratio_cpu']:.2f}"
        sizes = row.get("memory")
        megabytes = [f"{sizes[side] / 2**20:.0f}" for side in _SIDES] if sizes else [None, None]
        rows.append([*cells, *megabytes, f"{sizes['ratio']:.2f}" if sizes else None])
    names = {"median_ratio": "median of the settings", "least_ratio": "least", "largest_memory_ratio": "largest memory"}
    bars = zip(names.items(), _BARS.values(), strict=True)
    summary = figures["summary"]
    caption = ", ".join(f"{words} {summary[name]:.2f} (bar {bar})" for (name, words), bar in bars if name in summary)
    columns = ["setting", "this project", "TRL", "TRL / ours", "by CPU time", "peak MB", "TRL peak MB", "ratio"]
    title = f"One update, this project beside TRL {figures['trl_version']} (seconds, median [quartiles])"
    return Table(title, columns, rows, caption)


def _with_quartiles(middle: float, quartiles: Sequence[float]) -> str:
    return f"{middle:.2f} [{quartiles[0]:.2f}, {quartiles[1]:.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code is 0 whatever the figures say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.versus_trl", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=BUILTIN_MODEL, help="name or folder")
    parser.add_argument("--repetitions", type=int, default=5, help="timed steps of each side, in turn")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each side before that")
    parser.add_argument("--trainable", choices=["lora", "full"], default="lora")
    parser.add_argument("--passes", type=int, default=1, help="gradient passes TRL takes the rows in")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen weights")
    parser.add_argument("--sizes", type=int, nargs=4, metavar=("N", "K", "P", "T"), help="one setting of your own")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings to run, from 0")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--no-time", action="store_true", help="leave out the times")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(arguments)
    import trl

    chosen = [s for i, s in enumerate(SETTINGS) if not options.only or i in options.only]
    if options.sizes:
        rows, group, prompt, response = options.sizes
        chosen = [Setting(0.05, prompt, response, rows=rows, group=group)]
    common = {"trainable": options.trainable, "passes": options.passes, "dtype": options.dtype}
    settings = [replace(s, **common) for s in chosen]
    parts = []
    for setting in settings:
        row: dict[str, Any] = {**asdict(setting), "name": setting.name}
        if not options.no_time:
            times = {"repetitions": options.repetitions, "warmup": options.warmup}
            row = measure(setting, options.model, device=options.device, **times)
        if not options.no_memory:
            row["memory"] = memory(setting, options.model, options.device)
        parts.append(row)
    figures = {
        "command": "python -m benchmarks.speed.versus_trl " + " ".join(arguments),
        "trl_version": trl.__version__,
        "device": options.device,
        "settings": parts,
        "summary": summarise(parts),
    }
    if options.out:
        write_json(options.out, figures)
    print(table(figures).markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
