"""`LocalLM`: a language model in this process as a judge, the likelihoods of its answers, and generated rationales.

It runs on transformers. What the prompts of a batch share at their beginning (preamble, exemplars) is computed once and
kept; all answers to a prompt are seen in one forward pass where the model allows it
(`rewards.language_model.tree_logits`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rewards.api import Live
from rewards.language_model.answer_tree import AnswerTree, answer_logprobs, answer_tree, word_start_mask
from rewards.prompts import before_stop, leads_after
from rlaif_env.api import ContextError, RLAIFError
from rlaif_env.batches import TOKENS_PER_BATCH, length_buckets
from rlaif_env.data.tasks import Task
from rlaif_env.data.templates import encode_prompts
from rlaif_env.models import BUILTIN_MODEL, Backbone, backbone, context_of, continuation_text, encode, takes_any_mask
from rlaif_env.models.sampling import sample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHARED_MINIMUM = 8  # a shorter common beginning is not worth a cache
_KEPT_PREFIXES = 4


class LocalLM(Live):
    """A causal LM in this process, its plain weights (no adapter) frozen.

    Args:
        model: A name that `rlaif_env.models.backbone` knows, a `Backbone`, or a live Hugging Face model.
        tokenizer: The live model's tokenizer; needed with a live model only.
        device, dtype: As in `backbone`.
        chat: Whether prompts go through the tokenizer's chat template as a user's turn.
        max_tokens: Longest prompt accepted; None is the model's own limit, which holds in any case.
        tokens_per_batch: Padded tokens in one forward pass; memory against speed.
        share_prefix: Whether a common beginning is computed once. The result is the same.
        task: Whose template the prompts are put in: for a policy that answers, not for a judge.
    """

    def __init__(
        self,
        model: str | Path | Backbone | PreTrainedModel = BUILTIN_MODEL,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        chat: bool = False,
        max_tokens: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        share_prefix: bool = True,
        task: Task | None = None,
    ) -> None:
        if isinstance(model, Backbone):
            self.backbone = model
        elif isinstance(model, str | Path):
            self.backbone = backbone(model, device=device, dtype=dtype)
        elif tokenizer is None:
            raise RLAIFError(
                "expected a tokenizer with a live model, found none; pass LocalLM(model=..., tokenizer=...)"
            )
        else:
            self.backbone = Backbone(model, tokenizer, name=getattr(model.config, "_name_or_path", "") or "live")
        if chat and not self.backbone.tokenizer.chat_template:
            raise RLAIFError(
                f"expected a chat template for chat=True, found none in the tokenizer of {self.backbone.name}; leave "
                "chat away, or take a model that has one"
            )
        self.name = self.backbone.name
        self.chat, self._task = chat, task
        self.context = context_of(self.backbone.model)
        self.max_tokens = max_tokens or self.context or 4096
        self.tokens_per_batch = tokens_per_batch
        self.share_prefix = share_prefix
        self._one_pass = takes_any_mask(self.backbone.model)
        self._word_start: torch.Tensor | None = None
        self._trees: dict[tuple[tuple[str, ...], tuple[str, ...]], AnswerTree] = {}
        self._prefixes: dict[tuple[int, ...], Any] = {}  # their keys and values

    def render(self, prompt: str) -> str:
        """The text that the model sees for a prompt."""
        if not self.chat:
            return prompt
        turns = [{"role": "user", "content": prompt}]
        return str(self.backbone.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens the model reads for each prompt."""
        return [len(row) for row in self._encode(prompts)]

    def _encode(self, prompts: Sequence[str], beside: int = 0) -> list[list[int]]:
        """Token ids of n prompts that leave room for so many tokens more; `ContextError` where one does not."""
        tokenizer = self.backbone.tokenizer
        texts = [self.render(prompt) for prompt in prompts]
        if self._task is not None:
            rows, _ = encode_prompts(self._task, tokenizer, prompts, self._task.prompt_limit)
        elif self.chat and texts:  # the template has the special tokens
            rows = [list(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        else:
            rows = encode(tokenizer, texts)
        self._check_room(prompts, rows, beside)
        return rows

    def _check_room(self, prompts: Sequence[str], rows: Sequence[Sequence[int]], beside: int) -> None:
        room = self.max_tokens if self.context is None else min(self.max_tokens, self.context - beside)
        for i, row in enumerate(rows):
            if not 0 < len(row) <= room:
                new = (
                    f" beside {beside} more in the model's context of {self.context}" if room < self.max_tokens else ""
                )
                raise ContextError(
                    f"expected labelling prompts of 1 to {room} tokens{new}, found {len(row)} in row {i} "
                    f"({prompts[i][-60:]!r}); shorten the text or use fewer exemplars"
                )

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """Natural-log likelihood that the model answers exactly each label, and no word character follows it.

        Args:
            prompts: n prompts.
            labels: k labels, such as "1" ... "10".

        Returns:
            (n, k), in the caller's order; `exp` of a row sums to the label mass, at most 1.

        Raises:
            RLAIFError: If a prompt is empty or longer than the model takes, or a label cannot be spelled.
        """
        rows = self._encode(prompts)
        out = np.zeros((len(rows), len(labels)))
        leads = [leads_after(self.render(prompt)) for prompt in prompts]
        for lead in sorted(set(leads)):
            members = [i for i in range(len(rows)) if leads[i] == lead]
            if (key := (tuple(labels), lead)) not in self._trees:
                self._trees[key] = answer_tree(self.backbone.tokenizer, labels, lead)
            part, tree = [rows[i] for i in members], self._trees[key]
            self._check_room([prompts[i] for i in members], part, max(tree.depths, default=0))
            out[members] = self._tree_logprobs(part, tree)
        return out

    def _tree_logprobs(self, rows: list[list[int]], tree: AnswerTree) -> NDArray[np.float64]:
        """Log-likelihoods of a tree's k answers after n prompts, (n, k)."""
        import torch

        from rewards.language_model.tree_logits import branch_logits, tree_logits

        if self._word_start is None:
            mask = word_start_mask(self.backbone.tokenizer, self.backbone.logit_width)
            self._word_start = torch.from_numpy(mask).to(self.backbone.device)
        out, pad_id = np.zeros((len(rows), len(tree.ends))), self.backbone.tokenizer.pad_token_id
        with self.backbone.using(None) as model, torch.inference_mode():
            prefix = self._shared_prefix(model, rows) if self._one_pass else ()
            suffixes = [row[len(prefix) :] for row in rows]
            lengths = [len(suffix) for suffix in suffixes]
            for members in length_buckets(lengths, self.tokens_per_batch, extra=len(tree.tokens)):
                part = [suffixes[i] for i in members]
                if self._one_pass:
                    logits = tree_logits(model, self._prefixes.get(prefix, ()), part, tree, pad_id)
                else:
                    logits = branch_logits(model, part, tree, pad_id)
                out[members] = answer_logprobs(tree, logits, self._word_start).cpu().numpy()
        return out

    def _shared_prefix(self, model: Any, rows: list[list[int]]) -> tuple[int, ...]:
        """The beginning of all rows, if it is worth keeping; its keys and values are in `_prefixes`.

        For two rows or more it depends on these rows alone, never on what was asked before, so that the same batch gets
        the same answer to the last bit in a process that has just started. A row alone takes what is there.
        """
        if not self.share_prefix:
            return ()
        if len(rows) == 1:
            kept = [p for p in self._prefixes if len(rows[0]) > len(p) and tuple(rows[0][: len(p)]) == p]
            return max(kept, key=len, default=())
        shortest = min(len(row) for row in rows) - 1  # the last token stays: its logits are wanted
        same = takewhile(lambda pair: pair[0] == pair[1], zip(min(rows), max(rows), strict=False))
        best = tuple(token for token, _ in same)[:shortest]
        if len(best) < _SHARED_MINIMUM:
            return ()
        held = self._prefixes.pop(best, None)
        if held is None:
            while len(self._prefixes) >= _KEPT_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            from rewards.language_model.tree_logits import read_prefix

            held = read_prefix(model, best)
        self._prefixes[best] = held  # last: the one that was not asked for longest goes first
        return best

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Continue n prompts, greedily at temperature 0; see `LanguageModel.generate`."""
        tokenizer = self.backbone.tokenizer
        rows = self._encode(prompts, beside=max_new_tokens)
        texts = [""] * len(rows)
        uniform = np.array([numbers_for(prompt, seed, max_new_tokens) for prompt in prompts])
        with self.backbone.using(None) as model:
            for members in length_buckets([len(row) for row in rows], self.tokens_per_batch, extra=max_new_tokens):
                drawn = sample(
                    model,
                    [rows[i] for i in members],
                    max_new_tokens=max_new_tokens,
                    stop_ids=self.backbone.end_ids,
                    pad_id=tokenizer.pad_token_id,
                    uniform=uniform[members],
                    temperature=temperature,
                    top_k=top_k,
                )
                for i, row, length in zip(members, drawn.ids, drawn.lengths, strict=True):
                    texts[i] = before_stop(continuation_text(tokenizer, rows[i], row[:length].tolist()), stop)
        return texts


def numbers_for(prompt: str, seed: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers that depend on the prompt and the seed alone, so that a batch gives what each row alone gives."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32)]).random(count)
