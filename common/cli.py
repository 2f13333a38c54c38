"""How a script reads its settings and how it tells a user what is wrong with them.

Class default < SETTINGS on top of the script < preset < YAML file (--config) < command line.
"""

import ast
import difflib
import inspect
import json
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging
from trl import TrlParser

from common.checkpoints import FINAL_FOLDER
from common.config import RLConfig
from common.metrics import METRICS_FILE
from common.plots import CURVES_FILE
from common.trainer import OnPolicyTrainer

PRESETS = Path(__file__).parent / "presets"
ROOT = Path(__file__).parent.parent

Config = TypeVar("Config", bound=RLConfig)
Settings = TypeVar("Settings")


class _Parser(TrlParser):
    """TrlParser whose errors are ValueErrors rather than a page of usage."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}. See --help for every setting.")


def parse_config(settings: Config, *, embedded: dict | None = None, args: list[str] | None = None) -> Config:
    """Combine the script's settings, the preset, the YAML file and the command line.

    Args:
        settings: the literal on top of the script.
        embedded: what the algorithm wants to be different when preset "cpu" applies.
        args: command line without the program's name; None: sys.argv.

    Returns:
        Settings of the same class, checked.

    Raises:
        ValueError: for an unknown setting (naming the nearest), preset or file, and for what RLConfig refuses.
    """
    args = _gather_rewards(_in_plain_words(sys.argv[1:] if args is None else args, settings))
    names = [field.name for field in fields(settings)]
    given = [arg[2:] for arg in args if arg.startswith("--")]
    _refuse_unknown(given, [*names, "config", "help"], "on the command line")
    args, yaml_settings = _take_yaml(args, names)
    presets = [yaml_settings.get("preset", settings.preset)]
    presets += [value for name, value in pairwise(args) if name == "--preset"]
    preset, preset_settings = _preset(presets[-1])
    if preset == "cpu":
        preset_settings |= embedded or {}
    defaults = asdict(settings) | preset_settings
    given = {*yaml_settings, *(arg[2:].replace("-", "_") for arg in args if arg.startswith("--"))}
    if "task" in given:  # data and rewards belong to the task they were written for
        defaults |= {"dataset": None, "dataset_split": "train", "rewards": None}
    if {"task", "rewards"} & given:  # and weights to the rewards
        defaults["reward_weights"] = None
    config = _parse(type(settings), defaults | yaml_settings, args)
    config.preset = preset
    return config


def parse_settings(settings_class: type[Settings], args: list[str] | None = None) -> Settings:
    """Read the settings of a command that trains nothing: class default < YAML file (--config) < command line.

    Args:
        settings_class: a dataclass with a text under each field, which --help shows.
        args: command line without the program's name; None: sys.argv.

    Raises:
        ValueError: for an unknown setting (naming the nearest), and for what the class refuses.
    """
    args = sys.argv[1:] if args is None else args
    names = [field.name for field in fields(settings_class)]
    given = [arg[2:].partition("=")[0] for arg in args if arg.startswith("--")]
    _refuse_unknown(given, [*names, "config", "help"], "on the command line")
    args, yaml_settings = _take_yaml(args, names)
    return _parse(settings_class, yaml_settings, args)


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as words of a command line that reads them back; one that is None is left out."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            words += [f"--{name}", *(str(part).lower() if isinstance(part, bool) else str(part) for part in values)]
    return words


def read_yaml(path: Path, *, option: str = "", remedy: str) -> dict[str, Any]:
    """Read a YAML file of settings.

    Args:
        path: of the file.
        option: what named it on the command line, for messages.
        remedy: what to do if there is no such file.

    Raises:
        ValueError: it is not there or holds no settings.
    """
    named = f"{option} {path}".lstrip()
    if not path.is_file():
        raise ValueError(f"{named}: there is no such file. {remedy}")
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{named}: not readable as YAML: {error}. Mend the file.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{named}: need lines of the form `setting: value`. Mend the file.")
    return settings


def _parse(settings_class: type[Settings], defaults: dict[str, Any], args: list[str]) -> Settings:
    """Read a command line on top of defaults; every word has to be a setting's."""
    parser = _Parser(settings_class, allow_abbrev=False)
    parser.set_defaults_with_config(**defaults)
    if {"-h", "--help"}.intersection(args):
        _add_descriptions(parser, settings_class)
    settings, unread = parser.parse_args_and_config(args, return_remaining_strings=True)
    if unread:
        raise ValueError(f"{' '.join(unread)}: no setting reads it. Write each setting as --name value; see --help.")
    return settings


def _add_descriptions(parser: _Parser, config_class: type) -> None:
    """Show the text under each field of the settings classes in --help."""
    descriptions = {}
    for cls in reversed([cls for cls in config_class.__mro__ if is_dataclass(cls)]):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for field, text in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                descriptions[field.target.id] = text.value.value
    for action in parser._actions:
        if action.dest in descriptions:
            action.help = descriptions[action.dest].replace("%", "%%") + " (default: %(default)s)"


def run_script(
    main: Callable[[], None], *, interrupted: str = "the same command continues from the last checkpoint"
) -> None:
    """Call `main`; a ValueError that this project raises is a message to the user, not a traceback.

    Args:
        main: the script.
        interrupted: what Ctrl-C means for the work so far.

    Raises:
        SystemExit: with status 2 after printing such a message.
    """
    # Bars for loading and saving would come between the lines of a run's own bar; those of downloads stay.
    transformers_logging.disable_progress_bar()
    enable_progress_bars()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nanorlhf").setLevel(logging.INFO)
    try:
        main()
    except ValueError as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = Path(origin.filename).is_relative_to(ROOT) and not Path(origin.filename).is_relative_to(sys.prefix)
        # Python's own functions raise ValueErrors too; those have no frame, and end in a line that calls them.
        if not is_ours or not (origin.line or "").startswith("raise "):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted}", file=sys.stderr)
        sys.exit(130)


def report(trainer: OnPolicyTrainer) -> None:
    """Train, and print where the run is, how good the policy was before and after, and where its curves are.

    Args:
        trainer: ready to train.
    """
    folder = trainer.run.folder.resolve()
    say = print if trainer.accelerator.is_main_process else _say_nothing
    begun = f"continued after step {trainer.run.first_step - 1}" if trainer.run.checkpoint else "new"
    if trainer.config.preset == "cpu":
        why = "asked for" if torch.cuda.is_available() else "there is no CUDA GPU"
        say(f"preset cpu ({why}): the embedded default; common/presets/cpu.yaml replaces settings of the script")
    say(f"run: {folder} ({begun})")
    if trainer.prompts.num_dropped:
        say(f"{trainer.prompts.num_dropped} prompts are longer than max_prompt_length and were dropped")
    trainer.train()
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    name = "eval/accuracy" if any("eval/accuracy" in line for line in lines) else "eval/score"
    evaluations = [line for line in lines if name in line]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        prompts = f"{len(trainer.eval_prompts)} held-out prompts"
        say(f"{name} on {prompts}: {first[name]:.3f} before (step {first['step']})", end="")
        say(f", {last[name]:.3f} after step {last['step']}")
    say(f"curves: {folder / CURVES_FILE}")
    say(f"model: {folder / FINAL_FOLDER}")
    # Threads of a process group that are still there when Python ends can abort the process.
    trainer.accelerator.state.destroy_process_group()


def _say_nothing(*_: object, **__: object) -> None:
    """What processes other than the main one print."""


def _preset(name: str) -> tuple[str, dict]:
    """Resolve "auto" and read the preset's settings."""
    if name == "auto":
        name = "none" if torch.cuda.is_available() else "cpu"
    if name == "none":
        return name, {}
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in PRESETS.glob("*.yaml"))
        raise ValueError(
            f"preset={name!r}: there is no such preset. Pass --preset with one of {', '.join(known)}, none."
        )
    return name, yaml.safe_load(path.read_text())


def _take_yaml(args: list[str], names: list[str]) -> tuple[list[str], dict]:
    """The arguments without `--config FILE`, and the settings in that file."""
    if "--config" not in args:
        return args, {}
    place = args.index("--config")
    path = Path([*args, ""][place + 1])
    settings = read_yaml(path, option="--config", remedy="Pass the path of a YAML file of settings.")
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    _refuse_unknown(list(settings), names, f"in {path}")
    return args[:place] + args[place + 2 :], settings


def _in_plain_words(args: list[str], settings: RLConfig) -> list[str]:
    """Write --name=value in two words and --no_name as --name false: the parser has that only for some names."""
    switches = {f"no_{name}": f"--{name}" for name, value in vars(settings).items() if isinstance(value, bool)}
    words = []
    for arg in args:
        switch = switches.get(arg.removeprefix("--").replace("-", "_")) if arg.startswith("--") else None
        if switch:
            words += [switch, "false"]
        else:
            words += arg.split("=", 1) if arg.startswith("--") else [arg]
    return words


def _gather_rewards(args: list[str]) -> list[str]:
    """Write every `--reward NAME [WEIGHT]` together as --rewards and --reward_weights; a weight left out is 1."""
    rewards: list[list[str]] = []
    others: list[str] = []
    target = others
    for arg in args:
        if arg == "--reward":
            target = []
            rewards.append(target)
        elif arg.startswith("--") or len(target) == 2:
            target = others
        if arg != "--reward":
            target.append(arg)
    if not rewards:
        return others
    if not all(rewards):
        raise ValueError("--reward without a name: need a reward of the task, a reward model or file.py:function.")
    others += ["--rewards", *(reward[0] for reward in rewards)]
    if any(len(reward) == 2 for reward in rewards):
        others += ["--reward_weights", *([*reward, "1.0"][1] for reward in rewards)]
    return others


def _refuse_unknown(given: list[str], names: list[str], where: str) -> None:
    for name in given:
        plain = name.replace("-", "_")
        if plain in names:
            continue
        near = difflib.get_close_matches(plain, names, n=1)
        advice = f"Did you mean {near[0]}?" if near else "See --help for every setting."
        raise ValueError(f"unknown setting {name!r} {where}: nothing reads it. {advice}")
