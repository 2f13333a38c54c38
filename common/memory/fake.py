"""A micro-batch of the project's own passes without numbers: what it allocates, layer by layer.

A model is built without storage (`shapes.Shapes`), with a few of its layers, and log-probs, loss and backward pass run
as in training. Memory is linear in the number of layers, phase by phase, so two depths tell that of any depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn

from common import logprobs
from common.config import RLConfig
from common.logprobs import token_logprobs, without_adapter
from common.memory.depth import two_depths, with_depth
from common.memory.shapes import Shapes
from common.memory.stand_ins import standing_for_cuda
from common.memory.tracker import Bytes
from common.models.loading import add_adapter, set_mode
from common.rollouts import Rollouts
from common.update.batches import forward_context, weighted_loss

if TYPE_CHECKING:
    from common.memory.passes import PassSettings


@dataclass
class Phases:
    """Peak bytes of each phase of a pass, above what was alive before it."""

    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """The most of all phases."""
        return max(self.peaks.values())


@dataclass(frozen=True)
class Measured:
    """What one micro-batch allocates at most: with a backward pass, and without gradients."""

    training: int
    forward: int


def measured(
    config: transformers.PreTrainedConfig,
    settings: PassSettings,
    *,
    rows: int,
    row_tokens: int,
    completion_tokens: int,
) -> Measured:
    """Run a micro-batch on two depths of a model and extend to its own depth; see `passes.pass_bytes`."""
    rollouts = rows_of(rows, row_tokens, completion_tokens)
    depths = two_depths(config)
    found = [both_passes(with_depth(config, depth), settings, rollouts) for depth in depths]
    depth = config.get_text_config().num_hidden_layers
    return Measured(*(extended([f[i] for f in found], depths, depth) for i in range(2)))


def extended(phases: list[Phases], depths: list[int], depth: int) -> int:
    """The peak at `depth` of what was measured at one or two depths."""
    if len(phases) == 1:
        return phases[0].peak
    (low, high), (first, second) = phases, depths
    slopes = {name: (high.peaks[name] - low.peaks[name]) / (second - first) for name in low.peaks}
    return round(max(low.peaks[name] + slopes[name] * (depth - first) for name in low.peaks))


def both_passes(
    config: transformers.PreTrainedConfig, settings: PassSettings, rollouts: Rollouts
) -> tuple[Phases, Phases]:
    """Phases of a micro-batch with a backward pass, and of one without gradients, of a model as deep as `config`."""
    with standing_for_cuda(settings.attention == "flash"):
        model = build(config, settings)
        with Shapes() as shapes:
            shapes.place(model)
            logprobs._heads[without_adapter(model)] = head_of(model, settings)
            rollouts = shapes.rollouts(rollouts)
            return training_pass(model, settings, rollouts), forward_pass(model, settings, rollouts)


def head_of(model: nn.Module, settings: PassSettings) -> logprobs.Head:
    """The way to log-probs that a pass will take: on CUDA the fused one, which all but a few models can use."""
    return logprobs._fused if settings.attention == "flash" else logprobs._plain


def build(config: transformers.PreTrainedConfig, settings: PassSettings) -> nn.Module:
    """A policy without storage, on the device meta, ready to train."""
    config = deepcopy(config)
    attention = "sdpa" if settings.attention == "flash" else settings.attention
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=settings.weights, attn_implementation=attention, trust_remote_code=False
        )
        if settings.method != "full":
            names = settings.lora_target_modules
            names = names if isinstance(names, str) else ",".join(names)
            lora = RLConfig(model="predicted", use_lora=True, lora_r=settings.lora_r, lora_target_modules=names)
            model = add_adapter(model, lora, task_type="CAUSAL_LM")
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return set_mode(model)


def rows_of(rows: int, row_tokens: int, completion_tokens: int) -> Rollouts:
    """A micro-batch of equal rows without padding."""
    prompt = torch.zeros(rows, row_tokens - completion_tokens, dtype=torch.int64)
    completion = torch.zeros(rows, completion_tokens, dtype=torch.int64)
    floats = torch.zeros(rows, completion_tokens)
    return Rollouts(
        rows=torch.arange(rows),
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        completion_ids=completion,
        completion_mask=torch.ones_like(completion, dtype=torch.bool),
        truncated=torch.zeros(rows, dtype=torch.bool),
        sampling_logprobs=floats,
        advantages=floats.clone(),
        token_weights=floats.clone(),
    )


def training_pass(model: nn.Module, settings: PassSettings, rollouts: Rollouts) -> Phases:
    """Phases of a forward and a backward pass where gradients exist already."""
    bytes_ = Bytes(*model.parameters(), *model.buffers())
    with bytes_:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        with _phases(model, bytes_) as phases:
            with forward_context(torch.device("cpu"), settings.compute):
                per_token, _ = token_logprobs(model, rollouts, 1.0)
            weighted_loss(-per_token * rollouts.advantages, rollouts).backward()
    return phases


@torch.no_grad()
def forward_pass(model: nn.Module, settings: PassSettings, rollouts: Rollouts) -> Phases:
    """Phases of a pass without gradients."""
    bytes_ = Bytes(*model.parameters(), *model.buffers())
    with bytes_, _phases(model, bytes_) as phases, forward_context(torch.device("cpu"), settings.compute):
        token_logprobs(model, rollouts, 1.0)
    return phases


@contextmanager
def _phases(model: nn.Module, bytes_: Bytes) -> Iterator[Phases]:
    """Peaks of the backbone, of the head, of the head's gradient, of the backbone's, and of the embedding's."""
    phases, start = Phases(), bytes_.now
    bytes_.reset()

    def ends(name: str) -> None:
        phases.peaks[name] = max(phases.peaks.get(name, 0), bytes_.peak - start)
        bytes_.reset()

    def backbone_ran(_module: nn.Module, _inputs: tuple, output: dict) -> None:
        ends("backbone")
        hidden = output["last_hidden_state"]
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: ends("head gradient"))

    def embedded(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _gradient: ends("layer gradients"))

    base = without_adapter(model)
    with ExitStack() as stack:
        for module, hook in ((base.base_model, backbone_ran), (base.get_input_embeddings(), embedded)):
            handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield phases
    ends("rest")
