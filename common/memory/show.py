"""A memory plan in words: two lines for the start of a run, and the whole for --plan and config.yaml."""

from __future__ import annotations  # for type hints whose import would take seconds

import math

from common.config import AUTO, RLConfig
from common.memory import constants
from common.memory.cast import spread_over
from common.memory.plan import GB, Phase, Plan

# How wide a line of the table may get.
WIDTH = 118
# Parts of a phase below this are not named.
_SMALLEST = 5e6


def short(plan: Plan, config: RLConfig) -> list[str]:
    """One or two lines for the start of a run.

    Args:
        plan: of the run.
        config: its settings.
    """
    host = f"{_gb(plan.host_peak.on_host)} on the host"
    if plan.processes > 1:
        host += f", for each of {plan.processes} processes"
    if plan.card.kind == "cpu":
        need = f"memory plan: {_gb(plan.host_peak.on_host)} of {_gb(plan.host or 0)}"
        need += "" if plan.sources else " and activations"
        need += f", for each of {plan.processes} processes" if plan.processes > 1 else ""
        return [f"{need}; {_choices(plan, config)}"]
    peak = plan.peak
    return [
        f"memory plan: {_gb(peak.on_device)} of {_gb(plan.card.total)} on {plan.card.name} ({peak.name}), {host}",
        f"  {_choices(plan, config)}",
    ]


def whole(plan: Plan, config: RLConfig) -> list[str]:
    """The whole plan: what is there in each phase, what was chosen, and what is assumed.

    Args:
        plan: of the run.
        config: its settings.
    """
    card, sizes = plan.card, plan.cast.sizes
    trained = sum(sizes.adapter) if config.use_lora else sizes.parameters
    method = f"LoRA, {trained:,} trained" if config.use_lora else "all trained"
    method = f"4-bit {method}" if config.load_in_4bit else method
    where = f"{card.name}, {_gb(card.total)}" if card.kind == "cuda" else f"the CPU, {_gb(plan.host or 0)}"
    lines = [f"memory plan of {config.model}: {sizes.parameters:,} parameters, {method}; on {where}"]
    lines += [*_of_processes(plan, config), ""]
    lines += _table(plan)
    lines += ["", _choices(plan, config)]
    if card.kind == "cuda" and config.sampler == "vllm":
        length = config.max_prompt_length + config.max_completion_length
        lines.append(
            f"vLLM: room for {plan.sequences} completions of {length:,} tokens at a time, "
            f"{plan.cast.engine.sequence / GB:.3f} GB each"
            + (" on each of its devices" if config.vllm_tensor_parallel > 1 else "")
        )
    if plan.processes > 1:
        lines.append(push(plan, config))
    if plan.cast.server:
        lines.append(server(plan, config))
    lines += [f"not counted: {each}" for each in plan.cast.not_counted]
    if plan.sources:
        lines.append(f"passes: by {' and '.join(sorted(plan.sources))}")
    if card.kind == "cuda":
        lines.append("assumed: " + ", ".join(f"{name} {value}" for name, value in constants.ASSUMED.items()))
    if plan.host is None:
        lines.append("main memory: needed as shown; what that machine has is not known here")
    lines.append("it fits" if plan.fits else f"it does not fit: {plan.problem}")
    return lines


def _of_processes(plan: Plan, config: RLConfig) -> list[str]:
    """How many processes there are, and how they share the work; nothing for one."""
    if plan.processes == 1:
        return []
    machines = "one machine" if plan.nodes == 1 else f"{plan.nodes} machines"
    models = f"1/{plan.processes} of every model" if is_spread(plan, config) else "whole models"
    engines = ""
    if config.sampler == "vllm":
        count = plan.processes // config.vllm_tensor_parallel
        parts = config.vllm_tensor_parallel
        engines = f", {count} engines of {parts} processes each" if parts > 1 else ", an engine each"
    together = plan.processes // plan.nodes
    host = f"main memory of a machine: {_gb(together * plan.host_peak.on_host)} for its {together} processes"
    return [
        f"{plan.processes} processes on {machines}, each with such a device, {models}{engines}; a line is for each",
        host,
    ]


def is_spread(plan: Plan, config: RLConfig) -> bool:
    """Whether the plan's models are spread over its processes."""
    return spread_over(config, plan.processes) > 1


def push(plan: Plan, config: RLConfig) -> str:
    """What a push moves, with all processes.

    Args:
        plan: of the run.
        config: its settings.
    """
    size, width = plan.cast.sizes.parameters, plan.cast.policy.passes.compute.itemsize
    kind = str(plan.cast.policy.passes.compute).removeprefix("torch.")
    link = "over the network and within machines" if plan.nodes > 1 else "within the machine"
    largest = f"one tensor of at most {_gb(max(plan.cast.sizes.weights) * width)} at a time"
    if config.sampler == "transformers":
        return "push: none, the sampler uses the policy itself"
    parts = []
    if is_spread(plan, config):
        others = size * width * (plan.processes - 1) // plan.processes
        parts.append(f"each process gathers {_gb(others)} in {kind}, {link}, {largest}")
    if config.sampler == "vllm_server":
        parts.append(f"the main process sends {_gb(size * width)} in {kind} to the server")
    return f"push: {', and '.join(parts) or f'nothing between processes: each has the whole policy, {largest}'}"


def server(plan: Plan, config: RLConfig) -> str:
    """What vLLM's server needs on its own devices, and how many completions have room on a card like the trainer's.

    Args:
        plan: of a run with sampler=vllm_server.
        config: its settings.
    """
    engine, length = plan.cast.server, config.max_prompt_length + config.max_completion_length
    need = (
        f"the server, on devices of its own: {_gb(engine.weights)} of weights, {_gb(engine.work)} of activations and "
        f"graphs, {engine.sequence / GB:.3f} GB for each completion of {length:,} tokens"
    )
    if plan.card.kind == "cpu":
        return need
    share = constants.VLLM_LARGEST_SHARE if config.vllm_memory_share == AUTO else config.vllm_memory_share
    left = share * plan.card.total - engine.weights - engine.work
    if left < engine.sequence:
        return f"{need}; {share:g} of {plan.card.name} has no room for that: pass a larger --vllm_tensor_parallel"
    rows = f": room for {math.floor(left / engine.sequence)} at a time" if engine.sequence else ""
    return f"{need}; with {share:g} of {plan.card.name}{rows}"


def _table(plan: Plan) -> list[str]:
    on_cpu = plan.card.kind == "cpu"
    names = [phase.name for phase in plan.phases]
    width = max(map(len, [*names, "phase (GB)"]))
    lines = [f"{'phase (GB)':<{width}} {'' if on_cpu else ' device '}   host  what is there"]
    for phase in plan.phases:
        amounts = f"{phase.on_host / GB:7.2f}" if on_cpu else f"{phase.on_device / GB:7.2f} {phase.on_host / GB:7.2f}"
        lines.append(f"{phase.name:<{width}} {amounts}  {_parts(phase, on_cpu=on_cpu)}")
    peaks = (
        f"{plan.host_peak.on_host / GB:7.2f}"
        if on_cpu
        else f"{plan.peak.on_device / GB:7.2f} {plan.host_peak.on_host / GB:7.2f}"
    )
    return [*lines, f"{'most':<{width}} {peaks}"]


def _parts(phase: Phase, *, on_cpu: bool) -> str:
    """What is on the device, the largest first; then what is in main memory."""
    texts = [_named(phase.device), _named(phase.host)]
    return texts[1] if on_cpu else " | host: ".join(text for text in texts if text)


def _named(parts: dict[str, int]) -> str:
    shown = sorted(((name, size) for name, size in parts.items() if size >= _SMALLEST), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / GB:.2f}" for name, size in shown)


def _choices(plan: Plan, config: RLConfig) -> str:
    """What was chosen, and whether the user or the plan chose it."""
    choices, parts = plan.choices, []
    offloaded = [each.name for each in plan.cast.models if each.weights] if choices.offload == "always" else []
    moved = f" (off the device while idle: {', '.join(offloaded)})" if offloaded else ""
    by_plan = " (auto)" if config.offload == AUTO else ""
    parts.append(f"offload {choices.offload}{by_plan}{moved}")
    if choices.offload == "always" and plan.card.kind == "cuda" and not choices.pins:
        parts.append("copies not all pinned, since main memory is short")
    chosen = " (auto)" if config.max_tokens_per_microbatch == AUTO else ""
    parts.append(f"max_tokens_per_microbatch {choices.max_tokens_per_microbatch}{chosen}")
    if config.sampler == "vllm":
        chosen = " (auto)" if config.vllm_memory_share == AUTO else ""
        parts.append(f"vllm_memory_share {choices.vllm_memory_share:g}{chosen}")
        if plan.card.kind == "cuda":
            parts.append(f"vllm_sleep_level {config.vllm_sleep_level}")
    return ", ".join(parts)


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
