"""The memory plan of a run that begins, and of `--plan`."""

from __future__ import annotations  # for type hints whose import would take seconds

from collections.abc import Mapping, Sequence

import torch
import transformers

from common.config import RLConfig
from common.host import host_memory
from common.memory.cards import Card, card
from common.memory.cast import Casting
from common.memory.plan import Machine, Plan, make_plan
from common.memory.remedies import refusal
from common.memory.work import Work
from common.models.loading import compute_dtype

# Of main memory: a run that needs more than this without its passes might not fit with them.
MUCH = 0.5


def this_card(processes: int = 1) -> Card:
    """The device of this process: a GPU, or the CPU, of which each of so many processes on this machine has a part."""
    if not torch.cuda.is_available():
        return Card(name="the CPU", total=host_memory(processes=processes).total, kind="cpu")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card(name=found.name, total=found.total_memory, capability=(found.major, found.minor))


def plan_of(
    config: RLConfig,
    policy: transformers.PreTrainedModel,
    *,
    rewards: Sequence[str] = (),
    frozen: Mapping[str, tuple[transformers.PreTrainedModel, Sequence[int]]] | None = None,
    device: str | None = None,
    processes: int = 1,
    nodes: int = 1,
    with_passes: bool = True,
    is_trained: bool = True,
) -> Plan:
    """The memory plan of a run.

    Args:
        config: its settings.
        policy: its modules, without storage.
        rewards: hub ids or folders of its reward models.
        frozen: as for Casting.
        device: a card that is not there, as --device names it; None: that of this process.
        processes: that train together, each on a card of its own.
        nodes: machines that these are on, each with as many, which share its main memory.
        with_passes: on a CPU, predict activations whatever they are. That takes seconds for some models, so without it
            this is done only for a run that needs much of the memory without them.
        is_trained: False for an evaluation, which only samples: num_eval_prompts prompts at once.

    Raises:
        ValueError: the card is unknown, it has no bfloat16, or the run does not fit: with the first change of its
            settings that lets it fit.
    """
    together = processes // nodes
    there = card(device) if device else this_card(together)
    _check_bfloat16(config, there)
    host = None if device else host_memory(processes=together).total
    machine = Machine(card=there, host=host, processes=processes, nodes=nodes)
    options = {"rewards": rewards, "frozen": frozen, "processes": processes, "is_trained": is_trained}
    casting = Casting(config, policy, there, **options)
    cast, work = casting.cast(config), Work(config, processes)
    plan = make_plan(config, cast, machine, work=Work(config, processes, is_counted=False))
    if there.kind == "cpu" and not with_passes and plan.host_peak.on_host < MUCH * machine.host:
        return plan
    if plan.fits:
        plan = make_plan(config, cast, machine, work=work)
    if not plan.fits:
        raise ValueError(refusal(config, plan, casting, machine, work))
    return plan


def _check_bfloat16(config: RLConfig, there: Card) -> None:
    """Refuse vLLM with bfloat16 on a card that is too old for it."""
    is_bfloat16 = compute_dtype(config, torch.device(there.kind)) == torch.bfloat16
    if config.sampler == "vllm" and is_bfloat16 and not there.computes_bfloat16:
        major, minor = there.capability
        raise ValueError(
            f"dtype={config.dtype} on {there.name}: it has compute capability {major}.{minor}, and vLLM samples in "
            "bfloat16 from 8.0 on. Pass --dtype float32, which needs twice the memory, or use a newer card."
        )
