"""A memory plan in words: two lines for the start of a run, and the whole for --plan and config.yaml."""

from __future__ import annotations  # for type hints whose import would take seconds

from common.config import AUTO, RLConfig
from common.memory import constants
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
    if plan.card.kind == "cpu":
        need = f"memory plan: {_gb(plan.host_peak.on_host)} of {_gb(plan.host or 0)}"
        return [f"{need}{'' if plan.sources else ' and activations'}; {_choices(plan, config)}"]
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
    lines = [f"memory plan of {config.model}: {sizes.parameters:,} parameters, {method}; on {where}", ""]
    lines += _table(plan)
    lines += ["", _choices(plan, config)]
    if card.kind == "cuda" and config.sampler == "vllm":
        length = config.max_prompt_length + config.max_completion_length
        lines.append(
            f"vLLM: room for {plan.sequences} completions of {length:,} tokens at a time, "
            f"{plan.cast.engine.sequence / GB:.3f} GB each"
        )
    lines += [f"not counted: {each}" for each in plan.cast.not_counted]
    if plan.sources:
        lines.append(f"passes: by {' and '.join(sorted(plan.sources))}")
    if card.kind == "cuda":
        lines.append("assumed: " + ", ".join(f"{name} {value}" for name, value in constants.ASSUMED.items()))
    if plan.host is None:
        lines.append("main memory: needed as shown; what that machine has is not known here")
    lines.append("it fits" if plan.fits else f"it does not fit: {plan.problem}")
    return lines


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
