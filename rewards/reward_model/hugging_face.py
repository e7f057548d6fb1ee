"""Reward models made elsewhere: any sequence classifier of Hugging Face's as the backend "hf-rm".

The score is the logit that ``AutoModelForSequenceClassification`` gives for a text alone: state and head are the
model's own business. A batch gives what each row alone gives, because rows are padded on the right with the very token
that the model's pooling looks past; where its config names none, with one that stands in none of them.

A text is written as the model's chat template has it, where it has one. Otherwise prompt and response are

* a pair, if the tokenizer has a separator of texts (BERT, DeBERTa) and they are not one text in the task;
* else plain text as `rewards.reward_model.features.reward_text` puts them together, with the tokenizer's own special
  tokens and, where these leave the end open, the EOS: so TRL's RewardTrainer and OpenRLHF train on texts.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.api import Live
from rewards.reward_model.features import reward_text
from rlaif_env.api import BackendError, RLAIFError, Scores
from rlaif_env.batches import TOKENS_PER_BATCH, length_buckets
from rlaif_env.data.tasks import DEFAULT_TASK, TaskLike, load_task
from rlaif_env.data.templates import conversation
from rlaif_env.models import context_of, default_device, default_dtype, keep_end, load_weights, pad_rows, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOLERANCE = 0.05  # bfloat16 rounds to some 1 %

Template = Literal["auto", "chat", "pair", "plain"]

_loaded: weakref.WeakValueDictionary[tuple[str, str, str], PreTrainedModel] = weakref.WeakValueDictionary()


class _Row(NamedTuple):
    """An encoded text."""

    ids: list[int]
    segments: list[int]  # which of two texts a token belongs to
    cut: int  # tokens that were left out


class HFRewardModel(Live):
    """A sequence classifier of Hugging Face's; a reward backend.

    ``score`` returns one of its logits as it is, and info "truncated_tokens" and "template", which is in use.

    Args:
        model: The classifier.
        tokenizer: Its tokenizer.
        task: What is judged: a task or its name.
        index: Which of several outputs.
        template: "chat", "pair" or "plain", as above; "auto" chooses.
        max_tokens: Longest text; a longer one keeps its end, where the response is. None is the model's limit.
        name: What the model is called.

    Raises:
        RLAIFError: If it has several outputs and none is named, no chat template that is asked for, a lower limit, or
            scores a text in a batch otherwise than alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: TaskLike = DEFAULT_TASK,
        *,
        index: int | None = None,
        template: Template = "auto",
        max_tokens: int | None = None,
        name: str = "live",
    ) -> None:
        config: Any = model.config
        count = int(config.num_labels)
        if count > 1 if index is None else not 0 <= index < count:
            labels = ", ".join(f"{i}: {label}" for i, label in [*config.id2label.items()][:8])
            raise RLAIFError(f"expected index to say which output of {name} is the reward ({labels}), found {index}")
        if template not in get_args(Template):
            raise RLAIFError(f"expected template to be one of {', '.join(get_args(Template))}, found {template!r}")
        if template == "chat" and not tokenizer.chat_template:
            raise RLAIFError(
                f"expected a chat template in the tokenizer of {name}, found none; use template 'plain', or set "
                "tokenizer.chat_template and save it"
            )
        limits = [limit for limit in (context_of(model), tokenizer.model_max_length) if limit is not None]
        if max_tokens is not None and not 2 <= max_tokens <= min(limits):
            raise RLAIFError(f"expected max_tokens from 2 to {min(limits)} for {name}, found {max_tokens}")
        self.model, self.tokenizer, self.task = model.eval(), tokenizer, load_task(task)
        self.index = index or 0
        self.max_tokens = int(max_tokens or min(limits))
        self.template = self._chosen() if template == "auto" else template
        self.name = f"hf-rm:{name}"
        self._check_batches()

    def _chosen(self) -> Template:
        if self.tokenizer.chat_template:
            return "chat"
        return "pair" if self.tokenizer.sep_token_id is not None and self.task.kind != "continuation" else "plain"

    def _check_batches(self) -> None:
        """Refuse an architecture that reads rows padded on the right otherwise than alone; two short texts tell."""
        try:
            both = self.score(["a", "a text"], ["b", " that is longer"]).values
            apart = abs(float(both[0] - self.score(["a"], ["b"]).values[0]))
        except Exception as error:  # an architecture that wants other inputs shows as any of a dozen kinds
            raise RLAIFError(f"expected {self.name} to score two short texts, found: {error}") from error
        if not apart <= _TOLERANCE * max(1.0, float(np.abs(both[0]))):
            raise RLAIFError(
                f"expected {self.name}, {self.model.config.model_type!r}, to score a text in a batch, padded on the "
                f"right, as alone, found {apart:.2g} between the two; use another model"
            )

    def render(self, prompt: str, response: str) -> str:
        """The text that is scored; for a pair its two texts with a line between them."""
        if self.template == "pair":
            return f"{prompt}\n{response}"
        if self.template == "plain":
            return reward_text(self.task, prompt, response)
        return conversation(self.task, self.tokenizer, prompt, response)

    def _encode(self, prompt: str, response: str) -> _Row:
        tokenizer, special = self.tokenizer, {*self.tokenizer.all_special_ids}
        texts = (prompt, response) if self.template == "pair" else (self.render(prompt, response),)
        encoded = tokenizer(*texts, add_special_tokens=self.template != "chat", verbose=False)
        ids = list(encoded["input_ids"])
        segments = list(encoded.get("token_type_ids", [0] * len(ids)))
        if self.template == "plain" and tokenizer.eos_token_id is not None and not (ids and ids[-1] in special):
            ids, segments = [*ids, tokenizer.eos_token_id], [*segments, 0]
        if not ids:
            raise RLAIFError("found no token in it")
        first = ids[0] in special  # a BOS or CLS stays
        kept = keep_end(ids, self.max_tokens, ids[0] if first else None)
        return _Row(kept, keep_end(segments, self.max_tokens, segments[0] if first else None), len(ids) - len(kept))

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Logits, (n,); see `rlaif_env.api.RewardBackend`.

        Raises:
            BackendError: If the chat template refuses a conversation, or a text has no tokens.
        """
        rows = []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                rows.append(self._encode(prompt, response))
            except Exception as error:  # a template raises what it likes
                raise BackendError(
                    f"expected prompt and response that {self.name} can read as {self.template}, found row {i} "
                    f"({response[:60]!r}): {type(error).__name__}: {error}",
                    [i],
                ) from error
        values = np.zeros(len(rows), dtype=np.float32)
        with torch.inference_mode():
            for members in length_buckets([len(row.ids) for row in rows], TOKENS_PER_BATCH):
                values[members] = self._logits([rows[i] for i in members])
        cut = np.array([row.cut for row in rows], dtype=np.int64)
        return Scores(values, {"truncated_tokens": cut, "template": np.full(len(rows), self.template)})

    def _logits(self, rows: Sequence[_Row]) -> NDArray[np.float32]:
        device = self.model.device
        with _padding(self.model, {token for row in rows for token in row.ids}) as pad_id:
            ids, mask = (torch.from_numpy(a).to(device) for a in pad_rows([row.ids for row in rows], pad_id))
            further: dict[str, Any] = {}
            if "token_type_ids" in self.tokenizer.model_input_names:
                further["token_type_ids"] = torch.from_numpy(pad_rows([row.segments for row in rows], 0)[0]).to(device)
            logits = self.model(input_ids=ids, attention_mask=mask, **further).logits
        found: NDArray[np.float32] = logits[:, self.index].float().cpu().numpy()
        return found


@contextmanager
def _padding(model: PreTrainedModel, used: set[int]) -> Iterator[int]:
    """The token that the model's pooling looks past: its config's, else for now one that is not in use."""
    config: Any = model.config.get_text_config()
    embeddings: Any = model.get_input_embeddings()
    known = len(embeddings.weight)
    own = config.pad_token_id
    if own is not None and 0 <= own < known:
        yield own
        return
    config.pad_token_id = next(token for token in range(known) if token not in used)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = own


def hf_rm(
    *,
    task: TaskLike = DEFAULT_TASK,
    model: str | Path | None = None,
    index: int | None = None,
    template: Template = "auto",
    max_tokens: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> HFRewardModel:
    """The reward "hf-rm": a sequence classifier of Hugging Face's, such as one that TRL's RewardTrainer made.

    Args:
        task: What is judged.
        model: A folder or a Hugging Face name; safetensors only.
        index: Which of its outputs is the reward; needed where it has several.
        template: How prompt and response become text: "chat" by the model's own template, "pair" as two texts with the
            tokenizer's separator, "plain"; "auto" is the first of these that the model has.
        max_tokens: Longest text; a longer one keeps its end. The model's limit where not given.
        device: "cpu", "cuda", ...; by default the GPU where there is one.
        dtype: "float32", "bfloat16" or "float16"; by default bfloat16 on a GPU that has it and float32 elsewhere.

    Raises:
        RLAIFError: If no model is given, it cannot be opened, has no trained head, or a setting does not fit it.
    """
    if model is None:
        raise RLAIFError(
            "reward 'hf-rm': expected model, the folder or Hugging Face name of a reward model, found none"
        )
    if (Path(model).expanduser() / "adapter_config.json").is_file():
        raise RLAIFError(
            f"expected a whole reward model in {model}, found an adapter; merge it with "
            "peft.AutoPeftModelForSequenceClassification.from_pretrained(folder).merge_and_unload() and save that"
        )
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = device or default_device()
    dtype = dtype or default_dtype(device)
    key = (path := resolve(model), device, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if (opened := _loaded.get(key)) is None:
            opened, missing = load_weights(AutoModelForSequenceClassification, path, dtype)
            if missing:
                raise RLAIFError(
                    f"expected the weights of a whole reward model in {model}, found no {', '.join(missing[:3])}: a "
                    "language model has no head that scores texts. `rlaif train-rm` or TRL's RewardTrainer makes one"
                )
            opened = _loaded[key] = opened.to(device)
    except RLAIFError:
        raise
    except Exception as error:  # a damaged file shows as any of a dozen kinds
        raise RLAIFError(
            f"expected a sequence classifier of Hugging Face's, in a folder or by a name that can be reached, found "
            f"{str(model)!r}: {type(error).__name__}: {str(error).strip()[:200]}"
        ) from error
    return HFRewardModel(
        opened, tokenizer, task, index=index, template=template, max_tokens=max_tokens, name=str(model)
    )
