"""The base in 4 bits: it is trained around, moved, merged, saved and continued like any other."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config import RLConfig
from common.embedded.policy import build_tokenizer
from common.models.loading import load_policy
from common.models.lora import read_by_kernels
from common.models.pool import ModelPool
from common.models.quantization import in_floating_point, is_quantized, scales
from common.models.saving import save_model
from common.models.weights import policy_weights
from tests.architectures import make
from tests.movers import LateMover, Uses
from tests.toy import metrics_of, save_toy_policy, toy_trainer

bitsandbytes = pytest.importorskip("bitsandbytes")
LORA = {"use_lora": True, "lora_r": 4, "lora_alpha": 8}

pytestmark = pytest.mark.slow  # bitsandbytes takes seconds to import


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_toy_policy(tmp_path_factory.mktemp("quantized") / "policy", hidden_size=128)


def load(folder: Path, **settings: object):
    config = RLConfig(model=str(folder), **(LORA | {"load_in_4bit": True} | settings))
    return load_policy(str(folder), config, dtype=torch.float32)


def test_four_bits_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="load_in_4bit without use_lora"):
        RLConfig(load_in_4bit=True)


def test_linear_layers_take_a_seventh_of_the_memory_and_the_rest_stays_as_it_is(folder):
    plain, packed = load(folder, load_in_4bit=False), load(folder)
    layers = [name for name, weight in packed.named_parameters() if is_quantized(weight)]
    assert layers and all(".base_layer." in name for name in layers)
    sizes = {name: weight.nbytes for name, weight in plain.named_parameters()}
    total = sum(sizes[name] for name in layers)
    assert sum(packed.get_parameter(name).nbytes for name in layers) == total // 8
    assert sum(tensor.nbytes for tensor in scales(packed)) < total // 30
    assert not scales(plain)


def test_four_bits_lose_a_tenth_of_normally_distributed_weights(folder):
    """NF4 has its sixteen numbers where such weights are; those of four-bit floats lose an eighth."""
    plain, packed = load(folder, load_in_4bit=False), load(folder)
    for name, weight in packed.named_parameters():
        if is_quantized(weight):
            exact = plain.get_parameter(name)
            assert 0.08 < (in_floating_point(weight) - exact).norm() / exact.norm() < 0.105, name


def test_what_vllm_gets_is_what_the_policy_computes_with(folder):
    model = load(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    merged = AutoModelForCausalLM.from_pretrained(folder)
    merged.load_state_dict(dict(policy_weights(model)), strict=False)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, found = model.eval()(ids).logits, merged.eval()(ids).logits
        untrained = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    assert (found - expected).abs().max() < 1e-4 < (found - untrained).abs().max()


def test_the_saved_model_is_a_plain_one(folder, tmp_path):
    model = load(folder)
    save_model(model, build_tokenizer(), tmp_path / "final")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert "quantization_config" not in saved.config.to_dict()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(saved.eval()(ids).logits, model.eval()(ids).logits, atol=1e-4)
    assert (tmp_path / "final" / "adapter" / "adapter_config.json").is_file()


def test_packed_weights_travel_with_their_scales(folder):
    pool, model = ModelPool(torch.device("cpu"), "always"), load(folder)
    pool.add("policy", model)
    pool.add("other", torch.nn.Linear(2, 2))
    weight = next(weight for weight in model.parameters() if is_quantized(weight))
    state, value = weight.quant_state, in_floating_point(weight).clone()

    def places() -> list[int]:
        found = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        return [tensor.data_ptr() for tensor in found]

    home = places()
    with pool.use("policy"):
        assert not set(places()) & set(home)
        assert torch.equal(in_floating_point(weight), value)
    with pool.use("other"):
        assert places() == home
        assert torch.equal(in_floating_point(weight), value)


def test_a_push_with_offload_unpacks_each_weight_on_the_device(folder):
    model, pool = load(folder), ModelPool(torch.device("cpu"), "always")
    expected = {name: tensor.clone() for name, tensor in policy_weights(model)}
    pool.add("policy", model)
    mover = pool.mover = LateMover()
    with pool.stream("policy") as (module, on_device), Uses(mover):
        pushed = {name: tensor.clone() for name, tensor in policy_weights(module, on_device)}
    assert mover.faults == [] and mover.alive == 0
    assert pushed.keys() == expected.keys() and all(torch.equal(pushed[name], expected[name]) for name in expected)
    moved = [*model.parameters(), *scales(model)]
    assert all(mover.arrived[tensor.untyped_storage().data_ptr()] for tensor in moved)
    # The embeddings are held by the loop above while the first packed weight comes, with its scales and its adapter.
    assert mover.peak <= max(parameter.nbytes for parameter in model.parameters()) + 16_384


@pytest.mark.parametrize("algorithm", ["GRPO", "PPO"])
def test_offload_changes_no_number_of_a_quantized_run(folder, tmp_path, algorithm):
    settings = LORA | {"load_in_4bit": True, "eval_every": 1, "kl_coef": 0.1, "algorithm": algorithm}
    if algorithm == "PPO":
        settings["value_backbone"] = "shared"
    lines = []
    for offload in ("never", "always"):
        toy_trainer(folder, tmp_path / offload, offload=offload, **settings).train()
        lines.append(metrics_of(tmp_path / offload))
    assert lines[0] == lines[1]
    assert lines[0][1]["policy/grad_norm"] > 0 and lines[0][1]["sampler/logprob_diff"] < 1e-4


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1"])
def test_a_weight_that_a_kernel_reads_itself_is_not_packed(kind, tmp_path):
    make(kind, tmp_path / "model")
    model = load(tmp_path / "model")
    packed = {
        name.split(".")[-2 - (".base_layer." in name)] for name, each in model.named_parameters() if is_quantized(each)
    }
    assert packed and not packed & {each.split(".")[-1] for each in read_by_kernels(model.get_base_model())}
    settings = LORA | {"load_in_4bit": True, "sampler": "transformers", "num_steps": 1}
    metrics = toy_trainer(tmp_path / "model", tmp_path / "run", **settings).train()
    assert metrics["policy/first_ratio"] == 1 and metrics["sampler/logprob_diff"] < 1e-4


def test_a_quantized_run_goes_on_from_its_checkpoint(folder, tmp_path):
    settings = LORA | {"load_in_4bit": True, "save_every": 1, "num_steps": 3}
    toy_trainer(folder, tmp_path / "whole", **settings).train()
    trainer = toy_trainer(folder, tmp_path / "parts", **settings)
    step = trainer.step
    trainer.step = lambda prompts: step(prompts) if prompts.step < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    toy_trainer(folder, tmp_path / "parts", **settings).train()
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
