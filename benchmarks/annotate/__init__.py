"""People's preferences and verdicts, collected in the browser: ``rlaif annotate``."""

from benchmarks.annotate.command import AnnotateConfig, annotate, main

__all__ = ["AnnotateConfig", "annotate", "main"]
