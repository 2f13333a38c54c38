"""Passes whose shapes the CPU knows: no work of a device is waited for, and nothing depends on its numbers."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from common.config import RLConfig
from common.logprobs import sequence_logprobs, token_logprobs
from common.losses import clipped_policy_loss, importance_ratio
from common.models.loading import load_policy
from common.sequences import Sequences
from common.update.batches import Batches
from common.update.learner import Learner
from PPO.value_model import load_value_model, token_values
from tests.architectures import ARCHITECTURES, CAUSAL, configuration

DEVICE = torch.device("meta")
# What a program waits for the device for: a number, a shape that depends on numbers, or a copy to the CPU.
WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique2", "_unique2"),
    *("unique_dim", "unique_consecutive", "bincount", "argwhere"),
}


class Waits(TorchDispatchMode):
    """Lists operations on the device meta that would wait for a real one, and answers them with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        flat = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        on_device = any(isinstance(each, torch.Tensor) and each.device == DEVICE for each in flat)
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        by_mask = name.startswith(("index", "_index")) and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in flat[1:]
        )
        if on_device and (name in WAITS or to_host or by_mask or (name == "copy_" and args[0].device != DEVICE)):
            self.found.append(name)
            if name == "_local_scalar_dense":
                return 1.0 if args[0].is_floating_point() else 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)


def untrained(name: str) -> torch.nn.Module:
    """A tiny untrained model of an architecture."""
    torch.manual_seed(0)
    config = configuration(name)
    auto = AutoModelForCausalLM if config.model_type in CAUSAL else AutoModelForImageTextToText
    return auto.from_config(config).eval()


def with_fields(rollouts):
    rollouts.old_logprobs = rollouts.returns = rollouts.values = rollouts.sampling_logprobs
    rollouts.advantages = rollouts.sampling_logprobs + 1
    return rollouts


def waits_of_an_update(module, loss, rollouts, config) -> tuple[list[str], int]:
    """What an optimizer step on the device waits for, and its number of micro-batches."""
    batches = Batches(config, Accelerator(cpu=True), torch.float32)
    batches.device = DEVICE
    learner, passes = Learner("policy", module, config), []

    def counted(microbatch):
        passes.append(microbatch)
        return loss(microbatch)

    with Waits() as waits:
        learner.update(rollouts, counted, batches=batches, step=1)
    return waits.found, len(passes)


@pytest.mark.parametrize("settings", [{}, {"use_lora": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_an_update_waits_for_the_device_once_whatever_its_micro_batches(
    tiny_folder, rollouts, monkeypatch, kind, settings
):
    settings = {"gradient_checkpointing": False} | settings
    config = RLConfig(prompts_per_step=3, num_generations=2, num_minibatches=1, lora_r=4, **settings)
    if kind == "policy":
        model = load_policy(str(tiny_folder), config, dtype=torch.float32)
        token_logprobs(model, rollouts, 1.0)  # decides which head is the model's
    else:
        model = load_value_model(str(tiny_folder), config, dtype=torch.float32, zero_head=True)
    model.to(DEVICE)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # torch has none for this device

    def policy_loss(minibatch):
        logprobs, entropy = token_logprobs(model, minibatch, 1.0)
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)
        return clipped_policy_loss(ratio, logprobs, entropy, minibatch, (0.2, 0.2))

    def value_loss(minibatch):
        return (token_values(model, minibatch) - minibatch.returns).square(), {}

    rollouts, found = with_fields(rollouts), {}
    for budget in (1, 1000):
        config.max_tokens_per_microbatch = budget
        loss = policy_loss if kind == "policy" else value_loss
        waits, passes = waits_of_an_update(model, loss, rollouts, config)
        found[passes] = waits
    # One number: the norm of the gradient.
    assert found == {6: ["_local_scalar_dense"], 1: ["_local_scalar_dense"]}


def test_a_wait_would_be_seen():
    x = torch.ones(3, device=DEVICE)
    with Waits() as waits:
        float(x.sum())
        x.cpu()
        bool((x > 0).all())
    assert waits.found == ["_local_scalar_dense", "_to_copy", "_local_scalar_dense"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_no_search_for_packed_rows_changes_a_model(name):
    """Rows longer than every window of the tiny models, which have a mask of their own."""
    model = untrained(name)
    ids = torch.randint(8, 90, (2, 40))
    sequences = Sequences(ids=ids, sources=ids[0], targets=ids[0], places=ids[0], first=0, shape=(1, 40))
    expected = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(sequences.outputs(model).logits, expected)


class Masks(TorchDispatchMode):
    """Notes whether attention gets a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(function) and "backward" not in str(function):
            self.found.append((kwargs or {}).get("attn_mask"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_pass_of_tensors_without_values_makes_no_mask(tiny_folder, rollouts, use_lora):
    """What a prediction of memory runs: the same shapes as a real pass, none of them from data."""
    model = load_policy(str(tiny_folder), RLConfig(use_lora=use_lora, lora_r=4), dtype=torch.float32)
    real = Sequences.of(rollouts)
    expected = token_logprobs(model, rollouts, 1.0)
    fake = deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in fake.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    made = torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)
                    module._parameters[name] = made
        tensors = {n: mode.from_tensor(v) for n, v in vars(real).items() if isinstance(v, torch.Tensor)}
        with Masks() as masks:
            found = sequence_logprobs(fake, replace(real, **tensors), 1.0)
            found[0].sum().backward()
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert masks.found == [None] * model.config.num_hidden_layers
