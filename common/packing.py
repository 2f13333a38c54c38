"""Which models can be given packed rows: those that compute the same as with padded rows.

Each model shows it once. Convolutions, state spaces and token shifts carry something from one row into the next, and
some models pass nothing on to their attention or make a mask of their own: these get padded rows.
"""

import logging
import math
import re
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses import FakeTensor

from common.packed_attention import SIXTEEN_BITS, attention, has_varlen
from common.rollouts import Rollouts
from common.sequences import Packing, Sequences
from common.sharding import as_forward, gathered_dtype, is_sharded

logger = logging.getLogger("nanorlhf")

# The attention of such models, in transformers' list of them: sdpa, and that of packed rows where a pass has them. A
# name of its own leaves "sdpa" as it is for all other models of the process. It stays with the model, because layers
# that are computed again in the backward pass need it too. For names with "flash" transformers looks for a kernel.
ATTENTION = "sdpa_or_packed_rows"

# Settings of models in which a token sees only some of the tokens before it, if there are more than so many.
_WINDOW = re.compile(r"window(?!_layers)|attention_chunk_size|index_topk|indexer_budget")
# Kinds of rope whose angles depend on the longest row of a pass.
_ROPE_OF_LENGTH = ("dynamic", "longrope")
# What packed and padded states may differ by, as a share of the largest: rounding, in 32 and in 16 bits.
_TOLERANCE = {torch.float32: 1e-4}
_IN_16_BITS = 0.1

_packings: WeakKeyDictionary[nn.Module, Packing | None] = WeakKeyDictionary()


def packing_of(model: nn.Module) -> Packing | None:
    """How a model can be given packed rows; None if it cannot.

    Args:
        model: on the device of its passes, in their precision (autocast): a transformers model, in peft or not, or a
            module with such a model in it.
    """
    from transformers import PreTrainedModel  # importing it takes seconds

    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        return None
    backbone = found.base_model
    # A comparison may have replaced it for its own time.
    if backbone.config.get_text_config()._attn_implementation not in ("sdpa", ATTENTION):
        return None
    first = next(backbone.parameters())
    if first.device.type == "cuda" and not _has_varlen_here(first):
        return None
    if backbone not in _packings:
        _packings[backbone] = _packing(backbone, model)
    return _packings[backbone]


def _packing(backbone: nn.Module, model: nn.Module) -> Packing | None:
    first, settings = next(backbone.parameters()), backbone.config.get_text_config().to_dict()
    if isinstance(first, FakeTensor) or first.device.type not in ("cpu", "cuda"):
        return None
    if backbone._is_stateful or any(f"'{kind}'" in str(settings) for kind in _ROPE_OF_LENGTH):
        return None
    if not _is_same(backbone, model):
        return None
    if settings.get("use_sliding_window") is False:
        settings.pop("sliding_window", None)
    windows = [value for name, value in settings.items() if _WINDOW.search(name) and type(value) is int and value > 0]
    # As many tokens as the window would already get a mask.
    return Packing(max_tokens=min(windows, default=math.inf) - 1, hidden_size=_width(backbone))


def _width(backbone: nn.Module) -> int:
    return backbone.get_input_embeddings().weight.shape[-1]


def _has_varlen_here(weight: torch.Tensor) -> bool:
    """Whether passes of this precision have attention without padding on this GPU."""
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    if precision in SIXTEEN_BITS and not has_varlen():
        _say_that_rows_are_padded()
    return precision in SIXTEEN_BITS and has_varlen()


@cache
def _say_that_rows_are_padded() -> None:
    logger.info(
        "this GPU or this torch has no flash attention for rows of unequal length (torch.nn.attention.varlen), so "
        "rows are padded, and a prompt is computed for each of its completions."
    )


@torch.no_grad()
def _is_same(backbone: nn.Module, model: nn.Module) -> bool:
    """Give a model the attention for packed rows, if its states before completion tokens are then the same.

    Args:
        backbone: what is compared.
        model: has it in it, and is called as a whole if it is sharded.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    rows, first = _compared_rows(backbone.config.get_text_config().vocab_size), next(backbone.parameters())
    tolerance = _TOLERANCE.get(gathered_dtype(model, first), _IN_16_BITS)
    packed, padded = Sequences.packed(rows, first.device), Sequences.of(rows.to(first.device))
    same = False

    def states(sequences: Sequences) -> torch.Tensor:
        return as_forward(model, lambda: sequences.states(backbone))

    try:
        with torch.autocast(first.device.type, enabled=False):
            expected = states(padded)
            _set_attention(backbone, ATTENTION)
            same = all(_is_close(states(each), expected, tolerance) for each in (padded, packed))
        if first.device.type == "cuda" and same:  # once more as it is trained, in flash attention
            same = _is_close(states(packed), expected, _IN_16_BITS)
    # A model that knows no position ids, or has another attention, raises whatever its code does.
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) and is_sharded(model):
            raise  # of this process alone: the others are in the middle of the pass
        logger.debug("%s takes no packed rows: %s", type(backbone).__name__, error)
        same = False
    finally:
        if not same:
            _set_attention(backbone, "sdpa")
    return same


def _set_attention(backbone: nn.Module, name: str) -> None:
    """Change all of a model's sdpa to the other kind."""
    from transformers import PreTrainedConfig

    # Modules read it from a configuration that need not be the same object as the model's.
    for module in backbone.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and config._attn_implementation in ("sdpa", ATTENTION):
            config._attn_implementation = name


def _is_close(states: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((states - expected).abs().max() <= tolerance * expected.abs().max())


def _compared_rows(vocabulary: int) -> Rollouts:
    """A prompt with two completions, and two with one: the tokens are from the whole vocabulary."""
    shape = [(7, 6), (7, 3), (3, 9), (5, 4)]  # tokens of prompt and completion
    ids = (torch.arange(64) * (vocabulary // 64 or 1) + 3) % vocabulary
    prompts, completions = torch.zeros(4, 7, dtype=torch.int64), torch.zeros(4, 9, dtype=torch.int64)
    prompt_mask, completion_mask = torch.zeros(4, 7, dtype=torch.bool), torch.zeros(4, 9, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(shape):
        start = 0 if row < 2 else 12 * row
        prompts[row, 7 - prompt :], prompt_mask[row, 7 - prompt :] = ids[start : start + prompt], True
        completions[row, :completion] = ids[8 * row + 9 : 8 * row + 9 + completion]
        completion_mask[row, :completion] = True
    return Rollouts(
        rows=torch.arange(4),
        prompt_ids=prompts,
        prompt_mask=prompt_mask,
        completion_ids=completions,
        completion_mask=completion_mask,
        truncated=torch.zeros(4, dtype=torch.bool),
        sampling_logprobs=torch.zeros(4, 9),
    )
