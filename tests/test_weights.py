import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from common.models.pool import ModelPool
from common.models.weights import checkpoint_shapes, policy_weights
from common.sampling.protocol import SamplingSettings, sampling_seed
from common.sampling.torch_sampler import TransformersSampler
from tests.fixtures_engine import completion_logprobs, greedy_by_full_passes, untrained_model
from tests.movers import LateMover

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
GREEDY = SamplingSettings(temperature=0, max_tokens=12, stop_token_ids=())
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapter(seed=0, *, tied=True, dtype=torch.float32, **options):
    """An untrained model with an adapter that clearly changes it."""
    model = untrained_model(seed, tied=tied).to(dtype)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | options))
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def greedy(sampler):
    return [completion.token_ids for completion in sampler.generate(PROMPTS, GREEDY)]


def expected_greedy(model):
    return [greedy_by_full_passes(model, prompt, 12) for prompt in PROMPTS]


# -------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_gives_its_own_tensors_and_tied_ones_once(tied, model_folders):
    model = untrained_model(tied=tied)
    weights = list(policy_weights(model))
    parameters = dict(model.named_parameters())
    assert [name for name, _ in weights] == list(parameters)
    assert ("lm_head.weight" in parameters) == (not tied)
    assert all(tensor.data_ptr() == parameters[name].data_ptr() for name, tensor in weights)
    assert not any(tensor.requires_grad for _, tensor in weights)
    assert {name: tuple(tensor.shape) for name, tensor in weights} == checkpoint_shapes(model_folders[tied])


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {}),
        (True, {"target_modules": ["q_proj", "v_proj"]}),
        (True, {"modules_to_save": ["norm"]}),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (False, {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_an_adapter_comes_out_merged_and_the_policy_is_not_touched(tied, options):
    model = with_adapter(tied=tied, **options)
    before = copy.deepcopy(model.state_dict())
    weights = {name: tensor.clone() for name, tensor in policy_weights(model)}
    merged = copy.deepcopy(model).merge_and_unload()
    expected = dict(merged.named_parameters())
    if options.get("ensure_weight_tying"):
        merged.tie_weights()
        expected.pop("lm_head.weight", None)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name].detach(), atol=1e-6, rtol=0)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_that_is_off_does_not_come_out():
    model = with_adapter(modules_to_save=["norm"])
    original = dict(untrained_model(0).named_parameters())
    with model.disable_adapter():
        weights = {name: tensor.clone() for name, tensor in policy_weights(model)}
    assert weights.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("adapters", [["default"], ["default", "second", "third"]], ids=len)
def test_a_merged_weight_in_bfloat16_is_rounded_once(adapters):
    model = with_adapter(dtype=torch.bfloat16)
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights=False))
    model.base_model.set_adapter(adapters)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.double()
    for name in adapters:
        exact = exact + 2 * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()  # lora_alpha / r
    merged = dict(policy_weights(model))["model.layers.0.self_attn.q_proj.weight"]
    assert merged.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16, which has 8 bits; the float32 sum adds next to nothing.
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_a_push_plans_the_layout_once_for_the_same_names(tmp_path, monkeypatch):
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    AutoModelForCausalLM.from_config(MixtralConfig(**small, **heads)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    first = {name: tensor.clone() for name, tensor in policy_weights(model)}
    monkeypatch.setattr("common.models.layout._plan", None)  # a second plan would fail
    second = dict(policy_weights(model))
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_merged_tensors_do_not_pile_up():
    alive, most = [], 0
    for _, tensor in policy_weights(with_adapter()):
        alive = [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(tensor))
        most = max(most, len(alive))
    assert most <= 2


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        ("Dora", {"use_dora": True}),
        ("lora_bias", {"lora_bias": True}),
        ("TrainableTokens", {"trainable_token_indices": {"embed_tokens": [1, 2]}}),
        ("lm_head.weight", {"target_modules": ["embed_tokens"]}),
        ("lm_head.weight", {"modules_to_save": ["lm_head"]}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about tied embeddings
def test_adapters_that_have_no_merged_form_are_refused(problem, options):
    with pytest.raises(ValueError, match=problem):
        list(policy_weights(with_adapter(**options)))


# ------------------------------------------------------------------------------------------------------ into vLLM


def test_vllm_samples_from_the_policy_with_its_adapter(make_vllm_sampler):
    model = with_adapter(1)
    sampler = make_vllm_sampler(model)
    assert greedy(sampler) == expected_greedy(model) != expected_greedy(untrained_model(1))
    settings = SamplingSettings(temperature=0.7, max_tokens=12, stop_token_ids=())
    seeds = [sampling_seed(0, 0, row, "train") for row in range(3)]
    completions = sampler.generate(PROMPTS, settings, num_generations=4, seeds=seeds)
    for row, completion in enumerate(completions):
        expected = completion_logprobs(model, PROMPTS[row // 4], completion.token_ids, 0.7)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_vllm_has_at_most_two_tensors_of_a_push_at_a_time(make_vllm_sampler):
    sampler, alive, most = make_vllm_sampler(untrained_model(1)), [], 0

    def new_tensors():
        nonlocal alive, most
        for name, tensor in policy_weights(untrained_model(0)):
            new = tensor.clone()
            alive = [*(reference for reference in alive if reference() is not None), weakref.ref(new)]
            most = max(most, len(alive))
            yield name, new
            del new  # before the next one is made

    sampler.push(new_tensors())
    assert most <= 2  # nor does it wait for all parts of a fused layer


def test_the_policy_itself_is_sampled_with_its_adapter():
    model = with_adapter(1)
    sampler = TransformersSampler(lambda: nullcontext(model), device=torch.device("cpu"))
    assert greedy(sampler) == expected_greedy(model) != expected_greedy(untrained_model(1))


def test_vllm_follows_the_adapter_from_push_to_push(make_vllm_sampler):
    model = with_adapter(2)
    before = greedy(make_vllm_sampler(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(-3)
    assert expected_greedy(model) != before
    assert greedy(make_vllm_sampler(model)) == expected_greedy(model)


def test_vllm_gets_the_policy_from_main_memory_a_few_tensors_at_a_time(make_vllm_sampler):
    model, pool = with_adapter(1), ModelPool(torch.device("cpu"), "always")
    sampler = make_vllm_sampler(untrained_model(3))
    pool.add("policy", model)
    mover = pool.mover = LateMover()
    with pool.stream("policy") as (module, on_device):
        sampler.push(policy_weights(module, on_device))
    assert greedy(sampler) == expected_greedy(model)
    # One weight with its adapter, while vLLM still holds the tensors that it was given last.
    assert mover.faults == [] and mover.alive == 0
    assert mover.peak < sum(parameter.nbytes for parameter in model.parameters()) / 4


def failing(weights, at):
    for name, tensor in weights:
        if name == at:
            raise InterruptedError
        yield name, tensor


def without(weights, left_out):
    return [(name, tensor) for name, tensor in weights if name != left_out]


# Places in a stream of weights: the first, within the fused query, key and value, and between layers.
PLACES = ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight"]


@pytest.mark.parametrize("place", PLACES)
def test_a_push_that_fails_midway_is_not_sampled_from_and_the_next_one_repairs_it(make_vllm_sampler, place):
    sampler = make_vllm_sampler(untrained_model(3))
    broken = policy_weights(untrained_model(4))
    with pytest.raises(InterruptedError):
        sampler.push(failing(broken, place))
    with pytest.raises(RuntimeError, match="push"):
        sampler.generate(PROMPTS, GREEDY)
    model = untrained_model(5)
    sampler.push(policy_weights(model))
    assert greedy(sampler) == expected_greedy(model)


@pytest.mark.parametrize("place", [*PLACES, "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_push_without_one_of_the_weights_is_refused(make_vllm_sampler, place):
    sampler = make_vllm_sampler(untrained_model(3))
    with pytest.raises(ValueError, match=f"without 1 of .* {place}"):
        sampler.push(without(policy_weights(untrained_model(4)), place))
    assert not sampler.has_weights
    model = untrained_model(5)
    sampler.push(policy_weights(model))
    assert greedy(sampler) == expected_greedy(model)


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("is not a weight of the model", lambda weights: [*weights, ("lm_head.weight", torch.zeros(120, 64))]),
        ("comes twice", lambda weights: [*weights, weights[0]]),
        ("has shape|with shape", lambda weights: [(weights[0][0], torch.zeros(128, 64)), *weights[1:]]),
    ],
)
def test_a_push_of_other_weights_is_refused(make_vllm_sampler, problem, change):
    sampler = make_vllm_sampler(untrained_model(3))
    with pytest.raises(ValueError, match=problem):
        sampler.push(change(list(policy_weights(untrained_model(4)))))
    assert not sampler.has_weights


def test_weights_may_come_in_any_order(make_vllm_sampler):
    sampler = make_vllm_sampler(untrained_model(3))
    model = untrained_model(5)
    sampler.push(list(policy_weights(model))[::-1])
    assert greedy(sampler) == expected_greedy(model)
