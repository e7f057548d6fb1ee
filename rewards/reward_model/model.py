"""Reward models: a scalar head on a causal LM's state at the EOS (section 2.2.1), as reward backends.

`human_rm`, `distilled_rm` and `any_rm` are the backends "human-rm", "distilled-rm" and "reward-model": one class, told
apart by who made the labels, which a saved model says of itself. `rewards.reward_model.training` trains them.

How this differs from the paper: the head may sit on a middle layer; the model may be frozen or have a LoRA adapter, and
then shares its base weights in memory with everything else that uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.reward_model import files
from rewards.reward_model.features import encode_for_reward, extract
from rewards.reward_model.parts import BACKENDS, MADE_BY, Provenance, RewardModelParts
from rlaif_env.api import BackendError, RLAIFError, Scores
from rlaif_env.data.tasks import Task
from rlaif_env.models import Backbone

__all__ = ["RewardModel", "any_rm", "distilled_rm", "human_rm"]


class RewardModel(RewardModelParts):
    """A reward model as a reward backend; what it is made of is said in `RewardModelParts`.

    ``score`` returns values and info "raw_score" and "truncated_tokens". σ of a difference of raw scores is the model's
    probability that people (or the labeler) prefer the one to the other.
    """

    def __deepcopy__(self, memo: object) -> RewardModel:
        """A live backend is shared, never cloned."""
        return self

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[list[int]], NDArray[np.int64]]:
        """Token ids of n texts and how many tokens were cut from each; see `encode_for_reward`."""
        encoded = [
            encode_for_reward(self.backbone.tokenizer, self.task, prompt, response, self.max_tokens)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return [row for row, _ in encoded], np.array([cut for _, cut in encoded], dtype=np.int64)

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
        raw = self.raw_scores(self.encode([*prompts, *prompts], [*responses_1, *responses_2])[0])
        p: NDArray[np.float64] = 1 / (1 + np.exp(raw[len(prompts) :] - raw[: len(prompts)]))
        return p

    def save(self, folder: str | Path, *, merged: bool = True, figures: Mapping[str, Any] | None = None) -> None:
        """Write the model, its head and adapter, and a model card; `rewards.reward_model.files` says what goes where.

        Args:
            folder: A new or empty folder.
            merged: Also write a whole model that `AutoModelForSequenceClassification.from_pretrained` opens. A fully
                trained model is always whole.
            figures: Of the evaluation, for the card.
        """
        files.save(self, Path(folder), merged=merged, figures=figures or {})

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
                the base model or tokenizer is not the one it was trained with, or the task is of another kind.
        """
        return files.load(cls, Path(folder), task=task, base=base, device=device, dtype=dtype, standalone=standalone)


def _backend(accepts: Provenance | None) -> Callable[..., RewardModel]:
    """The backend for reward models with labels of one provenance, or of any."""
    name = BACKENDS[accepts or "mixed"]

    def make(
        *,
        task: str | Path | Task | Mapping[str, Any] = "movie-review",
        model: str | Path | RewardModel | None = None,
        base: str | Path | Backbone | None = None,
        device: str | None = None,
        dtype: str | None = None,
        standalone: bool = False,
    ) -> RewardModel:
        """A trained reward model as a backend.

        "human-rm" takes those all of whose labels are people's, "distilled-rm" those all of whose labels are a language
        model's, "reward-model" any, people's and language models' together included.

        Args:
            task: What is scored.
            model: The folder of a trained model (what ``rlaif train-rm`` made), or a live `RewardModel`.
            base: The base model where it is not, or not only, under the name it had in training.
            device: "cpu", "cuda", ...; by default the GPU where there is one.
            dtype: "float32", "bfloat16" or "float16"; by default bfloat16 on a GPU that has it and float32 elsewhere.
            standalone: Open the merged copy instead of sharing the base model.

        Raises:
            RLAIFError: If no model is given, it cannot be opened, or anybody else made its labels.
        """
        if model is None:
            labels = {"human": "--labels human ", "ai": "--labels ai-preferences.jsonl "}.get(accepts or "", "")
            raise RLAIFError(
                f"reward {name!r}: expected the folder of a trained reward model, found none; train one with "
                f"`rlaif train-rm {labels}--out runs/rm` and give reward_kwargs={{'model': 'runs/rm'}}"
            )
        if isinstance(model, RewardModel):
            others = {"base": base, "device": device, "dtype": dtype, "standalone": standalone}
            if given := ", ".join(setting for setting, value in others.items() if value):
                raise RLAIFError(f"reward {name!r}: expected no other settings with a live model, found {given}")
        else:
            try:
                model = RewardModel.load(model, task=task, base=base, device=device, dtype=dtype, standalone=standalone)
            except TypeError as error:
                raise RLAIFError(f"reward {name!r}: {error}") from error
        if accepts not in (None, model.labels.provenance):
            raise RLAIFError(
                f"reward {name!r}: expected a reward model whose labels were all made by {MADE_BY[accepts]}, found one "
                f"trained on {str(model.labels) or 'labels of unknown origin'}; use reward "
                f"{BACKENDS[model.labels.provenance]!r}"
            )
        return model

    return make


human_rm = _backend("human")
distilled_rm = _backend("ai")
any_rm = _backend(None)
