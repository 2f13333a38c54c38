"""Who is on the device and in main memory: models, their optimizers, and the engine, each with its bytes.

Parameters are counted on a model without storage, tied ones once; nothing is told from a model's name.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from common.config import RLConfig
from common.memory import constants
from common.memory.passes import PassBytes, PassSettings
from common.models.configs import setting
from common.models.loading import trained_dtype
from common.models.lora import adapted_modules
from common.sharding import blocks
from common.update.learner import MAX_REDUCED
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
        rows: the first side of each parameter, along which it is spread over processes.
        adapter_rows: the same of each matrix of the adapter.
        block: numbers in the largest layer that is gathered at a time, and of the adapter on it.
        root: numbers that are in no such layer, such as embedding and head, and of the adapter on them.
    """

    config: transformers.PreTrainedConfig
    weights: tuple[int, ...]
    packed: int
    adapter: tuple[int, ...]
    head: int
    width: int
    adapted: int = 0
    embedding: int = 0
    rows: tuple[int, ...] = ()
    adapter_rows: tuple[int, ...] = ()
    block: tuple[int, int] = (0, 0)
    root: tuple[int, int] = (0, 0)

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
        adapters = [model.get_submodule(name).weight for name in adapted_modules(model, config)]
        adapted = [weight.shape for weight in adapters]
        # A matrix for each side of an adapted weight.
        of_adapter = {weight: config.lora_r * sum(weight.shape[-2:]) for weight in adapters}
        layers = [_numbers(part.parameters(), of_adapter) for part in blocks(model)]
        all_of_them = _numbers(model.parameters(), of_adapter)
        return cls(
            config=model.config,
            weights=tuple(each.numel() for each in model.parameters()),
            packed=sum(each.numel() for each in linear),
            adapter=tuple(config.lora_r * side for shape in adapted for side in shape[-2:]),
            head=own_head,
            width=embedding.shape[-1] if head is None else head.weight.shape[-1],
            embedding=embedding.numel(),
            adapted=max((shape.numel() for shape in adapted), default=0),
            rows=tuple(each.shape[0] if each.dim() else 1 for each in model.parameters()),
            adapter_rows=tuple(rows for shape in adapted for rows in (shape[-2], config.lora_r)),
            block=max(layers, default=(0, 0)),
            root=tuple(of_all - sum(parts) for of_all, *parts in zip(all_of_them, *layers, strict=True)),
        )


def _numbers(weights: Iterable[Tensor], of_adapter: dict[Tensor, int]) -> tuple[int, int]:
    """Numbers in weights, and in the adapter on them."""
    weights = list(weights)
    return sum(each.numel() for each in weights), sum(of_adapter.get(each, 0) for each in weights)


def parts_of(numbers: Sequence[int], rows: Sequence[int], processes: int) -> list[int]:
    """Numbers of each tensor in the process that has most of it, where its rows are dealt out.

    Args:
        numbers: of each tensor.
        rows: first side of each; not read with one process.
        processes: that have a part.
    """
    if processes == 1:
        return list(numbers)
    return [math.ceil(side / processes) * (size // side) for size, side in zip(numbers, rows, strict=True) if side]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Bytes of tensors that a pass of a model gathers from all processes, beside their own parts of them.

    FSDP2 gathers what is in no layer for the whole pass, and layers one at a time. A tensor that is gathered is there
    twice: in the buffer of the collective operation, and as the weight that is computed with. The next layer's buffer
    fills while a layer computes.

    Attributes:
        start: when a pass begins, before it has activations.
        forward: in a layer of a pass without gradient.
        layers: in a layer of a backward pass: with its gradients, and those of the one before on their way to their
            parts. Gradients of embedding and head wait for the end; they count as the pass's.
        rest: after the first layer, where only its gradients are still on their way.
        end: when gradients of embedding and head are on their way, and all else of the pass is gone.
    """

    start: int = 0
    forward: int = 0
    layers: int = 0
    rest: int = 0
    end: int = 0

    def beside(self, size: PassBytes) -> tuple[int, int]:
        """Bytes of what is gathered and of a pass with gradients, where both together are the most.

        Args:
            size: of the pass alone.
        """
        if not self.layers:
            return 0, size.training
        gathered = {"backbone": self.forward, "head gradient": self.start, "layer gradients": self.layers}
        gathered["rest"] = self.rest
        both = [(gathered[name], peak) for name, peak in size.phases.items() if name in gathered]
        both = both or [(max(self.start, self.layers), size.training)]
        return max([*both, (self.start, 0), (self.end, 0)], key=sum)


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
        gathered: of a model that is spread over processes, what its passes gather.
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
    gathered: Gathered = Gathered()
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
        spread: processes that each tensor is spread over; 1: every process has whole ones.
        attention: "flash", or the name of transformers' implementation.
        is_fused: an optimizer step makes no temporary tensors.
    """

    dtype: torch.dtype
    processes: int = 1
    spread: int = 1
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
    parts = parts_of(sizes.weights, sizes.rows, numbers.spread)
    if not has_head and sizes.head:
        del parts[sizes.weights.index(sizes.head)]
    value_head = [] if has_head else [sizes.width + 1]
    is_packed = config.load_in_4bit and options.get("may_pack", True)
    adapter = parts_of(sizes.adapter, sizes.adapter_rows, numbers.spread)
    trained = [*(adapter if config.use_lora else parts), *value_head]
    width = numbers.dtype.itemsize
    base, home = 0, []
    if config.use_lora and not needs:
        frozen = sum(parts)
        packed = sizes.packed if is_packed else 0
        base = int(packed * BYTES_IN_4_BIT) + (frozen - packed) * width
        home = [base * each // max(frozen, 1) for each in parts]
    method = ("qlora" if is_packed else "lora") if config.use_lora else "full"
    kept = trained_dtype(config, numbers.dtype) if method == "full" else numbers.dtype
    gathered = Gathered()
    if numbers.spread > 1:  # gathered in what a pass computes in, whatever the parts are kept in
        gathered = _gathered(sizes, numbers.dtype, has_adapter=config.use_lora, has_head=has_head)
        kept = numbers.dtype
    passes = PassSettings(
        kind="policy" if has_head else "value",
        method=method,
        weights=kept,
        compute=numbers.dtype,
        checkpointing=config.gradient_checkpointing,
        lora_r=config.lora_r,
        lora_target_modules=config.lora_target_modules,
        attention=numbers.attention,
        spread=numbers.spread > 1 and method == "full",
    )
    return Tenant(
        name=name,
        config=sizes.config,
        needs=needs,
        gathered=gathered,
        passes=passes,
        **_training(trained, base, home, config, numbers, sizes.embedding),
    )


def _gathered(sizes: Sizes, dtype: torch.dtype, *, has_adapter: bool, has_head: bool) -> Gathered:
    """What passes of a model gather in `dtype`; autograd's gradients are in it too, and in float32 on their way."""
    root = (sizes.root[0] - (0 if has_head else sizes.head), sizes.root[1])
    gathered = [sum(each) if has_adapter else each[0] for each in (sizes.block, root)]
    block, outside = (dtype.itemsize * each for each in gathered)
    trained, trained_outside = (each[1 if has_adapter else 0] for each in (sizes.block, root))
    return Gathered(
        start=2 * outside + block,
        forward=outside + 2 * block,
        layers=outside + 2 * block + (dtype.itemsize + FLOAT32) * trained,
        rest=outside + FLOAT32 * trained,
        end=(dtype.itemsize + FLOAT32) * trained_outside,
    )


def _training(
    trained: list[int], base: int, home: list[int], config: RLConfig, numbers: Numbers, embedding: int
) -> dict[str, object]:
    """Bytes of weights, gradients and optimizer of a learner, as the fields of Tenant."""
    kept = torch.float32 if config.use_lora else trained_dtype(config, numbers.dtype)
    each, rows = bytes_per_weight(config.optimizer, kept), bytes_per_weight(config.optimizer, kept, embedding=True)
    count, of_embedding = sum(trained), 0 if config.use_lora else embedding // numbers.spread
    # Gradients that are summed at a time lie in one tensor, beside its sum; those of parts are summed on their way.
    together = min(count, max(MAX_REDUCED, *trained))
    flat = 2 * kept.itemsize * together if numbers.processes > 1 and numbers.spread == 1 else 0
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


def frozen(
    name: str,
    sizes: Sizes,
    passes: PassSettings,
    *,
    kept: torch.dtype | None = None,
    spread: int = 1,
    has_flash: bool = True,
) -> Tenant:
    """A model that is not trained, such as a reference or a reward model.

    Args:
        name: in the pool.
        sizes: of the model.
        passes: with the dtype of its weights in a pass.
        kept: that of its weights between passes; None: the same.
        spread: processes that its tensors are spread over.
        has_flash: see Tenant.
    """
    kept = kept or passes.weights
    home = tuple(kept.itemsize * each for each in parts_of(sizes.weights, sizes.rows, spread))
    gathered = Gathered()
    if spread > 1:
        block, root = (passes.weights.itemsize * each[0] for each in (sizes.block, sizes.root))
        gathered = Gathered(start=2 * root + block, forward=root + 2 * block)
    return Tenant(
        name=name,
        weights=sum(home),
        home=home,
        gathered=gathered,
        passes=passes,
        config=sizes.config,
        has_flash=has_flash,
    )


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


def engine(
    sizes: Sizes, config: RLConfig, dtype: torch.dtype, *, on_cpu: bool = False, processes: int = 1, spread: int = 1
) -> Engine:
    """The memory of vLLM in a process, or of a sampler in transformers, which has no weights of its own.

    Args:
        sizes: of the policy.
        config: the run's; lengths and vllm_* are read.
        dtype: of forward passes.
        on_cpu: where it samples.
        processes: that train together.
        spread: processes that the policy's tensors are spread over.
    """
    text, width = sizes.config.get_text_config(), dtype.itemsize
    length = config.max_prompt_length + config.max_completion_length
    logits = constants.VLLM_LOGITS * config.vllm_max_num_seqs * text.vocab_size * 4
    # A tensor as the trainer has it, gathered in what the engine takes; an adapter is merged in float32.
    source = width if config.use_lora or spread > 1 else trained_dtype(config, dtype).itemsize
    push = (source + width) * max(sizes.weights)
    if config.use_lora:
        push = max(push, (source + width + 2 * FLOAT32) * sizes.adapted)
    if config.sampler == "vllm_server":  # on devices of its own
        return Engine(weights=0, work=0, asleep=0, sequence=0, push=push)
    parts = config.vllm_tensor_parallel if config.sampler == "vllm" else 1
    sequence = cache_bytes(sizes.config, length, width, parts)
    if config.sampler != "vllm":
        return Engine(weights=0, work=logits, asleep=0, sequence=sequence, push=0)
    hidden = setting(text, "hidden_size") or sizes.width
    inner = _largest(setting(text, "intermediate_size", "ffn_dim", "n_inner", "d_ff") or 4 * hidden)
    tokens = max(constants.VLLM_BATCHED_TOKENS, length)
    if on_cpu:  # where no pass is made but of what is asked for
        of_prompts = math.ceil(config.completions_at_once * parts / processes) * config.max_prompt_length
        tokens = min(max(constants.VLLM_BATCHED_TOKENS_ON_CPU, length), of_prompts)
    inners = constants.VLLM_INTERMEDIATES * inner // parts
    activations = tokens * width * (inners + constants.VLLM_HIDDENS * hidden)
    graphs = 0 if config.vllm_enforce_eager or on_cpu else constants.VLLM_GRAPHS
    return Engine(
        weights=width * _of_rank(sizes, parts),
        work=logits + activations + graphs,
        asleep=graphs,
        sequence=sequence,
        push=push,
    )


def _of_rank(sizes: Sizes, parts: int) -> int:
    """Numbers of the policy in each process of an engine: a part of every matrix, and vectors whole."""
    if parts == 1:
        return sizes.parameters
    vectors = sum(size for size, rows in zip(sizes.weights, sizes.rows, strict=True) if size == rows)
    return math.ceil((sizes.parameters - vectors) / parts) + vectors


def cache_bytes(config: transformers.PreTrainedConfig, length: int, itemsize: int, parts: int = 1) -> int:
    """Bytes of the keys and values of one sequence, by the model's own layout of layers and heads.

    Args:
        config: of the model.
        length: tokens of the sequence.
        itemsize: bytes of a number.
        parts: processes that share an engine: each has some of the heads, and at least one.
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
    each = 2 * size * math.ceil(_largest(key_heads) / parts)
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
