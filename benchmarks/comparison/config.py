"""What a comparison runs: its arms, and the settings of each part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agents.training.config import TrainingConfig
from rewards.labeling.config import LabelOptions
from rewards.language_model.config import LanguageModelConfig
from rewards.reward_model.training import RewardModelConfig
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import DEFAULT_TASK
from rlaif_env.models import BUILTIN_MODEL


@dataclass(frozen=True)
class Arm:
    """A way to get a reward."""

    reward: str  # the backend's name
    # Whose preferences its reward model learns, if it has one; "pairwise": the labeler's, asked in mode "pairwise"
    labels: Literal["human", "ai", "pairwise", "same-size", "both"] | None = None
    # Which language model scores, if one does: the labeler, or the initial policy itself
    scorer: Literal["labeler", "policy"] | None = None


ARMS: Mapping[str, Arm] = {
    "human-rm": Arm("human-rm", "human"),  # RLHF
    "distilled-rm": Arm("distilled-rm", "ai"),  # RLAIF, labelled as the mode of the labels says
    "pairwise-rm": Arm("distilled-rm", "pairwise"),  # RLAIF as in the paper: both responses shown, whatever that mode
    "same-size-rm": Arm("distilled-rm", "same-size"),  # the same, the labeler as large as the policy
    "combined-rm": Arm("reward-model", "both"),
    "direct-llm": Arm("direct-llm", scorer="labeler"),  # d-RLAIF
    "group-preference": Arm("group-preference", scorer="labeler"),  # the responses to a prompt, compared in pairs
    "self-llm": Arm("direct-llm", scorer="policy"),  # strict self-improvement
}
"""The arms by name; "sft" stands for the initial policy, which every one is compared with."""

_SAME = {
    "pairwise-rm": 'its labels are those of mode "pairwise", which is the mode asked for',
    "same-size-rm": "the labeler is the policy's own model",
    "self-llm": "the labeler is the initial policy itself",
}


def same_arms(keys: Mapping[str, str]) -> list[str]:
    """Which arms come to the same thing as another one, and why; ``keys`` are those of their trainings by arm."""
    first: dict[str, str] = {}
    arms = [arm for arm in ARMS if arm in keys]
    return [
        f"{arm} is {first[keys[arm]]} here: {_SAME.get(arm, 'their rewards are made from the same')}"
        for arm in arms
        if first.setdefault(keys[arm], arm) != arm
    ]


@dataclass(frozen=True)
class AblationConfig:
    """What else to measure.

    Attributes:
        staleness: How well each reward follows the gold measure early and late in the training of each arm.
        labelers: More labelers, whose agreement with people is measured beside the labeler's.
        prompt_grid: Measure the labelers' agreement with people for base and detailed preambles, with 0 to so many
            shots, pairwise; -1 for not.
        grid_cot: Also with rationales in that grid.
        pair_counts: Train the human and the AI reward model again on so many pairs, for their accuracy.
        pairs: Pairs judged by people that a labeler's agreement is measured on.
        equal_kl: What each arm gains in gold for its distance from SFT.
        samples: What each reward sees of gold, and what picking by it gains, on so many samples of the initial policy
            to each held-out prompt; 0 for not.
        gold_bases: Also judge with gold reward models made from these language models, by name.
    """

    staleness: bool = False
    labelers: tuple[str, ...] = ()
    prompt_grid: int = -1
    grid_cot: bool = False
    pair_counts: tuple[int, ...] = ()
    pairs: int = 200
    equal_kl: bool = False
    samples: int = 0
    gold_bases: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompareConfig:
    """Compare the reward backends: train with each, judge all by all, tables and plots.

    Attributes:
        task: A built-in task or a TOML file.
        arms: Ways to get a reward: human-rm, distilled-rm, pairwise-rm, same-size-rm, combined-rm, direct-llm,
            group-preference, self-llm.
        seeds: One training a seed and arm. Three or more make the intervals over seeds mean something.
        out: The folder; the same command goes on with it, and another setting redoes what depends on it only.
        workers: Processes that make the stages, each with its share of the cores and, where there are several, a GPU.
        dry_run: Only say which stages there are, which would be made, and about how long that takes; nothing is made.
        model: The initial policy, and the base of the reward models: built-in name, folder or Hugging Face id.
        sft_data: Fine-tune the initial policy first: a file of demonstrations, or "builtin" for the built-in corpus.
        labeler: The language model that labels and scores.
        label: How the labeler is asked. Scale and minimum_mass hold for its direct score too, and in mode "score" so do
            shots and template. Its calibration, where there is one, is on human_labels or on the task's preferences.
        label_pairs: Pairs that the labeler labels.
        human_labels: A file of people's preferences; those of the task where not given.
        reward_model: How the reward models are trained.
        train: How the policies are trained; its eval_prompts are what every policy answers in the end.
        gold_rm: Also judge with a reward model that learned from people's preferences of the split "gold", which no
            arm sees.
        price_per_hour: Of this machine, in dollars, for the table of costs; the prices of tokens are the labeler's.
        report: Write report.html.
        document: A Markdown page to write tables and figures into, between <!-- made by make paper: NAME --> and
            <!-- end NAME -->; NAME is the title of one, or facts.
        ablation: What else to measure.
    """

    task: str = DEFAULT_TASK
    arms: tuple[str, ...] = ("human-rm", "distilled-rm", "direct-llm")
    seeds: tuple[int, ...] = (0,)
    out: Path = Path("runs/compare")
    workers: int = 1
    dry_run: bool = False
    model: str = BUILTIN_MODEL
    sft_data: str | None = None
    labeler: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    label: LabelOptions = field(default_factory=lambda: LabelOptions(mode="score"))
    label_pairs: int = 1_500
    human_labels: Path | None = None
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    gold_rm: bool = True
    price_per_hour: float | None = None
    report: bool = True
    document: Path | None = None
    ablation: AblationConfig = field(default_factory=AblationConfig)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.arms if name not in ARMS]:
            raise RLAIFError(f"unknown arm {unknown[0]!r}: expected one of {', '.join(ARMS)}")
        for name, values in {"arms": self.arms, "seeds": self.seeds}.items():
            if not values or len(set(values)) < len(values):
                raise RLAIFError(f"expected {name} to be given, each once, found {values}")
        counts = {"workers": self.workers, "label_pairs": self.label_pairs, "ablation.pairs": self.ablation.pairs}
        for name, count in counts.items():
            if count < 1:
                raise RLAIFError(f"expected {name} of at least 1, found {count}")
        if self.train.eval_prompts is not None and self.train.eval_prompts < 2:
            raise RLAIFError(f"expected at least 2 eval_prompts, for an interval, found {self.train.eval_prompts}")
        if self.ablation.samples < 0 or self.ablation.samples == 1:
            raise RLAIFError(
                "expected ablation.samples of at least 2, to compare within a prompt, or 0 for none, found "
                f"{self.ablation.samples}"
            )
        agent = self.train.agent
        if self.ablation.equal_kl and agent.beta == 0 and agent.baseline != "value":
            raise RLAIFError(
                "expected train.agent.beta above 0 for ablation.equal_kl, found 0: such a training does not measure "
                "its KL; a small one, as 1e-6, has it measured and weighs nothing"
            )
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise RLAIFError(f"expected a price_per_hour of at least 0, found {self.price_per_hour}")
