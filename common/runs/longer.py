"""Whether a run may be made longer, and what its user has to type for that.

At a constant learning rate, and for early stopping, the number of steps only says when a run ends. A schedule that
ends gives every step another rate if the run is longer, so it has to be extended by an explicit choice.
"""

import logging
import shlex
from pathlib import Path
from typing import Any

from common.runs.checkpoints import (
    FINAL_FOLDER,
    STATE_FILE,
    damage_of,
    latest_checkpoint,
    load_state,
    named_checkpoints,
)

logger = logging.getLogger("nanorlhf")

Settings = dict[str, Any]


def grows(name: str, stored: Settings, now: Settings) -> bool:
    """Whether a setting is at least what it was; a patience of 0 never ends the run, so it is the most.

    Args:
        name: num_steps or early_stopping_patience.
        stored: the run's settings so far.
        now: those of the command.
    """
    if name == "early_stopping_patience":
        return now[name] == 0 or 0 < stored[name] <= now[name]
    return now[name] >= stored[name]


def check_length(folder: Path, stored: Settings, now: Settings, length_matters: str) -> None:
    """Refuse to make a run longer without a word, if every later step differs from what it would have been.

    Args:
        folder: the run's.
        stored: its settings so far.
        now: those of the command.
        length_matters: what a larger num_steps changes besides the end of the run.

    Raises:
        ValueError: says what to type.
    """
    latest, old, new = latest_checkpoint(folder), stored.get("num_steps"), now["num_steps"]
    if old is None or new <= old or latest is None:  # without a checkpoint it begins anew, with the new length
        return
    raise ValueError(
        f"output_dir={folder}: num_steps (stored {old}, now {new}): {length_matters}, so the steps from here on would "
        f"not be those that the run was begun with. To train longer all the same, pass --num_steps {new} --resume "
        f"extend: it continues from {latest.name}, and the rates after it are those of a run of {new} steps. Pass "
        f"--num_steps {old} to end the run as it was begun, or another --output_dir for a new run."
    )


def check_unfinished(folder: Path, stored: Settings, now: Settings, length_matters: str) -> None:
    """Refuse a finished run with what would make it longer.

    Args:
        folder: the run's.
        stored: its settings so far.
        now: those of the command.
        length_matters: what a larger num_steps changes besides the end of the run; empty: nothing.

    Raises:
        ValueError: the run has finished, or its final/ is spoiled and there is nothing to write it again from.
    """
    final, named = folder / FINAL_FOLDER, named_checkpoints(folder)
    state = _state_of_final(folder, has_checkpoints=bool(named)) if final.exists() else None
    if state is None:
        return
    patience, stopped_early = now.get("early_stopping_patience"), state.get("stopped_early", False)
    old_patience = state.get("early_stopping_patience", stored.get("early_stopping_patience", 0))
    early = stopped_early and (patience is None or 0 < patience <= old_patience)
    if state["step"] < now["num_steps"] and not early and named:
        return
    what = f"{'early, ' if stopped_early else ''}after step {state['step']} of {now['num_steps']}"
    if latest := latest_checkpoint(folder):
        longer = longer_command(folder, now["num_steps"], length_matters)
        longer += f": {length_matters}, and with extend it falls until the new one" if length_matters else ""
        if early:
            longer = f"{_output_dir(folder)} --early_stopping_patience with more than {old_patience}, or with 0"
        reason = f" after {old_patience} evaluations without a new best" if early else ""
        how = f"To continue from {latest.name}{reason}, pass {longer}"
    else:
        how = "Its checkpoints are all damaged" if named else "It kept no checkpoint to continue from"
        how += (
            f", so it cannot be made longer. To train its model further, begin a new run: --model "
            f"{shlex.quote(str(final))} with another --output_dir. Checkpoints are kept every save_every steps: pass "
            f"a --save_every of at most {state['step']}"
        )
    raise ValueError(
        f"output_dir={folder}: the run there has finished ({what}); its model is in {final}. {how}. Pass another "
        "--output_dir for a new run."
    )


def _state_of_final(folder: Path, *, has_checkpoints: bool) -> dict[str, Any] | None:
    """What is stored with final/; None, with a warning, if something of it is missing and will be written again."""
    final = folder / FINAL_FOLDER
    if final.is_file():
        raise ValueError(
            f"output_dir={folder}: {FINAL_FOLDER} is a file, and the trained model goes into a folder of that name. "
            "Move the file away, or pass another --output_dir."
        )
    damage = damage_of(final)
    if damage is None:
        return load_state(final)
    if not has_checkpoints:
        raise ValueError(
            f"output_dir={folder}: {FINAL_FOLDER}/ is damaged ({damage}), and the run kept no checkpoint to continue "
            f"from. Delete {final} to run it again from its beginning, or pass another --output_dir."
        )
    if (final / STATE_FILE).is_file() and not damage.endswith("is missing"):  # perhaps somebody has edited it
        raise ValueError(
            f"output_dir={folder}: {FINAL_FOLDER}/ is not as it was written: {damage}. What is there is not "
            f"overwritten. Delete {final} to have it written again from the last checkpoint, or pass another "
            "--output_dir."
        )
    logger.warning("%s is damaged: %s. It is written again at the end of the run.", final, damage)
    return None


def longer_command(folder: Path, num_steps: int, length_matters: str) -> str:
    """What to add to a run's command to train longer.

    Args:
        folder: the run's.
        num_steps: its steps; twice as many are proposed.
        length_matters: as in `check_unfinished`.
    """
    extend = " --resume extend" if length_matters else ""
    return f"{_output_dir(folder)} --num_steps {2 * num_steps}{extend}"


def patience_command(folder: Path) -> str:
    """What to add to the command of a run that stopped early."""
    return f"{_output_dir(folder)} --early_stopping_patience 0"


def _output_dir(folder: Path) -> str:
    return f"--output_dir {shlex.quote(str(folder))}"
