"""The command ``rlaif evaluate``: policies against policies on the same held-out prompts, under any number of judges.

    config.json        the resolved configuration, and a hash of the content of every policy and judge
    systems/           a file a system: its responses and every score so far
    pairwise.jsonl     the answers of the pairwise judge
    responses.jsonl, evaluation.json     the results: see `benchmarks.evaluation.tables`

The same command on the same folder goes on where it was: what was answered or scored is not done again, what failed is.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from benchmarks.evaluation.judge_panel import JudgePanel
from benchmarks.evaluation.judges import check_scored, pairwise_wins, score_rows, win_rates, with_gold
from benchmarks.evaluation.length_control import RESAMPLES
from benchmarks.evaluation.systems import (
    FILES,
    Source,
    System,
    answer,
    find_source,
    read_responses,
    read_system,
    reference_of,
    write_system,
)
from benchmarks.evaluation.tables import write_evaluation
from rewards.labeling.labeler import LabelingConfig
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import RLAIFError
from rlaif_env.batches import PROMPTS_AT_ONCE
from rlaif_env.data.journal import Journal
from rlaif_env.data.tasks import DEFAULT_TASK, EVAL_PROMPTS, EVAL_SPLIT, Task, held_out_prompts, load_task
from rlaif_env.models import BUILTIN_MODEL, backbone
from rlaif_env.options import JSON_MAPPING, OPERATIONAL
from rlaif_env.runs import RunFolder
from rlaif_env.servers.vllm import VLLMConfig
from rlaif_env.tables import Table, side_by_side

_SAMPLES = 4  # prompts shown on the terminal


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare policies on held-out prompts.

    Attributes:
        policies: Each a run folder, a checkpoint's folder, a model's name or folder, "sft" (the reference), or a .jsonl
            file of responses (prompt, response) made elsewhere; NAME=SOURCE to give it another name in the tables.
        task: A built-in task or a TOML file.
        judges: Reward backends that score the responses: "direct-llm", "human-rm=runs/rm", "distilled-rm=runs/rm", ...;
            LABEL:BACKEND=MODEL where two have one name. Code of yours as package.module:name or path/file.py:name.
            The task's gold measure is always among the judges.
        pairwise: Also have a language model choose between the responses of each two systems, in both orders.
        judge: The language model behind "direct-llm" and the pairwise judgement.
        label: How it chooses and, as far as they are settings of a score, how it scores.
        judge_settings: Of single judges, by name or "pairwise", such as '{"pairwise": {"shots": 2}}'; they go before
            the shared ones.
        reference: The model that KL and perplexity are measured against, and that "sft" stands for.
        split: Which of the task's prompts.
        prompts: How many of them, at least 2; by default 128, or as many as there are.
        max_new_tokens: Longest response; the task's where not given.
        temperature: Of the sampling; that of each policy's own run where not given (0.9 where there is none).
        seed: Of the sampling and the bootstrap.
        resamples: Of the bootstrap of each length-controlled win rate.
        batch: Prompts answered at once.
        sampler: vLLM servers that answer, with the policies' base model.
        out: The folder to write to, or to go on with; a new one under runs/ where not given.
    """

    policies: tuple[str, ...]
    task: str = DEFAULT_TASK
    judges: tuple[str, ...] = ()
    pairwise: bool = False
    judge: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    label: LabelingConfig = field(default_factory=LabelingConfig)
    judge_settings: Annotated[Mapping[str, Mapping[str, Any]], JSON_MAPPING] = field(default_factory=dict)
    reference: str = BUILTIN_MODEL
    split: str = EVAL_SPLIT
    prompts: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    resamples: int = RESAMPLES
    batch: int = PROMPTS_AT_ONCE
    sampler: VLLMConfig = field(default_factory=VLLMConfig)
    out: Path | None = None


def _named(policies: Sequence[str]) -> dict[str, str]:
    """Sources by the names of their systems; an error if there is none, or two have one name."""
    pairs = []
    for policy in policies:
        name, equals, source = policy.partition("=")
        named = equals and not Path(policy).exists()  # a path may hold a "=" too
        pairs.append((name, source) if named else (_name_of(policy), policy))
    names = [name for name, _ in pairs]
    if not names or len(set(names)) < len(names) or not all(names):
        raise RLAIFError(
            f"expected at least one policy, each of its own name, found {', '.join(names) or 'none'}; write "
            "NAME=SOURCE to name one"
        )
    return dict(pairs)


def _name_of(source: str) -> str:
    """What tables call a source: the run's folder, the file without its ending, or the model's name."""
    path = Path(source)
    if path.is_dir():
        path = path.resolve()
        if path.parent.name == "checkpoints":
            return f"{path.parent.parent.name}@{int(path.name)}" if path.name.isdigit() else path.name
        return path.parent.name if path.name in ("policy", "model") else path.name
    return re.sub(r"\.(jsonl(\.gz)?|parquet)$", "", path.name) if source.endswith(FILES) else source


def evaluate(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Answer, judge and compare, or go on with it, and write the results; returns what evaluation.json holds.

    Raises:
        RLAIFError: On bad settings, before anything slow happens.
        RunError: If the folder holds another evaluation, or is being written.
        BackendError: If a judge failed on everything. What was done is kept.
    """
    console = console or Console(quiet=True)
    task = load_task(config.task)
    prompts = held_out_prompts(task, config.split, config.prompts)
    if len(prompts) < 2:
        raise RLAIFError(f"expected at least 2 prompts, found {len(prompts)}")
    if config.prompts is None and len(prompts) < EVAL_PROMPTS:
        console.print(f"prompts: {len(prompts)}, all that split {config.split!r} has", highlight=False)
    config = replace(config, prompts=len(prompts))
    policies = _named(config.policies)
    sources = {name: find_source(source, config.reference) for name, source in policies.items()}
    reference = reference_of(config.reference)
    for source in sources.values():
        if source.kind == "file":
            read_responses(source.path, task, split=config.split, prompts=config.prompts)
    judges = JudgePanel(
        task,
        config.judges,
        judge=config.judge,
        label=config.label,
        settings=config.judge_settings,
        pairwise=config.pairwise,
    )
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    kept = {name: value for name, value in asdict(config).items() if name != "out"}
    contents = {"judge": judges.contents(), "policy": {name: source.content for name, source in sources.items()}}
    kept |= {"task": task.to_json(), "prompts_sha256": digest, "content": contents | {"reference": reference.content}}
    if config.out is None or not (config.out / "config.json").exists():
        with _working(console, "loading the judges"):
            judges.build_all()
    free = ["sampler", *(f"judge.{name}" for name in OPERATIONAL)]
    with RunFolder.create(config.out, kept, command="evaluate", exist=True, free=free) as run:
        console.print(f"Writing to {run.path}; the same command with --out {run.path} goes on", soft_wrap=True)
        systems, failures = _systems(config, task, policies, judges, run.path, console)
        measures = [*(["gold"] if task.gold else []), *(f"judge:{name}" for name in judges.specs)]
        wins = [row for m in measures for row in win_rates(systems, m, seed=config.seed, resamples=config.resamples)]
        if config.pairwise and len(systems) > 1:
            labeler = judges.labeler()
            what = f"{labeler.language_model.name} compares the responses"
            with Journal(run.path / "pairwise.jsonl") as journal, _working(console, what) as show:
                wins += pairwise_wins(
                    systems,
                    labeler,
                    seed=config.seed,
                    resamples=config.resamples,
                    journal=journal,
                    progress=lambda done, total: show(f"{done}/{total} questions"),
                )
        facts = _facts(config, task, sources, judges) | {"failures": failures}
        write_evaluation(run.path, systems, wins, facts)
        written: dict[str, Any] = json.loads((run.path / "evaluation.json").read_bytes())
        _show(written, systems, console)
        console.print(f"Responses, figures and all win rates at equal length in {run.path}", soft_wrap=True)
    return written


def _systems(
    config: EvaluateConfig, task: Task, policies: Mapping[str, str], judges: JudgePanel, folder: Path, console: Console
) -> tuple[list[System], dict[str, dict[str, dict[str, int]]]]:
    """Every system with all its scores, and why rows failed: counts by judge, system and reason."""
    (folder / "systems").mkdir(exist_ok=True)
    slugs = [re.sub(r"[^\w.-]+", "-", name) for name in policies]
    files = {name: folder / "systems" / f"{i:02d}-{slugs[i]}.json" for i, name in enumerate(policies)}
    reference = None  # held here, it is loaded once
    systems: list[System] = []
    failures: dict[str, dict[str, dict[str, int]]] = {}
    for name, source in policies.items():
        if files[name].exists():
            systems.append(read_system(files[name]))
            continue
        reference = reference or backbone(reference_of(config.reference).path)
        with _working(console, f"{name}: answering {config.prompts} prompts"):
            system = answer(
                name,
                source,
                task,
                split=config.split,
                prompts=config.prompts,
                seed=config.seed,
                batch=config.batch,
                reference=config.reference,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                servers=config.sampler,
                adapters=folder / "adapters",
                tell=console.print,
            )
        systems.append(with_gold(system, task))
        write_system(files[name], systems[-1])
    for judge in judges.specs:
        for i, system in enumerate(systems):
            systems[i], reasons = _score(system, judge, judges, console)
            if reasons:
                failures.setdefault(judge, {})[system.name] = dict(Counter(reasons.values()))
            if systems[i] is not system:
                write_system(files[system.name], systems[i])
    return systems, failures


def _score(system: System, judge: str, judges: JudgePanel, console: Console) -> tuple[System, dict[int, str]]:
    """The system with the scores of a judge; only rows without one are asked for."""
    values = system.measures.get(f"judge:{judge}", np.full(len(system.prompts), np.nan)).copy()
    rows = np.flatnonzero(np.isnan(values))
    if not rows.size:
        return system, {}
    with _working(console, f"{system.name}: {judge} scores {rows.size} responses"):
        values[rows], reasons = score_rows(
            judges.backend(judge),
            [system.prompts[i] for i in rows],
            [system.responses[i] for i in rows],
            give_up=rows.size == values.size,
        )
    check_scored(judge, system.name, values, reasons)
    return replace(system, measures={**system.measures, f"judge:{judge}": values}), reasons


def _facts(config: EvaluateConfig, task: Task, sources: Mapping[str, Source], judges: JudgePanel) -> dict[str, Any]:
    sampled = {name: source for name, source in sources.items() if source.kind != "file"}
    return {
        "task": task.name,
        "split": config.split,
        "prompts": config.prompts,
        "seed": config.seed,
        "max_new_tokens": config.max_new_tokens or task.max_response_tokens,
        "temperatures": {name: config.temperature or source.temperature for name, source in sampled.items()},
        "reference": config.reference,
        "gold": task.gold,
        "judges": {name: kind if model is None else f"{kind}={model}" for name, (kind, model) in judges.specs.items()},
        "pairwise": config.label.mode if config.pairwise else None,
        "judge_model": config.judge.name,
        "label": asdict(config.label),
        "judge_settings": dict(config.judge_settings),
        "bootstrap_resamples": config.resamples,
    }


@contextmanager
def _working(console: Console, what: str) -> Iterator[Any]:
    """A spinner while it lasts, then a line with the time it took; yields a function that says how far it is."""
    started = time.monotonic()
    with console.status(what) as status:
        yield lambda text: status.update(f"{what}: {text}")
    console.print(f"{what} ({time.monotonic() - started:.0f} s)", highlight=False, markup=False)


def _show(written: Mapping[str, Any], systems: Sequence[System], console: Console) -> None:
    """The tables, but for the matrices that would only repeat them, and some samples."""
    for values in written["tables"]:
        if values["title"].startswith("Win rates") and (len(systems) < 3 or "equal length" in values["title"]):
            continue
        console.print(Table.from_json(values, "evaluation.json").rich())
    responses = {system.name: system.responses for system in systems}
    console.print(side_by_side("the same prompts", systems[0].prompts[:_SAMPLES], responses))


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif evaluate``; returns the exit code."""
    evaluate(tyro.cli(EvaluateConfig, args=argv, prog="rlaif evaluate"), Console())
    return 0
