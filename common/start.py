"""What a script does: read its settings, train, and report."""

import os
import sys
from functools import partial
from typing import Any

from common.cli import PlanRequest, origins_in, parse_config, run_script, take_plan, take_serve
from common.config import RLConfig
from common.embedded import is_embedded, skeleton
from common.frozen import find_frozen, for_plan
from common.memory import show
from common.memory.start import plan_of
from common.mistakes import UnlikeProcesses
from common.models.configs import read_config
from common.runs.outcome import how_to_continue
from common.runs.run import algorithm_name, run_folder
from common.sampling.checks import check_engines
from common.serve import serve
from common.sharding import check_sharding
from common.signals import command_line
from common.tasks import check_task, reward_models
from common.terminal import printable
from common.trainer import OnPolicyTrainer
from common.update.batches import check_processes


def start(trainer: type[OnPolicyTrainer], settings: RLConfig, **reading: Any) -> None:
    """Train with the settings of the script and the command line; a mistake in them ends in one message.

    With --plan the memory plan is printed, and nothing is loaded. With --serve it is the server that samples for the
    run with these settings.

    Args:
        trainer: the algorithm.
        settings: the literal on top of the script.
        reading: other arguments of parse_config: `script`, and `embedded` if the preset cpu needs more.

    Raises:
        SystemExit: with status 2 after a message about a user's mistake, 3 if the run stopped because of its numbers,
            4 if another process of it is lost.
    """

    def main() -> None:
        request, args = take_plan(sys.argv[1:])
        is_server, args = take_serve(args)
        if is_server and request is not None:
            raise ValueError("--serve with --plan: the one starts a server, the other loads nothing. Leave out one.")
        if is_server:
            serve(parse_config(settings, args=args, **reading))
        elif request is not None:
            has_gpu = True if request.device else None
            print_plan(parse_config(settings, args=args, has_gpu=has_gpu, **reading), request)
        else:
            report(prepare(trainer, parse_config(settings, **reading)))

    run_script(main, interrupted=lambda: how_to_go_on(trainer, parse_config(settings, **reading)))


def print_plan(config: RLConfig, request: PlanRequest) -> None:
    """Print the memory plan of a run.

    Args:
        config: the run's settings.
        request: for which card, and how many of them.

    Raises:
        ValueError: there is no such model or card, or the run does not fit.
    """
    check_task(config.task)
    check_processes(config, request.processes)
    check_sharding(config, request.processes)
    if not is_embedded(config.model):
        read_config(config.model, trust_remote_code=config.trust_remote_code)  # makes the model's code known
    devices = {"device": request.device, "processes": request.processes, "nodes": request.nodes}
    policy = skeleton(config.model)
    check_engines(config, policy, request.processes)
    frozen = for_plan(find_frozen(config, is_planned=True))
    plan = plan_of(config, policy, rewards=reward_models(config), frozen=frozen, **devices)
    if os.environ.get("RANK", "0") == "0":  # the others would print the same
        print(*map(printable, show.whole(plan, config)), sep="\n", flush=True)


def prepare(trainer: type[OnPolicyTrainer], config: RLConfig) -> OnPolicyTrainer:
    """Make the trainer.

    Args:
        trainer: the algorithm.
        config: its settings.

    Raises:
        ValueError: see OnPolicyTrainer; with where the values come from that it is about.
    """
    if sys.stderr.isatty():  # somebody is watching, and data may take a while; a file keeps only what matters later
        print(f"preparing {config.task} for {config.model} ...", file=sys.stderr, flush=True)
    try:
        return trainer(config)
    except ValueError as error:
        origins = origins_in(str(error), config.origins)
        if not origins:
            raise
        kind = UnlikeProcesses if isinstance(error, UnlikeProcesses) else ValueError
        raise kind(f"{error}{origins}") from error


def how_to_go_on(trainer: type[OnPolicyTrainer], config: RLConfig) -> str:
    """What the same command does after Ctrl-C or a signal, and that command.

    Args:
        trainer: the algorithm.
        config: its settings.
    """
    return f"{how_to_continue(run_folder(config, algorithm_name(trainer)), config)}\n{command_line()}"


def report(trainer: OnPolicyTrainer) -> None:
    """Train, and print the run's folder, how good the policy was before and after, and the path of its curves.

    Args:
        trainer: ready to train.
    """
    # At once: a killed run must not take along what it has said.
    show = partial(print, flush=True) if trainer.accelerator.is_main_process else _print_nothing
    state = "new" if trainer.run.is_new else "begun again, since it had no checkpoint yet"
    if trainer.run.checkpoint:
        state = f"continued after step {trainer.run.first_step - 1}"
    show(f"run: {trainer.run.folder.resolve()} ({state})")
    if trainer.prompts.num_dropped:
        show(f"{trainer.prompts.num_dropped} prompts are longer than max_prompt_length and were dropped")
    trainer.train()
    show(*trainer.run.outcome(len(trainer.eval_prompts or ())), sep="\n")
    if trainer.accelerator.num_processes > 1:  # else the group is vLLM's, whose engine destroys it
        # Threads of a process group that are still there when Python ends can abort the process.
        trainer.accelerator.state.destroy_process_group()


def _print_nothing(*_: object, **__: object) -> None:
    """Replaces print on all processes but the main one."""
