"""Names and values in the layout of the checkpoint: what is pushed is what transformers itself would save."""

import copy
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from common.models.layout import in_checkpoint_layout
from common.models.weights import checkpoint_shapes, policy_weights, weights_in_memory
from tests.layouts import BUFFERS, CONFIGS, loaded, saved, small_model, with_lora

# Peft says so where it wraps experts, and where all layers keep (in, out).
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_and_values_are_those_that_transformers_saves(kind, tmp_path):
    model = small_model(kind)
    expected = saved(model, tmp_path)
    weights = list(policy_weights(model))
    assert len(weights) == len(expected)  # tied weights once
    assert dict(weights).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights)
    assert not any(tensor.requires_grad for _, tensor in weights)
    assert checkpoint_shapes(str(tmp_path)) == shapes(expected)
    assert shapes(dict(policy_weights(loaded(tmp_path)))) == shapes(expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_merged_and_comes_out_under_the_names_of_the_checkpoint(kind, tmp_path):
    model = with_lora(small_model(kind))
    expected = saved(copy.deepcopy(model).merge_and_unload(), tmp_path)
    weights = dict(policy_weights(model))
    untrained = dict(policy_weights(small_model(kind)))
    assert weights.keys() == expected.keys() == untrained.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    assert sum(not torch.equal(tensor, untrained[name]) for name, tensor in weights.items()) >= 6


@pytest.mark.parametrize("parameters", [["experts.gate_up_proj"], ["experts.down_proj", "experts.gate_up_proj"]])
def test_adapters_on_fused_experts_by_name_are_merged(parameters, tmp_path):
    model = get_peft_model(small_model("mixtral"), LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = saved(copy.deepcopy(model).merge_and_unload(), tmp_path)
    weights = dict(policy_weights(model))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    with model.disable_adapter():
        plain = dict(policy_weights(small_model("mixtral")))
        assert all(torch.equal(tensor, plain[name]) for name, tensor in policy_weights(model))


@pytest.mark.parametrize(("kind", "buffer"), BUFFERS.items())
def test_buffers_that_a_checkpoint_holds_are_weights(kind, buffer):
    model = small_model(kind)
    names = [name for name, _ in model.named_buffers() if name.endswith(buffer)]
    weights = dict(policy_weights(with_lora(model, ["o_proj"])))
    assert names and all(weights[name].abs().sum() > 0 for name in names)
    assert not any("inv_freq" in name for name in weights)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_neox", "deepseek_v3"])
def test_a_checkpoint_in_the_layout_of_memory_stays_in_it(kind, tmp_path):
    expected = saved(small_model(kind), tmp_path, save_original_format=False)
    weights = dict(policy_weights(loaded(tmp_path)))
    assert weights.keys() == expected.keys() != dict(policy_weights(small_model(kind))).keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert checkpoint_shapes(str(tmp_path)) == shapes(expected)


def test_a_prefix_that_the_checkpoint_has_comes_back(tmp_path):
    """Checkpoints of Qwen 3.5 are those of a multimodal model, whose language model has a name."""
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "linear_num_key_heads": 2, "pad_token_id": 0}
    linear = {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    config = transformers.AutoConfig.for_model("qwen3_5_text", **sizes | heads | linear | kinds)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {name.replace("model.", "model.language_model.", 1): t for name, t in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    assert checkpoint_shapes(str(tmp_path)) == shapes(renamed)
    weights = dict(policy_weights(loaded(tmp_path)))
    assert weights.keys() == renamed.keys()
    assert all(torch.equal(tensor, renamed[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "kimi_linear"])
def test_merged_and_converted_tensors_do_not_pile_up(kind):
    model = with_lora(small_model(kind))
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    most, new, alive = 0, 0, {}
    for _, tensor in policy_weights(model):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Parts of a fused weight are views of it: what counts is what they share.
            whole = tensor if tensor._base is None else tensor._base
            new += id(whole) not in alive
            alive[id(whole)] = weakref.ref(whole)
        alive = {key: reference for key, reference in alive.items() if reference() is not None}
        most = max(most, len(alive))
    assert most <= 3 < 12 <= new


def test_a_group_comes_out_when_its_last_part_is_there_and_the_rest_at_once():
    model = small_model("hrm_text")
    names, order = [name for name, _ in weights_in_memory(model)], []

    def read():
        for name, tensor in weights_in_memory(model):
            order.append(f"read {name}")
            yield name, tensor

    for name, _ in in_checkpoint_layout(model, names, read()):
        order.append(f"write {name}")
    at = order.index("read model.H_module.layers.0.mlp.up_proj.weight")
    assert order[at - 1 : at + 2] == [
        "read model.H_module.layers.0.mlp.gate_proj.weight",
        "read model.H_module.layers.0.mlp.up_proj.weight",
        "write model.H_module.layers.0.mlp.gate_up_proj.weight",
    ]
    plain = order.index("read model.H_module.layers.0.mlp.down_proj.weight")
    assert order[plain + 1] == "write model.H_module.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gemma3"])
def test_weights_in_memory_have_the_names_of_the_model_itself(kind):
    adapted = with_lora(small_model(kind))
    weights = dict(weights_in_memory(adapted))
    plain = small_model(kind)
    found = plain.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}  # tied
