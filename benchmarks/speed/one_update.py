"""One update of this project, as benchmarks run it: prompts and responses of exact lengths, a reward that is free.

So that every response has all its tokens, the model is given an end of text that it never writes.

Notation: n rows of B prompts with K samples each, P prompt tokens, T response tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.speed.timing import Times, stopwatch
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import PromptSource, Task
from rlaif_env.models import LoraConfig, encode, load_tokenizer, logit_width, resolve

if TYPE_CHECKING:
    from agents.sampler import SamplerConfig

WORDS = (
    "the film was a story of people who never knew what they had until it was gone and then one day all of this came "
    "back to them as if it were new in the town by the sea where every house had an old door"
).split()


@dataclass(frozen=True)
class Setting:
    """What one comparison is about."""

    beta: float  # weight of the KL
    prompt: int  # P
    response: int  # T
    rows: int = 16  # n
    group: int = 4  # K
    trainable: str = "lora"  # "lora" or "full"
    rank: int = 16  # LoRA rank; alpha is twice that
    passes: int = 1  # gradient passes in which TRL takes the n rows
    dtype: str = "float32"  # of the frozen weights, and on TRL's side of autocast

    @property
    def name(self) -> str:
        """Short name for tables."""
        return f"beta {self.beta:g}, {self.prompt}/{self.response}"


SETTINGS = tuple(Setting(beta, p, t) for beta in (0.0, 0.05) for p, t in ((64, 32), (32, 128), (256, 32)))


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that costs nothing and tells responses apart: TRL's signature, and a callable of ours."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def prompts_of(tokenizer: Any, count: int, length: int) -> list[str]:
    """Different texts of exactly so many tokens.

    Raises:
        RLAIFError: If the tokenizer does not split words as expected.
    """
    single = [w for w in dict.fromkeys(WORDS) if len(tokenizer.encode(" " + w, add_special_tokens=False)) == 1]
    extra = len(encode(tokenizer, [" " + single[0]])[0]) - 1  # a BOS token
    texts = [
        "".join(" " + single[(i * (3 + j) + 7 * j) % len(single)] for i in range(length - extra)) for j in range(count)
    ]
    lengths = sorted({len(row) for row in encode(tokenizer, texts)})
    if lengths != [length] or len(set(texts)) != count:
        raise RLAIFError(f"expected {count} prompts of {length} tokens, found lengths {lengths}")
    return texts


def bare_task(prompts: Sequence[str], prompt: int, response: int) -> Task:
    """A task of these prompts of at most P tokens, with responses of at most T."""
    source = PromptSource(prompts={"train": tuple(prompts)})
    return Task(
        "speed", "continuation", "nothing", max_prompt_tokens=prompt, max_response_tokens=response, source=source
    )


def _never_written(tokenizer: Any) -> str:
    """A special token that is neither the end of a text nor anything else a model of this tokenizer writes."""
    used = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token}
    added = tokenizer.added_tokens_decoder.values()
    spare = [token.content for token in added if token.special and token.content not in used]
    if not spare:
        raise RLAIFError("expected a tokenizer with a special token to spare, found none; use another model")
    return str(spare[-1])


def model_folder(name: str, folder: Path) -> Path:
    """The model with an end of text that never comes, for both sides."""
    tokenizer = load_tokenizer(name)
    source = Path(resolve(name))
    end = _never_written(tokenizer)
    for file in source.glob("*.safetensors"):
        (folder / file.name).symlink_to(file)
    tokenizer.eos_token = end
    tokenizer.save_pretrained(folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


class Ours:
    """This project's side: environment, agent, one update a call."""

    def __init__(self, folder: Path, setting: Setting, device: str, sampler: SamplerConfig | None = None) -> None:
        import gymnasium as gym

        from agents import ReinforceAgent, ReinforceConfig
        from agents.sampler import make_sampler

        s = setting
        self.setting = s
        config = ReinforceConfig(
            beta=s.beta,
            trainable=s.trainable,
            lora=LoraConfig(s.rank, 2.0 * s.rank),
            temperature=1.0,
            reward_normalisation="none",
            learning_rate=1e-5,
        )
        tokenizer = load_tokenizer(folder)
        self.prompts = prompts_of(tokenizer, s.rows // s.group, s.prompt)
        task = bare_task(self.prompts, s.prompt, s.response)
        self.envs: Any = gym.make_vec(
            "RLAIF/TextGeneration-v0",
            num_envs=s.rows,
            group_size=s.group,
            task=task,
            reward=lambda prompts, responses: reward(prompts, responses),
            tokenizer=tokenizer,
            vocab_size=logit_width(folder),
        )
        source = partial(make_sampler, sampler) if sampler else None
        self.agent = ReinforceAgent(folder, config, envs=self.envs, device=device, dtype=s.dtype, sampler=source)
        self.observations, _ = self.envs.reset(seed=0)
        self.metrics: dict[str, float] = {}

    def step(self, act: Times | None = None, around: Times | None = None, learn: Times | None = None) -> None:
        """One update; sampling, the environment and what learns are timed if asked for."""
        with stopwatch(act):
            responses = self.agent.act(self.observations)
        with stopwatch(around):
            self.observations, self.rewards, _, _, self.info = self.envs.step(responses)
        with stopwatch(learn):
            self.metrics = self.agent.update(self.rewards)

    def tokens(self) -> tuple[int, int]:
        """Prompt and response tokens of the last update, all rows together."""
        return int(self.observations["attention_mask"].sum()), int(self.metrics["tokens"])
