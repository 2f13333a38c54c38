"""Processes that share one engine of vLLM, each with a part of every weight (tensor parallel).

No process gives orders: each runs vLLM's scheduler itself, and the passes of all are one. So all must ask for the same
prompts in the same order, and draw the same tokens. The prompts of all are gathered here, and each process takes the
completions of its own. With a single process per engine, nothing is exchanged.
"""

import inspect
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.rollouts import Completion
from common.sampling.protocol import Leaving, SamplingSettings
from common.sampling.vllm_corrections import replaced

Something = TypeVar("Something")

# Steps of the engine between two moments at which its processes ask each other whether one has to leave.
_STEPS_BETWEEN = 8

# Where torch reads settings of its allocator, under its old name and its new one.
_OF_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass(kw_only=True, frozen=True)
class Request:
    """What one process asks for at once.

    Attributes:
        prompt_ids: token ids of each prompt.
        settings: for all of them.
        num_generations: completions per prompt; completion i of a prompt has the seed of the prompt plus i.
        seeds: one per prompt; None: greedy.
    """

    prompt_ids: list[list[int]]
    settings: SamplingSettings
    num_generations: int
    seeds: Sequence[int | None]

    @property
    def num_rows(self) -> int:
        """How many completions."""
        return len(self.prompt_ids) * self.num_generations


class Group:
    """The processes of an engine that is there, as one of them sees it.

    Args:
        size: how many share it.

    Attributes:
        place: this process's, from 0.
    """

    def __init__(self, size: int) -> None:
        self.size, self.place, self._processes, self._leaving = size, 0, None, None
        self._steps = 0  # of the engine, the same number in all processes
        if size > 1:
            from vllm.distributed.parallel_state import get_tp_group

            group = get_tp_group()
            self.place, self._processes = group.rank_in_group, group.cpu_group
            # Nobody sends anything through its shared memory, which Python would warn of when the run ends.
            group.mq_broadcaster = None

    @contextmanager
    def together(self, leaving: Leaving | None) -> Iterator[None]:
        """Work of all processes of the group, which none of them leaves alone inside.

        Args:
            leaving: how they leave; None: they do not.
        """
        if self._processes is None or leaving is None:
            yield
            return
        with leaving.held() as says:
            self._leaving = leaving, says
            try:
                yield
            finally:
                self._leaving = None

    def gather(self, mine: Something) -> list[Something]:
        """What each process of the group gives, in their order. All must call it; it waits for the last one."""
        if self._processes is None:
            return [mine]
        given: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(given, (self._says(), mine), group=self._processes)
        self._leave_if_said(max(said for said, _ in given))
        return [each for _, each in given]

    def after_step(self) -> None:
        """Where all processes are after a step of the engine: now and then they ask whether one has to leave."""
        self._steps += 1
        if self._leaving is not None and self._steps % _STEPS_BETWEEN == 0:
            said = torch.tensor([self._says()])
            torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, group=self._processes)
            self._leave_if_said(int(said))

    def _says(self) -> int:
        return 0 if self._leaving is None else self._leaving[1]()

    def _leave_if_said(self, said: int) -> None:
        if said and self._leaving is not None:
            self._leaving[0].leave_together(said)

    def check_same(self, completions: list[Completion]) -> None:
        """Stop where processes have drawn different tokens: from there on their parts of a pass do not fit together.

        Raises:
            RuntimeError: in all of them.
        """
        if self._processes is None:
            return
        digest = 0
        for completion in completions:
            digest = zlib.crc32(array("q", [len(completion.token_ids), *completion.token_ids]), digest)
        if len(set(self.gather(digest))) > 1:
            raise RuntimeError(
                f"the {self.size} processes that share an engine of vLLM drew different tokens for the same prompts: "
                "their sums of a layer's parts differ, so the completions are not the policy's. Start again with "
                "--vllm_tensor_parallel 1, and report it with the versions of vLLM, torch and NCCL."
            )


def group_arguments(size: int) -> dict[str, Any]:
    """Arguments of vLLM's LLM for an engine that `size` processes share."""
    if size == 1:
        return {}
    arguments: dict[str, Any] = {"tensor_parallel_size": size}
    if any("expandable_segments:True" in os.environ.get(name, "") for name in _OF_ALLOCATOR):
        # vLLM's own all-reduce hands its buffers to other processes in a way that such memory does not have, and ends
        # the process with "custom_all_reduce.cuh: invalid argument" (github.com/vllm-project/vllm/issues/42609).
        arguments["disable_custom_all_reduce"] = True
    return arguments


def timeouts(minutes: float) -> dict[str, Any]:
    """Arguments of vLLM's LLM with which its processes wait no longer for one that hangs than the trainer's do.

    Args:
        minutes: the longest wait; torch's own limits are 10 with NCCL and 30 with gloo.
    """
    from vllm.engine.arg_utils import EngineArgs

    names = ("distributed_timeout_seconds", "cpu_distributed_timeout_seconds")
    known = inspect.signature(EngineArgs).parameters  # older versions of vLLM have none of them
    return {name: round(60 * minutes) for name in names if name in known}


@contextmanager
def over_gloo() -> Iterator[None]:
    """Let groups that vLLM makes inside sum over gloo on the CPU, not in shared memory of its own (0.31).

    In shared memory they would wait, spinning and without a limit, for a process that hangs, and a killed one would
    leave it behind.
    """
    from vllm.platforms import current_platform

    with ExitStack() as stack:
        if current_platform.is_cpu():
            from vllm.distributed.device_communicators import cpu_communicator

            stack.enter_context(replaced(cpu_communicator, "_CPUSHMDistributed", _NoSharedMemory))
        yield


class _NoSharedMemory:
    """Takes the place of vLLM's class: what is made from it is a _Gloo, and so no instance of it."""

    def __new__(cls, communicator: Any) -> Any:
        return _Gloo()

    @staticmethod
    def make_group_name(communicator: Any) -> str:
        """The same in all processes: vLLM asks whether they share memory."""
        return ""


class _Gloo:
    """The sums and copies that vLLM's layers ask for, by torch."""

    all_reduce = staticmethod(torch.distributed.all_reduce)
    gather = staticmethod(torch.distributed.gather)

    @staticmethod
    def all_gather_into_tensor(output: Tensor, mine: Tensor, group: torch.distributed.ProcessGroup) -> None:
        """Fill `output` with the tensors of all processes, one after another."""
        torch.distributed.all_gather(list(output.chunk(group.size())), mine, group=group)


@contextmanager
def without_compiling(size: int) -> Iterator[None]:
    """Run what vLLM has compiled at its first use as it is written, on the CPU, inside.

    Only the embeddings of an engine with several processes are (get_masked_input_and_mask of
    vocab_parallel_embedding.py): the first pass would wait 10 to 30 s for a C++ compiler, to save microseconds.
    """
    from vllm.platforms import current_platform

    with ExitStack() as stack:
        if size > 1 and current_platform.is_cpu():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
