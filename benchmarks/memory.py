"""Peak memory of the update and of the bare loop, each in a process of its own that has never had another peak."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.updates import BareLoop, budget_microbatches, update
from common.metrics import memory_report
from common.rollouts import Rollouts
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer


def compare_memory(config: GRPOConfig, rollouts: Rollouts) -> dict:
    """GB of 2^30 bytes by way, "update" and "bare".

    Returns:
        By way: peak_gb, the highest allocation (on the CPU resident memory); weights_gb, what there was of it when
        the model was loaded; and update_gb, the difference: gradients, optimizer state and activations. And ratio,
        that of the two differences.
    """
    peaks = {}
    for way in ("update", "bare"):
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
            peaks[way] = process.submit(_peak, way, config, rollouts).result()
    return {**peaks, "ratio": peaks["update"]["update_gb"] / peaks["bare"]["update_gb"]}


def _peak(way: str, config: GRPOConfig, rollouts: Rollouts) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        # A sampler without weights of its own: nothing but what is measured is on the device.
        config = replace(config, sampler="transformers", output_dir=str(Path(folder) / "run"))
        trainer = GRPOTrainer(config)
        trainer.current_step = 1
        device = trainer.models.device
        if way == "update":
            with trainer.models.use("policy"):  # brings it to the device
                run = lambda: update(trainer, rollouts)  # noqa: E731
        else:
            bare = BareLoop(config.model, dtype=trainer.dtype, device=device, temperature=config.temperature)
            microbatches = budget_microbatches(trainer, rollouts)
            run = lambda: bare.update(microbatches)  # noqa: E731
        _first_operations(device)
        memory_report(device)  # begins a new peak on a GPU
        before = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else memory_report(device)["memory/host_gb"]
        run()
        peak = memory_report(device)["memory/peak_gb"]
        return {"peak_gb": peak, "weights_gb": before, "update_gb": peak - before}
