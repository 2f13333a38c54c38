"""What a run says of itself when it ends or is interrupted: how good the policy became, where it is, how to go on."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from common.config import RLConfig
from common.runs.best import BEST_LINK, Best
from common.runs.checkpoints import FINAL_FOLDER, damage_of, latest_checkpoint, load_state, step_of
from common.runs.log import read_metrics
from common.runs.longer import longer_command, patience_command
from common.runs.plots import CURVES_FILE


def describe_outcome(folder: Path, config: RLConfig, best: Best | None, num_eval_prompts: int) -> list[str]:
    """Lines about a finished run.

    Args:
        folder: the run's.
        config: its settings.
        best: the pointer to its best checkpoint.
        num_eval_prompts: how many prompts are held out.
    """
    folder, lines = folder.resolve(), read_metrics(folder)
    name = "eval/accuracy" if any("eval/accuracy" in line for line in lines) else "eval/score"
    evaluations = [line for line in lines if name in line]
    state = load_state(folder / FINAL_FOLDER)
    summary = []
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        before, after = f"{first[name]:.3f} before (step {first['step']})", f"{last[name]:.3f} after"
        summary.append(f"{name} on {num_eval_prompts} held-out prompts: {before}, {after} step {last['step']}")
    summary.append(f"curves: {folder / CURVES_FILE}")
    if best is not None:
        summary += _describe_best(folder, best, state["step"], use_lora=config.use_lora)
    summary.append(f"model: {folder / FINAL_FOLDER} (the policy after the last step, {state['step']})")
    if latest_checkpoint(folder) is not None:
        longer = longer_command(folder, config.num_steps, length_matters(config))
        if state["stopped_early"]:
            longer = patience_command(folder)
        summary.append(f"to train longer: the same command with {longer}")
    return summary


def _describe_best(folder: Path, best: Best, last_step: int, *, use_lora: bool) -> Iterator[str]:
    step, value = step_of(best["checkpoint"]), f"{best['metric']} {best['value']:.3f}"
    if step == 0:
        yield f"best: the untrained policy (step 0, {value}); no evaluation after it was better, so there is no best/"
        return
    link, checkpoint = folder / BEST_LINK, folder / best["checkpoint"]
    place = link if link.is_symlink() and link.is_dir() else checkpoint
    if not place.is_dir():
        where = "which is in final/" if step == last_step else "of which there is no checkpoint"
        yield f"best: the policy of step {step} ({value}), {where}"
        return
    yield f"best: {place} (step {step}, {value})"
    if use_lora:
        command = f"python -m common.merge --model {shlex.quote(str(place))} --output FOLDER"
        yield f"  an adapter; a complete model: {command}"


def how_to_continue(folder: Path, config: RLConfig) -> str:
    """What the same command does with a run that was interrupted.

    Args:
        folder: the run's, which need not exist.
        config: its settings.
    """
    final = folder / FINAL_FOLDER
    if final.is_dir() and damage_of(final) is None:
        state = load_state(final)
        if state["step"] >= config.num_steps or state["stopped_early"]:
            return f"the run has finished, and its model is in {final}"
    latest = latest_checkpoint(folder) if folder.is_dir() else None
    if latest is not None:
        resume = " with --resume auto" if config.resume == "never" else ""
        return f"the same command{resume} continues from {latest.name}"
    reason = f"there is no checkpoint yet (save_every={config.save_every})"
    if not config.save_every:
        reason = "save_every=0 keeps no checkpoint"
    return f"{reason}, so the same command starts again from the first step"


def length_matters(config: RLConfig) -> str:
    """What a larger num_steps changes besides the end of a run; empty: nothing."""
    if config.lr_scheduler == "constant":
        return ""
    return f"with lr_scheduler={config.lr_scheduler} the learning rate falls until the last step"
