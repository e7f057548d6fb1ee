"""The arms of a comparison of reward backends, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agents.reinforce import ReinforceConfig
from rlaif_env.api import RLAIFError
from rlaif_env.models import BUILTIN_MODEL

__all__ = ["ARMS", "Arm", "CompareConfig"]


@dataclass(frozen=True)
class Arm:
    """A way to get a reward.

    Attributes:
        reward: The backend's name.
        labels: Whose preferences its reward model learns, if it has one.
        scorer: Which language model scores, if one does: the labeler, or the initial policy itself.
        meaning: For people.
    """

    reward: str
    labels: Literal["human", "ai", "same-size", "both"] | None
    scorer: Literal["labeler", "policy"] | None
    meaning: str


ARMS: Mapping[str, Arm] = {
    "human-rm": Arm("human-rm", "human", None, "reward model trained on people's preferences (RLHF)"),
    "distilled-rm": Arm("distilled-rm", "ai", None, "reward model trained on the labeler's preferences (RLAIF)"),
    "same-size-rm": Arm("distilled-rm", "same-size", None, "the same, the labeler as large as the policy"),
    "combined-rm": Arm("reward-model", "both", None, "reward model trained on people's and the labeler's preferences"),
    "direct-llm": Arm("direct-llm", None, "labeler", "the labeler's own score (d-RLAIF)"),
    "self-llm": Arm("direct-llm", None, "policy", "the initial policy's own score (strict self-improvement)"),
}
"""The arms by name; "sft" stands for the initial policy, which every one is compared with."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare the reward backends: train with each, judge all by all, tables and plots.

    Attributes:
        task: A built-in task or a TOML file.
        arms: Ways to get a reward: human-rm, distilled-rm, same-size-rm, combined-rm, direct-llm, self-llm.
        seeds: One training a seed and arm. Three or more make the intervals over seeds mean something.
        out: The folder; the same command goes on with it, and another setting redoes what depends on it only.
        model: The initial policy, and the base of the reward models: built-in name, folder or Hugging Face id.
        sft_data: Fine-tune the initial policy first: a file of demonstrations, or "builtin" for the built-in corpus.
        labeler: The language model that labels and scores: built-in name, folder, id, or what its server calls it.
        labeler_url: Base URL of an OpenAI-compatible server that has the labeler.
        human_labels: A file of people's preferences; those of the task where not given.
        label_pairs: Pairs that the labeler labels.
        label_mode: Compare two scores, or show both responses in both orders.
        label_prompt: Preamble of the pairwise prompt.
        label_shots: Exemplars before the sample.
        label_cot: Write a rationale first.
        scale: Lowest and highest score of the labeler.
        minimum_mass: Least likelihood that the labeler gives to its labels; under it a pair gets none, a score is an
            error.
        rm_pairs: Preferences that a reward model learns from, at most.
        rm_texts: And distinct texts, at most.
        rm_trainable: What of the reward model is trained.
        rm_test_pairs: Pairs that a reward model is tested on.
        gold_rm: Also judge with a reward model that learned from people's preferences of the split "gold", which no
            arm sees.
        updates: REINFORCE steps.
        prompts_per_update: Prompts in a batch; each gets agent.group_size samples.
        eval_prompts: Held-out prompts that every policy answers.
        eval_split: The split they come from.
        staleness: Also ask how well each reward follows the gold measure early and late in the training of each arm.
        labelers: More labelers, whose agreement with people is measured beside the labeler's.
        prompt_grid: Measure the labeler's agreement with people for base and detailed preambles, with 0 to so many
            shots, pairwise; -1 for not.
        grid_cot: Also with rationales in that grid.
        pair_counts: Train the human and the AI reward model again on so many pairs, for their accuracy.
        ablation_pairs: Human-judged pairs for the labeler ablations.
        report: Write report.html.
        agent: The algorithm's settings.
    """

    task: str = "movie-review"
    arms: tuple[str, ...] = ("human-rm", "distilled-rm", "direct-llm")
    seeds: tuple[int, ...] = (0,)
    out: Path = Path("runs/compare")
    model: str = BUILTIN_MODEL
    sft_data: str | None = None
    labeler: str = BUILTIN_MODEL
    labeler_url: str | None = None
    human_labels: Path | None = None
    label_pairs: int = 1_500
    label_mode: Literal["score", "pairwise"] = "score"
    label_prompt: Literal["base", "detailed"] = "base"
    label_shots: int = 0
    label_cot: bool = False
    scale: tuple[int, int] = (1, 10)
    minimum_mass: float = 1e-3
    rm_pairs: int = 6_000
    rm_texts: int = 2_000
    rm_trainable: Literal["head", "lora", "full"] = "head"
    rm_test_pairs: int = 600
    gold_rm: bool = True
    updates: int = 40
    prompts_per_update: int = 4
    eval_prompts: int = 128
    eval_split: str = "test"
    staleness: bool = False
    labelers: tuple[str, ...] = ()
    prompt_grid: int = -1
    grid_cot: bool = False
    pair_counts: tuple[int, ...] = ()
    ablation_pairs: int = 200
    report: bool = True
    agent: ReinforceConfig = field(default_factory=ReinforceConfig)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.arms if name not in ARMS]:
            raise RLAIFError(f"unknown arm {unknown[0]!r}: expected one of {', '.join(ARMS)}")
        for name in ("arms", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise RLAIFError(f"expected {name} to be given, each once, found {values}")
        for name in (
            "label_pairs",
            "rm_pairs",
            "rm_test_pairs",
            "updates",
            "prompts_per_update",
            "eval_prompts",
            "ablation_pairs",
        ):
            if getattr(self, name) < 1:
                raise RLAIFError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if self.eval_prompts < 2:
            raise RLAIFError("expected at least 2 eval_prompts, for an interval, found 1")
