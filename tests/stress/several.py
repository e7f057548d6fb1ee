"""Trainings in several processes that are forked from this one, ended in many ways and gone on with, told as JSON.

``python -m tests.stress.several FOLDER`` runs all cases; with names after the folder, those only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.processes import ended, started
from tests.stress import survival

KILL, TERM, INT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGINT)
UPDATES = 20

Prepare = Callable[[int], object]


def job(folder: Path, name: str, *, updates: int = 6, every: int = 10, trainable: str = "lora") -> Any:
    """Five prompts with three answers each: rows that two processes cannot have the same number of."""
    config = survival.settings(folder, folder / name, updates, every)
    rate = 1e-2 if trainable == "lora" else 1e-4
    agent = replace(config.agent, trainable=trainable, learning_rate=rate)
    return replace(config, prompts_per_update=5, agent=agent)


def trained(config: Any, size: int, prepare: Prepare = lambda rank: None, argv: Any = None) -> list[int]:
    """Start a training in so many processes, output in a file each beside the run; their ids."""
    from rich.console import Console

    from agents.training.command import train
    from agents.training.follow import follow
    from rlaif_env.api import RLAIFError
    from rlaif_env.ranks import Ranks, facts_of

    def work(rank: int) -> int:
        with Path(f"{config.out}.{rank}.txt").open("a") as file, redirect_stdout(file), redirect_stderr(file):
            prepare(rank)
            words = [] if argv is None else argv(rank)
            try:
                with Ranks.started() as ranks:
                    if not ranks.leader:
                        return follow(ranks, words)
                    ranks.check_same(facts_of(words))
                    return 130 if train(config, Console(file=file, width=400), ranks).interrupted else 0
            except RLAIFError as error:
                print(error)
                return 2

    children, store = started(size, work)
    STORES.append(store)
    return children


STORES: list[Any] = []


def at(owner: Any, name: str, count: int, do: Callable[[], object]) -> None:
    """Do something when a method is called for the n-th time."""
    inner, left = getattr(owner, name), [count]

    def call(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            do()
        return inner(*arguments, **named)

    setattr(owner, name, call)


def owner(name: str) -> Any:
    """Where a method is."""
    import torch

    from agents.passes import Passes
    from agents.policy import Policy
    from agents.training.follow import Follower
    from rlaif_env.envs.core import Core
    from rlaif_env.runs import RunFolder

    return {
        "sample": Policy,
        "evaluate": Policy,
        "idle": Policy,
        "score": Core,
        "_gradient": Passes,
        "step": torch.optim.AdamW,
        "log_samples": RunFolder,
        "_await_whole": Follower,
    }[name]


def signalled(rank: int, name: str, count: int, number: int) -> Prepare:
    """Have one rank signalled when it calls a method for the n-th time."""

    def prepare(mine: int) -> None:
        if mine == rank:
            at(owner(name), name, count, lambda: os.kill(os.getpid(), number))

    return prepare


def raising(rank: int, name: str, count: int, error: Exception) -> Prepare:
    """Have one rank fail when it calls a method for the n-th time."""

    def prepare(mine: int) -> None:
        def fail() -> None:
            raise error

        if mine == rank:
            at(owner(name), name, count, fail)

    return prepare


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """What a run left behind: its last checkpoint's update, and what its processes said."""
    saved = [int(path.name) for path in (folder / name / "checkpoints").glob("0*")]
    said = [file.read_text() for file in sorted(folder.glob(f"{name}.?.txt"))]
    return {"saved": max(saved, default=0), "said": said}


def numbers(run: Path) -> dict[str, Any]:
    """A finished run's figures and weights, as two runs that differ by float rounding can be compared."""
    from safetensors.torch import load_file

    weights = {name: t.double() for name, t in load_file(run / "policy" / "model.safetensors").items()}
    rows = survival.samples(run)
    return {"weights": weights, "responses": [row["response"] for row in rows]}


def gap(one: Path, other: Path) -> dict[str, Any]:
    """The largest difference of a weight between two runs, how far the first moved, whether samples are the same."""
    from safetensors.torch import load_file

    a, b = numbers(one), numbers(other)
    initial = load_file(one.parent / "model" / "model.safetensors")
    apart = [float((a["weights"][name] - b["weights"][name]).abs().max()) for name in a["weights"]]
    moved = [float((a["weights"][name] - initial[name].double()).abs().max()) for name in a["weights"]]
    return {"apart": max(apart), "moved": max(moved), "same": a["responses"] == b["responses"]}


def updates_equal(folder: Path) -> dict[str, Any]:
    """Twenty updates by one process and by two, with an adapter and with all weights; three of a sampler not exact."""

    def inexact(rank: int) -> None:
        from agents.policy import Policy

        Policy.exact = False  # type: ignore[method-assign, assignment]

    found = {}
    for name in ("lora", "full", "inexact"):
        for size in (1, 2):
            config = job(folder, f"{name}-{size}", updates=UPDATES, trainable="full" if name == "full" else "lora")
            if name == "inexact":
                config = replace(config, updates=3, agent=replace(config.agent, baseline="leave-one-out"))
            codes = ended(trained(config, size, inexact if name == "inexact" else lambda rank: None))
            assert codes == [0] * size, outcome(folder, f"{name}-{size}")
        found[name] = gap(folder / f"{name}-1", folder / f"{name}-2")
        rows = [
            json.loads((folder / f"{name}-{size}" / "metrics.jsonl").read_text().splitlines()[1]) for size in (1, 2)
        ]
        off = [key for key, value in rows[0].items() if abs(value - rows[1][key]) > 1e-4 * max(1, abs(value))]
        found[name]["metrics"] = [key for key in off if not key.startswith("time/")]
    return found


def resumed(folder: Path) -> dict[str, Any]:
    """One process to update 2, two to update 4, where the leader is killed, one to the end; beside one all along."""
    assert ended(trained(job(folder, "whole", every=2), 1)) == [0]
    config = job(folder, "resumed", every=2)
    codes = [ended(trained(config, 1, signalled(0, "log_samples", 3, KILL)))]
    config = replace(config, checkpoint_every=10)
    codes.append(ended(trained(config, 2, signalled(0, "log_samples", 3, KILL))))
    between = outcome(folder, "resumed")["saved"]
    codes.append(ended(trained(config, 1)))
    said = (folder / "resumed" / "warnings.jsonl").read_text()
    return {"codes": codes, "between": between, "said": said, **gap(folder / "whole", folder / "resumed")}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of the prepared model, in a process of its own."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        from transformers import AutoModelForCausalLM

        from tests.fake_vllm import FakeVLLM

        with FakeVLLM(AutoModelForCausalLM.from_pretrained(folder / "model").eval()) as server:
            os.write(writer, server.url.encode())
            signal.pause()
    try:
        yield os.read(reader, 100).decode()
    finally:
        os.kill(child, KILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def sharded_job(folder: Path, url: str, name: str, baseline: Any, shard: bool = True) -> Any:
    """A training whose responses a server samples."""
    from agents.sampler import SamplerConfig

    config = job(folder, name)
    agent = replace(config.agent, baseline=baseline)
    return replace(config, agent=agent, sampler=SamplerConfig(url=(url,)), shard=shard)


def counting(rank: int) -> None:
    """Have each process tell, when the policy is saved, its idle passes and its part of the layers' weights."""
    from torch.distributed.tensor import DTensor

    from agents.policy import Policy
    from agents.training.follow import Follower
    from rlaif_env.models.sharding import layers_of

    idle, forward, told = Policy.idle, Follower.forward, {"idle": 0, "asked": 0}

    def counted(policy: Policy) -> None:
        told["idle"] += 1
        idle(policy)

    def asked(follower: Follower) -> None:
        told["asked"] += 1
        forward(follower)

    def tell(policy: Policy) -> None:
        weights = [p for n, p in layers_of(policy.backbone.model).named_parameters() if "lora_" not in n]
        divided = [w for w in weights if isinstance(w, DTensor)]
        held = sum(w.to_local().numel() for w in divided) / sum(w.numel() for w in weights)
        whole = any(isinstance(p, DTensor) for p in (*policy.parameters, policy.backbone.model.lm_head.weight))
        print("COUNTED" + json.dumps({**told, "share": held, "others": whole}))

    save, give = Policy.save, Follower.give
    Policy.idle, Follower.forward = counted, asked  # type: ignore[method-assign]
    Policy.save = lambda policy, folder: tell(policy) or save(policy, folder)  # type: ignore
    Follower.give = lambda follower: tell(follower._agent.policy) or give(follower)  # type: ignore


def sharded(folder: Path, baseline: str = "value") -> dict[str, Any]:
    """Six updates by one process, and by two that hold the layers together."""
    one, two = folder / f"{baseline}-whole", folder / f"{baseline}-sharded"
    with served(folder) as url:
        assert ended(trained(sharded_job(folder, url, one.name, baseline, shard=False), 1)) == [0]
        codes = ended(trained(sharded_job(folder, url, two.name, baseline), 2, counting))
    said = outcome(folder, two.name)["said"]
    assert codes == [0, 0], (codes, said)
    counts = [json.loads(text.partition("COUNTED")[2].splitlines()[0]) for text in said]
    return {**gap(one, two), "counts": counts, "said": said}


def sharded_by_group(folder: Path) -> dict[str, Any]:
    """As `sharded`, each group's targets from the gradient pass itself."""
    return sharded(folder, "leave-one-out")


def sharded_families(folder: Path) -> dict[str, Any]:
    """How far gradients, log-probabilities and saved weights of each family's sharded layers are from whole ones'."""

    def work(rank: int) -> None:
        import torch

        from agents.policy import Policy
        from rlaif_env.models import Backbone, LoraConfig, shard
        from rlaif_env.ranks import Ranks
        from tests.families import FAMILIES, family, tokenizer_of

        generator, tokenizer = torch.Generator().manual_seed(rank), tokenizer_of("byte-level")
        rows, gaps = [torch.randint(5, 50, (4 + rank, width), generator=generator) for width in (9 + rank, 6)], {}
        x, y = rows
        with Ranks.started() as ranks:
            for name in FAMILIES:
                found = []
                for divided in (False, True):
                    policy = Policy(Backbone(family(name, tokenizer), tokenizer), lora=LoraConfig(4))
                    with torch.no_grad():
                        for parameter in policy.parameters:
                            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
                    if divided:
                        shard(policy.backbone, "cpu")
                    with policy.training():
                        logprobs = policy.evaluate(x, torch.ones_like(x), y, torch.ones_like(y)).logprobs
                        logprobs.sum().backward()
                    state = dict(policy.backbone.plain_state(policy.adapter))
                    found.append([logprobs.detach(), *(p.grad for p in policy.parameters), *state.values()])
                gap = [float((a - b).abs().max() / a.abs().max().clamp(1e-3)) for a, b in zip(*found, strict=True)]
                gaps[name] = {"gap": float(np.max(gap)), "size": float(found[0][1].abs().max())}
                ranks.agree(lambda: None)
            if ranks.leader:
                (folder / "families.json").write_text(json.dumps(gaps))

    children, store = started(2, work)
    STORES.append(store)
    assert ended(children) == [0, 0]
    found: dict[str, Any] = json.loads((folder / "families.json").read_text())
    return found


def sharded_ends(folder: Path) -> dict[str, Any]:
    """Processes killed, short of memory or with a loss that is not finite amid passes that others wait in."""
    if not (folder / "value-whole").exists():
        sharded(folder)

    def broken(rank: int) -> None:
        from agents import functional

        loss, left = functional.policy_gradient_loss, [6]

        def call(*arguments: Any) -> Any:
            left[0] -= 1
            return loss(*arguments) * (float("nan") if rank == 1 and left[0] < 0 else 1.0)

        functional.policy_gradient_loss = call  # type: ignore[assignment]

    def terminated(rank: int) -> None:
        (folder / f"process-{rank}").write_text(str(os.getpid()))

        def both() -> None:
            os.kill(int((folder / "process-1").read_text()), TERM)
            time.sleep(0.2)
            os.kill(os.getpid(), TERM)

        if rank == 0:
            at(owner("_gradient"), "_gradient", 4, both)

    memory = MemoryError("out of memory")
    cases = {
        "follower": signalled(1, "_gradient", 4, KILL),
        "leader": signalled(0, "_gradient", 4, KILL),
        "follower-amid": signalled(1, "idle", 20, KILL),
        "leader-amid": signalled(0, "evaluate", 50, KILL),
        "term": terminated,
        "memory-0": raising(0, "evaluate", 50, memory),
        "memory-1": raising(1, "evaluate", 20, memory),
        "finite": broken,
    }
    found: dict[str, Any] = {}
    with served(folder) as url:
        for name, prepare in cases.items():
            config = sharded_job(folder, url, f"sharded-{name}", "value")
            began = time.monotonic()
            codes = ended(trained(config, 2, prepare))
            found[name] = {"codes": codes, "seconds": time.monotonic() - began, **outcome(folder, config.out.name)}
        config = sharded_job(folder, url, "sharded-follower", "value", shard=False)
        assert ended(trained(config, 1)) == [0], outcome(folder, "sharded-follower")
        found["follower"] |= gap(folder / "value-whole", config.out)
    return found


def ends(folder: Path) -> dict[str, Any]:
    """Each way to end, with the update that is then the last checkpoint's, and the run gone on with to its end."""
    if not (folder / "whole").exists():
        assert ended(trained(job(folder, "whole"), 1)) == [0]
    found = {}
    for rank, name, count, number, forwarded in ENDS:
        case = f"{rank}-{name}-{count}-{signal.Signals(number).name}-{forwarded}"
        began = time.monotonic()
        codes = ended(trained(job(folder, case), 2, signalled(rank, name, count, number)), signal_others=forwarded)
        seconds = time.monotonic() - began
        left = outcome(folder, case)
        again = ended(trained(job(folder, case), 2))
        found[case] = {"codes": codes, "seconds": seconds, "again": again, **left}
        found[case] |= gap(folder / "whole", folder / case) if again == [0, 0] else outcome(folder, case)
    return found


ENDS = [
    (0, "score", 6, KILL, TERM),
    (1, "_gradient", 5, KILL, TERM),
    (1, "_gradient", 5, KILL, 0),
    (0, "log_samples", 4, KILL, TERM),
    (0, "step", 4, KILL, 0),
    (1, "_await_whole", 4, KILL, TERM),
    (0, "_gradient", 3, TERM, TERM),
    (1, "_gradient", 3, TERM, 0),
    (0, "_gradient", 3, INT, 0),
]
"""Rank, method, its how manieth call, signal, and what the others are then sent, as by torchrun; score's first call is
the evaluation before."""


def disagreeing(folder: Path) -> dict[str, Any]:
    """Processes of unlike command lines, and one whose model is another."""
    codes = ended(trained(job(folder, "words"), 2, argv=lambda rank: ["--agent.beta", f"0.{rank}"]))

    def other(rank: int) -> None:
        if rank == 1:
            from agents.policy import Policy

            Policy.fingerprint = lambda policy: "another"  # type: ignore[method-assign]

    return {
        "words": {"codes": codes, **outcome(folder, "words")},
        "model": {"codes": ended(trained(job(folder, "model-1"), 2, other)), **outcome(folder, "model-1")},
    }


def failing(folder: Path) -> dict[str, Any]:
    """A follower short of memory, one with an error of its own, and a judge that fails."""

    from rlaif_env.api import BackendError

    cases = {
        "memory": raising(1, "_gradient", 2, MemoryError("out of memory")),
        "bug": raising(1, "step", 3, KeyError("a bug")),
        "sampling": raising(1, "sample", 4, RuntimeError("no kernel")),
        "judge": raising(0, "score", 4, BackendError("expected an answer, found none", [0])),
    }
    return {
        name: {"codes": ended(trained(job(folder, name), 2, prepare)), **outcome(folder, name)}
        for name, prepare in cases.items()
    }


def commands(folder: Path) -> dict[str, Any]:
    """Fine-tuning and a reward model's training by one process and by two; and what a bad file comes to in two."""
    from safetensors.torch import load_file

    rng = np.random.default_rng(0)
    words = ["good", "bad", "film", "dull", "fun", "plot", "we saw", "and so"]
    texts = [" ".join(rng.choice(words, rng.integers(2, 8))) for _ in range(320)]
    for name, rows in {
        "demonstrations": [
            {"prompt": f"{a} {i}", "response": " " + b} for i, (a, b) in enumerate(zip(texts, texts[9:], strict=False))
        ],
        "labels": [
            {"prompt": f"p{i}", "response_1": a, "response_2": b, "p_first": float(len(a) > len(b)), "source": "ai:toy"}
            for i, (a, b) in enumerate(zip(texts, texts[5:], strict=False))
            if a != b
        ],
        "broken": [{"prompt": 1}],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model", str(folder / "model")]
    sft = ["sft", "--data", str(folder / "demonstrations.jsonl"), "--rows", "90", *model]
    rm = ["train-rm", "--task", str(folder / "task.toml"), "--labels", str(folder / "labels.jsonl"), "--epochs", "1"]
    cases = {
        "sft": (sft, "model/model.safetensors"),
        "rm-lora": ([*rm, "--trainable", "lora", "--learning-rate", "3e-3", *model], "model/model.safetensors"),
        "broken": ([*sft[:2], str(folder / "broken.jsonl"), *model], ""),
    }
    found: dict[str, Any] = {}
    for name, (words, file) in cases.items():
        runs = {size: folder / f"{name}-{size}" for size in (1, 2)}
        codes = [ended(command([*words, "--out", str(run)], size)) for size, run in runs.items()]
        found[name] = {"codes": codes, "said": [path.read_text() for path in sorted(folder.glob(f"{name}-2.?.txt"))]}
        if file:
            a, b = (load_file(run / file) for run in runs.values())
            found[name]["apart"] = max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
    return found


def command(words: list[str], size: int) -> list[int]:
    """Start a command in so many processes, output in a file each beside what it makes; their ids."""

    def work(rank: int) -> int:
        from rlaif_env.cli import main

        with Path(f"{words[-1]}.{rank}.txt").open("w") as file, redirect_stdout(file), redirect_stderr(file):
            return main(words)

    children, store = started(size, work)
    STORES.append(store)
    return children


CASES = {
    case.__name__: case
    for case in (
        updates_equal,
        sharded,
        sharded_by_group,
        sharded_ends,
        sharded_families,
        resumed,
        ends,
        disagreeing,
        failing,
        commands,
    )
}


def main(argv: list[str]) -> None:
    """Run cases in a folder."""
    import torch

    from rlaif_env import ranks

    torch.set_num_threads(1)
    ranks._ROLL_CALL = 1.0
    folder = survival.prepared(Path(argv[0]))
    survival._load_libraries()
    found = {}
    for name in argv[1:] or CASES:
        began = time.monotonic()
        found[name] = CASES[name](folder)
        found[name]["time"] = time.monotonic() - began
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
