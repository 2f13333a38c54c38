"""What to change where a plan does not fit: the first of a fixed list of changes with which it does."""

from __future__ import annotations  # for type hints whose import would take seconds

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from common.config import AUTO, RLConfig
from common.environment import cpu_computes_bfloat16
from common.memory.cast import Casting
from common.memory.plan import GB, Machine, Plan, make_plan
from common.memory.work import Work
from common.models.facts import why_no_parts
from common.sharding import why_not_spread

Changes = dict[str, Any]


# The most processes for which a refusal looks.
MOST_PROCESSES = 4096
# Cards of one machine, where a run has fewer so far.
PER_MACHINE = 8


def changes(
    config: RLConfig,
    *,
    on_cpu: bool = False,
    is_trained: bool = True,
    processes: int = 1,
    engines: tuple[int, ...] = (),
) -> Iterator[Changes]:
    """Changes of settings that need less memory, from the one that costs least.

    Args:
        config: of the run that does not fit.
        on_cpu: main memory is all that there is, so that nothing gains by moving.
        is_trained: False for an evaluation.
        processes: that train together.
        engines: processes that may share an engine of vLLM.
    """
    if config.max_tokens_per_microbatch != AUTO and is_trained:
        yield {"max_tokens_per_microbatch": AUTO}
    if config.sampler == "vllm" and config.vllm_memory_share != AUTO:
        yield {"vllm_memory_share": AUTO}
    if on_cpu:
        yield from _spread(config, processes, engines)
        yield from _on_cpu(config, is_trained=is_trained)
    else:
        yield from _on_gpu(config, processes, engines)
    length = config.max_completion_length
    while length >= 128:
        length //= 2
        yield {"max_completion_length": length}


def _on_cpu(config: RLConfig, *, is_trained: bool) -> Iterator[Changes]:
    narrow = {"dtype": "bfloat16"}
    if is_trained and not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if cpu_computes_bfloat16():  # faster too
        yield narrow
    if is_trained and not config.use_lora:
        yield {"use_lora": True, "optimizer": "adamw"}
    if config.sampler == "vllm":
        yield {"sampler": "transformers"}  # which has no copy of the weights, and is slower
    if not cpu_computes_bfloat16():
        yield narrow
    if is_trained:
        yield from _shared_base(config)


def _shared_base(config: RLConfig) -> Iterator[Changes]:
    if "value_backbone" in vars(config) and vars(config)["value_backbone"] == "own":
        yield {"use_lora": True, "optimizer": "adamw", "value_backbone": "shared"}
    if not config.load_in_4bit:
        yield {"use_lora": True, "optimizer": "adamw", "load_in_4bit": True}


def _spread(config: RLConfig, processes: int, engines: tuple[int, ...]) -> Iterator[Changes]:
    """Over the processes that there are."""
    spread = _spread_over_all(config) if processes > 1 else {}
    if spread:
        yield spread
    if config.sampler == "vllm":
        for parts in engines:
            yield spread | {"vllm_tensor_parallel": parts}


def _on_gpu(config: RLConfig, processes: int, engines: tuple[int, ...]) -> Iterator[Changes]:
    if config.offload == "never":
        yield {"offload": AUTO}
    if config.sampler == "vllm" and config.vllm_sleep_level == 0:
        yield {"vllm_sleep_level": 1}
    if config.sampler == "vllm" and config.vllm_sleep_level < 2:
        yield {"vllm_sleep_level": 2}
    yield from _spread(config, processes, engines)
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if not config.use_lora and config.optimizer != "adamw_host":
        yield {"optimizer": "adamw_host"}
    if not config.use_lora:
        yield {"use_lora": True, "optimizer": "adamw"}
    yield from _shared_base(config)


def remedy(config: RLConfig, casting: Casting, machine: Machine, work: Work) -> tuple[Changes, Plan] | None:
    """The first change with which a run fits; if no single one is enough, the first of them together.

    Args:
        config: of the run that does not fit.
        casting: finds who takes memory with other settings.
        machine: what there is.
        work: what the plan was made with.

    Returns:
        Settings to change, with the plan; None if nothing of this helps.
    """
    options = {"on_cpu": machine.card.kind == "cpu", "is_trained": casting.is_trained}
    engines = shared_engines(config, casting, machine)
    found = list(changes(config, processes=machine.processes, engines=engines, **options))
    for each in found:
        if plan := _fitting(config, each, casting, machine, work):
            return each, plan
    # Length changes what is learned: only if the others are not enough together.
    together: Changes = {}
    for each in found:
        together |= each
        if plan := _fitting(config, together, casting, machine, work):
            return _without_idle(config, together, casting, machine, work) or (together, plan)
    return None


def shared_engines(config: RLConfig, casting: Casting, machine: Machine) -> tuple[int, ...]:
    """Numbers of processes on a machine that may share an engine, above that of the settings.

    They divide the processes of a machine and the policy's tensors.
    """
    text, most = casting.sizes.config.get_text_config(), machine.processes // machine.nodes
    larger = range(config.vllm_tensor_parallel + 1, most + 1)
    return tuple(n for n in larger if most % n == 0 and not why_no_parts(text, n))


def enough_processes(config: RLConfig, casting: Casting, machine: Machine, work: Work) -> Plan | None:
    """The plan on the fewest processes, on machines like these, on which a run with these settings fits.

    Args:
        config: of the run that does not fit, with shard=full.
        casting: finds who takes memory with more processes.
        machine: what there is.
        work: what the plan was made with.

    Returns:
        The plan; None if no number is enough.
    """
    together, count = machine.processes // machine.nodes, machine.processes
    while 2 * count <= MOST_PROCESSES:
        count *= 2
        more = replace(machine, processes=count, nodes=-(-count // max(together, PER_MACHINE)))
        if machine.card.kind == "cpu":  # a machine's processes share its memory, so more of them need more machines
            more = replace(more, nodes=count // together)
        plan = make_plan(config, casting.cast(config, count), more, work=work.of_settings(config, count))
        if plan.fits:
            return plan
    return None


def _without_idle(
    config: RLConfig, together: Changes, casting: Casting, machine: Machine, work: Work
) -> tuple[Changes, Plan] | None:
    """The same without the changes that it fits without."""
    result = None
    for name in list(together):
        fewer = {other: value for other, value in together.items() if other != name}
        if plan := _fitting(config, fewer, casting, machine, work):
            together, result = fewer, (fewer, plan)
    return result


def _fitting(config: RLConfig, change: Changes, casting: Casting, machine: Machine, work: Work) -> Plan | None:
    known = {field.name for field in fields(config)}
    try:
        changed = replace(config, **{name: value for name, value in change.items() if name in known})
    except ValueError:  # these settings do not go together
        return None
    if changed.shard == "full" and machine.processes > 1 and why_not_spread(changed, machine.processes):
        return None
    cast = casting.cast(changed)
    if work.is_counted and not make_plan(changed, cast, machine, work=Work(changed, is_counted=False)).fits:
        return None  # without its passes already, which may take seconds to predict
    plan = make_plan(changed, cast, machine, work=work.of_settings(changed))
    return plan if plan.fits else None


def refusal(config: RLConfig, plan: Plan, casting: Casting, machine: Machine, work: Work) -> str:
    """What to say of a run that cannot fit, with what to do.

    Args:
        config: its settings.
        plan: which does not fit.
        casting: finds who takes memory with other settings.
        machine: what there is.
        work: what the plan was made with.
    """
    row = config.max_prompt_length + config.max_completion_length
    others = [each for each in config.other_models if each.path is not None and not each.is_trained]
    settings = ", ".join([f"model={config.model}", *(f"{each.setting}={each.path}" for each in others)])
    if casting.is_trained:
        settings += f", max_tokens_per_microbatch={config.max_tokens_per_microbatch}"
    phase = plan.peak if machine.card.kind == "cuda" else plan.host_peak
    is_alone = plan.choices.max_tokens_per_microbatch <= max(row, 1024 * -(-row // 1024))
    is_of_passes = "passes" in phase.device | phase.host
    alone = f" A micro-batch is one row of {row:,} tokens already." if is_alone and is_of_passes else ""
    found = remedy(config, casting, machine, work)
    more = _more_devices(config, casting, machine, work, is_last=found is None)
    if found is None:
        larger = "a machine with more memory" if machine.card.kind == "cpu" else "a larger card"
        smaller = " or ".join(f"--{name}" for name in ("model", *(each.setting for each in others)))
        todo = f"No setting that changes memory is enough: pass a smaller {smaller}, or use {larger}."
        return f"{settings}: {plan.problem}.{alone} {todo}{more}"
    change, fitting = found
    change = {name: value for name, value in change.items() if vars(config)[name] != value}
    flags = " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())
    if change.get("max_tokens_per_microbatch") == AUTO:
        flags = flags.replace(
            "--max_tokens_per_microbatch auto",
            f"--max_tokens_per_microbatch {fitting.choices.max_tokens_per_microbatch}",
        )
    if change.get("vllm_memory_share") == AUTO:
        flags = flags.replace("_share auto", f"_share {fitting.choices.vllm_memory_share:g}")
    need = (
        f"it then needs {fitting.peak.on_device / GB:.1f} GB"
        if machine.card.kind == "cuda"
        else (f"it then needs {fitting.host_peak.on_host / GB:.1f} GB of main memory")
    )
    return f"{settings}: {plan.problem}.{alone} Pass {flags}: {need}.{more}"


def _spread_over_all(config: RLConfig) -> Changes:
    """What to change so that models are spread over all processes."""
    return {} if config.shard == "full" else {"shard": "full"}


def _more_devices(config: RLConfig, casting: Casting, machine: Machine, work: Work, *, is_last: bool) -> str:
    """On how many devices like these the run fits with its models spread over them; empty where nobody asks.

    Args:
        config: its settings.
        casting: finds who takes memory with more processes.
        machine: what there is.
        work: what the plan was made with.
        is_last: no change of settings is enough.
    """
    is_asked = config.shard == "full" or (is_last and machine.card.kind == "cuda")
    if not (is_asked and casting.is_trained and not why_not_spread(config, max(machine.processes, 2))):
        return ""
    plan = enough_processes(replace(config, **_spread_over_all(config)), casting, machine, work)
    if plan is None:
        return ""
    size = plan.peak.on_device if machine.card.kind == "cuda" else plan.host_peak.on_host
    devices = f"{plan.processes} processes" if machine.card.kind == "cpu" else f"{plan.processes} such cards"
    where = f" on {plan.nodes} machines" if plan.nodes > 1 else ""
    flags = [f"--{name} {value}" for name, value in _spread_over_all(config).items()]
    if config.prompts_per_step % plan.processes:
        flags.append(f"--prompts_per_step {plan.processes * -(-config.prompts_per_step // plan.processes)}")
    flags = f" and pass {' '.join(flags)}" if flags else ""
    return f" Or use {devices}{where}{flags}: each then needs {size / GB:.1f} GB."
