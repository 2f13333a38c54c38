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
from common.memory.depth import layer_kinds, two_depths, with_depth
from common.memory.packed import pack
from common.memory.shapes import Shapes
from common.memory.stand_ins import standing_for_cuda
from common.memory.tracker import Bytes
from common.mistakes import first_line
from common.models.attention import why_not
from common.models.configs import model_class
from common.models.loading import add_adapter, set_mode
from common.rollouts import Rollouts
from common.sequences import Sequences
from common.sharding import blocks
from common.update.batches import forward_context, weighted_loss

if TYPE_CHECKING:
    from common.memory.passes import PassSettings

# The attention that stands for a CUDA device, see stand_ins.
CUDA = "flash"


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
    """What one micro-batch allocates at most: with a backward pass, also by phase, and without gradients."""

    training: int
    forward: int
    phases: dict[str, int] = field(default_factory=dict)


def measured(
    config: transformers.PreTrainedConfig,
    settings: PassSettings,
    *,
    rows: int,
    row_tokens: int,
    completion_tokens: int,
) -> Measured:
    """Run a micro-batch on two depths of a model and extend to its own depth; see `passes.pass_bytes`."""
    try:
        training, forward = extended_passes(config, settings, rows_of(rows, row_tokens, completion_tokens))
    except Exception as error:  # whatever a library raises where code asks for the numbers of a tensor without any
        raise ValueError(
            f"{config.model_type} cannot be predicted: its code needs the numbers of its tensors, or torch does not "
            f"know the shape of what an operator gives ({first_line(error)})."
        ) from error
    return Measured(training=training.peak, forward=forward.peak, phases=training.peaks)


def extended_passes(
    config: transformers.PreTrainedConfig, settings: PassSettings, rollouts: Rollouts
) -> tuple[Phases, Phases]:
    """As `both_passes`, of a model of any depth: measured at two depths, each phase on a line."""
    kinds = layer_kinds(skeleton(config, settings))
    depths, depth = two_depths(kinds), len(kinds)
    found = [both_passes(with_depth(config, each), settings, rollouts) for each in depths]
    if len(found) == 1:
        return found[0]
    share = (depth - depths[0]) / (depths[1] - depths[0])
    training, forward = (
        Phases({name: round(size + share * (high.peaks[name] - size)) for name, size in low.peaks.items()})
        for low, high in zip(*found, strict=True)
    )
    return training, forward


def both_passes(
    config: transformers.PreTrainedConfig, settings: PassSettings, rollouts: Rollouts
) -> tuple[Phases, Phases]:
    """Phases of a micro-batch with a backward pass, and of one without gradients, of a model as deep as `config`."""
    with standing_for_cuda(settings.attention == CUDA):
        model = build(config, settings)
        with Shapes() as shapes:
            shapes.place(model)
            settle_head(model, settings)
            rollouts = shapes.rollouts(rollouts)
            forward = forward_pass(model, settings, rollouts)
            return forward if settings.kind == "score" else training_pass(model, settings, rollouts), forward


def settle_head(model: nn.Module, settings: PassSettings) -> None:
    """Choose the way to log-probs, as a model's first pass does by its numbers.

    On CUDA it is the fused one, on the CPU the plain one if the head's logits are the model's. A model that makes its
    logits in a way of its own needs more: there are few, and it says so when it is loaded.
    """
    if settings.kind != "policy":
        return
    base = without_adapter(model)
    plain, *fused = logprobs._possible_heads(base) or [logprobs._own]
    is_scaled = logprobs._scalings(base) != (None, [1.0])
    logprobs._heads[base] = fused[0] if fused and (settings.attention == CUDA or is_scaled) else plain


def skeleton(config: transformers.PreTrainedConfig, settings: PassSettings) -> transformers.PreTrainedModel:
    """A model of transformers without storage, on the device meta."""
    config = deepcopy(config)
    auto = transformers.AutoModelForCausalLM
    if settings.kind == "score":
        auto = transformers.AutoModelForSequenceClassification
    attention = "sdpa" if settings.attention == CUDA else settings.attention
    if why_not(attention, config, model_class(config, auto)) is not None:
        attention = "eager"  # which needs the most
    with torch.device("meta"):
        return auto.from_config(config, dtype=settings.weights, attn_implementation=attention, trust_remote_code=False)


def build(config: transformers.PreTrainedConfig, settings: PassSettings) -> nn.Module:
    """A model without storage, ready to train."""
    model = skeleton(config, settings)
    with torch.device("meta"):
        if settings.method == "qlora":
            pack(model, settings.compute)
        head = None
        if settings.kind == "value":
            head = nn.Linear(model.get_output_embeddings().weight.shape[-1], 1)
            model = model.base_model
        if settings.method != "full" and settings.kind != "score":
            names = settings.lora_target_modules
            names = names if isinstance(names, str) else ",".join(names)
            lora = RLConfig(model="predicted", use_lora=True, lora_r=settings.lora_r, lora_target_modules=names)
            model = add_adapter(model, lora, task_type="FEATURE_EXTRACTION" if head else "CAUSAL_LM")
    if settings.checkpointing and settings.kind != "score":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return set_mode(model if head is None else StateValues(model, head))


class StateValues(nn.Module):
    """What PPO's value model allocates: a backbone and a head that gives one number for each of some places."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, sequences: Sequences) -> Tensor:
        """(n,) float32 values of the states before n completion tokens."""
        states = sequences.states(self.backbone)
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float()).squeeze(-1)


def output(model: nn.Module, rollouts: Rollouts) -> Tensor:
    """(b, C) what a pass gives for each completion token; (b,) scores of a classifier."""
    if isinstance(model, StateValues):
        sequences = Sequences.of(rollouts)
        return sequences.spread(model(sequences))
    if not model.can_generate():
        ids, _ = rollouts.sequences()
        model.config.get_text_config().pad_token_id = 1  # no row here ends with it
        with torch.autocast("cpu", enabled=False):
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
    return token_logprobs(model, rollouts, 1.0)[0]


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
    """Phases of a forward and a backward pass where gradients exist already, or leave the layers that they are of."""
    bytes_ = Bytes(*model.parameters(), *model.buffers())
    leaving = {each for part in blocks(model) for each in part.parameters()} if settings.spread else ()
    with bytes_:
        for parameter in model.parameters():
            if parameter in leaving:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
            elif parameter.requires_grad and not settings.spread:
                parameter.grad = torch.empty_like(parameter)
        with _phases(model, bytes_) as phases:
            with forward_context(torch.device("cpu"), settings.compute):
                per_token = output(model, rollouts)
            weighted_loss(-per_token * rollouts.advantages, rollouts).backward()
    return phases


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@torch.no_grad()
def forward_pass(model: nn.Module, settings: PassSettings, rollouts: Rollouts) -> Phases:
    """Phases of a pass without gradients."""
    bytes_ = Bytes(*model.parameters(), *model.buffers())
    with bytes_, _phases(model, bytes_) as phases, forward_context(torch.device("cpu"), settings.compute):
        output(model, rollouts)
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
        hidden = output.get("last_hidden_state")
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _gradient: ends("head gradient"))

    def embedded(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _gradient: ends("layer gradients"))

    base = without_adapter(model.backbone if isinstance(model, StateValues) else model)
    with ExitStack() as stack:
        for module, hook in ((base.base_model, backbone_ran), (base.get_input_embeddings(), embedded)):
            handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield phases
    ends("rest")
