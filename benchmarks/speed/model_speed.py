"""Speed of what runs the model: scoring, sampling, an update, each over its floor (``benchmarks.speed.throughput``).

Everything is a ratio of things that took turns in one process. What stands against this project's scorer is the same
model on batches of whole prompts, padded, in the caller's order; against its sampler, transformers' `generate`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed import costs
from benchmarks.speed.one_update import Ours, Setting, model_folder
from benchmarks.speed.timing import Machine, Times, alternate, machine, stopwatch
from rewards.direct_score import DirectLLMScore
from rewards.language_model.answer_tree import answer_tree
from rewards.language_model.local import LocalLM
from rlaif_env.api import RLAIFError
from rlaif_env.data.corpus import movie_snippets
from rlaif_env.models import BUILTIN_MODEL, Backbone, backbone, default_device, pad_rows
from rlaif_env.models.sampling import sample
from rlaif_env.runs import RunFolder


class PlainLM(LocalLM):
    """The same model without this project's savings: whole prompts, padded, so many at a time in the caller's order."""

    rows_per_batch = 16

    def __init__(self, model: Backbone) -> None:
        super().__init__(model, share_prefix=False)

    def _buckets(self, lengths: Sequence[int], extra: int) -> list[list[int]]:
        rows = list(range(len(lengths)))
        return [rows[i : i + self.rows_per_batch] for i in range(0, len(rows), self.rows_per_batch)]


def _texts(count: int) -> list[str]:
    snippets = movie_snippets()
    chosen = np.random.default_rng(0).choice(len(snippets), size=count, replace=False)
    return [snippets[int(i)].text for i in chosen]


def scoring(*, model: str = BUILTIN_MODEL, texts: int = 256, repetitions: int = 5) -> dict[str, Any]:
    """Direct scores of movie snippets beside a plain padded batch through the same model.

    Args:
        model: Name or folder.
        texts: Snippets scored in one call.
        repetitions: Timed calls of each side, in turn.

    Returns:
        For three exemplars and for none: times, ratio, and the largest difference between the scores.

    Raises:
        RLAIFError: If the scores differ by more than 1e-4.
    """
    base = backbone(model, dtype="float32")
    snippets, empty = _texts(texts), [""] * texts
    found: dict[str, Any] = {"texts": texts, "model": model, "parts": []}
    for shots in (3, 0):
        ours, plain = (DirectLLMScore(lm, shots=shots) for lm in (LocalLM(base), PlainLM(base)))
        scores = [np.asarray(side.score(empty, snippets).info["score"]) for side in (ours, plain)]
        apart = float(np.abs(scores[0] - scores[1]).max())
        if apart > 1e-4:
            raise RLAIFError(f"expected the same scores from both to 1e-4, found {apart} between them")

        def call(side: DirectLLMScore) -> Callable[[], object]:
            return lambda: side.score(empty, snippets)

        times = alternate({"ours": call(ours), "plain": call(plain)}, repetitions=repetitions, warmup=0)
        found["parts"].append({"exemplars": shots, "apart": apart, **_ratio(times, "plain")})
    return found


def _ratio(times: Mapping[str, Times], other: str) -> dict[str, Any]:
    ours, theirs = times["ours"], times[other]
    pairs = np.array(theirs.wall) / np.array(ours.wall)
    return {
        "ours": ours.summary(),
        other: theirs.summary(),
        "ratio": theirs.median / ours.median,
        "ratio_quartiles": [float(q) for q in np.percentile(pairs, [25, 75])],
        "ratio_cpu": float(np.median(theirs.cpu) / np.median(ours.cpu)),
    }


@contextmanager
def _planned(model: Any, ends: Sequence[int], width: int, eos: int) -> Iterator[None]:
    """Make responses end where planned, whoever samples: the EOS is certain then and impossible before.

    Args:
        model: The model; its logits are altered, at the same price for everybody.
        ends: For prompts of 1 ... width tokens: after how many tokens a response ends, the EOS counted; 0 is never.
        width: Of the widest prompt; rows are told apart by how much they are padded on the left.
        eos: The EOS.
    """
    import torch

    plan = torch.tensor([0, *ends], device=model.device)

    def alter(_: Any, __: Any, keywords: dict[str, Any], out: Any) -> None:
        mask = keywords["attention_mask"]
        length = width - (mask.cumsum(1) == 0).sum(1)
        out.logits[:, -1, eos] = -torch.inf
        now = (mask.shape[1] - width + 1 == plan[length]).nonzero()[:, 0]
        if len(now):
            out.logits[now, -1] = -torch.inf
            out.logits[now, -1, eos] = 0.0

    hook = model.register_forward_hook(alter, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def sampling(
    *,
    model: str = BUILTIN_MODEL,
    rows: int = 32,
    groups: Sequence[int] = (1, 4),
    response: int = 64,
    shortest: int = 4,
    repetitions: int = 5,
) -> dict[str, Any]:
    """Sampling beside `generate`, with responses that end early and with responses of full length.

    Args:
        model: Name or folder.
        rows: Responses.
        groups: Numbers of samples of each prompt.
        response: Tokens of the longest.
        shortest: Tokens of the shortest, where they end early; the lengths between are evenly spread.
        repetitions: Timed calls of each side, in turn.

    Raises:
        RLAIFError: If the two sides did not write responses of the same lengths.
    """
    import torch

    base = backbone(model, dtype="float32")
    lm, eos, pad = base.model, base.tokenizer.eos_token_id, base.tokenizer.pad_token_id
    rng = np.random.default_rng(0)
    narrow, width = 16, 16 + rows - 1
    parts = []
    for early in (True, False):
        for group in groups:
            lengths = [narrow + i for i in range(rows // group)]
            prompts = [rng.integers(100, 20_000, size=length).tolist() for length in lengths]
            widest = max(lengths)
            spread = rng.permutation(np.linspace(shortest, response, len(lengths)).round().astype(int))
            ends = [0] * widest
            if early:
                for length, end in zip(lengths, spread, strict=True):
                    ends[length - 1] = int(end)
            ids, mask = (
                torch.from_numpy(a).repeat_interleave(group, 0).to(lm.device)
                for a in pad_rows(prompts, pad, side="left")
            )

            def ours(prompts: list[list[int]] = prompts, group: int = group) -> list[int]:
                drawn = sample(
                    lm,
                    prompts,
                    max_new_tokens=response,
                    stop_ids=[eos],
                    pad_id=pad,
                    uniform=np.random.default_rng().random((len(prompts) * group, response)),
                    samples_per_prompt=group,
                )
                return [int(n) for n in drawn.lengths]

            def theirs(ids: Any = ids, mask: Any = mask) -> list[int]:
                out = lm.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=response,
                    eos_token_id=eos,
                    pad_token_id=pad,
                )[:, ids.shape[1] :]
                ended = (out == eos).int()
                return [int(n) for n in torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1])]

            with base.using(None), torch.inference_mode(), _planned(lm, ends, widest, eos):
                written = ours()
                if written != theirs():
                    raise RLAIFError(f"expected responses of the same lengths from both, found others than {written}")
                times = alternate({"ours": ours, "generate": theirs}, repetitions=repetitions, warmup=0)
            facts = {"early": early, "samples_per_prompt": group, "tokens": sum(written)}
            parts.append({**facts, **_ratio(times, "generate")})
    return {"rows": rows, "response": response, "shortest": shortest, "widest_prompt": width, "parts": parts}


def _side(setting: Setting, model: str, folder: Path) -> Ours:
    return Ours(model_folder(model, folder), setting, default_device())


def floors(*, model: str = BUILTIN_MODEL, repetitions: int = 3) -> dict[str, Any]:
    """The time of each phase over the least that the machine allows, both measured in turn.

    Args:
        model: Name or folder.
        repetitions: Timed updates of each setting.
    """
    parts: list[dict[str, Any]] = []
    for setting in (Setting(0.05, 64, 32), Setting(0.05, 256, 32)):
        with tempfile.TemporaryDirectory() as name:
            ours = _side(setting, model, Path(name))
            parts += _update_floor(ours, setting, repetitions)
    base = backbone(model, dtype="float32")
    snippets = _texts(256)
    for shots in (3, 0):
        scorer = DirectLLMScore(LocalLM(base), shots=shots)
        rows = scorer.language_model._encode([scorer.render("", text) for text in snippets])  # type: ignore[attr-defined]
        first, last = min(rows), max(rows)
        shared = next(i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
        tree = answer_tree(base.tokenizer, scorer.answers)
        cost = costs.scoring(
            costs.Sizes.of(base.model),
            prefix=shared,
            suffixes=[len(row) - shared for row in rows],
            nodes=len(tree.tokens),
        )
        scorer.score([""] * 8, snippets[:8])
        took, reached = _with_machine(lambda s=scorer: s.score([""] * 256, snippets), repetitions)  # type: ignore[misc]
        parts.append(_over(f"score 256 snippets, {shots} exemplars", took, [cost], reached))
    return {"model": model, "parts": parts}


def _with_machine(call: Callable[[], object], repetitions: int) -> tuple[Times, list[Machine]]:
    times, reached = Times(), []
    for _ in range(repetitions):
        before = _machine()
        with stopwatch(times):
            call()
        reached.append(_mean(before, _machine()))
    return times, reached


def _machine() -> Machine:
    return machine(device=default_device())


def _mean(before: Machine, after: Machine) -> Machine:
    return Machine((before.flops + after.flops) / 2, (before.bytes + after.bytes) / 2)


def _over(name: str, took: Times, parts: Sequence[costs.Cost], reached: Sequence[Machine]) -> dict[str, Any]:
    least = [sum(cost.seconds(m) for cost in parts) for m in reached]
    return {
        "phase": name,
        "gigaflop": sum(cost.total for cost in parts) / 1e9,
        "took": took.summary(),
        "floor_s": float(np.median(least)),
        "over_floor": float(np.median(np.array(took.wall) / np.array(least))),
        "gigaflops": float(np.median([m.flops for m in reached])) / 1e9,
        "gigabytes": float(np.median([m.bytes for m in reached])) / 1e9,
    }


def _update_floor(ours: Ours, setting: Setting, repetitions: int) -> list[dict[str, Any]]:
    """Sampling, and what learns from it, over their floors."""
    agent = ours.agent
    sizes = costs.Sizes.of(agent.policy.backbone.model, sum(p.numel() for p in agent.policy.parameters))
    shape = {"rows": setting.rows, "group": setting.group, "prompt": setting.prompt, "response": setting.response}
    sample_cost = costs.sampling(sizes, **shape)
    learn_costs = [costs.gradient(sizes, **shape)]
    if setting.beta:
        learn_costs.append(costs.reference(sizes, **shape))
    act, learn, whole = Times(), Times(), Times()
    reached = []
    ours.step()
    for _ in range(repetitions):
        before = _machine()
        with stopwatch(whole):
            with stopwatch(act):
                responses = agent.act(ours.observations)
            ours.observations, rewards, *_ = ours.envs.step(responses)
            with stopwatch(learn):
                agent.update(rewards)
        reached.append(_mean(before, _machine()))
    return [
        _over(f"sample, {setting.name}", act, [sample_cost], reached),
        _over(f"learn, {setting.name}", learn, learn_costs, reached),
        _over(f"update (sample and learn), {setting.name}", whole, [sample_cost, *learn_costs], reached),
    ]


def overhead(*, model: str = BUILTIN_MODEL, repetitions: int = 5) -> dict[str, Any]:
    """Time in the environment (its reward costs nothing) and in the run folder, as a share of an update.

    Args:
        model: Name or folder.
        repetitions: Timed updates.
    """
    setting = Setting(0.05, 64, 32)
    around, update = Times(), Times()
    with tempfile.TemporaryDirectory() as name, RunFolder.create(Path(name) / "run", {}) as run:
        (folder := Path(name) / "model").mkdir()
        ours = _side(setting, model, folder)
        ours.step()
        run.log(0, ours.metrics)  # opens the writers
        for i in range(1, repetitions + 1):
            with stopwatch(update):
                responses = ours.agent.act(ours.observations)
            with stopwatch(around):
                ours.observations, rewards, _, _, info = ours.envs.step(responses)
            with stopwatch(update):
                metrics = ours.agent.update(rewards)
            with stopwatch(around):
                run.log(i, metrics)
                final = info["final_info"]
                run.log_samples(i, list(final["prompt"]), list(final["response"]), rewards)
    share = sum(around.wall) / sum(update.wall)
    return {"updates": repetitions, "around_s": sum(around.wall), "update_s": sum(update.wall), "share": share}
