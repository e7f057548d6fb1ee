"""People's preferences and verdicts, collected in the browser: ``rlaif annotate``.

| module | room |
|---|---|
| `items` | what is judged: pairs or single responses, attention checks |
| `project` | the words: plan, annotator, answer, judgement |
| `showings` | what an annotator is shown next |
| `store` | items and answers in one SQLite file |
| `server`, ``page.html`` | the routes, who may use them, the page |
| `results`, `report` | the preference file; the figures, with AI labelers beside people |
| `command` | the command |
| `stress` | many annotators and a server that is killed, measured |
"""

from benchmarks.annotate.command import AnnotateConfig, annotate, main

__all__ = ["AnnotateConfig", "annotate", "main"]
