"""What a script does: read its settings, train, and report."""

from typing import Any

from common.cli import explain_mistakes_above, origins_in, parse_config, run_script
from common.config import RLConfig
from common.trainer import OnPolicyTrainer

# The literal on top of a script is checked when Python reads it, before `start` is called.
explain_mistakes_above()


def start(trainer: type[OnPolicyTrainer], settings: RLConfig, **reading: Any) -> None:
    """Train with the script's settings and the command line's; what is wrong with them is said in one message.

    Args:
        trainer: the algorithm.
        settings: the literal on top of the script.
        reading: what else parse_config takes: `script`, and `embedded` where the preset cpu needs more.

    Raises:
        SystemExit: with status 2 after a message about a user's mistake.
    """
    run_script(lambda: report(prepare(trainer, parse_config(settings, **reading))))


def prepare(trainer: type[OnPolicyTrainer], config: RLConfig) -> OnPolicyTrainer:
    """Make the trainer.

    Args:
        trainer: the algorithm.
        config: its settings.

    Raises:
        ValueError: see OnPolicyTrainer; with where the values come from that it is about.
    """
    try:
        return trainer(config)
    except ValueError as error:
        origins = origins_in(str(error), config.origins)
        if not origins:
            raise
        raise ValueError(f"{error}{origins}") from error


def report(trainer: OnPolicyTrainer) -> None:
    """Train, and print where the run is, how good the policy was before and after, and where its curves are.

    Args:
        trainer: ready to train.
    """
    say = print if trainer.accelerator.is_main_process else _say_nothing
    begun = f"continued after step {trainer.run.first_step - 1}" if trainer.run.checkpoint else "new"
    say(f"run: {trainer.run.folder.resolve()} ({begun})")
    if trainer.prompts.num_dropped:
        say(f"{trainer.prompts.num_dropped} prompts are longer than max_prompt_length and were dropped")
    trainer.train()
    say(*trainer.run.outcome(len(trainer.eval_prompts or ())), sep="\n")
    if trainer.accelerator.num_processes > 1:  # else the group is vLLM's, whose engine destroys it
        # Threads of a process group that are still there when Python ends can abort the process.
        trainer.accelerator.state.destroy_process_group()


def _say_nothing(*_: object, **__: object) -> None:
    """What processes other than the main one print."""
