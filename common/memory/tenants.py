"""Who is on the device and in main memory: models, their optimizers, and the engine, each with its bytes.

Parameters are counted on a model without storage, tied ones once; nothing is told from a model's name.
"""

from __future__ import annotations  # for type hints whose import would take seconds

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from common.config import RLConfig
from common.memory import constants
from common.memory.passes import PassSettings
from common.models.configs import setting
from common.models.loading import trained_dtype
from common.models.lora import adapted_modules
from common.update.optimizers import bytes_per_weight

FLOAT32 = 4  # bytes
# In 4 bits (NF4): half a byte, an 8-bit scale for 64 weights, and a float32 scale for 256 of these.
BYTES_IN_4_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
# Layers of these types keep a state of fixed size in place of keys and values.
RECURRENT = ("linear_attention", "conv", "mamba", "mamba2", "recurrent")
WINDOWED = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model's parameters.

    Attributes:
        config: of the model.
        weights: numbers in each parameter, tied ones once.
        packed: numbers in those that 4 bits would pack: linear layers but the head.
        adapter: numbers in each matrix of a LoRA adapter as the settings have it.
        head: numbers of an output head that is no other weight too; 0 without one.
        width: features that the head reads.
        adapted: numbers in the largest weight that has an adapter.
        embedding: numbers in the embedding.
    """

    config: transformers.PreTrainedConfig
    weights: tuple[int, ...]
    packed: int
    adapter: tuple[int, ...]
    head: int
    width: int
    adapted: int = 0
    embedding: int = 0

    @property
    def parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(self.weights)

    @classmethod
    def of(cls, model: transformers.PreTrainedModel, config: RLConfig) -> Sizes:
        """Count the parameters of a model.

        Args:
            model: without storage is enough.
            config: lora_r and lora_target_modules are read.
        """
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings().weight
        own_head = 0 if head is None or head.weight is embedding else head.weight.numel()
        linear = {m.weight for m in model.modules() if type(m) in (nn.Linear, Conv1D) and m is not head} - {embedding}
        adapted = [model.get_submodule(name).weight.shape for name in adapted_modules(model, config)]
        return cls(
            config=model.config,
            weights=tuple(each.numel() for each in model.parameters()),
            packed=sum(each.numel() for each in linear),
            adapter=tuple(config.lora_r * side for shape in adapted for side in shape[-2:]),
            head=own_head,
            width=embedding.shape[-1] if head is None else head.weight.shape[-1],
            embedding=embedding.numel(),
            adapted=max((shape.numel() for shape in adapted), default=0),
        )


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """A model of the pool.

    Attributes:
        name: in the pool.
        weights: bytes that it takes on the device whenever it is used.
        home: bytes of each tensor that waits in main memory where models are moved off the device.
        moments: bytes of the optimizer on the device, from the first step on.
        gradients: bytes on the device while it is updated.
        step: bytes more while the optimizer takes a step.
        host: bytes that stay in main memory whatever moves, such as weights in float32 of an optimizer there.
        needs: another model whose weights it uses too.
        passes: what its passes need depends on these.
        config: of the model.
        has_flash: a reward model's attention makes no matrix of all pairs of tokens.
    """

    name: str
    weights: int
    config: transformers.PreTrainedConfig
    home: tuple[int, ...] = ()
    moments: int = 0
    gradients: int = 0
    step: int = 0
    host: int = 0
    needs: str | None = None
    passes: PassSettings
    has_flash: bool = True

    @property
    def is_trained(self) -> bool:
        """True for a learner."""
        return self.gradients > 0


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How a learner's numbers are kept.

    Attributes:
        dtype: of forward passes.
        processes: that sum their gradients.
        attention: "flash", or the name of transformers' implementation.
        is_fused: an optimizer step makes no temporary tensors.
    """

    dtype: torch.dtype
    processes: int = 1
    attention: str = "flash"
    is_fused: bool = True


def learner(name: str, sizes: Sizes, config: RLConfig, numbers: Numbers, **options: object) -> Tenant:
    """A model that is trained as the policy is.

    Args:
        name: in the pool.
        sizes: of the model; for a value model, of the language model that it is made of.
        config: LoRA, 4 bits, optimizer and gradient checkpointing are read.
        numbers: how they are kept.
        options: `needs`: a model whose frozen base it shares; `has_head`: False for a value model, which has a head
            of one row; `may_pack`: False where load_in_4bit is not read.
    """
    needs, has_head = options.get("needs"), options.get("has_head", True)
    weights = list(sizes.weights)
    if not has_head:
        if sizes.head:
            weights.remove(sizes.head)
        weights.append(sizes.width + 1)
    is_packed = config.load_in_4bit and options.get("may_pack", True)
    trained = [*sizes.adapter, *([] if has_head else [sizes.width + 1])] if config.use_lora else weights
    width = numbers.dtype.itemsize
    base, home = 0, []
    if config.use_lora and not needs:
        frozen = sum(sizes.weights) - (0 if has_head else sizes.head)
        packed = sizes.packed if is_packed else 0
        base = int(packed * BYTES_IN_4_BIT) + (frozen - packed) * width
        home = [base * each // max(frozen, 1) for each in sizes.weights]
    method = ("qlora" if is_packed else "lora") if config.use_lora else "full"
    kept = trained_dtype(config, numbers.dtype) if method == "full" else numbers.dtype
    passes = PassSettings(
        kind="policy" if has_head else "value",
        method=method,
        weights=kept,
        compute=numbers.dtype,
        checkpointing=config.gradient_checkpointing,
        lora_r=config.lora_r,
        lora_target_modules=config.lora_target_modules,
        attention=numbers.attention,
    )
    return Tenant(
        name=name,
        config=sizes.config,
        needs=needs,
        passes=passes,
        **_training(trained, base, home, config, numbers, sizes.embedding),
    )


def _training(
    trained: list[int], base: int, home: list[int], config: RLConfig, numbers: Numbers, embedding: int
) -> dict[str, object]:
    """Bytes of weights, gradients and optimizer of a learner, as the fields of Tenant."""
    kept = torch.float32 if config.use_lora else trained_dtype(config, numbers.dtype)
    each, rows = bytes_per_weight(config.optimizer, kept), bytes_per_weight(config.optimizer, kept, embedding=True)
    count, of_embedding = sum(trained), 0 if config.use_lora else embedding
    flat = 2 * kept.itemsize * count if numbers.processes > 1 else 0  # all gradients in one tensor, and its sum
    # AdamW's loop over lists of tensors, which is not used where one kernel does all.
    temporary = 0 if numbers.is_fused or config.optimizer != "adamw" else 4 * count
    moments = int(each.state * (count - of_embedding) + rows.state * of_embedding)
    parts = [int(each.weight * size) for size in trained]
    # Where gradients leave the device one by one, the largest is there.
    gradients = int(each.gradient * count) or kept.itemsize * max(trained)
    return {
        "weights": base + sum(parts),
        "home": (*home, *parts, *(moments * size // count // 2 for size in trained for _ in range(2))),
        "gradients": gradients,
        "moments": moments,
        "step": max(flat, temporary),
        "host": int(each.host * count),
    }


def frozen(name: str, sizes: Sizes, passes: PassSettings, *, has_flash: bool = True) -> Tenant:
    """A model that is not trained, such as a reference or a reward model, with weights of the dtype in `passes`."""
    home = tuple(passes.weights.itemsize * each for each in sizes.weights)
    return Tenant(name=name, weights=sum(home), home=home, passes=passes, config=sizes.config, has_flash=has_flash)


def pinned(sizes: Iterable[int]) -> int:
    """Bytes of main memory that tensors take once they are pinned: torch rounds each up to a power of two."""
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


# The engine


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The sampler's memory.

    Attributes:
        weights: bytes of its own copy of the policy.
        work: bytes of activations, and of CUDA graphs on a GPU.
        asleep: bytes that stay while it sleeps.
        sequence: bytes of the cache for one completion at full length.
        push: bytes of the one tensor that is on its way.
    """

    weights: int
    work: int
    asleep: int
    sequence: int
    push: int

    def holding(self, sequences: int) -> int:
        """Bytes with so many completions at full length."""
        return self.weights + self.work + sequences * self.sequence


def engine(sizes: Sizes, config: RLConfig, dtype: torch.dtype, *, on_cpu: bool = False) -> Engine:
    """The memory of vLLM, or of a sampler in transformers, which has no weights of its own.

    Args:
        sizes: of the policy.
        config: the run's; lengths and vllm_* are read.
        dtype: of forward passes.
        on_cpu: where it samples.
    """
    text, width = sizes.config.get_text_config(), dtype.itemsize
    length = config.max_prompt_length + config.max_completion_length
    logits = constants.VLLM_LOGITS * config.vllm_max_num_seqs * text.vocab_size * 4
    sequence = cache_bytes(sizes.config, length, width)
    if config.sampler != "vllm":
        return Engine(weights=0, work=logits, asleep=0, sequence=sequence, push=0)
    hidden = setting(text, "hidden_size") or sizes.width
    inner = _largest(setting(text, "intermediate_size", "ffn_dim", "n_inner", "d_ff") or 4 * hidden)
    tokens = max(constants.VLLM_BATCHED_TOKENS, length)
    if on_cpu:  # where no pass is made but of what is asked for
        of_prompts = config.completions_at_once * config.max_prompt_length
        tokens = min(max(constants.VLLM_BATCHED_TOKENS_ON_CPU, length), of_prompts)
    activations = tokens * width * (constants.VLLM_INTERMEDIATES * inner + constants.VLLM_HIDDENS * hidden)
    graphs = 0 if config.vllm_enforce_eager or on_cpu else constants.VLLM_GRAPHS
    # A tensor as the trainer has it, and as the engine takes it; an adapter is merged in float32.
    source = width if config.use_lora else trained_dtype(config, dtype).itemsize
    push = (source + width) * max(sizes.weights)
    if config.use_lora:
        push = max(push, (source + width + 2 * FLOAT32) * sizes.adapted)
    return Engine(
        weights=width * sizes.parameters,
        work=logits + activations + graphs,
        asleep=graphs,
        sequence=sequence,
        push=push,
    )


def cache_bytes(config: transformers.PreTrainedConfig, length: int, itemsize: int) -> int:
    """Bytes of the keys and values of one sequence, by the model's own layout of layers and heads.

    Args:
        config: of the model.
        length: tokens of the sequence.
        itemsize: bytes of a number.
    """
    text = config.get_text_config()
    layers = setting(text, "num_hidden_layers")
    heads = setting(text, "num_attention_heads")
    if heads is None:
        return 0
    kinds = list(setting(text, "layer_types") or ["full_attention"] * layers)
    kinds = kinds[: layers - (setting(text, "num_kv_shared_layers") or 0)]
    window = setting(text, "sliding_window", "attention_chunk_size")
    if window and "layer_types" not in vars(text) and not setting(text, "use_sliding_window"):
        window = window if "use_sliding_window" not in vars(text) else None
        kinds = ["sliding_attention"] * len(kinds) if window else kinds
    size = setting(text, "head_dim") or setting(text, "hidden_size") // _largest(heads)
    key_heads = setting(text, "num_key_value_heads") or (1 if setting(text, "multi_query") else heads)
    each = 2 * size * _largest(key_heads)
    if setting(text, "kv_lora_rank"):  # latent attention keeps one vector for keys and values of all heads
        each = setting(text, "kv_lora_rank") + (setting(text, "qk_rope_head_dim") or 0)
    total = 0
    for kind in kinds:
        if kind in RECURRENT:
            total += _largest(heads) * size * size * 4
        else:
            total += each * itemsize * (min(length, window) if kind in WINDOWED and window else length)
    return total


def _largest(value: int | list[int]) -> int:
    """Of a number for each layer, or one for all."""
    return max(value) if isinstance(value, list | tuple) else value
