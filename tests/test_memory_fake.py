"""A pass without numbers allocates what the real one does, to the byte."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from common import packing
from common.memory.fake import build, settle_head
from common.memory.passes import PassSettings
from common.memory.shapes import Shapes
from common.memory.tracker import Bytes
from common.models.configs import read_config
from common.update.learner import Learner
from PPO.value_model import share_backbone
from tests.toy import save_toy_policy, toy_trainer, updates_of

LORA = {"use_lora": True, "lora_r": 4}
CKPT = {"gradient_checkpointing": True}


def recorded(tmp_path: Path, algorithm: str, settings: dict) -> tuple:
    """A trainer after one step, and its updates as (learner, rollouts)."""
    model = save_toy_policy(tmp_path / "model", num_hidden_layers=3)
    defaults = {"num_steps": 1, "max_tokens_per_microbatch": 400, "gradient_checkpointing": False}
    trainer = toy_trainer(model, tmp_path / "run", algorithm=algorithm, **(defaults | settings))
    seen = updates_of(trainer)
    trainer.train()
    return trainer, seen


def peaks(model, learner, rollouts, loss, batches) -> tuple[int, int, int]:
    """Bytes before an update, the peak of its passes, and that of two updates: moments are new, then not."""
    with Bytes(*model.parameters(), *model.buffers()) as found:
        start = found.now
        _, minibatch = next(batches.minibatches(rollouts, step=1, epoch=0))
        assert batches.backward(minibatch, partial(loss, model), lambda *_: None)
        of_passes = found.peak
        for step in (1, 2):
            learner.update(rollouts, partial(loss, model), batches=batches, step=step)
    return start, of_passes, found.peak


def real_and_fake(model, fake, trainer, update, loss) -> list[tuple[int, int, int]]:
    """The peaks of an update of a model, and of its twin on the device meta without numbers."""
    learner, rollouts = update
    # Predictions are of padded rows: packed ones need less.
    backbone = next(each for each in model.modules() if isinstance(each, PreTrainedModel)).base_model
    packing._packings[backbone] = None
    real = peaks(model, Learner(learner.name, model, learner.config), rollouts, loss, trainer.batches)
    shapes = Shapes()
    shapes.place(fake)
    with shapes:
        settle_head(fake, PassSettings(kind=learner.name, attention="sdpa"))
        twin = Learner(learner.name, fake, learner.config)
        predicted = peaks(fake, twin, shapes.rollouts(rollouts), loss, trainer.batches)
    return [real, predicted]


# Settings of a run, those of its passes, and the dtype to which all weights go before it.
POLICIES = {
    "full": ({}, {"method": "full", "weights": torch.float32, "compute": torch.float32}, None),
    "full, autocast": ({"dtype": "bfloat16"}, {"method": "full", "weights": torch.float32}, None),
    "full in bf16": ({"dtype": "bfloat16"}, {"method": "full"}, torch.bfloat16),
    "lora": (LORA, {"weights": torch.float32, "compute": torch.float32}, None),
    "lora in bf16": (LORA | {"dtype": "bfloat16"}, {}, None),
}


# With checkpointing and without, as few as show each kind: a case takes seconds.
CASES = (
    *(("full", False), ("full, autocast", True), ("full in bf16", False), ("full in bf16", True)),
    *(("lora", True), ("lora in bf16", False)),
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_an_update_of_a_policy(tmp_path, name, checkpointing):
    settings, passes, dtype = POLICIES[name]
    trainer, seen = recorded(tmp_path, "GRPO", settings | {"gradient_checkpointing": checkpointing})
    passes = PassSettings(**passes, checkpointing=checkpointing, lora_r=4, attention="sdpa")
    fake = build(read_config(trainer.config.model), passes)
    with trainer.models.use("policy", train=True) as model:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        real, predicted = real_and_fake(model, fake, trainer, seen[0], trainer.loss)
    assert predicted == real


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["own", "shared"])
def test_an_update_of_a_value_model(tmp_path, backbone):
    settings = LORA | CKPT | {"value_backbone": backbone, "value_init": "zero_head", "dtype": "bfloat16"}
    trainer, seen = recorded(tmp_path, "PPO", settings)
    config = trainer.config
    passes = PassSettings(lora_r=4, attention="sdpa")
    if backbone == "shared":
        policy = build(read_config(config.model), passes)
        with torch.device("meta"):
            fake = share_backbone(policy, config, zero_head=True)
        policy.set_adapter("value")
    else:
        fake = build(read_config(config.model), replace(passes, kind="value"))
    update = next(each for each in seen if each[0].name == "value")
    with trainer.models.use("value", train=True) as model:
        real, predicted = real_and_fake(model, fake, trainer, update, trainer.value_loss)
    assert predicted == real


@pytest.mark.slow
def test_the_resident_set_of_a_process_grows_by_what_is_predicted():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this kernel does not reset the peak of the resident set: no /proc/self/clear_refs to write to")
    # With large blocks freed at once, the resident set follows the tensors.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.resident_set"], env=env, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["resident"] == pytest.approx(found["fake"], rel=0.02)
