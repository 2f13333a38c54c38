"""The place of this process among those that a launcher has started for one run."""

import logging
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from common import others
from common.config import RLConfig
from common.environment import why_restarts_fail
from common.runs.alike import check_alike
from common.runs.outcome import how_to_continue
from common.runs.trackers import choose_trackers

logger = logging.getLogger("nanorlhf")


def launched(config: RLConfig, trainer: type, folder: Path) -> Accelerator:
    """Meet the other processes of the run, if there are any, and see that they were given the same.

    Args:
        config: process_timeout and report_to are read, and all settings compared.
        trainer: the algorithm's class.
        folder: of the run, for what is said if a process is lost from now on.

    Returns:
        What knows the processes and the device.

    Raises:
        UnlikeProcesses: on all processes; says what differs, and where.
    """
    processes = others.expect(config.process_timeout, folder, partial(how_to_continue, folder.absolute(), config))
    # Without cpu=True, processes that torchrun starts on a machine without a GPU would not find each other.
    on_cpu, trackers = not torch.cuda.is_available(), choose_trackers(config.report_to) or None
    wait = InitProcessGroupKwargs(timeout=timedelta(minutes=config.process_timeout))
    accelerator = Accelerator(cpu=on_cpu, log_with=trackers, project_dir="runs", kwargs_handlers=[wait])
    if processes:
        processes.meet(gather_object([others.own_place()]), accelerator.process_index)
    check_alike(config, trainer, accelerator)
    if accelerator.is_main_process and (said := why_restarts_fail()):
        logger.warning("%s", said)
    return accelerator
