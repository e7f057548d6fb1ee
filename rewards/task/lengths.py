"""How long a task's prompts are, as the environment reads them, and how much a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import MOST_TOKENS, Task
from rlaif_env.envs.core import Core
from rlaif_env.models import context_of, resolve


def prompt_core(task: Task, model: str, split: str) -> Core:
    """What an environment makes of a split's prompts for a policy, none cut or refused for its length.

    Raises:
        RLAIFError: If the split has no prompts, or one of them cannot be a prompt.
    """
    whole = replace(task, max_prompt_tokens=MOST_TOKENS, truncate_prompts=False)
    return Core(task=whole, reward=_nothing, tokenizer=model, split=split)


def _nothing(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [0.0] * len(prompts)


def context_length(model: str) -> int | None:
    """The tokens that a model has positions for, by its name or folder, without its weights; None for no limit.

    Raises:
        RLAIFError: If the model is unknown.
    """
    from transformers import AutoConfig

    try:
        return context_of(SimpleNamespace(config=AutoConfig.from_pretrained(resolve(model), trust_remote_code=False)))
    except (OSError, ValueError) as error:
        raise RLAIFError(f"expected the config.json of a model at {model}, found: {error}") from error
