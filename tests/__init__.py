"""Tests, in folders that mirror the packages; `tests.stress` holds what runs for long, outside the suite."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository."""
