"""Systems under evaluation: what each policy answers to the same held-out prompts, and what is measured on the text.

A policy is the reference ("sft"), a run of ``rlaif train`` or ``rlaif sft``, one of its checkpoints (an adapter on the
shared base model), any causal LM by name or folder, or a JSON lines file of responses made elsewhere. All answer the
same prompts with the same random numbers, those of the held-out evaluation of ``rlaif train``.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlaif_env.api import DataError, RLAIFError
from rlaif_env.batches import PROMPTS_AT_ONCE
from rlaif_env.data.forms import response_of
from rlaif_env.data.rows import parsed
from rlaif_env.data.tasks import EVAL_SPLIT, Task, held_out_prompts
from rlaif_env.data.templates import encode_prompts
from rlaif_env.files import content_of
from rlaif_env.models import (
    BUILTIN_MODEL,
    TEMPERATURE,
    Backbone,
    LoraConfig,
    backbone,
    context_of,
    continuation_ids,
    continuation_text,
    load_tokenizer,
    pad_rows,
    resolve,
    tokenizer_fingerprint,
)
from rlaif_env.records import write_json
from rlaif_env.servers.vllm import VLLMConfig, VLLMServers
from rlaif_env.statistics import new_names, new_numbers, repeated_ngrams, word_counts

if TYPE_CHECKING:
    from agents.policy import Policy
    from agents.sampler import Sampler

FILES = (".jsonl", ".jsonl.gz", ".parquet")
"""What a file of responses may be."""

_CHECKPOINT = "agent.safetensors"
_SAMPLES_AT_ONCE = 256  # of prompts that repeat, which are short beside what a batch saves
_TOKENS_PER_PASS = 512  # response tokens whose logits are in memory at once


@dataclass(frozen=True)
class System:
    """n responses to n prompts and what is measured on them."""

    name: str  # what tables call it
    source: str  # where the responses come from
    prompts: list[str]  # n prompts, the same for all systems that are compared
    responses: list[str]  # n responses, special tokens removed; an empty one is a response too
    # By name, one value a response, float64 (n,), NaN where it has none: "length" (tokens of the text under the
    # reference's tokenizer, no EOS), "words", "kl" (nats a response, log pi - log pi_ref of the sample at the
    # sampling temperature; absent for files and where the tokenizers differ), "reference_nll" (nats) and
    # "perplexity" of the text under the reference at temperature 1 (NaN for an empty text or one beyond the model's
    # context), "repeated-3", "distinct-2" (share in the distinct 2-grams of all texts), "new_numbers" and
    # "new_names" (how many the prompt does not have); judges add "judge:<name>" and "gold"
    measures: dict[str, NDArray[np.float64]]


def write_system(file: Path, system: System) -> None:
    """Write a system as one JSON object; a measure that a response has no value of is null."""
    measures = {name: [x if np.isfinite(x) else None for x in v.tolist()] for name, v in system.measures.items()}
    write_json(file, {**asdict(replace(system, measures={})), "measures": measures})


def read_system(file: Path) -> System:
    """The system in a file that `write_system` wrote.

    Raises:
        DataError: If it holds something else.
    """
    try:
        values = json.loads(file.read_bytes())
        measures = {name: np.array(v, dtype=np.float64) for name, v in values.pop("measures").items()}
        return System(**values, measures=measures)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"expected a system's responses and measures in {file}, found {error!r}; remove it") from error


@dataclass(frozen=True)
class Source:
    """Where a system's responses come from."""

    # "file" of responses, "model" in Hugging Face format, or "checkpoint" of a training run
    kind: Literal["file", "model", "checkpoint"]
    path: str  # the file, the model's name or folder, or the checkpoint's folder
    temperature: float  # the sampling temperature of the run, or the usual one; 0 for a file
    run: Mapping[str, Any] | None = None  # the configuration of the training run that a checkpoint belongs to

    @property
    def content(self) -> str:
        """What changes when the responses or the weights do, those under a checkpoint's too; read anew each time."""
        return " on ".join(map(content_of, (self.path, *([self.run["model"]] if self.run else []))))


def find_source(source: str | Path, reference: str | Path = BUILTIN_MODEL) -> Source:
    """What a policy's name stands for; no weights are loaded.

    Args:
        source: "sft" (the reference), a run folder or the policy in it, a checkpoint's folder, a model's name or
            folder, or a file of responses: ``.jsonl`` (``.gz`` too) or ``.parquet``.
        reference: The model that "sft" stands for.

    Raises:
        RLAIFError: If there is no such thing, or it is no policy.
    """
    if str(source) == "sft":
        return find_source(reference)
    path = Path(source).expanduser()
    if str(source).endswith(FILES):
        if not path.is_file():
            raise DataError(f"expected a file of responses at {path}, found none")
        return Source("file", str(path), 0.0)
    if not path.is_dir():
        return _model(source)
    if (path / _CHECKPOINT).is_file():
        if (run := run_of(path.parent.parent, "train")) is None:
            raise RLAIFError(
                f"expected the checkpoint {path} inside its run folder (for the model and the adapter's rank)"
            )
        return Source("checkpoint", str(path), run["agent"]["temperature"], run)
    if (path / "reward_model.json").is_file() or (path / "model" / "reward_model.json").is_file():
        raise RLAIFError(f"expected a policy, found a reward model in {path}: use it as a judge")
    for command, part in (("train", "policy"), ("sft", "model")):
        if (run := run_of(path, command)) is None:
            continue
        if (path / part).is_dir():
            return _model(path / part, run)
        saved = sorted(path.glob(f"checkpoints/*/{_CHECKPOINT}"))
        hint = f"; {saved[-1].parent} is its last checkpoint" if saved else ""
        raise RLAIFError(f"expected a finished run with the folder {part!r} in {path}, found none{hint}")
    return _model(path, run_of(path.parent, "train") if path.name == "policy" else None)


def reference_of(reference: str | Path) -> Source:
    """The model that KL and perplexity are measured against; an error if it is none."""
    source = find_source(reference)
    if source.kind != "model":
        raise RLAIFError(f"expected a model as the reference, found the {source.kind} {reference}")
    return source


def _model(name: str | Path, run: Mapping[str, Any] | None = None) -> Source:
    load_tokenizer(name)  # an unknown model is an error now
    folder = Path(resolve(name))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise RLAIFError(f"expected safetensors weights in {folder}, found none")
    temperature = run.get("agent", {}).get("temperature", TEMPERATURE) if run else TEMPERATURE
    return Source("model", str(name), temperature)


def run_of(folder: Path, command: str) -> Mapping[str, Any] | None:
    """The configuration of the run in a folder, None if none of this command is there."""
    try:
        record = json.loads((folder / "config.json").read_bytes())
        return dict(record["config"]) if record["command"] == command else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a model's config.json is another file


def read_responses(path: str | Path, task: Task, *, split: str = EVAL_SPLIT, prompts: int | None = None) -> list[str]:
    """The responses of a file (``prompt``, ``response``, texts or messages), in the order of the split's first prompts.

    Rows for the split's other prompts are not needed and not used.

    Raises:
        DataError: For bad rows; or, in one message, for prompts without a response, with several, or not of the split.
    """
    wanted = held_out_prompts(task, split, prompts)
    known = Counter(task.prompts(split))
    given: dict[str, list[str]] = {}
    for prompt, response in parsed(path, response_of, "response"):
        given.setdefault(prompt, []).append(response)
    problems = {
        "without a response": [p for p, n in Counter(wanted).items() if len(given.get(p, ())) < n],
        "with more than one": [p for p, texts in given.items() if 0 < known[p] < len(texts)],
        f"that split {split!r} does not have": [p for p in given if p not in known],
    }
    if any(problems.values()):
        shown = "; ".join(f"{len(rows)} {what} (such as {rows[0][:60]!r})" for what, rows in problems.items() if rows)
        raise DataError(f"{path}: expected one response to each of the {len(wanted)} prompts, found {shown}")
    waiting = {prompt: iter(texts) for prompt, texts in given.items()}
    return [next(waiting[prompt]) for prompt in wanted]


def answer(
    name: str,
    source: str | Path,
    task: Task,
    *,
    split: str = EVAL_SPLIT,
    prompts: int | None = None,
    seed: int = 0,
    batch: int = PROMPTS_AT_ONCE,
    reference: str | Path = BUILTIN_MODEL,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    servers: VLLMConfig | None = None,
    adapters: Path | None = None,
    tell: Callable[[str], object] = lambda text: None,
) -> System:
    """Let a policy answer the first prompts of a split, and measure the texts by all that needs no judge.

    The random numbers depend on ``seed`` and the prompt's place alone, not on ``batch``. A model is loaded for the call
    and freed after it, but for one that the process shares already.

    Args:
        name: What tables are to call it.
        source: As in `find_source`, and so is ``reference``.
        task: Where the prompts come from.
        split: Which of them: "test", ...
        prompts: How many; None is 128, or all where the split has fewer.
        seed: Of the sampling.
        batch: Prompts sampled at once.
        reference: The model that KL and perplexity are measured against.
        max_new_tokens: Longest response; None is the task's.
        temperature: Of the sampling; None is that of the policy's own run, or 0.9.
        servers: vLLM servers that sample, with the policy's base model; it is sampled here where there are none.
        adapters: Folder for the adapter they sample with, where servers names none.
        tell: Called with a sentence about the servers.

    Raises:
        RLAIFError: If there is no such policy or not so many prompts, or a file does not answer exactly them.
    """
    chosen = held_out_prompts(task, split, prompts)
    located = find_source(source, reference)
    steps = task.max_response_tokens if max_new_tokens is None else max_new_tokens
    if steps < 1 or batch < 1 or not (temperature is None or temperature > 0):
        raise RLAIFError(
            f"expected max_new_tokens and batch from 1 and a temperature above 0, found {steps}, {batch} and "
            f"{temperature}"
        )
    start, kl = reference_of(reference), None
    if located.kind == "file":
        responses = read_responses(located.path, task, split=split, prompts=prompts)
        base = backbone(start.path)
    else:
        base = backbone(start.path)
        temperature = located.temperature if temperature is None else temperature
        policy = _policy(located, temperature, adapter=bool(servers and servers.url))
        with ExitStack() as stack:
            sampler: Any = policy
            if servers and servers.url:
                from agents.served import ServedSampler

                sampler = ServedSampler(policy, VLLMServers(servers))
                stack.callback(sampler.close)
                folder = Path(servers.adapters) if servers.adapters else adapters or Path("adapters")
                sampler.open(folder, name=name, tokens=task.max_prompt_tokens + steps, tell=tell)
            responses, kl = _sampled(policy, sampler, base, task, chosen, steps, seed, batch)
        del policy, sampler
        gc.collect()  # a model is full of cycles; two of them should not be in memory at once
    return System(name, str(source), chosen, responses, _measures(base, task, chosen, responses, kl))


def sampled_responses(source: Source, task: Task, prompts: list[str], *, seed: int = 0) -> list[str]:
    """A policy's response to each of n prompts, which may repeat: independent samples then.

    Args:
        source: A model or a checkpoint; it is loaded for the call.
        task: How prompts become what the policy reads, and how long a response may be.
        prompts: n prompts.
        seed: Of the sampling; the numbers depend on a prompt's place, too.
    """
    policy = _policy(source, source.temperature, adapter=False)
    base = policy.backbone
    return _sampled(policy, policy, base, task, prompts, task.max_response_tokens, seed, _SAMPLES_AT_ONCE, kl=False)[0]


def _sampled(
    policy: Policy,
    sampler: Sampler,
    base: Backbone,
    task: Task,
    prompts: list[str],
    steps: int,
    seed: int,
    batch: int,
    kl: bool = True,
) -> tuple[list[str], NDArray[np.float64] | None]:
    """Sampled responses and each one's log pi - log pi_ref, (n,), or None where the tokenizers differ or on demand."""
    from agents.answers import answer as answered
    from agents.answers import response_kl
    from agents.policy import Policy

    tokenizer = policy.tokenizer
    asked, _ = encode_prompts(task, tokenizer, prompts, task.prompt_limit)
    ids, mask = pad_rows(asked, tokenizer.pad_token_id, side="left")
    samples = answered(sampler, ids, mask, max_new_tokens=steps, seed=seed, batch=batch)
    rows = (row[:length] for row, length in zip(samples.ids.tolist(), samples.lengths, strict=True))
    known = ([i for i in row if i < len(tokenizer)] for row in rows)
    responses = [continuation_text(tokenizer, *pair) for pair in zip(asked, known, strict=True)]
    if not kl or tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(base.tokenizer):
        return responses, None
    if policy.backbone is base and policy.adapter is None:
        return responses, np.zeros(len(prompts))
    return responses, response_kl(
        policy, ids, mask, samples, Policy(base, trainable="none", temperature=policy.temperature)
    )


def _policy(source: Source, temperature: float, *, adapter: bool) -> Policy:
    """The policy, as an adapter on its base model where that is asked for and it has one."""
    from agents.policy import Policy

    if source.run is None:
        if adapter and (Path(source.path) / "adapter" / "adapter_config.json").is_file():
            return Policy.from_adapter(Path(source.path) / "adapter", temperature=temperature)
        return Policy(backbone(source.path), trainable="none", temperature=temperature)
    from safetensors.torch import load_file

    agent = source.run["agent"]
    policy = Policy(
        source.run["model"],
        trainable=agent["trainable"],
        lora=LoraConfig(**agent["lora"]),
        temperature=temperature,
    )
    state = load_file(Path(source.path) / _CHECKPOINT)
    policy.load_state({n.removeprefix("policy/"): v for n, v in state.items() if n.startswith("policy/")})
    return policy


def _parts(order: NDArray[np.int64], width: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers, as many at a time as the logits of rows of this width leave memory for."""
    size = max(1, min(16, _TOKENS_PER_PASS // max(1, width)))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _measures(
    base: Backbone, task: Task, prompts: list[str], responses: list[str], kl: NDArray[np.float64] | None
) -> dict[str, NDArray[np.float64]]:
    """Everything that is measured without a judge; see `System`."""
    from agents.training.heldout import distinct_shares

    lengths, nll = _reference_nll(base, task, prompts, responses)
    with np.errstate(invalid="ignore", divide="ignore"):
        perplexity = np.exp(nll / lengths)
    pairs = list(zip(prompts, responses, strict=True))
    return {
        "length": lengths,
        "words": word_counts(responses).astype(np.float64),
        **({} if kl is None else {"kl": kl}),
        "reference_nll": nll,
        "perplexity": perplexity,
        "repeated-3": repeated_ngrams(responses, 3),
        "distinct-2": distinct_shares(responses),
        "new_numbers": np.array([len(new_numbers(*pair)) for pair in pairs], dtype=np.float64),
        "new_names": np.array([len(new_names(*pair)) for pair in pairs], dtype=np.float64),
    }


def _reference_nll(
    base: Backbone, task: Task, prompts: Sequence[str], responses: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens of each response and minus its log-probability after the prompt (nats, temperature 1), (n,) each.

    The second is NaN for a response without tokens and one beyond the model's context.
    """
    import torch

    from agents.policy import Policy

    tokenizer, device = base.tokenizer, base.device
    asked, texts = encode_prompts(task, tokenizer, prompts, task.prompt_limit)
    answered = [continuation_ids(tokenizer, *pair) for pair in zip(texts, responses, strict=True)]
    lengths = np.array([len(row) for row in answered], dtype=np.int64)
    whole = lengths + np.array([len(row) for row in asked])
    limit = context_of(base.model) or np.inf
    nll = np.full(len(answered), np.nan)
    possible = np.flatnonzero((lengths > 0) & (whole <= limit))
    order = possible[np.argsort(-lengths[possible], kind="stable")]
    plain = Policy(base, trainable="none", temperature=1.0)
    for part in _parts(order, int(lengths[order[0]]) if len(order) else 1):
        ids, mask = pad_rows([asked[i] for i in part], tokenizer.pad_token_id, side="left")
        tokens, seen = pad_rows([answered[i] for i in part], tokenizer.pad_token_id)
        x, m, y, s = (torch.from_numpy(array).to(device) for array in (ids, mask, tokens, seen))
        nll[part] = -plain.evaluate(x, m, y, s.float(), reference=True).logprobs.double().sum(1).cpu().numpy()
    return lengths.astype(np.float64), nll
