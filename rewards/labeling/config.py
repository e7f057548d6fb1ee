"""The options of ``rlaif label``, and those of them that a comparison has too."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from typing_extensions import Self

from rewards.direct_score import ScoreConfig
from rewards.labeling.labeler import LabelingConfig
from rewards.labeling.pairwise_prompts import pair_wording
from rewards.language_model.config import LanguageModelConfig
from rewards.prompts import score_wording
from rlaif_env import options
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import DEFAULT_TASK, Task
from rlaif_env.models import TEMPERATURE, load_tokenizer
from rlaif_env.servers.vllm import VLLMConfig

OPERATIONAL = (
    *("out", "batch", "dry_run", "sampler"),
    *(f"labeler.{name}" for name in options.OPERATIONAL),
)
"""The settings with others of which a run can go on."""

CALIBRATION = ("calibrate", "calibration")
"""Those that only decide what is written: another temperature is fitted to what was answered, and some pairs more."""


def needed_shots(labeler: LanguageModelConfig, task: Task, mode: Literal["pairwise", "score"]) -> int:
    """How many exemplars a labeler is shown where nobody says: a base model all of the task's, any other none.

    A base model learned to go on with a text, not to follow an instruction; its tokenizer has no chat template. Without
    exemplars it answers by the position or hardly by the response (docs/labelling.md, docs/models.md). A model behind a
    server is taken for one that follows instructions.
    """
    if labeler.url is not None or load_tokenizer(labeler.model).chat_template:
        return 0
    return len(pair_wording(task).exemplars if mode == "pairwise" else score_wording(task).exemplars)


@dataclass(frozen=True)
class LabelOptions(LabelingConfig):
    """How a labeler is asked, and its labels calibrated.

    Attributes:
        shots: How many of the task's exemplars go before the sample; -1 is what the labeler needs: all for a base model
            (one without a chat template), none for another.
        calibrate: Fit a temperature of the labels on so many pairs that people judged and that are not labelled; 0 for
            none.
        calibration: A file of those pairs; the task's own of its training split where not given.
    """

    shots: int = -1
    calibrate: int = 0
    calibration: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibrate < 0 or (self.calibration is not None and self.calibrate == 0):
            raise RLAIFError(
                "expected a number of pairs to calibrate on (calibrate), from 1 where a file of them is given, found "
                f"{self.calibrate}"
            )

    def with_shots(self, labeler: LanguageModelConfig, task: Task) -> Self:
        """These options with the number of shots that the labeler needs in place of -1."""
        if self.shots != -1:
            return self
        return replace(self, shots=0 if self.template else needed_shots(labeler, task, self.mode))

    @property
    def pairwise(self) -> Self:
        """These options in mode "pairwise", for which shots and template of a score's prompt say nothing."""
        return self if self.mode == "pairwise" else replace(self, mode="pairwise", shots=-1, template=None)

    def direct_score(self, scorer: LanguageModelConfig, task: Task) -> ScoreConfig:
        """How a scorer is asked for one response's score: as for labels of mode "score", else as it needs it."""
        if self.mode == "score":
            return self.with_shots(scorer, task).score
        return replace(self.score, shots=needed_shots(scorer, task, "score"))


@dataclass(frozen=True)
class LabelConfig(LabelOptions):
    """Have a language model say which of two responses is better, pair by pair.

    Attributes:
        seed: Of sampled responses, rationales, and the choice of corpus pairs.
        task: What is judged: a built-in task or a TOML file.
        input: Pairs to label (human labels in them are compared with), or prompts where there is a policy: JSON lines
            (.gz too), Parquet, or a Hugging Face data set as owner/name, owner/name:split or owner/name/part:split.
            Without it the task's own human preferences, or prompts, are taken.
        out: Folder to write to, or to go on with; a new one under runs/ if not given.
        split: Which split of the task, without input.
        pairs: At most so many pairs.
        min_gap: Least difference of the two mean ratings in the movie corpus.
        policy: A model that responds twice to each prompt: built-in name, folder or Hugging Face id.
        policy_temperature: Temperature of those responses.
        sampler: vLLM servers that sample them.
        labeler: The language model that labels; its prices (those of server.limits) count wherever it runs.
        template_file: A text file with the template.
        batch: Pairs asked at a time; so much is lost at most when the process is killed.
        dry_run: Only say how many tokens it would take and what they would cost; of a server it is measured on a few
            of the questions, whose answers are not kept.
    """

    task: str = DEFAULT_TASK
    input: Path | None = None
    out: Path | None = None
    split: str = "train"
    pairs: int | None = None
    min_gap: float = 0.0
    policy: str | None = None
    policy_temperature: float = TEMPERATURE
    sampler: VLLMConfig = field(default_factory=VLLMConfig)
    labeler: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    template_file: Path | None = None
    batch: int = 16
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1 or (self.pairs is not None and self.pairs < 1):
            raise RLAIFError(f"expected batch and pairs from 1, found {self.batch} and {self.pairs}")
        if self.mode == "pairwise" and self.scale is not None:
            raise RLAIFError(f"expected a scale with mode 'score' only, found {self.scale} with mode {self.mode!r}")
        if self.sampler.url and self.policy is None:
            raise RLAIFError("expected a policy (--policy) that the servers of sampler.url sample from, found none")
        if self.template is not None and self.template_file is not None:
            raise RLAIFError("expected a template or a file that holds one (template_file), found both")
