"""The stages of a comparison are made: by this process, or by several.

Several workers take one stage each, as soon as what it needs is there; this process hands them out and makes none. A
worker that is lost takes nothing with it: its stage is not finished, so the same command makes it, or goes on with it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from traceback import format_exc
from typing import cast

from rich.console import Console

from benchmarks.comparison.config import CompareConfig
from benchmarks.comparison.pipeline import Pipeline
from benchmarks.comparison.planning.plan import planned
from benchmarks.comparison.stages import Job
from rlaif_env.api import RLAIFError


@dataclass
class _Worker:
    """A process that makes stages, one at a time."""

    name: str
    process: BaseProcess
    pipe: Connection  # keys go to it; None comes back for a stage that is made, else what went wrong
    job: Job | None = None  # what it makes


def make_stages(pipeline: Pipeline, jobs: Sequence[Job]) -> int:
    """Make the planned stages that are not there, with the configuration's number of workers; how many there were.

    Raises:
        RLAIFError: What a stage raised; the other workers have then finished theirs. Also where a worker was killed.
        KeyboardInterrupt: After Ctrl-C, when all workers have ended; a second one ends them at once.
    """
    if jobs[0].name == "sft" and not jobs[0].done:
        pipeline.stages.finish(jobs[0])
        return 1 + make_stages(pipeline, planned(pipeline))
    waiting = {job.key: job for job in jobs if not job.done}
    count, made = min(pipeline.config.workers, len(waiting)), len(waiting)
    if count < 2:
        for job in waiting.values():
            pipeline.stages.finish(job)
        return made
    with _workers(pipeline.config, count) as workers:
        failure = _hand_out(waiting, workers, pipeline.console)
    if failure is not None:
        raise RLAIFError(failure)
    return made


def _hand_out(waiting: dict[str, Job], workers: Sequence[_Worker], console: Console) -> str | None:
    """Have all jobs made, or those that were begun before one failed; what went wrong then."""
    failure = None
    while True:
        for worker in workers if failure is None else ():
            missing = {*waiting, *(other.job.key for other in workers if other.job is not None)}
            ready = (job for job in waiting.values() if not any(stage.key in missing for stage in job.needs))
            if worker.job is None and (job := next(ready, None)) is not None:
                worker.job = waiting.pop(job.key)
                with suppress(BrokenPipeError):  # `_end` will find it gone
                    worker.pipe.send(job.key)
                console.print(f"[bold]{job.name}[/] ({worker.name})", highlight=False)
        busy = {worker.pipe: worker for worker in workers if worker.job is not None}
        if not busy:
            return failure
        for pipe in wait(list(busy)):
            if problem := _end(busy[cast(Connection, pipe)], console):
                failure = failure or problem


def _end(worker: _Worker, console: Console) -> str | None:
    """Take in how a worker's stage ended: what went wrong, None where it is made."""
    job, worker.job = worker.job, None
    assert job is not None
    try:
        problem: str | None = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return f"{worker.name} ended while it made {job.path}, with exit code {worker.process.exitcode}"
    if problem is None:
        console.print(f"  {job.name}: {job.finished().seconds:.0f} s, in {job.path}", highlight=False, soft_wrap=True)
    return problem


@contextmanager
def _workers(config: CompareConfig, count: int) -> Iterator[list[_Worker]]:
    """So many workers, which have ended when the block has."""
    import torch

    spawn, threads = get_context("spawn"), max(1, torch.get_num_threads() // count)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    devices = visible.split(",") if "RLAIF_DEVICE" not in os.environ else [visible]
    workers = []
    try:
        for i in range(count):
            ours, theirs = spawn.Pipe()
            arguments = (config, threads, devices[i % len(devices)], theirs)
            process = spawn.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(f"worker {i + 1}", process, ours))
        yield workers
    except KeyboardInterrupt:
        _interrupt(workers)
        raise
    finally:
        for worker in workers:
            worker.pipe.close()
        for worker in workers:
            worker.process.join()


def _interrupt(workers: Sequence[_Worker]) -> None:
    """Have the workers end as Ctrl-C ends them, a training with a checkpoint; on another Ctrl-C at once."""
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker.process.pid or 0, signal.SIGINT)
    try:
        for worker in workers:
            worker.process.join()
    except KeyboardInterrupt:
        for worker in workers:
            worker.process.kill()


def _work(config: CompareConfig, threads: int, device: str, pipe: Connection) -> None:
    """A worker's life: make the stages whose keys come through the pipe until that is closed."""
    os.setpgrp()  # a terminal's Ctrl-C is for the process that hands out the stages
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch

    torch.set_num_threads(threads)
    console = Console(quiet=True, force_terminal=False)
    jobs: Mapping[str, Job] = {}
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            key, problem = pipe.recv(), None
            try:
                jobs = jobs or {job.key: job for job in planned(Pipeline(config, console))}
                jobs[key].finish()
            except RLAIFError as error:
                problem = str(error)
            except Exception:
                problem = format_exc()
            pipe.send(problem)


def _end_with_parent() -> None:
    """End this process where the one that started it is gone."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves a checkpoint
