"""What the names in a report mean, in one line each; the long form is in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from rlaif_env.files import package_data


@cache
def _definitions() -> dict[str, str]:
    return package_data("benchmarks.report", "definitions.toml")


def definitions_of(names: Iterable[str]) -> dict[str, str]:
    """The definitions of those names that have one; ``raw_score`` and ``reward/score`` are found too."""
    seen = {part for name in names for part in _spellings(name)}
    return {name: text for name, text in _definitions().items() if name in seen}


def _spellings(name: str) -> list[str]:
    plain = name.lower().replace("_", " ").strip()
    return [plain, *(plain.rpartition(m)[2] for m in ("/", " · ")), *(plain.partition(m)[0] for m in (" (", ","))]
