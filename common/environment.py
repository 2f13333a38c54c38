"""State of the whole process: environment variables, random state, and undoing what libraries change.

No heavy import at the top: the environment must be prepared before torch is imported.
"""

import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from common.caches import use_writable_caches
from common.host import allowed_cpus, num_cpus

_ENVIRONMENT = {
    # Idle threads of libgomp spin. On shared cores, two threads are then up to 25 times slower than one.
    "OMP_WAIT_POLICY": "PASSIVE",
    # oneDNN keeps a program of up to a megabyte for each of the last 1024 shapes that it multiplied, and the number of
    # tokens changes with every pass. A pass has some thirty shapes.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Lengths change at every step; without this, memory fragments. vLLM 0.25 to 0.28 must switch it off for their own
    # pool, and read this name instead of PYTORCH_ALLOC_CONF.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def prepare_environment() -> None:
    """Set the environment variables that torch and vLLM read at import; variables that are already set stay.

    Warns if torch was imported first, because its idle threads will spin.
    """
    too_late = "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _follow_quota()
    use_writable_caches()
    # At every start it warns of a missing CPU kernel for inference in 4 bits, which nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if too_late and os.environ.get("OMP_NUM_THREADS") != "1":
        warnings.warn(
            "torch was imported before common: OMP_WAIT_POLICY=PASSIVE comes too late, and on a CPU that other "
            "processes use too, torch can be many times slower. Import common first, or set OMP_WAIT_POLICY=PASSIVE "
            "in the shell.",
            stacklevel=2,
        )


def _follow_quota() -> None:
    """Let torch start as many threads as the cgroup's quota lets run: it looks at the machine alone.

    Threads above the quota are stopped for most of the time, in the middle of what the others wait for.
    """
    cpus = num_cpus()
    if "OMP_NUM_THREADS" not in os.environ and "torch" not in sys.modules and cpus < allowed_cpus():
        os.environ["OMP_NUM_THREADS"] = str(cpus)
        _said_of_threads.append(
            f"OMP_NUM_THREADS={cpus}: this process may run on {allowed_cpus()} CPUs, but its cgroup has a quota "
            f"of {cpus}; set OMP_NUM_THREADS for another number of threads"
        )


_said_of_threads: list[str] = []


def said_of_threads() -> list[str]:
    """A line, if this process was given fewer threads than torch would take."""
    return list(_said_of_threads)


def print_what_has_no_bytes() -> None:
    """Print a character that the terminal's encoding lacks, as ü under LC_ALL=C, as an escape: no error ends a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else it is a test's or a notebook's, which takes any text
            stream.reconfigure(errors="backslashreplace")


# What a launcher tells each of several processes, and torch needs to find the others.
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_launch() -> None:
    """Refuse an environment that speaks of several processes, but not of where they are.

    Raises:
        ValueError: names the variables that are missing.
    """
    given = {name: os.environ[name] for name in _LAUNCH if os.environ.get(name)}
    is_launched = given.get("WORLD_SIZE", "1") != "1" or given.get("LOCAL_RANK", "-1") != "-1"
    missing = [name for name in _LAUNCH if name not in given]
    if is_launched and missing:
        script, number = os.path.basename(sys.argv[0]), given.get("WORLD_SIZE", "1")
        raise ValueError(
            f"{', '.join(f'{name}={value}' for name, value in given.items())} in the environment, without "
            f"{', '.join(missing)}: this would be one of several processes that cannot find each other, as in a "
            "container or a Slurm step that sets only some of these variables. Start the processes with `torchrun "
            f"--nproc_per_node {number} --master_addr 127.0.0.1 --master_port 29500 {script}` or `accelerate launch`, "
            "which set all of them; or a single one with "
            f"`env {' '.join(f'-u {name}' for name in given)} python {script}`."
        )


def why_restarts_fail() -> str | None:
    """A line, if torchrun is to start processes again that would then look for the dead ones.

    Its own store keeps the addresses under which gloo found the processes, and new ones read them.
    """
    most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if most == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1":  # --master_port makes torchrun ignore it
        return (
            f"--max-restarts {most} with --master_port: torchrun ignores TORCH_DISABLE_SHARE_RDZV_TCP_STORE then, so "
            "after a restart processes would look for the dead ones, and most restarts fail. Pass --rdzv_backend c10d "
            "--rdzv_endpoint 127.0.0.1:29500 in place of --master_addr and --master_port."
        )
    return (
        f"--max-restarts {most} without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment: after a "
        "restart, processes would look for the dead ones, and most restarts fail. Set it before torchrun."
    )


CPU_INFO = Path("/proc/cpuinfo")


def cpu_computes_bfloat16() -> bool:
    """Whether this machine's CPU multiplies in bfloat16; True where it does not say what it can do."""
    lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPU_INFO.is_file() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), None)
    return flags is None or bool({"avx512_bf16", "amx_bf16", "bf16"}.intersection(flags))  # bf16: ARM


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random state of Python, numpy and torch after the block."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside the block; None: as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def process_unchanged() -> Iterator[None]:
    """Undo what importing vLLM and creating an engine change in this process, and hide the warnings."""
    import torch

    with ExitStack() as stack, preserved_random_state(), warnings.catch_warnings(action="ignore"):
        stack.callback(logging.disable, logging.root.manager.disable)
        if os.environ.get("VLLM_LOGGING_LEVEL") == _ENVIRONMENT["VLLM_LOGGING_LEVEL"]:
            logging.disable(logging.WARNING)
        stack.enter_context(redirect_stdout(sys.__stdout__))  # vLLM needs a real file; a notebook's stdout is none
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(setattr, sys, "excepthook", sys.excepthook)
        stack.callback(setattr, torch, "set_num_threads", torch.set_num_threads)
        stack.callback(setattr, torch.accelerator, "synchronize", torch.accelerator.synchronize)
        stack.callback(setattr, torch.accelerator, "empty_cache", torch.accelerator.empty_cache)
        yield


def _restore_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
