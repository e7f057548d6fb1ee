"""The judges that a command line names: reward backends by label, and one language model behind those that need one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from rewards import make_reward
from rewards.api import LanguageModel
from rewards.direct_score import ScoreConfig
from rewards.endpoint.config import ServerConfig
from rewards.labeling.labeler import LabelingConfig, PreferenceLabeler
from rewards.language_model.choice import language_model_from
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import BackendError, RewardBackend, RLAIFError, Scores, checked_scores, judges_groups
from rlaif_env.data.tasks import Task
from rlaif_env.files import content_of
from rlaif_env.keywords import reward_names
from rlaif_env.references import code_in

_SCORE = tuple(entry.name for entry in fields(ScoreConfig))  # what "direct-llm" has of the labelling's settings


class OncePerText:
    """A judge that is asked for a score of each prompt and response once: equal texts have equal scores.

    Args:
        backend: The judge.
    """

    def __init__(self, backend: RewardBackend) -> None:
        self.backend, self.name = backend, backend.name
        self._known: dict[tuple[str, str], float] = {}

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """The scores, without the judge's further figures; raises `BackendError` as it does, with the same rows."""
        pairs = list(zip(prompts, responses, strict=True))
        rows = list({pair: row for row, pair in enumerate(pairs) if pair not in self._known}.values())
        if rows:
            try:
                scores = checked_scores(self.backend, *zip(*(pairs[row] for row in rows), strict=True))
            except BackendError as error:
                failed = {pairs[rows[i]] for i in error.rows if 0 <= i < len(rows)}
                raise BackendError(str(error), [i for i, pair in enumerate(pairs) if pair in failed]) from error
            self._known |= {pairs[row]: float(value) for row, value in zip(rows, scores.values, strict=True)}
        return Scores(np.array([self._known[pair] for pair in pairs], dtype=np.float32))


class JudgePanel:
    """Judges by name, each built when it is first asked for.

    Args:
        task: What they judge.
        judges: ``[LABEL:]BACKEND[=MODEL]`` each, code as `rlaif_env.keywords.reward_factory` takes it; without a model
            "direct-llm" has the language model below.
        judge: The language model behind "direct-llm" and the pairwise judge.
        label: How it is asked for preferences and, as far as they are those of a score, for scores.
        settings: Of single judges, by their names or "pairwise"; they go before the shared ones.
        pairwise: Whether there is a pairwise judge.

    Attributes:
        specs: Backend and model (or None) of each scoring judge by name.

    Raises:
        RLAIFError: If two judges have one name, or there are settings of nobody.
    """

    def __init__(
        self,
        task: Task,
        judges: Sequence[str],
        *,
        judge: LanguageModelConfig,
        label: LabelingConfig,
        settings: Mapping[str, Mapping[str, Any]],
        pairwise: bool,
    ) -> None:
        self._task, self._judge, self._label, self._own, self._pairwise = task, judge, label, settings, pairwise
        self.specs = dict(_judge_spec(spec) for spec in judges)
        if len(self.specs) < len(judges):
            raise RLAIFError(
                f"expected judges of different names, found {', '.join(judges)}; write LABEL:BACKEND=MODEL"
            )
        for name, own in settings.items():
            if name not in (*self.specs, "pairwise") or not isinstance(own, Mapping):
                names = ", ".join([*self.specs, "pairwise"])
                raise RLAIFError(f"expected judge_settings by name under the judges {names}, found {name}: {own!r}")
        self._refuse_unused()
        self._model: LanguageModel | None = None
        self._backends: dict[str, RewardBackend] = {}

    def _refuse_unused(self) -> None:
        """Raise `RLAIFError` for settings that no judge takes."""
        scored = any(kind == "direct-llm" for kind, _ in self.specs.values())
        unused = _changed("label", self._label, but=_SCORE if scored else ())
        unused += [] if scored else _changed("judge", self._judge, but=("model", "url"))
        if unused and not self._pairwise:
            what, give = ("pairwise", "") if scored else ("language-model", " or the judge direct-llm")
            raise RLAIFError(
                f"expected a {what} judge for the settings {', '.join(unused)}, found none: give --pairwise{give}, or "
                "put the settings under a judge's name in judge_settings"
            )
        mode = self._own.get("pairwise", {}).get("mode", self._label.mode)
        if self._label.scale is not None and not scored and mode == "pairwise":
            raise RLAIFError(
                f"expected a judge that scores for label.scale {self._label.scale}, found the pairwise judge alone, "
                "which chooses: give --label.mode score, or the judge direct-llm"
            )

    def backend(self, name: str) -> RewardBackend:
        """The judge of this name."""
        if name not in self._backends:
            kind, model = self.specs[name]
            settings = self._own.get(name, {})
            if kind == "direct-llm":
                settings = {**asdict(self._label.score), **settings, "model": self._language_model(model)}
            elif model is not None:
                settings = {**settings, "model": model}
            try:
                made = make_reward(kind, task=self._task, **settings)
            except TypeError as error:
                raise RLAIFError(f"judge {name!r}: {error}") from error
            if judges_groups(made):
                raise RLAIFError(
                    f"expected judges that score one response, found that {name!r} compares those to a prompt; give "
                    "--pairwise, which compares the systems' responses as it does (--label.mode, --label.shots)"
                )
            self._backends[name] = OncePerText(made)
        return self._backends[name]

    def labeler(self) -> PreferenceLabeler:
        """The pairwise judge."""
        settings = {**asdict(self._label), **self._own.get("pairwise", {})}
        try:
            return PreferenceLabeler(self._language_model(), self._task, **settings)
        except TypeError as error:
            raise RLAIFError(f"the pairwise judge: {error}") from error

    def _language_model(self, own: str | None = None) -> LanguageModel:
        """The shared language model, or a judge's own in this process."""
        if own is not None:
            return language_model_from(replace(self._judge, model=own, url=None, server=ServerConfig()))
        if self._model is None:
            self._model = language_model_from(self._judge)
        return self._model

    def build_all(self) -> None:
        """Build every judge, so that what is wrong with one is said before anything slow happens."""
        for name in self.specs:
            self.backend(name)
        if self._pairwise:
            self.labeler()

    def contents(self) -> dict[str, str]:
        """What changes when a judge's weights or code do, by judge."""
        parts = {
            name: [*([] if model is None else [content_of(model)]), *code_in([kind, self._own.get(name)]).values()]
            for name, (kind, model) in self.specs.items()
        }
        own = {name: " ".join(contents) for name, contents in parts.items() if contents}
        shared = [name for name, (kind, model) in self.specs.items() if kind == "direct-llm" and model is None]
        shared += ["pairwise"] if self._pairwise else []
        return own | (dict.fromkeys(shared, self._judge.content) if shared else {})


def _judge_spec(spec: str) -> tuple[str, tuple[str, str | None]]:
    """``[LABEL:]BACKEND[=MODEL]`` as label, backend and model; code, PLACE:NAME, is called by its name."""
    backend, _, model = spec.partition("=")
    label, _, kind = backend.partition(":")
    if kind in reward_names() or ":" in kind:
        return label, (kind, model or None)
    return kind or backend, (backend, model or None)


def _changed(of: str, settings: LabelingConfig | LanguageModelConfig, but: Sequence[str]) -> list[str]:
    """The settings that are not the usual ones."""
    usual, names = type(settings)(), (entry.name for entry in fields(settings))
    return [f"{of}.{n}" for n in names if n not in but and getattr(settings, n) != getattr(usual, n)]
