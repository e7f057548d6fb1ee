"""The command ``rlaif label``: AI preferences for a file of pairs, the built-in corpus, or a policy's own responses.

    config.json          the resolved configuration
    journal.jsonl        the answer to every question asked, written and synced batch by batch
    usage.jsonl          what each batch asked of the labeler's server, if it is behind one
    responses.jsonl      the sampled responses, if there is a policy
    preferences.jsonl    the labelled pairs, in the order of the input
    errors.jsonl         the pairs without a label, each with the reason
    report.json, .md     position bias, label mass, agreement with people

A run that was killed goes on where it was when the same command is given again: what is in the journal under the hash
of the question, the model and the parameters is not asked again; what failed is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from rewards.api import LanguageModel
from rewards.labeling.config import CALIBRATION, OPERATIONAL, LabelConfig
from rewards.labeling.job import LabelJob
from rewards.labeling.pair_source import Pair, SampledPairs
from rewards.labeling.probabilities import fitted_temperature
from rewards.labeling.report import Tally, as_markdown
from rewards.labeling.served import ServedPolicy
from rlaif_env.api import BackendError, Preference
from rlaif_env.batches import HOPELESS
from rlaif_env.data.journal import Journal
from rlaif_env.data.jsonl import write_jsonl
from rlaif_env.data.preferences import write_preferences
from rlaif_env.records import write_json
from rlaif_env.runs import RunFolder
from rlaif_env.tables import count_of

__all__ = ["LabelConfig", "label", "main"]


Pairs = Callable[[], Iterable[Pair]]
_LEAST_MEASURED, _MOST_MEASURED = 8, 32  # questions that a dry run asks of a server; between them a tenth


def label(config: LabelConfig, console: Console, model: LanguageModel | None = None) -> dict[str, Any]:
    """Label all pairs, or go on with it, and write the results.

    Args:
        config: The options.
        console: Where progress and the report go.
        model: A live labeler to use instead of the one that ``config`` names.

    Returns:
        The report; with ``dry_run`` the estimate.

    Raises:
        DataError: For all bad rows of the input together, before anything is asked.
        RunError: If the folder holds another run, or is being written.
        BackendError: If the labeler failed on everything some batches in a row. What was answered is kept.
    """
    with ExitStack() as stack:
        job = stack.enter_context(closing(LabelJob(config, model)))
        prompts = job.prompts()
        if config.dry_run:
            return _estimate(job, prompts, console)
        total = sum(1 for _ in job.stored_pairs()) if prompts is None else len(prompts)
        judged = job.calibration(job.stored_pairs() if prompts is None else ())
        settings = asdict(config) | {"task": job.task.to_json(), "content": job.content(), "shots": job.config.shots}
        may_differ = (*OPERATIONAL, *CALIBRATION)
        run = stack.enter_context(RunFolder.create(config.out, settings, command="label", exist=True, free=may_differ))
        run.amend(CALIBRATION)
        console.print(f"Writing to {run.path}; the same command with --out {run.path} goes on", soft_wrap=True)
        journal = stack.enter_context(Journal(run.path / "journal.jsonl", job.note))
        usage = stack.enter_context(Journal(run.path / "usage.jsonl", job.note_usage))
        pairs: Pairs = job.stored_pairs
        if prompts is not None:
            responses = stack.enter_context(Journal(run.path / "responses.jsonl", SampledPairs.check))
            pairs = _sampled(job, prompts, responses, console)
        started, before = time.monotonic(), len(journal)
        everything = len(judged) + total
        calibration = None
        if judged:  # first: where no temperature fits, that is said before the long work
            _ask_all(job, judged.__iter__, everything, journal, usage, console)
            calibration = _calibrated(job, judged, journal)
        _ask_all(job, lambda: chain(judged, pairs()), everything, journal, usage, console)
        tokens = job.tokens
        facts = {
            "task": job.task.name,
            "mode": config.mode,
            "model": job.labeler.language_model.name,
            "parameters": job.labeler.parameters,
            "asked_in_this_run": len(journal) - before,
            "seconds_of_this_run": round(time.monotonic() - started, 1),
            "tokens": tokens,
            "cost": job.cost(tokens["input"], tokens["output"]),
            **job.server(),
            "calibration": calibration,
        }
        report = _write(job, pairs(), journal, run.path, facts)
    console.print(Markdown(as_markdown(report)))
    return report


def _sampled(job: LabelJob, prompts: Sequence[str], journal: Journal, console: Console) -> Pairs:
    """Have the policy respond twice to each prompt, where it has not yet; the pairs."""
    config = job.config
    sampling: dict[str, Any] = {"seed": config.seed, "temperature": config.policy_temperature}
    sampled = SampledPairs(str(config.policy), job.task, prompts, journal, **sampling)
    if todo := sampled.open():
        policy = job.policy(console.print)
        with ExitStack() as stack:
            if isinstance(policy, ServedPolicy):
                stack.callback(policy.close)
            progress = stack.enter_context(_progress(console))
            done = len(sampled.prompts) - len(todo)
            bar = progress.add_task("sampling", total=len(sampled.prompts), completed=done, figures="")
            for start in range(0, len(todo), config.batch):
                part = todo[start : start + config.batch]
                sampled.draw(policy, part)
                progress.update(bar, advance=len(part))
    return sampled.__iter__


def _ask_all(job: LabelJob, pairs: Pairs, total: int, journal: Journal, usage: Journal, console: Console) -> None:
    """Ask everything that is not in the journal, batch by batch."""
    started = time.monotonic()
    hopeless = asked = 0
    with _progress(console) as progress:
        bar = progress.add_task("labelling", total=total, figures="")
        for batch, finished in _batches(job, pairs, journal):
            job.load()
            hopeless = 0 if job.ask(batch, journal, usage) else hopeless + 1
            asked += len(batch)
            if hopeless >= HOPELESS:
                raise BackendError(
                    f"expected answers from {job.labeler.language_model.name}, found that every question of "
                    f"{HOPELESS} batches in a row failed ({job.last_failure}); what was answered is kept, and the "
                    "same command goes on from there"
                )
            done, rate = finished + asked, asked / max(time.monotonic() - started, 1e-9)
            cost = job.cost(job.tokens["input"], job.tokens["output"])
            figures = f"{rate:.2f} labels/s  {(total - done) / rate / 60:.1f} min left"
            figures += "" if cost is None else f"  cost {cost:.4f}"
            progress.update(bar, completed=done, figures=figures)
        progress.update(bar, completed=total)
    job.settle(usage)  # a server that was probed and not asked


def _batches(job: LabelJob, pairs: Pairs, journal: Container[str]) -> Iterator[tuple[list[Pair], int]]:
    """The pairs that are still to be asked, batch by batch, each with the number of finished ones seen so far."""
    batch: list[Pair] = []
    finished = 0
    for pair in pairs():
        if pair.problem or all(key in journal for key in job.questions(pair)):
            finished += 1
            continue
        batch.append(pair)
        if len(batch) == job.config.batch:
            yield batch, finished
            batch = []
    if batch:
        yield batch, finished


def _calibrated(job: LabelJob, judged: Sequence[Pair], journal: Journal) -> dict[str, Any]:
    """The temperature of the labels, fitted on pairs that people judged; raises where none fits."""
    labels = [(label.p_first, pair.human) for pair in judged if (label := job.label(pair, journal)).status == "ok"]
    if not labels:
        raise BackendError(
            f"expected labels of {job.labeler.language_model.name} on some of the {len(judged)} pairs to calibrate on, "
            "found none; without calibration (calibrate 0) the same command says why in errors.jsonl"
        )
    return {"temperature": fitted_temperature(*zip(*labels, strict=True)), "pairs": len(labels), "asked": len(judged)}


def _write(
    job: LabelJob, pairs: Iterable[Pair], journal: Journal, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the labelled pairs in the order of the input, the others with their reasons, and the report."""
    tally = Tally()
    errors: list[dict[str, Any]] = []

    def labelled() -> Iterator[Preference]:
        for row, pair in enumerate(pairs, start=1):
            result = job.label(pair, journal)
            if facts["calibration"]:
                result = result.calibrated(facts["calibration"]["temperature"])
            tally.add(pair, result)
            texts = {name: getattr(pair, name) for name in ("prompt", "response_1", "response_2")}
            human = {} if pair.human is None else {"human_p_first": pair.human}
            meta = {**pair.meta, **human, "label": dict(result.record)}
            if result.status == "ok":
                yield Preference(**texts, p_first=result.p_first, source=f"ai:{facts['model']}", meta=meta)
            else:
                errors.append({"row": row, "status": result.status, "reason": result.reason, **texts, "meta": meta})

    write_preferences(folder / "preferences.jsonl", labelled())
    write_jsonl(folder / "errors.jsonl", errors)
    report = tally.report(facts)
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
    return report


def _estimate(job: LabelJob, prompts: list[str] | None, console: Console) -> dict[str, Any]:
    """Say what the job would take, without a model's weights; unknown texts count at their longest.

    How many requests of a server a question takes depends on what its model answers: some of the questions are asked.
    The tokens read are taken to grow with a question's characters.
    """
    config = job.config
    longest = " word" * job.task.max_response_tokens
    pairs: Iterable[Pair] = job.stored_pairs()
    if prompts is not None:
        pairs = (Pair(prompt, longest, longest + "s") for prompt in prompts)
    journal: Container[str] = () if config.out is None else Journal(config.out / "journal.jsonl")
    judged = job.calibration(job.stored_pairs() if prompts is None else ())
    count = done = 0
    asked: set[str] = set()
    sample: dict[str, str] = {}  # the questions with the least keys; those are hashes, so that they may be any
    tokens = [0, 0]
    for labelled, pair in chain(((False, pair) for pair in judged), ((True, pair) for pair in pairs)):
        new = {key: question for key, question in job.questions(pair).items() if key not in journal}
        count += labelled
        done += labelled and not new
        spent = [job.spent(question) for key, question in new.items() if key not in asked]
        tokens = [sum(column) for column in zip(tokens, *spent, strict=True)]
        asked |= new.keys()
        sample = dict(sorted((sample | new).items())[:_MOST_MEASURED])
    about = "at most " if config.cot or prompts is not None else "" if job.exact else "about "
    measured = ""
    estimate = {"pairs": count, "done": done, "questions": len(asked)}
    if config.labeler.url is not None and sample:
        some = list(sample.values())[: max(_LEAST_MEASURED, len(asked) // 10)]
        estimate["requests"], *tokens = job.measured(some, len(asked), tokens[0])
        about, measured = "about ", f", measured on {len(some)} of them: about {estimate['requests']:,} requests"
    cost = job.cost(*tokens)
    prices = "--labeler.server.limits.price-in and price-out"
    priced = f"; give {prices} for the cost" if cost is None else f"; cost {about}{cost:.4f}"
    beside = f", and {len(judged)} to calibrate on" if judged else ""
    console.print(
        f"{count_of(count, 'pair')}, {done} of them labelled already{beside}; {len(asked)} questions to "
        f"{job.labeler.language_model.name}{measured}: {about}{tokens[0]:,} tokens read, {about}{tokens[1]:,} "
        f"written{priced}",
        highlight=False,
        soft_wrap=True,
    )
    return {**estimate, "tokens": tokens, "cost": cost}


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}")
    return Progress(*columns, console=console)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``rlaif label``; returns the exit code: 1 if no pair could be labelled."""
    import tyro

    config = tyro.cli(LabelConfig, args=argv, prog="rlaif label")
    report = label(config, Console())
    return 0 if config.dry_run or report["labelled"] else 1
