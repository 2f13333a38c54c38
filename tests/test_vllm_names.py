"""What this project uses of vLLM beyond its public interface is there under its name, in the installed version."""

import ast
import importlib
import importlib.util
import inspect

import pytest

from tests.imports import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

# Of modules and classes, by attribute; what is imported by name is found in the sources.
ATTRIBUTES = {
    "vllm.v1.engine.core": ("get_kv_cache_configs", "freeze_gc_heap", "cleanup_dist_env_and_memory"),
    "vllm.config.model": ("checkpoint_has_lm_head",),
    "vllm.v1.sample.sampler": ("batched_count_greater_than",),
    "vllm.distributed.parallel_state": (
        *("model_parallel_is_initialized", "_EP", "get_world_group", "get_tp_group", "init_model_parallel_group"),
        *("destroy_model_parallel", "destroy_distributed_environment"),
    ),
    "vllm.distributed.device_communicators.cpu_communicator": ("_CPUSHMDistributed",),
    "vllm.model_executor.layers.attention": ("is_deferred_attention_layer",),
    "vllm.model_executor.layers.fused_moe.router.router_factory": ("CPURouter",),
    "vllm.model_executor.models.bloom": ("get_act_fn",),
    "vllm.model_executor.models.hrm_text": ("PrefillPrefixLMAttention",),
    "vllm.model_executor.models.phimoe": ("sparsemixer", "phimoe_routing_function"),
    "vllm.model_executor.models.apertus": ("XIELU",),
    "vllm.utils.cpu_resource_utils": ("get_allowed_cpu_list", "get_memory_node_info"),
}
OF_CLASSES = {
    "vllm.model_executor.models.transformers.base.Base": ("_decorate_cls_for_torch_compile",),
    "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding": (
        *("forward_cpu", "forward_native", "_match_cos_sin_cache_dtype"),
    ),
    "vllm.config.ModelConfig": (
        *("using_transformers_backend", "is_hybrid", "is_attention_free", "get_head_size", "hf_text_config"),
    ),
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend": ("get_supported_head_sizes",),
    "vllm.model_executor.model_loader.reload.types.LayerReloadingInfo": (
        *("restore_metadata", "load_numel", "loaded_weights", "kernel_tensors", "can_load"),
    ),
    "vllm.LLM": ("apply_model", "sleep", "wake_up", "reset_prefix_cache", "generate"),
    "vllm.v1.engine.llm_engine.LLMEngine": ("abort_request", "has_unfinished_requests", "step"),
}


def imported_names() -> set[tuple[str, str]]:
    """(module, name) of every import from vllm in the sampler, but of those for versions that lack another one."""
    found = set()
    for path in sorted((ROOT / "common/sampling").glob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        handlers = [each for each in nodes if isinstance(each, ast.ExceptHandler)]
        instead = {
            node for each in handlers if ast.unparse(each.type or each) == "ImportError" for node in ast.walk(each)
        }
        for node in filter(lambda node: node not in instead, nodes):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(node.module, each.name) for each in node.names}
    return found


def look_up(module: str, name: str) -> object:
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        return importlib.import_module(f"{module}.{name}")


@pytest.mark.slow
def test_every_name_of_vllm_is_there():
    from common.sampling.vllm_support import imported

    with imported():
        names = imported_names()
        assert ("vllm.model_executor.model_loader.reload.layerwise", "get_layerwise_info") in names
        for module, name in sorted(names):
            look_up(module, name)
        for module, attributes in ATTRIBUTES.items():
            assert set(attributes) <= vars(importlib.import_module(module)).keys(), module
        for path, attributes in OF_CLASSES.items():
            owner = look_up(*path.rsplit(".", 1))
            fields = {name for each in owner.__mro__ for name in inspect.get_annotations(each)}
            assert set(attributes) <= set(dir(owner)) | fields, path
