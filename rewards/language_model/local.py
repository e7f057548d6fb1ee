"""`LocalLM`: a language model in this process as a judge, the likelihoods of its answers, and generated rationales.

It runs on transformers. What the prompts of a batch share at their beginning (preamble, exemplars) is computed once and
kept; all answers to a prompt are seen in one forward pass, as branches of a tree that attend to the prompt and to their
own beginnings only.
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
from rlaif_env.api import RLAIFError
from rlaif_env.batches import TOKENS_PER_BATCH, length_buckets
from rlaif_env.models import BUILTIN_MODEL, Backbone, backbone, encode, head_logits, pad_rows
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
        max_tokens: Longest prompt accepted; None is the model's own limit.
        tokens_per_batch: Padded tokens in one forward pass; memory against speed.
        share_prefix: Whether a common beginning is computed once. The result is the same.
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
                f"expected a chat template for chat=True, found none in the tokenizer of {self.backbone.name}"
            )
        self.name = self.backbone.name
        self.chat = chat
        limit = getattr(self.backbone.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_tokens = max_tokens or limit or 4096
        self.tokens_per_batch = tokens_per_batch
        self.share_prefix = share_prefix
        self._word_start: torch.Tensor | None = None
        self._trees: dict[tuple[tuple[str, ...], tuple[str, ...]], AnswerTree] = {}
        self._prefixes: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def render(self, prompt: str) -> str:
        """The text that the model sees for a prompt."""
        if not self.chat:
            return prompt
        turns = [{"role": "user", "content": prompt}]
        return str(self.backbone.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens the model reads for each prompt."""
        return [len(row) for row in self._encode(prompts)]

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        tokenizer = self.backbone.tokenizer
        texts = [self.render(prompt) for prompt in prompts]
        if self.chat and texts:  # the template has the special tokens
            rows = [list(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        else:
            rows = encode(tokenizer, texts)
        for i, row in enumerate(rows):
            if not 0 < len(row) <= self.max_tokens:
                raise RLAIFError(
                    f"expected labelling prompts of 1 to {self.max_tokens} tokens, found {len(row)} in row {i} "
                    f"({prompts[i][-60:]!r}); shorten the text or use fewer exemplars"
                )
        return rows

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
            out[members] = self._tree_logprobs([rows[i] for i in members], self._trees[key])
        return out

    def _tree_logprobs(self, rows: list[list[int]], tree: AnswerTree) -> NDArray[np.float64]:
        """Log-likelihoods of a tree's k answers after n prompts, (n, k)."""
        import torch

        if self._word_start is None:
            mask = word_start_mask(self.backbone.tokenizer, self.backbone.logit_width)
            self._word_start = torch.from_numpy(mask).to(self.backbone.device)
        out = np.zeros((len(rows), len(tree.ends)))
        with self.backbone.using(None) as model, torch.inference_mode():
            prefix = self._shared_prefix(model, rows)
            suffixes = [row[len(prefix) :] for row in rows]
            lengths = [len(suffix) for suffix in suffixes]
            for members in length_buckets(lengths, self.tokens_per_batch, extra=len(tree.tokens)):
                logits = self._tree_logits(model, prefix, [suffixes[i] for i in members], tree)
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
            import torch

            state = model(input_ids=torch.tensor([best], device=self.backbone.device), use_cache=True, logits_to_keep=1)
            while len(self._prefixes) >= _KEPT_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            held = [(layer.keys, layer.values) for layer in state.past_key_values.layers]
        self._prefixes[best] = held  # last: the one that was not asked for longest goes first
        return best

    def _tree_logits(
        self, model: Any, prefix: tuple[int, ...], suffixes: list[list[int]], tree: AnswerTree
    ) -> torch.Tensor:
        """Logits at the end of each prompt and at every node of the tree, (n, N + 1, V)."""
        import torch
        from transformers import DynamicCache

        device, nodes, before = self.backbone.device, len(tree.tokens), len(prefix)
        ids, real = pad_rows(suffixes, self.backbone.tokenizer.pad_token_id, side="left")
        n, width = ids.shape
        ids = np.concatenate([ids, np.broadcast_to(np.asarray(tree.tokens), (n, nodes))], axis=1)
        of_nodes = real.sum(axis=1)[:, None] - 1 + np.asarray(tree.depths)[None]
        positions = before + np.concatenate([(real.cumsum(axis=1) - 1).clip(0), of_nodes], axis=1)
        sees = np.zeros((n, width + nodes, before + width + nodes), dtype=bool)
        sees[:, :, :before] = True
        sees[:, :, before : before + width] = real[:, None] > 0
        sees[:, :width, before : before + width] &= np.tri(width, dtype=bool)
        sees[:, width:, before + width :] = tree.ancestry()
        diagonal = np.arange(width + nodes)
        sees[:, diagonal, before + diagonal] = True  # padding sees itself: a row that sees nothing would be NaN
        cache = None
        if before:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(self._prefixes[prefix]):
                cache.update(keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1), layer)
        hidden = model.get_decoder()(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=self._attention(model, torch.from_numpy(sees), torch.from_numpy(positions)),
            position_ids=torch.from_numpy(positions).to(device),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state[:, -(nodes + 1) :]
        return head_logits(model, hidden.reshape(-1, hidden.shape[-1])).reshape(n, nodes + 1, -1)

    def _attention(self, model: Any, sees: torch.Tensor, positions: torch.Tensor) -> Any:
        """An additive mask (n, 1, q, k) of who sees whom; one a kind of layer where some layers see a window only.

        Args:
            model: Whose layers they are.
            sees: Whether a query sees a key, (n, q, k); the first k - q keys are those of the shared prefix.
            positions: Of the queries, (n, q), the prefix counted.
        """
        import torch

        def additive(allowed: torch.Tensor) -> torch.Tensor:
            blocked = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill_(~allowed, torch.finfo(model.dtype).min)
            return blocked[:, None].to(self.backbone.device)

        config = model.config.get_text_config()
        if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
            return additive(sees)
        prefix = torch.arange(sees.shape[2] - sees.shape[1]).expand(len(positions), -1)
        distance = positions[:, :, None] - torch.cat([prefix, positions], dim=1)[:, None]
        near = additive(sees & (distance < config.sliding_window))
        masks = {"full_attention": additive(sees), "sliding_attention": near}
        return {kind: masks[kind] for kind in set(config.layer_types)}

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
        rows = self._encode(prompts)
        texts = [""] * len(rows)
        uniform = np.array([_numbers_for(prompt, seed, max_new_tokens) for prompt in prompts])
        with self.backbone.using(None) as model:
            for members in length_buckets([len(row) for row in rows], self.tokens_per_batch, extra=max_new_tokens):
                drawn = sample(
                    model,
                    [rows[i] for i in members],
                    max_new_tokens=max_new_tokens,
                    stop_ids=[tokenizer.eos_token_id],
                    pad_id=tokenizer.pad_token_id,
                    uniform=uniform[members],
                    temperature=temperature,
                    top_k=top_k,
                )
                for i, row, length in zip(members, drawn.ids, drawn.lengths, strict=True):
                    texts[i] = before_stop(str(tokenizer.decode(row[:length], skip_special_tokens=True)), stop)
        return texts


def _numbers_for(prompt: str, seed: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers that depend on the prompt and the seed alone, so that a batch gives what each row alone gives."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32)]).random(count)
