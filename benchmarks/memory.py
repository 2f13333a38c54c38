"""Peak memory of the update and of the bare loop, each in its own process: a process keeps memory it once used."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.updates import BareLoop, BareMicrobatch, update
from common.rollouts import Rollouts
from common.runs.metrics import GB, memory_report
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer


def compare_memory(config: GRPOConfig, rollouts: Rollouts, microbatches: list[BareMicrobatch]) -> dict:
    """What one update needs beyond the model, in GB of 2^30 bytes: gradients, optimizer state and activations.

    Args:
        config: of the trainer.
        rollouts: with advantages.
        microbatches: those of the update, on the CPU.

    Returns:
        For "update" and "bare": loaded (memory allocated with the model loaded; on the CPU resident memory), peak, and
        their difference growth. And ratio, the growth of the update over that of the bare loop.
    """
    gigabytes = {
        "update": _in_new_process(_peak_of_update, config, rollouts),
        "bare": _in_new_process(_peak_of_bare_loop, config, microbatches),
    }
    return {**gigabytes, "ratio": gigabytes["update"]["growth"] / gigabytes["bare"]["growth"]}


def _in_new_process(measure: Callable, *arguments: object) -> dict[str, float]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=transformers_logging.disable_progress_bar) as process:
        return process.submit(measure, *arguments).result()


def _peak_of_update(config: GRPOConfig, rollouts: Rollouts) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        # A sampler without its own weights: only the policy is on the device.
        trainer = GRPOTrainer(replace(config, sampler="transformers", output_dir=str(Path(folder) / "run")))
        trainer.current_step = 1
        with trainer.models.use("policy"):  # moves it to the device, where it stays
            pass
        return _peak(trainer.models.device, lambda: update(trainer, rollouts))


def _peak_of_bare_loop(config: GRPOConfig, microbatches: list[BareMicrobatch]) -> dict[str, float]:
    bare = BareLoop(config)
    return _peak(bare.device, lambda: bare.update([microbatch.to(bare.device) for microbatch in microbatches]))


def _peak(device: torch.device, work: Callable[[], None]) -> dict[str, float]:
    earlier = memory_report(device)  # resets the peak on a GPU
    loaded = torch.cuda.memory_allocated() / GB if device.type == "cuda" else earlier["memory/host_gb"]
    work()
    peak = memory_report(device)["memory/peak_gb"]
    assert device.type == "cuda" or peak > earlier["memory/peak_gb"], "loading needed more memory than the update"
    return {"loaded": loaded, "peak": peak, "growth": peak - loaded}
