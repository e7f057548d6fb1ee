"""Reward models: a scalar head on a causal LM's state at the EOS (section 2.2.1), as reward backends.

`human_rm`, `distilled_rm` and `any_rm` are the backends "human-rm", "distilled-rm" and "reward-model": one class, told
apart by who made the labels, which a saved model says of itself. `rewards.reward_model.training` trains them.

How this differs from the paper: the head may sit on a middle layer; the model may be frozen or have a LoRA adapter, and
then shares its base weights in memory with everything else that uses them. A saved model's folder:

    reward_model.json     what the model is: base and tokenizer fingerprints, layers, labels, normalisation, figures
    head.safetensors      the head ("score.weight") and the LoRA adapter, for use on the shared base model
    config.json, model.safetensors, tokenizer files
                          the merged model, whole: `AutoModelForSequenceClassification.from_pretrained` opens it
    README.md             the model card
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.reward_model.features import depth_of, encode_for_reward, extract
from rewards.reward_model.record import (
    BACKENDS,
    MADE_BY,
    LabelRecord,
    Normalization,
    Provenance,
    read_record,
    write_record,
)
from rewards.reward_model.weights import attach_adapter, open_base, open_merged, read_head, save_head, save_merged
from rlaif_env.api import BackendError, RLAIFError, Scores
from rlaif_env.batches import TOKENS_PER_BATCH
from rlaif_env.data.tasks import DEFAULT_TASK, TaskLike, load_task
from rlaif_env.models import MODELS, Backbone, tokenizer_fingerprint

DEFAULT_MAX_TOKENS = 1152
"""Longest text scored, EOS included (appendix A)."""


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

    Raises:
        RLAIFError: If the sizes do not fit.

    ``score`` returns values and info "raw_score" and "truncated_tokens". σ of a difference of raw scores is the model's
    probability that people (or the labeler) prefer the one to the other.
    """

    def __init__(
        self,
        backbone: Backbone,
        weight: torch.Tensor,
        task: TaskLike = DEFAULT_TASK,
        *,
        layers: int | None = None,
        adapter: str | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        labels: LabelRecord | None = None,
        normalization: Normalization | None = None,
        owns_weights: bool = False,
        tokens_per_batch: int = TOKENS_PER_BATCH,
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
        self.name = f"{BACKENDS[self.labels.provenance]}:{backbone.name}"

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
        """Write the model, its head and adapter, and a card with the figures.

        ``merged`` also writes a whole model that `AutoModelForSequenceClassification.from_pretrained` opens; a fully
        trained one is always whole.

        Raises:
            RLAIFError: If the folder holds files already, or the architecture has no sequence-classification form.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise RLAIFError(f"expected {folder} to be new or empty, found files in it: name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not self.owns_weights:
            save_head(folder, self.backbone, self.weight, self.adapter)
        if whole := merged or self.owns_weights:
            save_merged(folder, self.backbone, self.weight, self.layers, self.adapter)
        write_record(folder, self._record(figures or {}), whole=whole)

    def _record(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """What reward_model.json holds."""
        base, name, lora = self.backbone, self.backbone.name, None
        if self.adapter is not None:
            config = base.model.peft_config[self.adapter]
            lora = {"rank": config.r, "alpha": config.lora_alpha, "targets": sorted(config.target_modules)}
        if name not in MODELS and Path(name).is_dir():
            name = str(Path(name).resolve())
        return {
            "base": {"name": name, "fingerprint": None if self.owns_weights else base.fingerprint()},
            "tokenizer": {"fingerprint": tokenizer_fingerprint(base.tokenizer), "pad_token": base.tokenizer.pad_token},
            "task": {**self.task.to_json(), "source": {}},
            "layers": self.layers,
            "lora": lora,
            "max_tokens": self.max_tokens,
            "labels": dict(self.labels.sources),
            "provenance": self.labels.provenance,
            "normalization": asdict(self.normalization),
            "figures": dict(figures),
        }

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        task: TaskLike | None = None,
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
        folder, record = read_record(Path(folder))
        name, fingerprint = record["base"]["name"], record["base"]["fingerprint"]
        if whole := standalone or fingerprint is None:
            model, weight = open_merged(folder, name, record["tokenizer"]["pad_token"], device, dtype)
        else:
            model = open_base(folder, name, fingerprint, base, device, dtype)
        expected, present = record["tokenizer"]["fingerprint"], tokenizer_fingerprint(model.tokenizer)
        if present != expected:
            raise RLAIFError(
                f"expected the tokenizer that the reward model in {folder} was trained with (fingerprint "
                f"{expected[:12]}), found another ({present[:12]}) with {model.name}; its token ids would mean "
                "something else. Train the model again"
            )
        trained_for = load_task(record["task"])
        wanted = trained_for if task is None else load_task(task)
        if wanted.kind != trained_for.kind:
            raise RLAIFError(
                f"expected a task of kind {trained_for.kind!r} for the reward model in {folder}, trained for "
                f"{trained_for.name!r}; found {wanted.name!r} of kind {wanted.kind!r}, whose texts are put together in "
                "another way"
            )
        tensors: dict[str, torch.Tensor] = {}
        if not whole:
            weight, tensors = read_head(folder)
        made = cls(
            model,
            weight,
            wanted,
            layers=None if whole else record["layers"],
            max_tokens=record["max_tokens"],
            labels=LabelRecord(record["labels"]),
            normalization=Normalization(**record["normalization"]),
            owns_weights=whole,
        )
        if record["lora"] is not None and not whole:
            made.adapter = attach_adapter(folder, model, record["lora"], tensors)
        return made


def _backend(accepts: Provenance | None) -> Callable[..., RewardModel]:
    """The backend for reward models with labels of one provenance, or of any."""
    name = BACKENDS[accepts or "mixed"]

    def make(
        *,
        task: TaskLike = DEFAULT_TASK,
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
            model: The folder of a trained model (what rlaif train-rm made), or a live RewardModel.
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
