"""Settings of ``rlaif train``, and of a training as part of something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from agents.sampler import SamplerConfig
from agents.settings import ReinforceConfig
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import DEFAULT_TASK, EVAL_SPLIT
from rlaif_env.files import content_of
from rlaif_env.models import BUILTIN_MODEL
from rlaif_env.options import OPERATIONAL
from rlaif_env.references import code_in
from rlaif_env.runs import settled
from rlaif_env.servers.vllm import VLLMConfig

FREE = (
    *(
        "out",
        "resume",
        "change_reward",
        "checkpoint_every",
        "keep_checkpoints",
        "on_judge_failure",
        "max_dropped",
        "agent.micro_batch",
        "agent.pass_tokens",
        "shard",
        *(f"sampler.{entry.name}" for entry in fields(VLLMConfig)),
    ),
    *(f"reward_options.{name}" for name in OPERATIONAL),
)
"""Settings that may be others when a run is gone on with: they do not change what is learned."""

REWARD = ("reward_options", "content")
"""What may be another with ``change_reward``: the reward's settings, and the content of what they name."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long a policy is trained, on how much, and by which algorithm.

    Attributes:
        updates: REINFORCE steps.
        prompts_per_update: Prompts in a batch.
        group_size: K, samples of each prompt in a batch.
        eval_prompts: Held-out prompts answered before and after, by default 128 or as many as there are; 0 is no
            evaluation.
        eval_split: The split they come from.
        decay: Let the learning rate fall linearly to 0 over the run.
        agent: The algorithm's settings.
        sampler: What writes the responses, of training and of evaluations during it.
    """

    updates: int = 50
    prompts_per_update: int = 4
    group_size: int = 6
    eval_prompts: int | None = None
    eval_split: str = EVAL_SPLIT
    decay: bool = True
    agent: ReinforceConfig = field(default_factory=ReinforceConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        for name in ("updates", "prompts_per_update", "group_size"):
            if getattr(self, name) < 1:
                raise RLAIFError(f"expected {name} of at least 1, found {getattr(self, name)}")


@dataclass(frozen=True)
class TrainConfig(TrainingConfig):
    """Train a policy with REINFORCE on any reward.

    The models are put on the GPU where there is one (bfloat16), else on the CPU (float32); the environment variables
    RLAIF_DEVICE and RLAIF_DTYPE say otherwise.

    Attributes:
        task: A built-in task or a TOML file.
        reward: Where the reward comes from: "direct-llm", "human-rm", "distilled-rm", "hf-rm", an installed backend, or
            code of yours as package.module:name or path/file.py:name.
        reward_options: The reward's own settings; on the command line --reward.NAME, listed by --help for the --reward
            beside it.
        model: The initial policy: the built-in model, a folder, or a Hugging Face id.
        on_judge_failure: What becomes of a response that the reward cannot score: "raise" ends the run, which can be
            gone on with; "drop-group" leaves its prompt's responses out of the update.
        max_dropped: End the run where more than this share of the groups of ten batches in a row was dropped.
        overlap: Ask a judge elsewhere, and servers that sample, for the next batch while the gradient of the last is
            computed. Responses are then one update old, and weighed for it (agent.importance_cap).
        shard: Divide the frozen weights of the policy's layers over the processes that torchrun started: for a policy
            larger than one device. It takes an adapter to train and servers that sample.
        seed: Of prompts, sampling and initial adapter.
        checkpoint_every: Updates between checkpoints; 0 is none but the last.
        keep_checkpoints: How many of the last stay, the best by validation beside them.
        validate_every: Updates between evaluations on the validation split, the first before training: they find the
            best checkpoint, and say how often the start is beaten and whether the gold measure or diversity falls; 0
            is none.
        validation_prompts: Prompts in each of these, by default 32 or as many as there are.
        out: The run folder; a new one under runs/ where not given. One that holds an unfinished run of this
            configuration is gone on with; of a finished one the result is given.
        resume: "latest" (of the folder out, or of the newest run under runs/), a run folder, or one of its checkpoints
            to go back to. On the command line, settings that are not given are then that run's.
        change_reward: Go on with the run though the reward's settings, or the models they name, are others than they
            were. From which update on they are is recorded, and the evaluation before training is made again.
    """

    task: str = DEFAULT_TASK
    reward: str = "direct-llm"
    reward_options: Mapping[str, Any] = field(default_factory=dict)
    model: str = BUILTIN_MODEL
    on_judge_failure: Literal["raise", "drop-group"] = "raise"
    max_dropped: float = 0.5
    overlap: bool = False
    shard: bool = False
    seed: int = 0
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    validate_every: int = 0
    validation_prompts: int | None = None
    out: Path | None = None
    resume: str | None = None
    change_reward: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_checkpoints < 1:
            raise RLAIFError(f"expected keep_checkpoints of at least 1, found {self.keep_checkpoints}")
        if not 0 <= self.max_dropped <= 1:
            raise RLAIFError(f"expected max_dropped from 0 to 1, found {self.max_dropped}")
        if self.shard:
            _check_shard(self)

    @property
    def drops(self) -> bool:
        """Whether groups are dropped where the judge fails."""
        return self.on_judge_failure == "drop-group"


def _check_shard(config: TrainConfig) -> None:
    """Raise RLAIFError where a policy that no process has the whole of would be needed whole."""
    problems = {
        "an adapter to be trained (--agent.trainable lora)": config.agent.trainable == "lora",
        "servers that sample (--sampler.url)": config.sampler.url and not config.sampler.dtype,
        "no --overlap": not config.overlap,
    }
    if missing := [wanted for wanted, met in problems.items() if not met]:
        raise RLAIFError(f"expected with --shard {' and '.join(missing)}, found otherwise; or leave --shard away")


def resolved_config(config: TrainConfig) -> dict[str, Any]:
    """All that makes a run: its settings, and the content of the code, files and folders that the reward's name."""
    named = {n: str(v) for n, v in settled(config.reward_options, ("server",)).items() if isinstance(v, str | Path)}
    content = {name: content for name, path in named.items() if (content := content_of(path)) != path}
    return {**asdict(config), "content": {"reward": content, "code": reward_code(config)}}


def reward_code(config: TrainConfig) -> dict[str, str]:
    """Hashes of the files of code that the reward's name, or its settings, name."""
    return code_in([config.reward, config.reward_options])


def reward_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's reward, by dotted names, of what `resolved_config` gives."""
    return settled({name: config[name] for name in REWARD}, FREE)
