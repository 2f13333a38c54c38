"""How a vLLM engine starts: its arguments, the memory for its cache, and side effects that are avoided."""

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from common.host import host_memory, processes_here
from common.memory.constants import VLLM_BATCHED_TOKENS_ON_CPU
from common.sampling.vllm_corrections import model_arguments, replaced
from common.sampling.vllm_group import group_arguments, over_gloo, timeouts

# Tokens per block of the cache on the CPU, the minimum there. Completions of one prompt share its full blocks: with
# vLLM's default of 128, shorter prompts would be computed once per completion.
_CPU_BLOCK = 32


@dataclass(kw_only=True, frozen=True)
class EngineSettings:
    """Settings of an engine.

    Attributes:
        model: hub id or folder; only its configuration is read, weights come by `push_weights`.
        dtype: "float32", "bfloat16" or "float16".
        max_model_len: tokens of the longest prompt and its completion.
        max_num_seqs: completions sampled at the same time.
        most_rows: completions of the largest request, if that is known; on the CPU there is memory for no more.
        memory_share: share of the GPU's memory for weights, cache and activations; on the CPU, share of the free
            memory, at most what the cache can use.
        enforce_eager: do not capture CUDA graphs.
        can_sleep: memory can be freed for a while, on CUDA.
        trust_remote_code: run Python files that come with the model.
        tensor_parallel: so many processes of adjacent ranks share the engine; it divides their number.
        timeout: minutes for which processes wait for one that hangs; None: as long as torch does.
    """

    model: str
    dtype: str
    max_model_len: int
    max_num_seqs: int = 256
    most_rows: int | None = None
    memory_share: float = 0.4
    enforce_eager: bool = False
    can_sleep: bool = False
    trust_remote_code: bool = False
    tensor_parallel: int = 1
    timeout: float | None = None

    @property
    def num_seqs_on_cpu(self) -> int:
        """Completions that the CPU samples at the same time; the memory for all of them is allocated at once."""
        return min(self.max_num_seqs, self.most_rows or self.max_num_seqs)


def engine_arguments(settings: EngineSettings, config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of vLLM's LLM.

    Args:
        settings: of the engine.
        config: of the model.
    """
    from vllm.platforms import current_platform

    arguments = {
        "model": settings.model,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "config_format": "hf",  # config.json, even where params.json of Mistral lies beside it
        "load_format": "dummy",  # the first push brings the weights
        "tokenizer_mode": "hf",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "logprobs_mode": "processed_logprobs",  # after the temperature
        "use_tqdm_on_load": False,
    } | model_arguments(config)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # Each process on the GPU of its LOCAL_RANK; the default would put all of them on the first.
        arguments["distributed_executor_backend"] = "external_launcher"
        arguments |= group_arguments(settings.tensor_parallel)
        arguments |= timeouts(settings.timeout) if settings.timeout else {}
    if not current_platform.is_cpu():
        return arguments | {
            "gpu_memory_utilization": settings.memory_share,
            "enforce_eager": settings.enforce_eager,
            "enable_sleep_mode": settings.can_sleep,
        }
    return arguments | {
        "max_num_seqs": settings.num_seqs_on_cpu,
        "kv_cache_memory_bytes": int(_free_memory() * settings.memory_share),  # at most: see cache_for
        "block_size": _CPU_BLOCK,
        "enforce_eager": True,  # compiling takes 26 s and gains nothing
        # For a prompt cut in two, vLLM resets the offset of the request's random generator. The CPU's has none:
        # "CPU Generator does not use offset" (vllm/v1/worker/gpu_model_runner.py, still so in 0.32).
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(VLLM_BATCHED_TOKENS_ON_CPU, settings.max_model_len),
    }


@contextmanager
def cache_for(settings: EngineSettings) -> Iterator[None]:
    """Let vLLM on the CPU, which allocates its cache at once, have memory for all sequences at full length, not more.

    How many blocks a sequence needs depends on all kinds of layers (windows, states, latent attention): vLLM says.
    """
    import vllm.v1.engine.core as core
    from vllm.platforms import current_platform
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    divide = core.get_kv_cache_configs

    def divide_for_all(config: Any, specs: Any, memory: list[int]) -> Any:
        [found] = divide(config, specs, memory)
        sequences = get_max_concurrency_for_kv_cache_config(config, found)
        if sequences <= settings.num_seqs_on_cpu:
            return [found]
        blocks = round(found.num_blocks / sequences) * settings.num_seqs_on_cpu + 1  # vLLM reserves one
        config.cache_config.num_gpu_blocks_override = min(blocks, found.num_blocks)
        return divide(config, specs, memory)

    with replaced(core, "get_kv_cache_configs", divide_for_all if current_platform.is_cpu() else divide):
        yield


def _free_memory() -> int:
    """Bytes that are free for this process; vLLM itself looks at the memory node that is nearest to it."""
    free = host_memory(processes=processes_here()).available
    if importlib.util.find_spec("vllm.utils.cpu_resource_utils") is None:
        return free  # older versions of vLLM know no nodes
    from vllm.utils import cpu_resource_utils

    node = cpu_resource_utils.get_allowed_cpu_list()[0].numa_node
    return min(free, cpu_resource_utils.get_memory_node_info(node).available_memory)


@contextmanager
def without_side_effects(shapes: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Replace functions of vLLM that act on the whole process or take long without a benefit, while it starts.

    Args:
        shapes: of all tensors of a complete push.
    """
    import vllm.config.model as model_config
    import vllm.v1.engine.core as core
    from vllm.model_executor.models.transformers.base import Base as TransformersBackend
    from vllm.platforms import current_platform

    has_head = any(name.endswith("lm_head.weight") for name in shapes)
    with keeping_groups(), over_gloo(), ExitStack() as stack:
        # Hides all current objects from the garbage collector forever, and takes a second.
        stack.enter_context(replaced(core, "freeze_gc_heap", do_nothing))
        # Replaces methods of transformers' own class, so that the policy would no longer run outside of vLLM. The
        # cost: on CUDA, models in transformers' own class are not compiled.
        stack.enter_context(replaced(TransformersBackend, "_decorate_cls_for_torch_compile", do_nothing))
        if "checkpoint_has_lm_head" in vars(model_config):  # from vLLM 0.29 on
            # The head is tied if the policy's is, even where the folder has a copy of it that no push brings.
            stack.enter_context(replaced(model_config, "checkpoint_has_lm_head", lambda *args, **kwargs: has_head))
        if current_platform.is_cpu():
            # Binds all memory of the process, the trainer's too, to one NUMA node.
            stack.enter_context(replaced(torch.ops._C, "init_cpu_memory_env", do_nothing))
        yield


@contextmanager
def keeping_groups() -> Iterator[None]:
    """Keep vLLM from destroying every process group, the trainer's too, when an engine is shut down."""
    import vllm.v1.engine.core as core

    with replaced(core, "cleanup_dist_env_and_memory", do_nothing):
        yield


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of functions that must not act."""


def add_expert_group() -> None:
    """Let a mixture of experts use the groups of an earlier, dense engine, for which vLLM makes none of experts."""
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        world, size = parallel_state.get_world_group(), parallel_state.get_tp_group().world_size
        backend = torch.distributed.get_backend(world.device_group)
        of_engines = [list(range(first, first + size)) for first in range(0, world.world_size, size)]
        parallel_state._EP = parallel_state.init_model_parallel_group(
            of_engines, world.local_rank, backend, group_name="ep"
        )
