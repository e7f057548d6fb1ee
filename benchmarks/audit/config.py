"""What ``rlaif audit`` can be told, and the command line that says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.audit.api import CHECK_GROUP, Check
from benchmarks.audit.verdicts import LEVEL
from rlaif_env.api import RLAIFError
from rlaif_env.data.tasks import DEFAULT_TASK
from rlaif_env.models import BUILTIN_MODEL
from rlaif_env.options import as_options, option_values, reward_options

LAST = "cost"  # sums up what the other checks asked for

_PREFIX = "--reward."


@dataclass(frozen=True)
class AuditConfig:
    """Hold a reward to a battery of checks before a policy is trained on it.

    Attributes:
        reward: A reward's name ("direct-llm", "human-rm", "group-preference", ...), or code of yours as
            package.module:name or path/file.py:name. It goes first.
        reward_options: The reward's own settings; on the command line --reward.NAME, listed by --help after the
            reward.
        task: A built-in task or a TOML file.
        policy: Whose samples the reward is held to: a run folder, a checkpoint, a model, or a file of responses
            (prompt, response); "none" leaves out the checks that need them.
        checks: Names of checks; all by default.
        test: Files of cases of your own: JSON lines of name, prompt, better, worse (docs/trust.md).
        runs: Folders of trainings on this reward, to be held against what its best of n says.
        gold: The folder of a trained reward model that measures gold in the place of the task's measure; no figure is
            worth more than its labels, so take one that learned from other people's judgements than the reward did.
        texts: How many human-rated texts.
        pairs: How many pairs of them.
        prompts: How many prompts the policy answers.
        samples_a_prompt: How many responses to each; the best of n is known up to so many.
        samples: The folder that keeps the policy's samples, for other audits too; by default audit-samples beside the
            audit's own folder.
        level: Of the intervals; what it leaves to 1 is how often a sound reward is flagged by any check.
        strict: Exit with 1 if a figure is flagged.
        seed: Of all that is drawn at random.
        out: The folder to write to; a new one under runs/ where not given.
    """

    reward: tyro.conf.Positional[str]
    reward_options: Mapping[str, Any] = field(default_factory=dict)
    task: str = DEFAULT_TASK
    policy: str = BUILTIN_MODEL
    checks: tuple[str, ...] = ()
    test: tuple[Path, ...] = ()
    runs: tuple[Path, ...] = ()
    gold: Path | None = None
    texts: int = 240
    pairs: int = 2000
    prompts: int = 8
    samples_a_prompt: int = 256
    samples: Path | None = None
    level: float = LEVEL
    strict: bool = False
    seed: int = 0
    out: Path | None = None


def parsed(argv: Sequence[str]) -> AuditConfig:
    """The configuration that a command line says.

    Raises:
        RLAIFError: If there is no such reward, or it has no such option.
        SystemExit: After ``--help``, or where the command line cannot be read.
    """
    reward = argv[0] if argv and not argv[0].startswith("-") else None
    if reward is None:  # help, or nothing that can be read
        named = reward_options("direct-llm")
    else:
        words = [word[len(_PREFIX) :].partition("=")[0].replace("-", "_") for word in argv if word.startswith(_PREFIX)]
        named = reward_options(reward, [name.removeprefix("no_") for name in words])
    arguments = make_dataclass(
        "AuditArguments",
        [("reward_options", Annotated[named, tyro.conf.arg(name="reward")], field(default=as_options(named, {})))],
        bases=(AuditConfig,),
        frozen=True,
        namespace={"__doc__": AuditConfig.__doc__},
    )
    given: Any = tyro.cli(arguments, args=list(argv), prog="rlaif audit")
    settings = {entry.name: getattr(given, entry.name) for entry in fields(AuditConfig)}
    return AuditConfig(**settings | {"reward_options": option_values(given.reward_options)})


def checks_named(names: Sequence[str] = ()) -> dict[str, Check]:
    """Checks by name, in the order they are made: all that are installed where none is named.

    Raises:
        RLAIFError: If there is no check of a name, or what it stands for is no function; the message lists the names.
    """
    known = {point.name: point for point in entry_points(group=CHECK_GROUP)}
    if unknown := [name for name in names if name not in known]:
        valid = ", ".join(sorted(known)) or "none installed; run pip install on this package"
        raise RLAIFError(f"expected checks among {valid}, found {', '.join(unknown)}")
    order = sorted(dict.fromkeys(names or known), key=lambda name: name == LAST)
    found: dict[str, Check] = {}
    for name in order:
        loaded = known[name].load()
        if not isinstance(loaded, Callable):  # type: ignore[arg-type]
            raise RLAIFError(f"check {name!r}: expected a function of subject and materials, found {loaded!r:.60}")
        found[name] = loaded
    return found
