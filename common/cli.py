"""How a script reads its settings and reports mistakes in them.

Later sources win: class default < preset < SETTINGS on top of the script, where the user edited them < YAML file
(--config) < command line. For each setting, a preset names the value that the scripts ship with and its own value. A
line with any other value was edited by the user, and the preset keeps it.
"""

import ast
import inspect
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from common import others
from common.config import RLConfig
from common.environment import print_what_has_no_bytes
from common.foreign_names import IN_FILE, ON_COMMAND_LINE, unknown_settings
from common.host import processes_here
from common.mistakes import OF_ALL_PROCESSES, ROOT, WRONG_NUMBERS, WrongNumbers, is_ours, name_of_script
from common.presets.preset import Pairs, Preset
from common.signals import Stopped, end_without_a_word, ignore_while_python_ends, name_of, raise_in_script
from common.terminal import PrintableFormatter, printable
from common.yaml_files import parse_yaml

# Settings that are a number, or a word for what decides it.
NUMBERS_OR_WORDS = ("max_tokens_per_microbatch", "vllm_memory_share")

Config = TypeVar("Config", bound=RLConfig)
Settings = TypeVar("Settings")


@cache
def _parser_class() -> type:
    from trl import TrlParser

    class Parser(TrlParser):
        """TrlParser that raises a ValueError instead of printing its usage."""

        def error(self, message: str) -> None:
            raise ValueError(f"{message}. See --help for every setting.")

    return Parser


@dataclass(frozen=True)
class PlanRequest:
    """That a script was asked for its memory plan and no run.

    Attributes:
        device: a card that is not there, as the user named it; None: this machine.
        processes: that train together, each on such a device.
        nodes: machines that these are on, each with as many.
    """

    device: str | None = None
    processes: int = 1
    nodes: int = 1


def take_plan(args: list[str]) -> tuple[PlanRequest | None, list[str]]:
    """Whether --plan is on a script's command line, and the other arguments.

    Args:
        args: command line without the program's name.

    Raises:
        ValueError: --device, --processes or --nodes without --plan or without a value that it may have, or a value
            after --plan.
    """
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith(_OF_PLAN) else [arg])]
    is_asked, others, given = False, [], {}
    while words:
        word = words.pop(0)
        name = word.removeprefix("--")
        if f"{word}=" in _OF_PLAN:
            if not words or words[0].startswith("--"):
                needed = "without a name: need a card" if name == "device" else "without a number"
                raise ValueError(f"{word} {needed}. Pass {_EXAMPLES[name]}.")
            given[name] = words.pop(0)
        elif word == "--plan":
            is_asked = True
            if words and not words[0].startswith("--"):
                raise ValueError(
                    f"--plan {words[0]}: it takes no value; it prints the memory plan and ends. Pass --plan alone, or "
                    f"--plan --device {words[0]} for a card that is not there."
                )
        else:
            others.append(word)
    if not is_asked and "device" in given:
        raise ValueError(
            f"--device {given['device']} without --plan: a run uses the GPU that is there, or the CPU. Pass --plan "
            f"--device {given['device']} for the memory plan of a run on such a card, or leave out --device."
        )
    if not is_asked and given:
        name, value = next(iter(given.items()))
        raise ValueError(
            f"--{name} {value} without --plan: a launcher starts the processes of a run. Start it with `torchrun "
            f"--nproc_per_node N`, or pass --plan --{name} {value} for the memory plan of such a run."
        )
    return (_plan_request(given) if is_asked else None), others


# What says for which devices a plan is made.
_OF_PLAN = ("--device=", "--processes=", "--nodes=")
_EXAMPLES = {"device": "--device 24gb, or --device h100", "processes": "--processes 8", "nodes": "--nodes 2"}


def _plan_request(given: dict[str, str]) -> PlanRequest:
    """The request with its numbers checked against each other, and against what a launcher has started."""
    numbers: dict[str, int | None] = {"processes": None, "nodes": None}
    for name in numbers.keys() & given.keys():
        if not given[name].isdecimal() or not 1 <= int(given[name]) <= 1_000_000:
            raise ValueError(f"--{name} {given[name]}: need a number, at least 1. Pass {_EXAMPLES[name]}.")
        numbers[name] = int(given[name])
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and numbers["processes"] not in (None, started):
        raise ValueError(
            f"--processes {numbers['processes']} in a run of {started} processes: the plan is that of the processes "
            "that were started. Leave out --processes, or start the script without torchrun."
        )
    processes = numbers["processes"] or started
    nodes = numbers["nodes"] or (max(1, processes // processes_here()) if started > 1 else 1)
    if processes % nodes:
        raise ValueError(
            f"--nodes {nodes} for {processes} processes: each machine has as many of them. Pass --processes "
            f"{nodes * -(-processes // nodes)}, or another number of machines."
        )
    return PlanRequest(given.get("device"), processes, nodes)


def take_serve(args: list[str]) -> tuple[bool, list[str]]:
    """Whether --serve is on a script's command line, and the other arguments.

    Args:
        args: command line without the program's name.

    Raises:
        ValueError: a value after --serve, or a launcher started several processes.
    """
    if "--serve" not in args:
        return False, args
    at = args.index("--serve")
    after = args[at + 1 : at + 2]
    if after and not after[0].startswith("--"):
        raise ValueError(
            f"--serve {after[0]}: it takes no value; it starts the server that the run with the same settings samples "
            "from. Pass --serve alone, and its address as --sampler_url."
        )
    if (processes := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        raise ValueError(
            f"--serve in {processes} processes of a launcher: a server is one program, and starts its processes. "
            "Start it by python in place of torchrun; GPUs of a model are --vllm_tensor_parallel."
        )
    return True, args[:at] + args[at + 1 :]


def parse_config(
    settings: Config,
    *,
    embedded: Pairs | None = None,
    script: str | None = None,
    args: list[str] | None = None,
    has_gpu: bool | None = None,
) -> Config:
    """Combine the script's settings, the preset, the YAML file and the command line.

    Args:
        settings: the literal on top of the script.
        embedded: further pairs for preset "cpu": setting -> (value of the script as shipped, value without a GPU).
        script: the script's `__file__`, for messages. None: the settings were made in Python; a value equal to the
            class default then counts as not given.
        args: command line without the program's name; None: sys.argv.
        has_gpu: whether the run has a CUDA GPU; None: whether this machine has one.

    Returns:
        Settings of the same class, checked. Their `notes` say what the preset replaced.

    Raises:
        ValueError: for an unknown setting (naming the nearest), preset or file, and for what RLConfig refuses (naming
            the source of the value).
    """
    args = _gather_rewards(_normalized(sys.argv[1:] if args is None else args, settings))
    names = [field.name for field in fields(settings)]
    owner = type(settings).__name__
    _refuse_unknown(_typed(args), [*names, "config", "help"], "on the command line", ON_COMMAND_LINE, owner)
    args, path, yaml_settings = _take_yaml(args, names, owner)
    on_command_line = {arg[2:].replace("-", "_"): value for arg, value in pairwise([*args, ""]) if arg[:2] == "--"}
    typed, written = yaml_settings | on_command_line, asdict(settings)
    preset = Preset.read(typed.get("preset", settings.preset), has_gpu=has_gpu).with_settings_of(names)
    if preset.name == "cpu":
        preset.pairs.update(embedded or {})
    _refuse_unknown(dict.fromkeys(preset.pairs), names, f"in preset {preset.name}", IN_FILE, owner)
    class_defaults = {field.name: field.default for field in fields(settings)} if script is None else {}
    replaced, kept = preset.replacements(written, typed, model=typed.get("model"), class_defaults=class_defaults)
    defaults = written | replaced
    if "task" in typed:  # data and rewards belong to one task
        defaults |= {"dataset": None, "dataset_split": "train", "rewards": None}
    if {"task", "rewards"} & typed.keys():  # and weights to one list of rewards
        defaults["reward_weights"] = None
    replaced = {name: value for name, value in replaced.items() if defaults[name] is value}
    script_name = name_of_script(script)
    origins = dict.fromkeys(names, script_name) | dict.fromkeys(replaced, f"preset {preset.name}")
    origins |= dict.fromkeys(yaml_settings, str(path)) | dict.fromkeys(on_command_line, "")
    config = _parse(type(settings), defaults | yaml_settings, args, origins)
    config.preset = preset.name
    notes = preset.misfit(config.model, has_gpu=has_gpu) + preset.notes(script_name, written, replaced, kept)
    config.notes, config.origins = tuple(notes), origins
    return config


def parse_settings(
    settings_class: type[Settings], args: list[str] | None = None, *, defaults: dict[str, Any] | None = None
) -> Settings:
    """Read the settings of a command that does not train: class default < YAML file (--config) < command line.

    Args:
        settings_class: a dataclass with a text under each field, which --help shows.
        args: command line without the program's name; None: sys.argv.
        defaults: values in place of the class's defaults.

    Raises:
        ValueError: for an unknown setting (naming the nearest), and for what the class refuses.
    """
    args = sys.argv[1:] if args is None else args
    names = [field.name for field in fields(settings_class)]
    split = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    if "rewards" in names:
        args = split = _gather_rewards(split)
    owner = settings_class.__name__
    _refuse_unknown(_typed(split), [*names, "config", "help"], "on the command line", ON_COMMAND_LINE, owner)
    args, path, yaml_settings = _take_yaml(args, names, owner)
    return _parse(settings_class, (defaults or {}) | yaml_settings, args, dict.fromkeys(yaml_settings, str(path)))


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as the arguments of a command line that reads them back; a setting that is None is left out.

    Raises:
        ValueError: for a block of settings.
    """
    words = []
    for name, value in settings.items():
        if isinstance(value, dict):
            raise ValueError(
                f"{name} is a block with {', '.join(map(str, value))}: settings are flat, one on a line, without a "
                f"heading. Write its lines without `{name}:` and without indentation."
            )
        values = value if isinstance(value, list) else [value]
        if value is not None:
            words += [f"--{name}", *(str(part).lower() if isinstance(part, bool) else str(part) for part in values)]
    return words


def read_yaml(path: Path, *, option: str = "", remedy: str) -> dict[str, Any]:
    """Read a YAML file of settings.

    Args:
        path: of the file.
        option: the command-line option that named it, for messages.
        remedy: what to do if the file does not exist.

    Raises:
        ValueError: if it does not exist or holds no settings.
    """
    named = f"{option} {path}".lstrip()
    if not path.is_file():
        raise ValueError(f"{named}: there is no such file. {remedy}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{named}: cannot be read ({error.strerror}). Check the file and its rights.") from None
    settings = parse_yaml(content, named)
    if not isinstance(settings, dict):
        raise ValueError(f"{named}: need lines of the form `setting: value`. Fix the file.")
    return settings


def _parse(
    settings_class: type[Settings], defaults: dict[str, Any], args: list[str], origins: dict[str, str]
) -> Settings:
    """Read a command line on top of defaults; every argument must belong to a setting.

    Args:
        settings_class: the class of the result.
        defaults: values of settings.
        args: the command line.
        origins: where the value of a setting comes from, for messages; empty: the command line.
    """
    parser = _parser_class()(settings_class, allow_abbrev=False, prog=_program())
    for action in parser._actions:
        if action.dest in NUMBERS_OR_WORDS:  # the parser knows no unions: as_declared tells numbers from words
            action.type = str
    parser.set_defaults_with_config(**defaults)
    if {"-h", "--help"}.intersection(args):
        _add_descriptions(parser, settings_class)
    try:
        settings, unread = parser.parse_args_and_config(args, return_remaining_strings=True)
    except ValueError as error:
        raise ValueError(f"{error}{origins_in(str(error), origins)}") from error
    if unread:
        raise ValueError(f"{' '.join(unread)}: no setting reads it. Write each setting as --name value; see --help.")
    return settings


def _program() -> str | None:
    """How the running program is called; None: as argparse has it."""
    path = Path(sys.argv[0])
    if path.name != "__main__.py" or not path.is_relative_to(ROOT):
        return None
    return f"python -m {'.'.join(path.parent.relative_to(ROOT).parts)}"


def origins_in(message: str, origins: dict[str, str]) -> str:
    """Where the values come from that a message is about, unless its reader has just typed them.

    Args:
        message: which writes a setting as name=value.
        origins: where each setting's value comes from; empty: the command line.

    Returns:
        An addition to the message, empty if there is nothing to say.
    """
    names_by_origin: dict[str, list[str]] = {}
    for name in dict.fromkeys(re.findall(r"\b([a-z][a-z_0-9]+)=", message)):
        if origins.get(name):
            names_by_origin.setdefault(origins[name], []).append(name)
    parts = [
        f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} from {origin}"
        for origin, names in names_by_origin.items()
    ]
    return f" ({'; '.join(parts)}.)" if parts else ""


def _add_descriptions(parser: Any, config_class: type) -> None:
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


# Seconds for which a process that a launcher has started leaves a mistake to the first one of its machine.
_LEFT_TO_FIRST = 10.0


def _leave_to_first() -> None:
    """Let the machine's first process say a mistake, which was started by the same command.

    Only before the processes have met: later, one of them may have a mistake of its own. Where the first one has the
    same mistake, the launcher ends this process while it waits here.
    """
    distributed = sys.modules.get("torch.distributed")
    has_met = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if os.environ.get("LOCAL_RANK", "0") != "0" and not has_met:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_LEFT_TO_FIRST)


def run_script(
    main: Callable[[], None],
    *,
    interrupted: str | Callable[[], str] = "the same command continues where a checkpoint was kept",
) -> None:
    """Call `main`; print a ValueError that this project raises as a message instead of a traceback.

    Args:
        main: the script.
        interrupted: what to say of the work so far after Ctrl-C or another signal, or what finds out.

    Raises:
        SystemExit: with status 2 after such a message, 3 after that of a run whose numbers cannot be right, 4 after
            the loss of another process, 130 after Ctrl-C, 128 and its number after another signal.
    """
    print_what_has_no_bytes()
    if "transformers" in sys.modules:
        # Bars for loading and saving would break the run's own progress bar; bars for downloads stay.
        sys.modules["transformers"].logging.disable_progress_bar()
        sys.modules["huggingface_hub"].utils.enable_progress_bars()
    # These print their warnings themselves; the root logger's handler would print each a second time.
    for library in ("huggingface_hub", "transformers"):
        logging.getLogger(library).propagate = False
    shown = logging.StreamHandler()
    shown.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[shown])
    logging.getLogger("nanorlhf").setLevel(logging.INFO)
    raise_in_script()
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:  # the main process says what all would say; errors of one process are printed
        logging.getLogger("nanorlhf").setLevel(logging.ERROR)
    try:
        main()
    except ValueError as error:
        if not is_ours(error.__traceback__):
            raise
        if is_main or not isinstance(error, OF_ALL_PROCESSES):
            _leave_to_first()
            print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except WrongNumbers as error:
        if is_main:  # all processes raise the same
            print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(WRONG_NUMBERS)
    except RuntimeError as error:
        if sys.flags.dev_mode or not others.means_lost(error):
            raise
        others.end_program(error)
    except (KeyboardInterrupt, Stopped) as error:
        if others.means_lost(error):  # and the launcher stops the rest
            others.end_program(error)
        end_without_a_word()
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if is_main or others.speaks_for_main():  # a launcher sends the signal to all
            name = "\ninterrupted" if stopped.number == signal.SIGINT else name_of(stopped.number)
            name += others.named_gone() if stopped.number == signal.SIGTERM else ""
            print(f"{name}: {interrupted if isinstance(interrupted, str) else interrupted()}", file=sys.stderr)
        sys.exit(stopped.code)
    finally:
        ignore_while_python_ends()


def _take_yaml(args: list[str], names: list[str], owner: str) -> tuple[list[str], Path | None, dict]:
    """The arguments without `--config FILE`, that file, and the settings in it."""
    if "--config" not in args:
        return args, None, {}
    if args.count("--config") > 1:
        raise ValueError(
            f"--config {args.count('--config')} times: settings are read from one file, so that it is clear which "
            "value counts. Put them into one, and pass others on the command line."
        )
    position = args.index("--config")
    path = Path([*args, ""][position + 1])
    settings = read_yaml(path, option="--config", remedy="Pass the path of a YAML file of settings.")
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    _refuse_unknown(settings, names, f"in {path}", IN_FILE, owner)
    return args[:position] + args[position + 2 :], path, settings


def _normalized(args: list[str], settings: RLConfig) -> list[str]:
    """Split --name=value in two and turn --no_name into --name false; the parser does so only for some names."""
    switches = {f"no_{name}": f"--{name}" for name, value in vars(settings).items() if isinstance(value, bool)}
    words = []
    for arg in args:
        switch = switches.get(arg.removeprefix("--").replace("-", "_")) if arg.startswith("--") else None
        if switch:
            words += [switch, "false"]
        else:
            words += arg.split("=", 1) if arg.startswith("--") else [arg]
    return _joined(words, "lora_target_modules")


def _joined(args: list[str], name: str) -> list[str]:
    """Make one text, with commas, of the words after a setting: --name a b and --name a,b are the same."""
    option = next((arg for arg in args if arg.replace("-", "_") == f"__{name}"), None)
    if option is None:
        return args
    first = args.index(option) + 1
    end = next((place for place in range(first, len(args)) if args[place].startswith("--")), len(args))
    return [*args[:first], *([",".join(args[first:end])] if end > first else []), *args[end:]]


def _gather_rewards(args: list[str]) -> list[str]:
    """Combine every `--reward NAME [WEIGHT]` into --rewards and --reward_weights; the default weight is 1."""
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
    if both := {"--rewards", "--reward_weights"}.intersection(others):
        raise ValueError(
            f"--reward beside {' and '.join(sorted(both))}: these are two ways to say the same, and one would be "
            "lost. Write every reward as --reward NAME WEIGHT, or all of them after --rewards and --reward_weights."
        )
    if not all(rewards):
        raise ValueError(
            "--reward without a name: need a reward of the task, a reward model, file.py:function or module:function."
        )
    others += ["--rewards", *(reward[0] for reward in rewards)]
    if any(len(reward) == 2 for reward in rewards):
        others += ["--reward_weights", *([*reward, "1.0"][1] for reward in rewards)]
    return others


def _typed(args: list[str]) -> dict[str, str | None]:
    """The settings of a command line in which names stand apart from values; None: without a value."""
    settings: dict[str, list[str]] = {}
    for arg in args:
        if arg.startswith("--"):
            values = settings[arg[2:]] = []
        elif settings:
            values.append(arg)
    return {name: " ".join(values) or None for name, values in settings.items()}


def _refuse_unknown(given: dict[str, Any], names: list[str], where: str, form: str, owner: str) -> None:
    message = unknown_settings(given, names, where=where, form=form, owner=owner)
    if message:
        raise ValueError(message)
