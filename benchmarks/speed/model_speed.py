"""Speed of what runs the model: scoring, sampling, an update, each over its floor (``benchmarks.speed.throughput``).

Everything is a ratio of things that took turns in one process. What stands against this project's scorer is the same
model on batches of whole prompts, padded, in the caller's order; against its sampler, transformers' `generate`.

Every measurement takes ``model``, a name or folder, and ``repetitions``, how often each side or update is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.sampler import SamplerConfig
from benchmarks.speed import costs
from benchmarks.speed.one_update import Ours, Setting, model_folder
from benchmarks.speed.timing import Machine, Times, alternate, beside, machine, stopwatch
from rewards.direct_score import DirectLLMScore
from rewards.group_preference import GroupPreference
from rewards.labeling.labeler import PreferenceLabeler
from rewards.labeling.pairwise_prompts import pair_wording
from rewards.language_model.answer_tree import answer_tree
from rewards.language_model.local import LocalLM
from rlaif_env.api import RLAIFError
from rlaif_env.data.corpus import movie_snippets
from rlaif_env.data.tasks import DEFAULT_TASK, TaskLike, load_task
from rlaif_env.models import BUILTIN_MODEL, Backbone, backbone, default_device, encode, pad_rows
from rlaif_env.models.sampling import sample
from rlaif_env.runs import RunFolder
from rlaif_env.statistics import bootstrap_mean

_ENDS = ("estimate", "low", "high")


class PlainLM(LocalLM):
    """The same model asked without this project's savings: whole prompts, so many at a time in the caller's order."""

    rows_per_batch = 16

    def __init__(self, model: Backbone) -> None:
        super().__init__(model, share_prefix=False, tokens_per_batch=1 << 20)

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """As `LocalLM`, (n, k)."""
        ask, size = super().label_logprobs, self.rows_per_batch
        parts = [ask(prompts[i : i + size], labels) for i in range(0, len(prompts), size)]
        return np.concatenate([np.zeros((0, len(labels))), *parts])


def _texts(count: int) -> list[str]:
    snippets = movie_snippets()
    chosen = np.random.default_rng(0).choice(len(snippets), size=count, replace=False)
    return [snippets[int(i)].text for i in chosen]


def scoring(*, model: str = BUILTIN_MODEL, texts: int = 256, repetitions: int = 5) -> dict[str, Any]:
    """Direct scores of so many movie snippets in one call, beside plain padded batches through the same model.

    For three exemplars and for none: times, ratio, and the largest difference between the scores.

    Raises:
        RLAIFError: If the scores differ by more than 1e-4.
    """
    base = backbone(model, dtype="float32")
    snippets, empty = _texts(texts), [""] * texts
    parts = []
    for shots in (3, 0):
        ours, plain = (DirectLLMScore(lm, shots=shots) for lm in (LocalLM(base), PlainLM(base)))
        scores = [np.asarray(side.score(empty, snippets).info["score"]) for side in (ours, plain)]
        apart = float(np.abs(scores[0] - scores[1]).max())
        if apart > 1e-4:
            raise RLAIFError(f"expected the same scores from both to 1e-4, found {apart} between them")
        sides = {"ours": partial(ours.score, empty, snippets), "plain": partial(plain.score, empty, snippets)}
        parts.append({"exemplars": shots, "apart": apart, **_timed(sides, repetitions)})
    return {"texts": texts, "model": model, "parts": parts}


def judging(
    *, model: str = BUILTIN_MODEL, group: int = 6, repetitions: int = 8, task: TaskLike = DEFAULT_TASK
) -> dict[str, Any]:
    """Groups compared in pairs, all pairs in both orders, their common beginning read once ("shared") or each time.

    Each repetition has a group of its own; "ratio" is shared over not, processor time, the geometric mean over groups
    with its 95 % interval.

    Raises:
        RLAIFError: If the rewards differ by more than 1e-4.
    """
    base = backbone(model, dtype="float32")
    snippets = _texts(group * (repetitions + 1))
    rewards: dict[str, list[NDArray[np.float32]]] = {}

    def side(name: str, share: bool) -> Callable[[], None]:
        exemplars = len(pair_wording(load_task(task)).exemplars)
        labeler = PreferenceLabeler(
            LocalLM(base, share_prefix=share), task, mode="pairwise", shots=exemplars, minimum_mass=1e-9
        )
        judge, texts, kept = GroupPreference(labeler), iter(snippets), rewards.setdefault(name, [])
        return lambda: kept.append(judge.score([""] * group, list(islice(texts, group))).values)

    times = alternate({"shared": side("shared", True), "whole": side("whole", False)}, repetitions=repetitions)
    apart = float(np.abs(np.array(rewards["shared"]) - np.array(rewards["whole"])).max())
    if apart > 1e-4:
        raise RLAIFError(f"expected the same rewards from both to 1e-4, found {apart} between them")
    ratios = bootstrap_mean(np.log(np.array(times["shared"].cpu) / np.array(times["whole"].cpu)))
    ends = {name: None if end is None else float(np.exp(end)) for name, end in vars(ratios).items() if name in _ENDS}
    sides = {name: side.summary() for name, side in times.items()}
    return {"model": model, "group": group, "apart": apart, **sides, "ratio": {**ends, "units": ratios.units}}


def _timed(sides: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, Any]:
    """Times of two sides in turn, by name, and their ratio; ours is the first."""
    times = alternate(sides, repetitions=repetitions, warmup=0)
    return {name: side.summary() for name, side in times.items()} | beside(*times.values())


@contextmanager
def _planned(model: Any, ends: Sequence[int], width: int, eos: int) -> Iterator[None]:
    """Make responses end where planned, whoever samples: the EOS is certain then and impossible before.

    The model's logits are altered, at the same price for everybody. ``ends`` says for prompts of 1 ... width tokens
    after how many tokens a response ends, the EOS counted; 0 is never. ``width`` is that of the widest prompt; rows are
    told apart by how much they are padded on the left.
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
    """Sampling beside `generate`: so many rows, for each number of samples a prompt in ``groups``.

    All responses have ``response`` tokens, or end early: after ``shortest`` to ``response`` tokens, evenly spread.

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
            planned = dict(zip(lengths, spread.tolist(), strict=True)) if early else {}
            ends = [planned.get(length, 0) for length in range(1, widest + 1)]
            padded = pad_rows(prompts, pad, side="left")
            ids, mask = (torch.from_numpy(a).repeat_interleave(group, 0).to(lm.device) for a in padded)

            def ours(prompts: list[list[int]] = prompts, group: int = group) -> list[int]:
                numbers = np.random.default_rng().random((len(prompts) * group, response))
                keywords = {"stop_ids": [eos], "pad_id": pad, "uniform": numbers, "samples_per_prompt": group}
                return [int(n) for n in sample(lm, prompts, max_new_tokens=response, **keywords).lengths]

            def theirs(ids: Any = ids, mask: Any = mask) -> list[int]:
                how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": response}
                out = lm.generate(input_ids=ids, attention_mask=mask, eos_token_id=eos, pad_token_id=pad, **how)
                ended = ((out := out[:, ids.shape[1] :]) == eos).int()
                return [int(n) for n in torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1])]

            with base.using(None), torch.inference_mode(), _planned(lm, ends, widest, eos):
                written = ours()
                if written != theirs():
                    raise RLAIFError(f"expected responses of the same lengths from both, found others than {written}")
                figures = _timed({"ours": ours, "generate": theirs}, repetitions)
            parts.append({"early": early, "samples_per_prompt": group, "tokens": sum(written), **figures})
    return {"rows": rows, "response": response, "shortest": shortest, "widest_prompt": width, "parts": parts}


_PRECISION_SIZES = ((24, 16), (24, 64), (24, 128), (6, 32), (6, 64))


def precision(
    *, model: str = BUILTIN_MODEL, repetitions: int = 5, sizes: Sequence[tuple[int, int]] = _PRECISION_SIZES
) -> dict[str, Any]:
    """Updates whose responses are drawn in bfloat16, with the correction that takes, beside those drawn in float32.

    ``sizes`` are rows and tokens of a response.
    """
    parts = []
    for rows, response in sizes:
        setting = Setting(0.05, 16, response, rows=rows, group=min(6, rows))
        with tempfile.TemporaryDirectory() as name:
            folder = model_folder(model, Path(name))
            sides = {dtype: Ours(folder, setting, "cpu", SamplerConfig(dtype=dtype)) for dtype in ("bfloat16", "")}
        sampled = {dtype: Times() for dtype in sides}
        whole = alternate({d: partial(side.step, sampled[d]) for d, side in sides.items()}, repetitions=repetitions)
        for what, times in (("update", whole), ("sampling", {d: t.without(1) for d, t in sampled.items()})):
            low, full = times["bfloat16"], times[""]
            figures = {"bfloat16": low.summary(), "float32": full.summary(), **beside(low, full)}
            parts.append({"part": f"{what}, {rows} rows of {response} tokens", **figures})
    return {"parts": parts}


def _side(setting: Setting, model: str, folder: Path) -> Ours:
    return Ours(model_folder(model, folder), setting, default_device())


def floors(*, model: str = BUILTIN_MODEL, repetitions: int = 3) -> dict[str, Any]:
    """The time of each phase over the least that the machine allows, both measured in turn."""
    parts: list[dict[str, Any]] = []
    for setting in (Setting(0.05, 64, 32), Setting(0.05, 256, 32)):
        with tempfile.TemporaryDirectory() as name:
            parts += _update_floor(_side(setting, model, Path(name)), setting, repetitions)
    base = backbone(model, dtype="float32")
    snippets = _texts(256)
    for shots in (3, 0):
        scorer = DirectLLMScore(LocalLM(base), shots=shots)
        rows = encode(base.tokenizer, [scorer.render("", text) for text in snippets])
        first, last = min(rows), max(rows)
        shared = next(i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
        tree = answer_tree(base.tokenizer, scorer.answers, ("",))
        suffixes = [len(row) - shared for row in rows]
        cost = costs.scoring(costs.Sizes.of(base.model), prefix=shared, suffixes=suffixes, nodes=len(tree.tokens))
        scorer.score([""] * 8, snippets[:8])
        took, reached = Times(), list[Machine]()
        for _ in range(repetitions):
            with _on_this_machine(reached), stopwatch(took):
                scorer.score([""] * 256, snippets)
        parts.append(_over(f"score 256 snippets, {shots} exemplars", took, [cost], reached))
    return {"model": model, "parts": parts}


@contextmanager
def _on_this_machine(reached: list[Machine]) -> Iterator[None]:
    """Add what the machine reaches: the mean of before and after the block."""
    before = machine(device=default_device())
    yield
    after = machine(device=default_device())
    reached.append(Machine((before.flops + after.flops) / 2, (before.bytes + after.bytes) / 2))


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
    sample_cost, learn_costs = costs.sampling(sizes, **shape), [costs.gradient(sizes, **shape)]
    if setting.beta:
        learn_costs.append(costs.reference(sizes, **shape))
    act, learn, whole, reached = Times(), Times(), Times(), list[Machine]()
    ours.step()
    for _ in range(repetitions):
        with _on_this_machine(reached), stopwatch(whole):
            ours.step(act, None, learn)
    return [
        _over(f"sample, {setting.name}", act, [sample_cost], reached),
        _over(f"learn, {setting.name}", learn, learn_costs, reached),
        _over(f"update (sample and learn), {setting.name}", whole, [sample_cost, *learn_costs], reached),
    ]


def overhead(*, model: str = BUILTIN_MODEL, repetitions: int = 5) -> dict[str, Any]:
    """Time in the environment (its reward costs nothing) and in the run folder, as a share of an update."""
    setting = Setting(0.05, 64, 32)
    around, update = Times(), Times()
    with tempfile.TemporaryDirectory() as name, RunFolder.create(Path(name) / "run", {}) as run:
        (folder := Path(name) / "model").mkdir()
        ours = _side(setting, model, folder)
        ours.step()
        run.log(0, ours.metrics)  # opens the writers
        for i in range(1, repetitions + 1):
            ours.step(update, around, update)
            with stopwatch(around):
                run.log(i, ours.metrics)
                final = ours.info["final_info"]
                run.log_samples(i, list(final["prompt"]), list(final["response"]), ours.rewards)
    share = sum(around.wall) / sum(update.wall)
    return {"updates": repetitions, "around_s": sum(around.wall), "update_s": sum(update.wall), "share": share}
