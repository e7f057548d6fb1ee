"""The command ``rlaif``: a table of names, each resolved when it is used.

A command's configuration and its ``main`` stand beside what they run; this module imports none of them, so that
``rlaif --help`` is quick and the environment's room does not depend on the rooms above it. A ``main`` takes the
arguments after the command's name and returns the exit code.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence

from rlaif_env.api import RLAIFError
from rlaif_env.tables import printable

COMMANDS: Mapping[str, tuple[str, str]] = {
    "task": (
        "rewards.task.command:main",
        "write a task of your own from a data file, or look at one before it is used",
    ),
    "sft": ("agents.sft:main", "fine-tune a language model on a task's demonstrations"),
    "label": ("rewards.labeling.command:main", "have a language model label which of two responses is better"),
    "train-rm": ("rewards.reward_model.command:main", "train a reward model on preferences"),
    "train": ("agents.training.command:main", "train a policy with REINFORCE on any reward"),
    "rescore": (
        "agents.training.rescore:main",
        "ask a training's reward again for the responses that it failed on",
    ),
    "evaluate": ("benchmarks.evaluation.command:main", "compare policies on held-out prompts"),
    "compare": ("benchmarks.comparison.command:main", "compare the reward backends, end to end"),
    "audit": ("benchmarks.audit.command:main", "hold a reward to a battery of checks before training on it"),
    "report": ("benchmarks.report:main", "write one HTML page from a run's files"),
    "annotate": ("benchmarks.annotate:main", "collect people's preferences in the browser"),
    "fetch": ("rlaif_env.models.assets:fetch_main", "fetch a model or the corpus by name, before it is needed"),
    "cache": ("rlaif_env.servers.cache:cache_main", "look after the stored answers of language model servers"),
}
"""Every command's name, with the function it calls ("module:function") and what it does."""

_IN_SEVERAL = ("train", "sft", "train-rm")  # processes, as torchrun starts them


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command's name and its arguments; those of the process where None.

    Returns:
        The exit code: the command's own, 2 after a usage error or one of this project's own errors (shown as one
        message; RLAIF_TRACEBACK=1 shows where it was raised), 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"rlaif {_version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _unknown(name)
    if os.environ.get("WORLD_SIZE", "1") != "1" and name not in _IN_SEVERAL:
        if os.environ.get("RANK") == "0":
            print(f"rlaif {name}: runs in one process; torchrun is for {', '.join(_IN_SEVERAL)}", file=sys.stderr)
        return 2
    try:
        module, _, function = COMMANDS[name][0].partition(":")
        return int(getattr(importlib.import_module(module), function)(rest))
    except RLAIFError as error:
        if os.environ.get("RLAIF_TRACEBACK") == "1":
            raise
        print(f"rlaif {name}: {printable(str(error))}", file=sys.stderr)  # it may quote what was in a file
        return 2
    except KeyboardInterrupt:
        print(f"rlaif {name}: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    """The text of ``rlaif --help``."""
    lines = [f"  {name:<10} {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlaif COMMAND [OPTIONS]",
            "",
            "Reinforcement learning from AI feedback: text generation as a Gymnasium environment.",
            "",
            "commands:",
            *lines,
            "",
            "`rlaif COMMAND --help` shows a command's options; `rlaif --version` the version.",
        ]
    )


def _unknown(name: str) -> int:
    near = difflib.get_close_matches(name, COMMANDS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(COMMANDS)}"
    print(f"rlaif: no command {name!r}: {hint} (rlaif --help lists them)", file=sys.stderr)
    return 2


def _version() -> str:
    try:
        return importlib.metadata.version("rlaif-env")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
