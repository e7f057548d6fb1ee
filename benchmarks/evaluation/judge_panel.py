"""The judges that a command line names: reward backends by label, and one language model behind those that need one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evaluation.systems import folder_state
from rewards import make_reward
from rewards.api import LanguageModel
from rewards.labeling.labeler import PreferenceLabeler
from rewards.language_model.choice import language_model_from
from rewards.language_model.config import LanguageModelConfig
from rlaif_env.api import RewardBackend, RLAIFError
from rlaif_env.data.tasks import Task
from rlaif_env.models import BUILTIN_MODEL

__all__ = ["JudgePanel"]

_MODEL_KEYS = ("chat", "device", "dtype", "llm")


class JudgePanel:
    """Judges by name, each built when it is first asked for.

    Args:
        task: What they judge.
        judges: ``[LABEL:]BACKEND[=MODEL]`` each; without a model "direct-llm" has the language model below.
        model: The language model behind "direct-llm" and the pairwise judge.
        url: Base URL of a server that has it; None runs it here.
        settings: A JSON object: its settings, of the scoring and of the pairwise judge, and under a judge's name (or
            "pairwise") an object of that judge's own.
        mode: Of the pairwise judge; None where there is none.

    Attributes:
        specs: Backend and model (or None) of each scoring judge by name.

    Raises:
        RLAIFError: If two judges have one name, or the settings are no JSON object or nobody's.
    """

    def __init__(
        self,
        task: Task,
        judges: Sequence[str],
        *,
        model: str = BUILTIN_MODEL,
        url: str | None = None,
        settings: str = "{}",
        mode: str | None = None,
    ) -> None:
        self._task, self._model_name, self._url, self._mode = task, model, url, mode
        self.specs = dict(_judge_spec(spec) for spec in judges)
        if len(self.specs) < len(judges):
            raise RLAIFError(
                f"expected judges of different names, found {', '.join(judges)}; write LABEL:BACKEND=MODEL"
            )
        shared = _settings(settings)
        names = (*self.specs, "pairwise")
        self._own = {name: shared.pop(name) for name in names if isinstance(shared.get(name), dict)}
        self._model_settings = {key: shared.pop(key) for key in _MODEL_KEYS if key in shared}
        self._shared = shared
        kinds = [kind for kind, _ in self.specs.values()]
        if (given := [*shared, *self._model_settings]) and mode is None and "direct-llm" not in kinds:
            raise RLAIFError(
                f"expected a language-model judge for the settings {', '.join(given)}, found none: give --pairwise or "
                "the judge direct-llm, or put the settings under a judge's name"
            )
        self._model: LanguageModel | None = None
        self._backends: dict[str, RewardBackend] = {}

    def backend(self, name: str) -> RewardBackend:
        """The judge of this name."""
        if name not in self._backends:
            kind, model = self.specs[name]
            kwargs = dict(self._own.get(name, {}))
            if kind == "direct-llm":
                kwargs = self._shared | kwargs
                kwargs["model"] = self._language_model() if model is None else self._load(model, None)
            elif model is not None:
                kwargs["model"] = model
            try:
                self._backends[name] = make_reward(kind, task=self._task, **kwargs)
            except TypeError as error:
                raise RLAIFError(f"judge {name!r}: {error}") from error
        return self._backends[name]

    def labeler(self) -> PreferenceLabeler:
        """The pairwise judge."""
        settings = self._shared | self._own.get("pairwise", {})
        if "scale" in settings:
            settings["scale"] = tuple(settings["scale"])
        try:
            return PreferenceLabeler(self._language_model(), self._task, mode=self._mode or "pairwise", **settings)
        except TypeError as error:
            raise RLAIFError(f"the pairwise judge: {error}") from error

    def _language_model(self) -> LanguageModel:
        if self._model is None:
            self._model = self._load(self._model_name, self._url)
        return self._model

    def _load(self, model: str, url: str | None) -> LanguageModel:
        settings = dict(self._model_settings)
        server = settings.pop("llm", {})
        return language_model_from(LanguageModelConfig(model, url, server=server, **settings))

    def build_all(self) -> None:
        """Build every judge, so that what is wrong with one is said before anything slow happens."""
        for name in self.specs:
            self.backend(name)
        if self._mode is not None:
            self.labeler()

    def states(self) -> dict[str, str]:
        """What changes when a judge's own weights do, by judge."""
        folders = {name: Path(model) for name, (_, model) in self.specs.items() if model is not None}
        return {name: folder_state(folder) for name, folder in folders.items() if folder.is_dir()}


def _judge_spec(spec: str) -> tuple[str, tuple[str, str | None]]:
    """``[LABEL:]BACKEND[=MODEL]`` as label, backend and model."""
    backend, _, model = spec.partition("=")
    label, colon, kind = backend.partition(":")
    return (label, (kind, model or None)) if colon else (backend, (backend, model or None))


def _settings(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RLAIFError(f"expected judge_kwargs as a JSON object, found {text!r} ({error})") from error
    if not isinstance(found, dict):
        raise RLAIFError(f"expected judge_kwargs as a JSON object, found {text!r}")
    return found
