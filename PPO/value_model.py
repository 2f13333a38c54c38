"""The value model of actor-critic algorithms: a causal backbone with a scalar head, and its value for each token.

It is made from the policy, or from any model with the policy's vocabulary. With LoRA it may share the policy's frozen
base: then only an adapter and the head are its own.
"""

from __future__ import annotations  # for type hints whose import would take seconds

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.advantages import is_spread, moments
from common.config import RLConfig
from common.logprobs import without_adapter
from common.models.loading import add_adapter, load_without_dropout, lora_config, set_mode, trained_dtype
from common.models.saving import copied_parts, is_first, save_merged
from common.packing import packing_of
from common.rollouts import Rollouts
from common.seeds import hashed_seed
from common.sequences import Sequences
from PPO.scored_model import HEAD_FILE, head_name, scored_model

if TYPE_CHECKING:
    from peft import PeftModel

# Name of the value model's adapter; peft calls the policy's "default".
VALUE_ADAPTER = "value"

# Standard deviation of a random head's weights, as transformers initialises new heads.
RANDOM_HEAD_STD = 0.02


class ValueModel(nn.Module):
    """A causal backbone with a head that gives one number for each state.

    Args:
        backbone: a transformers model without a head, LoRA layers or not.
        head: from hidden states to one number, float32.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, sequences: Sequences) -> Tensor:
        """Values of the states in which completion tokens were chosen.

        Args:
            sequences: rows with n completion tokens in all.

        Returns:
            (n,) float32.
        """
        states = sequences.states(self.backbone)  # (n, hidden)
        # Autocast would round the value of a state to three digits.
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float()).squeeze(-1)


def token_values(model: ValueModel, rollouts: Rollouts) -> Tensor:
    """The value of the state in which each completion token was chosen.

    Args:
        model: on the device of `rollouts`.
        rollouts: b rows.

    Returns:
        (b, C) float32 with gradient, 0 at padding. Column t is read from the token before completion token t.
    """
    sequences = Sequences.of(rollouts, packing_of(model))
    return sequences.spread(model(sequences))


def load_value_model(path: str, config: RLConfig, *, dtype: torch.dtype, zero_head: bool) -> ValueModel:
    """A value model with a backbone of its own, on the CPU.

    Args:
        path: hub id or folder of a causal language model; its backbone becomes that of the value model.
        config: seed, LoRA, attention and gradient checkpointing are read.
        dtype: precision of forward passes; weights that are trained are in `trained_dtype`, the head is float32.
        zero_head: every value is 0 at first; otherwise the head's weights are random.

    Raises:
        ValueError: if transformers cannot tell the model's backbone from its head.
    """
    dtype = dtype if config.use_lora else trained_dtype(config, dtype)
    policy = load_without_dropout(transformers.AutoModelForCausalLM, path, config, dtype=dtype)
    backbone = _backbone(policy)
    return _with_head(backbone, _new_head(_output_size(policy), config.seed, zero=zero_head), config)


def load_scored_value_model(
    path: str, config: RLConfig, *, dtype: torch.dtype, tokenizer: transformers.PreTrainedTokenizerBase
) -> ValueModel:
    """A value model from a reward model or a saved value model: backbone and head.

    Args:
        path: hub id or folder of a model for sequence or token classification with one label, or of a saved value
            model.
        config: as in load_value_model.
        dtype: as in load_value_model.
        tokenizer: the policy's; the model must know the same tokens.

    Raises:
        ValueError: if its head or its tokens do not fit, or it cannot be loaded.
    """
    found = scored_model(path, config, tokenizer)
    dtype = dtype if config.use_lora else trained_dtype(config, dtype)
    model = load_without_dropout(found.auto_class, path, config, dtype=dtype)
    if found.head is None:
        weights = load_file(Path(path) / HEAD_FILE)
        return _with_head(model, _copied_head(weights["weight"], weights["bias"]), config)
    head = model.get_submodule(found.head)
    return _with_head(model.base_model, _copied_head(head.weight, head.bias), config)


def share_backbone(policy: PeftModel, config: RLConfig, *, zero_head: bool) -> ValueModel:
    """A value model on the policy's frozen base: its own adapter and head.

    Args:
        policy: with its own adapter; gets a second one, which is inactive outside `value_adapter`.
        config: seed and LoRA settings.
        zero_head: as in load_value_model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(config.seed, "value lora"))
        names = policy.peft_config["default"].target_modules
        policy.add_adapter(VALUE_ADAPTER, lora_config(config, task_type="CAUSAL_LM", target_modules=names))
    base = policy.get_base_model()
    return ValueModel(_backbone(base), _new_head(_output_size(base), config.seed, zero=zero_head))


@contextmanager
def value_adapter(policy: PeftModel) -> Iterator[None]:
    """The policy's base with the value model's adapter in place of the policy's."""
    policy.set_adapter(VALUE_ADAPTER)
    try:
        yield
    finally:
        policy.set_adapter("default")


def save_value_model(model: ValueModel, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that `load_scored_value_model` loads, adapters merged.

    AutoModelForTokenClassification loads it too, for architectures that transformers has such a class of. For others
    AutoModel loads the backbone, and the head is in a file of its own.

    Args:
        model: on the CPU or the device; one that shares the policy's base needs `value_adapter` around the call. If
            it is spread over processes, all of them call this.
        tokenizer: saved in the same folder.
        folder: created if it does not exist.
    """
    backbone = without_adapter(model.backbone)
    config = deepcopy(backbone.config)
    config.num_labels = 1
    head = copied_parts({"": model.head})
    whole = _token_classifier(config, backbone, model.head)
    if whole is not None:
        save_merged(whole, {f"{whole.base_model_prefix}.": backbone, f"{head_name(whole)}.": model.head}, folder)
    else:
        with torch.device("meta"):
            plain = type(backbone)._from_config(config, dtype=torch.float32)
        save_merged(plain, {"": backbone}, folder)
    if not is_first(model):
        return
    if whole is None:
        save_file(head, folder / HEAD_FILE)
    tokenizer.save_pretrained(folder)


def _token_classifier(
    config: transformers.PreTrainedConfig, backbone: nn.Module, head: nn.Linear
) -> transformers.PreTrainedModel | None:
    """The architecture's model for token classification, without weights; None if there is none with such parts."""
    if type(config) not in transformers.AutoModelForTokenClassification._model_mapping:
        return None
    with torch.device("meta"):
        whole = transformers.AutoModelForTokenClassification.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    name = head_name(whole)
    fits = type(whole.base_model) is type(backbone) and name is not None
    if not fits or whole.get_submodule(name).in_features != head.in_features or whole.get_submodule(name).bias is None:
        return None
    return whole


def _backbone(policy: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The part of a causal language model below its head; see check_backbone."""
    check_backbone(policy)
    return policy.base_model


def check_backbone(policy: transformers.PreTrainedModel) -> None:
    """Refuse a causal language model of which no value model can be made.

    Args:
        policy: without storage is enough.

    Raises:
        ValueError: if transformers cannot tell its backbone from its head.
    """
    if policy.base_model is policy:
        raise ValueError(
            f"{type(policy).__name__} has no part that is named as its base_model, so no value model can be made of "
            "it. Use GRPO/ or RLOO/, which need none."
        )


def _output_size(policy: transformers.PreTrainedModel) -> int:
    """Features of a backbone's output, which the policy's head reads: not always hidden_size, as in OPT."""
    head = policy.get_output_embeddings()
    return policy.config.get_text_config().hidden_size if head is None else head.weight.shape[-1]


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None
) -> tuple[Tensor, Tensor]:
    """Squared error of the values, clipped to stay near the old values (huggingface.co/papers/2006.05990).

    loss = max((value - return)^2, (clip(value, old_value - clip_range, old_value + clip_range) - return)^2)

    Args:
        values: (b, C) float32, with gradient.
        old_values: (b, C) float32, of the value model that the advantages were computed with.
        returns: (b, C) float32, the targets.
        clip_range: above 0, in units of the score; None: the plain squared error.

    Returns:
        (b, C) float32 loss, and (b, C) float32 that is 1 where the clip removes the gradient.
    """
    error = (values - returns).square()
    if clip_range is None:
        return error, torch.zeros_like(error)
    change = values - old_values
    # Where the clip does not act the value stays as it is: a sum of rounded numbers would differ in the last bits.
    kept = torch.where(change.abs() <= clip_range, values, old_values + change.clamp(-clip_range, clip_range))
    clipped_error = (kept - returns).square()
    return torch.maximum(error, clipped_error), (clipped_error > error).float()


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, *, sum_over_processes: Callable[[Tensor], Tensor]
) -> float | None:
    """Share of the returns' variance that the values explain: 1 - Var(return - value) / Var(return).

    Args:
        values: (B, C) float; may hold anything outside the mask, in returns too.
        returns: (B, C) float, sums of rewards. Lambda-returns contain the values, which would then explain themselves.
        mask: (B, C) bool.
        sum_over_processes: adds a tensor over all processes; the identity on one process.

    Returns:
        1: all of it; 0: no better than one constant; below 0: worse. None if all returns are equal (to 1e-6), or if
        there are none: it is not defined then.
    """
    _, mean, of_returns = moments(returns, mask, sum_over_processes)
    _, _, of_errors = moments(returns - values, mask, sum_over_processes)
    return float(1 - of_errors / of_returns) if is_spread(mean, of_returns) else None


def _with_head(backbone: nn.Module, head: nn.Linear, config: RLConfig) -> ValueModel:
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.use_lora:
        backbone = add_adapter(backbone, config, task_type="FEATURE_EXTRACTION")
    return set_mode(ValueModel(backbone, head))


def _new_head(hidden_size: int, seed: int, *, zero: bool) -> nn.Linear:
    head = nn.utils.skip_init(nn.Linear, hidden_size, 1)
    generator = torch.Generator().manual_seed(hashed_seed(seed, "value head"))
    nn.init.zeros_(head.bias)
    nn.init.normal_(head.weight, std=0.0 if zero else RANDOM_HEAD_STD, generator=generator)
    return head


def _copied_head(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A float32 head with these numbers: weight (1, hidden), bias (1,) or None for 0."""
    head = nn.utils.skip_init(nn.Linear, weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        nn.init.zeros_(head.bias) if bias is None else head.bias.copy_(bias)
    return head
