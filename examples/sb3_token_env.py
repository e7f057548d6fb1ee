"""Stable-Baselines3 on the token-level environment: PPO learns which words please, token by token.

Nothing here is a language model: the policy is SB3's, with a small features extractor for token ids. Copy
`TokenFeatures` for vocabularies and tasks of your own.

Run: pip install stable-baselines3, then python examples/sb3_token_env.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rlaif_env

WORDS = "the film story actors was is dull slow flat bad fine good great superb".split()
PRAISE = {"good", "great", "superb"}


class TokenFeatures(BaseFeaturesExtractor):
    """Features of token ids: their mean embedding, the last token's, and how much of the page is full.

    Args:
        observation_space: Of the token-level environment: ids (W,) and mask (W,).
        vocab_size: V.
        width: Of an embedding.
    """

    def __init__(self, observation_space: gym.spaces.Dict, vocab_size: int, width: int = 32) -> None:
        super().__init__(observation_space, features_dim=2 * width + 1)
        self.embedding = torch.nn.Embedding(vocab_size, width)

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features (B, 2·width+1) of observations (B, W), which SB3 hands over as floats."""
        ids, mask = observations["input_ids"].long(), observations["attention_mask"].float()
        embedded = self.embedding(ids)  # (B, W, width)
        count = mask.sum(dim=1, keepdim=True)
        mean = (embedded * mask.unsqueeze(-1)).sum(dim=1) / count.clamp(min=1)
        last = mask.cumsum(dim=1).argmax(dim=1)  # the place of the last real token
        return torch.cat([mean, embedded[torch.arange(len(ids)), last], count / ids.shape[1]], dim=1)


def praise(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The number of words of praise."""
    return [float(sum(word in PRAISE for word in response.split())) for response in responses]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def keywords() -> dict[str, Any]:
    """Keywords of the environment: a task with two prompts, the reward, the tokenizer."""
    task = rlaif_env.Task(
        name="praise",
        kind="continuation",
        criterion="how much it praises the film",
        max_prompt_tokens=4,
        max_response_tokens=8,
        source=rlaif_env.PromptSource(prompts={"train": ("the film was", "the actors")}),
    )
    return {"task": task, "reward": praise, "tokenizer": word_tokenizer()}


def main(steps: int = 16_384) -> tuple[float, float]:
    """Train PPO; returns the mean return before and after."""
    made = keywords()
    envs = make_vec_env(lambda: gym.make("RLAIF/TokenGeneration-v0", **made), n_envs=8, seed=0)
    model = PPO(
        "MultiInputPolicy",
        envs,
        n_steps=128,
        batch_size=256,
        n_epochs=6,
        learning_rate=3e-3,
        gamma=1.0,
        ent_coef=0.01,
        seed=0,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": TokenFeatures,
            "features_extractor_kwargs": {"vocab_size": len(made["tokenizer"])},
            "net_arch": [64],
        },
    )
    before, _ = evaluate_policy(model, envs, n_eval_episodes=64, deterministic=False)
    model.learn(steps)
    after, _ = evaluate_policy(model, envs, n_eval_episodes=64, deterministic=False)
    return float(before), float(after)


if __name__ == "__main__":
    print("words of praise in eight, before and after: {:.2f}, {:.2f}".format(*main()))
