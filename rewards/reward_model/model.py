"""Reward models: a scalar head on a causal LM's state at the EOS (section 2.2.1), as reward backends.

`human_rm`, `distilled_rm` and `any_rm` are the backends "human-rm", "distilled-rm" and "reward-model": one class, told
apart by who made the labels, which a saved model says of itself. `rewards.reward_model.training` trains them.

How this differs from the paper: the head may sit on a middle layer; the model may be frozen or have a LoRA adapter, and
then shares its base weights in memory with everything else that uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rewards.reward_model.features import depth_of, encode_for_reward, extract
from rlaif_env.api import BackendError, RLAIFError, Scores
from rlaif_env.data.tasks import Task, load_task
from rlaif_env.models import Backbone

if TYPE_CHECKING:
    import torch

__all__ = ["LabelRecord", "Normalization", "RewardModel", "any_rm", "distilled_rm", "human_rm"]

DEFAULT_MAX_TOKENS = 1152
"""Longest text scored, EOS included (appendix A)."""


@dataclass(frozen=True)
class LabelRecord:
    """Who made the labels that a reward model was trained on.

    Attributes:
        sources: Training pairs by source: "human", "ai:<model>", ...
    """

    sources: Mapping[str, int]

    @property
    def provenance(self) -> Literal["human", "ai", "mixed"]:
        """Who made them: "human" or "ai" where all labels are; else "mixed"."""
        kinds = {source.partition(":")[0] for source in self.sources}
        if kinds == {"human"}:
            return "human"
        return "ai" if kinds == {"ai"} else "mixed"

    def __str__(self) -> str:
        return ", ".join(f"{count} pairs from {source!r}" for source, count in self.sources.items())


@dataclass(frozen=True)
class Normalization:
    """How a raw score becomes the reward: (raw - mean) / std, over the training responses; 0 and 1 leave it as it is.

    Attributes:
        kind: "none" or "standardize".
        mean: Mean raw score of the training responses.
        std: Its standard deviation.
    """

    kind: Literal["none", "standardize"] = "none"
    mean: float = 0.0
    std: float = 1.0


class RewardModel:
    """A scalar head on a model's state at the EOS; a reward backend.

    Args:
        backbone: The model. With an adapter or none it is shared; a fully trained one is its own.
        weight: The head, (H,): the raw score is weight . state.
        task: What is scored: a task or its name.
        layers: How many of the model's layers the state has passed; None is all.
        adapter: The LoRA adapter that acts; None is the plain weights.
        max_tokens: A longer text keeps its end; how much was cut is in the info of every score.
        labels: Who made the labels.
        normalization: How raw scores become rewards.
        owns_weights: Whether the backbone's weights were trained too, so that they are no longer the base model's.
        tokens_per_batch: Padded tokens in one forward pass.

    ``score`` returns values and info "raw_score" and "truncated_tokens". σ of a difference of raw scores is the model's
    probability that people (or the labeler) prefer the one to the other.

    Raises:
        RLAIFError: If the sizes do not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        weight: torch.Tensor,
        task: str | Path | Task | Mapping[str, Any] = "movie-review",
        *,
        layers: int | None = None,
        adapter: str | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        labels: LabelRecord | None = None,
        normalization: Normalization | None = None,
        owns_weights: bool = False,
        tokens_per_batch: int = 2048,
    ) -> None:
        width = int(backbone.model.config.get_text_config().hidden_size)
        depth = depth_of(backbone.model)
        layers = depth if layers is None else layers
        if tuple(weight.shape) != (width,):
            raise RLAIFError(f"expected a head of shape ({width},) for {backbone.name}, found {tuple(weight.shape)}")
        if not 1 <= layers <= depth:
            raise RLAIFError(f"expected layers from 1 to {depth} for {backbone.name}, found {layers}")
        if max_tokens < 2:
            raise RLAIFError(f"expected max_tokens of at least 2, found {max_tokens}")
        self.backbone = backbone
        self.weight = weight.detach().float().cpu()
        self.task = load_task(task)
        self.layers = layers
        self.adapter = adapter
        self.max_tokens = max_tokens
        self.labels = labels or LabelRecord({})
        self.normalization = normalization or Normalization()
        self.owns_weights = owns_weights
        self.tokens_per_batch = tokens_per_batch
        self.name = f"{_BACKENDS.get(self.labels.provenance, 'reward-model')}:{backbone.name}"

    def __deepcopy__(self, memo: object) -> RewardModel:
        """A live backend is shared, never cloned."""
        return self

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[list[int]], NDArray[np.int64]]:
        """Token ids of n texts and how many tokens were cut from each; see `encode_for_reward`."""
        pairs = [
            encode_for_reward(self.backbone.tokenizer, self.task, prompt, response, self.max_tokens)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return [row for row, _ in pairs], np.array([cut for _, cut in pairs], dtype=np.int64)

    def raw_scores(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """The head's output for n encoded texts, in their order, before normalisation: (n,)."""
        states = extract(
            self.backbone, rows, [self.layers], adapter=self.adapter, tokens_per_batch=self.tokens_per_batch
        )
        scores: NDArray[np.float64] = (states[:, 0].double() @ self.weight.double()).numpy()
        return scores

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Rewards; see `rlaif_env.api.RewardBackend`.

        Raises:
            BackendError: If a score is not finite.
        """
        rows, cut = self.encode(prompts, responses)
        raw = self.raw_scores(rows)
        if bad := [int(i) for i in np.flatnonzero(~np.isfinite(raw))]:
            raise BackendError(
                f"expected finite scores from {self.name}, found {raw[bad[0]]} in row {bad[0]} for response "
                f"{responses[bad[0]][:60]!r}",
                bad,
            )
        values = (raw - self.normalization.mean) / self.normalization.std
        return Scores(values.astype(np.float32), {"raw_score": raw, "truncated_tokens": cut})

    def p_first(
        self, prompts: Sequence[str], responses_1: Sequence[str], responses_2: Sequence[str]
    ) -> NDArray[np.float64]:
        """Probability that each first response is preferred, σ(r1 - r2): (n,)."""
        n = len(prompts)
        raw = self.raw_scores(self.encode([*prompts, *prompts], [*responses_1, *responses_2])[0])
        p: NDArray[np.float64] = 1 / (1 + np.exp(raw[n:] - raw[:n]))
        return p

    def save(self, folder: str | Path, *, merged: bool = True, figures: Mapping[str, Any] | None = None) -> None:
        """Write the model, its head and adapter, and a model card; `reward_model.files` says what goes where.

        Args:
            folder: A new or empty folder.
            merged: Also write a whole model that `AutoModelForSequenceClassification.from_pretrained` opens. A fully
                trained model is always whole.
            figures: Of the evaluation, for the card.
        """
        from rewards.reward_model.files import save

        save(self, Path(folder), merged=merged, figures=figures or {})

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        task: str | Path | Task | Mapping[str, Any] | None = None,
        base: str | Path | Backbone | None = None,
        device: str | None = None,
        dtype: str | None = None,
        standalone: bool = False,
    ) -> RewardModel:
        """Open a saved reward model.

        Args:
            folder: What `save` wrote, or the run folder of ``rlaif train-rm`` that holds it.
            task: What is scored; None is the task it was trained for.
            base: The base model where it is not, or not only, under the name it had in training.
            device: As in `rlaif_env.models.backbone`.
            dtype: As in `rlaif_env.models.backbone`.
            standalone: Open the merged copy instead of sharing the base model.

        Raises:
            RLAIFError: If the folder holds no reward model of this kind, the head is missing, the weights are pickled,
            the
                base model or tokenizer is not the one it was trained with, or the task is of another kind.
        """
        from rewards.reward_model.files import load

        return load(Path(folder), task=task, base=base, device=device, dtype=dtype, standalone=standalone)


_BACKENDS: Mapping[str, str] = {"human": "human-rm", "ai": "distilled-rm"}
_MADE_BY: Mapping[str, str] = {"human": "people", "ai": "a language model"}


def human_rm(
    *, task: str | Path | Task | Mapping[str, Any] = "movie-review", model: Any = None, **kwargs: Any
) -> RewardModel:
    """The backend "human-rm": a reward model trained on people's preferences alone.

    Args:
        task: What is scored.
        model: The folder of a trained model, or a live `RewardModel`.
        kwargs: As in `RewardModel.load`.

    Raises:
        RLAIFError: If no model is given, it cannot be opened, or anything but people made its labels.
    """
    return _backend("human", task, model, kwargs)


def distilled_rm(
    *, task: str | Path | Task | Mapping[str, Any] = "movie-review", model: Any = None, **kwargs: Any
) -> RewardModel:
    """The backend "distilled-rm": a reward model trained on a language model's preferences alone; see `human_rm`."""
    return _backend("ai", task, model, kwargs)


def any_rm(
    *, task: str | Path | Task | Mapping[str, Any] = "movie-review", model: Any = None, **kwargs: Any
) -> RewardModel:
    """The backend "reward-model": whoever made the labels, people and language models together included."""
    return _backend(None, task, model, kwargs)


def _backend(wanted: str | None, task: Any, model: Any, kwargs: Mapping[str, Any]) -> RewardModel:
    name = _BACKENDS.get(wanted or "", "reward-model")
    if model is None:
        labels = {"human": "--labels human ", "ai": "--labels ai-preferences.jsonl "}.get(wanted or "", "")
        raise RLAIFError(
            f"reward {name!r}: expected the folder of a trained reward model, found none; train one with "
            f"`rlaif train-rm {labels}--out runs/rm` and give reward_kwargs={{'model': 'runs/rm'}}"
        )
    if isinstance(model, RewardModel):
        if kwargs:
            raise RLAIFError(
                f"reward {name!r}: expected no other settings with a live model, found {', '.join(kwargs)}"
            )
        found = model
    else:
        try:
            found = RewardModel.load(model, task=task, **kwargs)
        except TypeError as error:
            raise RLAIFError(f"reward {name!r}: {error}") from error
    if wanted is not None and found.labels.provenance != wanted:
        right = _BACKENDS.get(found.labels.provenance, "reward-model")
        raise RLAIFError(
            f"reward {name!r}: expected a reward model whose labels were all made by {_MADE_BY[wanted]}, found one "
            "trained on "
            f"{found.labels or 'labels of unknown origin'}; use reward {right!r}"
        )
    return found
