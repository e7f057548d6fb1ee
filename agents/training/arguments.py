"""The command line of ``rlaif train``, and what ``--resume`` makes of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from agents.sampler import SamplerConfig
from agents.settings import ReinforceConfig
from agents.training.config import TrainConfig, reward_code
from rlaif_env.api import RLAIFError
from rlaif_env.models import LoraConfig, OptimizerConfig
from rlaif_env.options import as_options, option_values, reward_options

_PREFIX = "--reward."


def parsed(argv: Sequence[str]) -> TrainConfig:
    """The configuration that a command line says; with ``--resume`` what it leaves out is as in the resumed run.

    Raises:
        RLAIFError: If a setting cannot be used, the reward has no such option, or there is no run to resume.
        SystemExit: After ``--help``, or where the command line cannot be read.
    """
    import tyro

    known = argparse.ArgumentParser(prog="rlaif train", add_help=False, allow_abbrev=False)
    known.add_argument("--resume", nargs="?", const="latest")
    known.add_argument("--out", type=Path)
    known.add_argument("--reward")
    first, rest = known.parse_known_args(argv)
    config = TrainConfig(out=first.out, resume=first.resume)
    if first.resume is not None:
        config = replace(_recorded(resumed(config)[0].out or Path()), resume=first.resume, change_reward=False)
        _check_named(config, argv)
    if first.reward not in (None, config.reward):
        config = replace(config, reward=first.reward, reward_options={})
    names = [word[len(_PREFIX) :].partition("=")[0].replace("-", "_") for word in rest if word.startswith(_PREFIX)]
    options = reward_options(config.reward, [*config.reward_options, *(name.removeprefix("no_") for name in names)])
    default = as_options(options, config.reward_options)
    arguments = make_dataclass(
        "TrainArguments",
        [("reward_options", Annotated[options, tyro.conf.arg(name="reward")], field(default=default))],
        bases=(TrainConfig,),
        frozen=True,
        namespace={"__doc__": TrainConfig.__doc__},
    )
    settings = {entry.name: getattr(config, entry.name) for entry in fields(TrainConfig)}
    given = tyro.cli(arguments, args=rest, default=arguments(**settings | {"reward_options": default}), prog=known.prog)
    settings = {name: getattr(given, name) for name in settings}
    return TrainConfig(**settings | {"reward_options": option_values(given.reward_options)})


def _check_named(recorded: TrainConfig, argv: Sequence[str]) -> None:
    """Raise RLAIFError for code that a run folder names and the command line does not: reading a file runs none."""
    if unnamed := [code for code in reward_code(recorded) if not any(code in word for word in argv)]:
        option = "--reward" if unnamed[0] == recorded.reward else "--reward.NAME"
        raise RLAIFError(
            f"expected {unnamed[0]} on the command line too, because this run's reward is code, which runs only where "
            f"you name it; add {option} {unnamed[0] if option == '--reward' else '... as it was'}"
        )


def resumed(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """The configuration with the folder that ``resume`` means, and the checkpoint where it names one.

    Raises:
        RLAIFError: If there is no such run, or ``out`` is another folder.
    """
    if config.resume is None:
        return config, None
    chosen = None
    if config.resume == "latest":
        folder = config.out or _newest_run(Path("runs"))
    else:
        folder = Path(config.resume)
        if folder.absolute().parent.name == "checkpoints":
            folder, chosen = folder.absolute().parent.parent, folder
    if not (folder / "config.json").is_file():
        raise RLAIFError(f"expected a training to go on with in {folder}, found none; check resume and out")
    if config.out is not None and config.out.resolve() != folder.resolve():
        raise RLAIFError(f"expected out to be the folder to resume, {folder}, found {config.out}; leave out away")
    return replace(config, out=folder), chosen


def _newest_run(parent: Path) -> Path:
    """The training run under a folder that was written to last."""
    runs = [file.parent for file in parent.glob("*/config.json") if (file.parent / "start.json").is_file()]
    if not runs:
        raise RLAIFError(f"expected a training to go on with under {parent.absolute()}, found none; name its folder")
    return max(runs, key=lambda run: max(file.stat().st_mtime for file in run.iterdir()))


def _recorded(folder: Path) -> TrainConfig:
    """The configuration of the run in a folder.

    Raises:
        RLAIFError: If config.json cannot be read or is not one of this version's training runs.
    """
    try:
        values: dict[str, Any] = json.loads((folder / "config.json").read_bytes())["config"]
        nested, _ = values["agent"], values.pop("content")
        nested |= {"lora": LoraConfig(**nested["lora"]), "optimizer": OptimizerConfig(**nested["optimizer"])}
        built = {"agent": ReinforceConfig(**nested), "sampler": SamplerConfig(**values["sampler"]), "out": folder}
        return TrainConfig(**values | built)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RLAIFError(
            f"expected {folder / 'config.json'} to be a training's configuration, found: {error!r}"
        ) from error
