"""The memory plan of a run: who is on the device and in main memory in each phase, and what is chosen because of it.

A plan is a function of settings, the models' configurations and the bytes that there are: nothing is loaded. What
cannot fit is refused with the first change that lets it fit; see `remedies.py`.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from common.config import AUTO, RLConfig
from common.memory import constants
from common.memory.cards import Card
from common.memory.cast import Cast, spread_over
from common.memory.passes import PassBytes
from common.memory.tenants import Tenant, pinned
from common.memory.work import Work

GB = 1e9
# Padded tokens of a micro-batch that are tried where they are chosen. With more than the largest nothing gets faster;
# below the smallest, moving idle models off the device costs less than short passes do.
LARGEST_BUDGET, SMALL_BUDGET = 32768, 8192
# On the CPU, cores are busy with fewer tokens, and small micro-batches have less padding.
BUDGET_ON_CPU = 2048
# vLLM's cache on a CPU: at most this share of the free memory, and never more than the largest request needs.
SHARE_ON_CPU = 0.4


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a plan decides.

    Attributes:
        offload: "always" or "never".
        max_tokens_per_microbatch: padded tokens.
        vllm_memory_share: of the device; on a CPU, of the free memory.
        pins: whether what moves has pinned copies; where main memory is short, some have not.
    """

    offload: str
    max_tokens_per_microbatch: int
    vllm_memory_share: float
    pins: bool = True


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a step.

    Attributes:
        name: of the phase, and of who works in it.
        device: bytes on the device by what they are for.
        host: bytes in main memory, likewise; on a CPU, everything is here.
    """

    name: str
    device: dict[str, int]
    host: dict[str, int]

    @property
    def on_device(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def on_host(self) -> int:
        """Bytes in main memory."""
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs, phase by phase.

    Attributes:
        card: the device.
        host: bytes of main memory for each process; None: of another machine, so nothing is compared with it.
        phases: in the order of a step.
        choices: what was decided.
        cast: who takes memory.
        sequences: completions at full length that the sampler has room for at once.
        sources: where the bytes of passes are from: "formula", "fake layers".
        processes: that train together, each with a device and with the phases above.
        nodes: machines that these are on, each with as many.
        problem: why it does not fit; empty if it does.
    """

    card: Card
    host: int | None
    phases: tuple[Phase, ...]
    choices: Choices
    cast: Cast
    sequences: int
    sources: frozenset[str] = frozenset()
    processes: int = 1
    nodes: int = 1
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether every phase has room."""
        return not self.problem

    @property
    def peak(self) -> Phase:
        """The phase with the most on the device."""
        return max(self.phases, key=lambda phase: phase.on_device)

    @property
    def host_peak(self) -> Phase:
        """The phase with the most in main memory."""
        return max(self.phases, key=lambda phase: phase.on_host)

    def settled(self, config: RLConfig) -> RLConfig:
        """The settings with what the plan chose in place of "auto"; offload stays, since the pool is told."""
        names = ["max_tokens_per_microbatch"]
        if config.sampler != "vllm_server":  # its share is decided where it is started
            names.append("vllm_memory_share")
        chosen = {name: vars(self.choices)[name] for name in names if vars(config)[name] == AUTO}
        if not chosen:
            return config
        settled = replace(config, **chosen)
        settled.notes, settled.origins = config.notes, config.origins
        return settled


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is.

    Attributes:
        card: the device.
        host: bytes of main memory for each process; None: nothing is compared with it.
        processes: that train together, each with a device.
        nodes: machines that these are on, each with as many.
    """

    card: Card
    host: int | None = None
    processes: int = 1
    nodes: int = 1


def make_plan(config: RLConfig, cast: Cast, machine: Machine, *, work: Work | None = None) -> Plan:
    """Plan a run: the first of the choices that fits, or the last one tried with the reason why it does not.

    Args:
        config: the run's settings.
        cast: who takes memory, with the same settings.
        machine: what there is.
        work: bytes of passes, which are kept for other plans; None: a new one.
    """
    work = work or Work(config, machine.processes)
    plan = None
    for choices in _candidates(config, machine, work):
        plan = _plan_with(choices, config, cast, machine, work)
        if plan.fits:
            return plan
    return plan


def _candidates(config: RLConfig, machine: Machine, work: Work) -> Iterator[Choices]:
    """Choices from the fastest to the one that needs the least."""
    on_cpu = machine.card.kind == "cpu"
    share = SHARE_ON_CPU if on_cpu and config.vllm_memory_share == AUTO else config.vllm_memory_share
    budgets = budgets_of(config, on_cpu=on_cpu)
    is_auto = config.max_tokens_per_microbatch == AUTO
    for offload in ("never", "always") if config.offload == AUTO and not on_cpu else (config.offload,):
        offload = "never" if offload == AUTO else offload
        for budget in budgets:
            if is_auto and offload == "never" and config.offload == AUTO and budget < min(SMALL_BUDGET, budgets[0]):
                continue
            for pins in (True, False) if offload == "always" and not on_cpu else (False,):
                yield Choices(offload=offload, max_tokens_per_microbatch=budget, vllm_memory_share=share, pins=pins)


def budgets_of(config: RLConfig, *, on_cpu: bool) -> list[int]:
    """Token budgets that are tried, the largest first; the smallest is that of one row, which always runs."""
    if config.max_tokens_per_microbatch != AUTO:
        return [config.max_tokens_per_microbatch]
    row = config.max_prompt_length + config.max_completion_length
    smallest = 1024 * math.ceil(row / 1024)
    largest = BUDGET_ON_CPU if on_cpu else LARGEST_BUDGET
    powers = [1 << n for n in range(10, 31) if smallest < 1 << n <= largest]
    return [*reversed(powers), smallest]


def _plan_with(choices: Choices, config: RLConfig, cast: Cast, machine: Machine, work: Work) -> Plan:
    """The plan with these choices, vLLM's share still open."""
    room = _Room(config, cast, machine, choices)
    trained = [_update(room, each, work) for each in cast.models if each.is_trained]
    scored = [_score(room, each, work) for each in cast.models if each.passes.kind == "score"]
    forward = list(_forward_phases(room, config, cast, work))
    passes = [*scored, *forward, *trained]
    if room.on_cpu and config.sampler == "vllm":
        share, sequences = _share_on_cpu(room, config, machine, passes)
        passes = [replace(each, host=each.host | room.cache) for each in passes]
    else:
        share, sequences = _share(room, config, machine, passes)
    room.share = share
    engine_is_there = config.sampler == "vllm" and machine.card.kind == "cuda"
    gathers = config.sampler == "vllm_server" or (config.sampler == "vllm" and room.is_spread)
    pushes = [_push(room)] if engine_is_there or gathers else []
    phases = [_load(room), *pushes, _sample(room, config, sequences)]
    if engine_is_there and config.vllm_sleep_level == 0:
        passes = [replace(each, device=each.device | {"vLLM": room.engine_bytes}) for each in passes]
    plan = Plan(
        card=machine.card,
        host=machine.host,
        phases=(*phases, *passes),
        choices=replace(choices, vllm_memory_share=share, pins=room.pins),
        cast=cast,
        sequences=sequences,
        sources=work.sources,
        processes=machine.processes,
        nodes=machine.nodes,
    )
    return replace(plan, problem=_problem(plan, room, config))


class _Room:
    """Where things are with some choices, and what a phase adds to them."""

    def __init__(self, config: RLConfig, cast: Cast, machine: Machine, choices: Choices) -> None:
        self.config, self.cast, self.machine, self.choices = config, cast, machine, choices
        self.share = 0.0  # vLLM's, known once all passes are
        self.cache: dict[str, int] = {}  # of vLLM on a CPU, which keeps it for the whole run; known then too
        self.moves = choices.offload == "always"
        self.on_cpu = machine.card.kind == "cpu"
        self.has_engine = config.sampler == "vllm" and not self.on_cpu
        self.is_spread = spread_over(config, machine.processes) > 1
        homes = [size for each in cast.models for size in each.home]
        host = machine.host
        self.rounding = pinned(homes) - sum(homes)
        self.pins = host is None or pinned(homes) <= host // 2  # see PinnedMemory in models/mover.py
        if not self.pins:
            self.rounding = min(self.rounding, host // 4)
        if self.is_spread:  # what is spread moves by plain copies
            self.pins, self.rounding = True, 0

    @property
    def engine_bytes(self) -> int:
        """The engine's part of the device while it samples."""
        return int(self.share * self.machine.card.total) if self.has_engine else 0

    def present(self, *names: str) -> dict[str, int]:
        """Bytes of models on the device while these are used."""
        needed = set(names) | {each.needs for each in self.cast.models if each.name in names}
        found = {}
        for each in self.cast.models:
            if not self.moves or self.on_cpu or each.name in needed:
                found[each.name] = each.weights
                if each.moments and (not self.moves or self.on_cpu):
                    found[f"optimizer of {each.name}"] = each.moments
        return found

    def phase(self, name: str, *used: str, device: dict[str, int], engine: int | None = None) -> Phase:
        """A phase: residents, its own work, and what nobody sees.

        Args:
            name: of the phase.
            used: models on the device.
            device: what the phase adds.
            engine: bytes of the engine; None: it sleeps.
        """
        tensors = {name: size for name, size in (self.present(*used) | device).items() if size}
        if self.on_cpu:
            return Phase(name=name, device={}, host=tensors | self._host_of_cpu())
        lost = int(constants.FRAGMENTATION * sum(tensors.values()))
        engine = self.cast.engine.asleep if engine is None else engine
        kept = {"vLLM": engine} if self.has_engine and engine else {}
        unseen = {"fragmentation": lost, "CUDA context": constants.CONTEXT_AND_WORKSPACE}
        return Phase(name=name, device=tensors | kept | unseen, host=self._host(name))

    def _host_of_cpu(self) -> dict[str, int]:
        found = {"process": constants.HOST_PROCESS_CPU}
        found |= {f"optimizer of {each.name}": each.host for each in self.cast.models if each.host}
        if self.config.sampler == "vllm":
            found["vLLM"] = self.cast.engine.weights
        return found | self.cache

    def _host(self, name: str) -> dict[str, int]:
        """Main memory beside a GPU; all models are loaded there first."""
        found = {"process": constants.HOST_PROCESS_CUDA}
        for each in self.cast.models:
            if each.host:
                found[f"optimizer of {each.name}"] = each.host
            if self.moves or name == "load":
                found[f"{each.name}, at home"] = sum(each.home) if self.moves else each.weights
        if self.moves:
            found["rounding of pinned copies"] = self.rounding
        if self.has_engine and self.config.vllm_sleep_level == 1 and name not in ("load", "sample"):
            found["vLLM's weights"] = self.cast.engine.weights
        return {name: size for name, size in found.items() if size}


def _load(room: _Room) -> Phase:
    """Everything is loaded in main memory, the engine on the device."""
    engine = room.engine_bytes
    if room.on_cpu:
        return room.phase("load", *(each.name for each in room.cast.models), device={})
    device = {"vLLM": engine} if engine else {}
    device |= {"CUDA context": constants.CONTEXT_AND_WORKSPACE}
    return replace(room.phase("load", device={}), device=device)


def _push(room: _Room) -> Phase:
    """The policy's weights go to the engine one by one, from wherever they are."""
    engine, moves = room.cast.engine, {"one tensor": room.cast.engine.push}
    used = ("policy",) if room.is_spread else ()  # all parts of a tensor have to be there
    later = room.phase("push", *used, device=moves, engine=engine.weights + engine.asleep)
    # The first push finds an engine that has never slept, and an optimizer without moments.
    first = room.phase("push", *used, device=moves, engine=room.engine_bytes)
    kept = {name: size for name, size in first.device.items() if not name.startswith("optimizer of")}
    return max(later, replace(first, device=kept), key=lambda phase: phase.on_device)


def _sample(room: _Room, config: RLConfig, sequences: int) -> Phase:
    if room.has_engine:
        return room.phase("sample", device={}, engine=room.engine_bytes)
    if config.sampler == "vllm":
        return room.phase("sample", "policy", device={"vLLM's passes": room.cast.engine.work})
    if config.sampler == "vllm_server":  # on devices of its own
        return room.phase("sample", device={})
    cache = sequences * room.cast.engine.sequence
    return room.phase("sample", "policy", device={"cache": cache, "logits": room.cast.engine.work})


def _score(room: _Room, model: Tenant, work: Work) -> Phase:
    size = work.of(model, room.choices.max_tokens_per_microbatch).forward
    return room.phase(f"score, {model.name}", model.name, device={"forward pass": size})


def _forward_phases(room: _Room, config: RLConfig, cast: Cast, work: Work) -> Iterator[Phase]:
    """Passes without gradients: log-probs of policy and reference, and values."""
    budget = room.choices.max_tokens_per_microbatch
    for model in cast.models:
        is_asked = model.name != "policy" or config.kl_coef or config.eval_kl or config.makes_old_logprobs
        if model.passes.kind == "score" or not is_asked:
            continue
        what = "log-probs" if model.passes.kind == "policy" else "values"
        size = work.of(model, budget).forward
        gathered = model.gathered.forward
        own = {"gathered": gathered, "forward pass": max(size, model.gathered.start - gathered)}
        yield room.phase(f"{what}, {model.name}", model.name, device=own)


def _update(room: _Room, model: Tenant, work: Work) -> Phase:
    """Forward and backward passes, then the optimizer's step, which needs no activations."""
    size: PassBytes = work.of(model, room.choices.max_tokens_per_microbatch)
    gathered, passes = model.gathered.beside(size)
    own = {f"gradients of {model.name}": model.gradients}
    own |= {"gathered": gathered, "passes": passes} if gathered + passes >= model.step else {}
    own |= {"optimizer step": model.step} if gathered + passes < model.step else {}
    return room.phase(f"update, {model.name}", model.name, device={f"optimizer of {model.name}": model.moments} | own)


def _share(room: _Room, config: RLConfig, machine: Machine, passes: list[Phase]) -> tuple[float, int]:
    """VLLM's share of the device, and the completions at full length that it has room for.

    Where it is chosen: as much as all completions need, if the device has it beside what stays there.
    """
    engine, total = room.cast.engine, machine.card.total
    rows = rows_of_engine(config.completions_at_once, config, machine)
    wanted = min(config.vllm_max_num_seqs, rows)
    share = room.choices.vllm_memory_share
    if config.sampler == "vllm_server":
        return 0.0, 0
    if not room.has_engine:
        return (SHARE_ON_CPU if share == AUTO else share), min(256, rows)
    if share == AUTO:
        # The first push finds the whole engine awake.
        beside = max(room.phase("", device=each, engine=0).on_device for each in ({}, {"": engine.push}))
        if config.vllm_sleep_level == 0:
            beside = max([beside, *(phase.on_device - engine.asleep for phase in passes)])
        most = min((total - beside) / total - constants.SPARE, constants.VLLM_LARGEST_SHARE)
        # Upwards as much as it can use, downwards what there is.
        share = min(math.ceil(1000 * engine.holding(wanted) / total), math.floor(1000 * most)) / 1000
        share = max(share, 0.001)
    left = share * total - engine.weights - engine.work
    sequences = math.floor(left / engine.sequence) if engine.sequence else (wanted if left >= 0 else 0)
    return share, max(0, min(sequences, wanted))


def rows_of_engine(rows: int, config: RLConfig, machine: Machine | Plan) -> int:
    """Completions that each of the engines samples: of all processes that share it."""
    parts = config.vllm_tensor_parallel if config.sampler == "vllm" else 1
    return math.ceil(rows * parts / machine.processes)


def _share_on_cpu(room: _Room, config: RLConfig, machine: Machine, passes: list[Phase]) -> tuple[float, int]:
    """VLLM's share of the memory that is free before models are loaded, and the completions that its cache holds.

    The cache is allocated at once and stays, so where the share is chosen, it is what all phases leave. It is noted in
    the room.
    """
    engine = room.cast.engine
    evaluated = config.num_eval_prompts * config.eval_num_samples if config.eval_every else 0
    rows = max(config.completions_at_once, evaluated)
    sequences = min(config.vllm_max_num_seqs, rows_of_engine(rows, config, machine))
    share = room.choices.vllm_memory_share
    if machine.host is not None:
        free = max(machine.host - constants.HOST_PROCESS_CPU, 1)
        if config.vllm_memory_share == AUTO:
            most = max(phase.on_host for phase in [_load(room), _sample(room, config, 0), *passes])
            left = (1 - constants.SPARE_ON_CPU) * machine.host - most
            share = min(share, max(math.floor(1000 * left / free) / 1000, 0.001))
        sequences = min(sequences, int(share * free) // max(engine.sequence, 1))
    room.cache = {"vLLM's cache": sequences * engine.sequence}
    return share, sequences


def _problem(plan: Plan, room: _Room, config: RLConfig) -> str:
    """Why a plan does not fit; empty if it does."""
    if room.on_cpu:
        return _problem_of_host(plan) or _problem_of_cache(plan, room, config)
    card, peak = plan.card, plan.peak
    if room.has_engine:
        rows = rows_of_engine(config.completions_at_once, config, room.machine)
        wanted = min(config.vllm_max_num_seqs, rows, constants.FEWEST_SEQUENCES)
        least = room.cast.engine.holding(wanted if config.vllm_memory_share == AUTO else 1)
        if plan.sequences < (wanted if config.vllm_memory_share == AUTO else 1):
            share = plan.choices.vllm_memory_share
            return (
                f"vLLM gets {share:.2f} of {card.name}, {share * card.total / GB:.1f} GB, and needs {least / GB:.1f} "
                f"GB: {room.cast.engine.weights / GB:.1f} for weights, {room.cast.engine.work / GB:.1f} for "
                f"activations and graphs, and {room.cast.engine.sequence / GB:.2f} for the cache of each completion "
                f"of {config.max_prompt_length + config.max_completion_length:,} tokens"
            )
    if peak.on_device > card.total:
        parts = sorted(peak.device.items(), key=lambda item: -item[1])[:4]
        named = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)
        return (
            f"the phase `{peak.name}` needs {peak.on_device / GB:.1f} GB of {card.name}, which has "
            f"{card.total / GB:.1f}: {named}"
        )
    return _problem_of_host(plan)


def _problem_of_cache(plan: Plan, room: _Room, config: RLConfig) -> str:
    """On a CPU, that vLLM's cache does not even hold one completion."""
    if config.sampler != "vllm" or plan.sequences:
        return ""
    return (
        f"vLLM's cache gets {plan.choices.vllm_memory_share:g} of the memory that is free before models are loaded, "
        f"and one completion of {config.max_prompt_length + config.max_completion_length:,} tokens needs "
        f"{room.cast.engine.sequence / GB:.2f} GB of it"
    )


def _problem_of_host(plan: Plan) -> str:
    peak = plan.host_peak
    if plan.host is None or peak.on_host <= plan.host:
        return ""
    parts = sorted(peak.host.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)
    together = plan.processes // plan.nodes
    sharing = f", as one of {together} on this machine" if together > 1 else ""
    return (
        f"the phase `{peak.name}` needs {peak.on_host / GB:.1f} GB of main memory, and this process may use "
        f"{plan.host / GB:.1f}{sharing}: {named}"
    )
