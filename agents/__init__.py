"""Agents that learn from an environment's reward, whatever is behind it. Importing this package loads nothing heavy."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "Policy": "agents.policy",
    "ReinforceAgent": "agents.reinforce",
    "ReinforceConfig": "agents.settings",
    "TrainConfig": "agents.training.config",
}

__all__ = ["Policy", "ReinforceAgent", "ReinforceConfig", "TrainConfig"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")
