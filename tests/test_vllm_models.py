"""vLLM after two pushes against transformers, for kinds of models whose weights vLLM prepares for its kernels."""

import importlib.util
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.mistakes import WrongNumbers
from common.sampling import vllm_corrections, vllm_engine, vllm_support
from common.sampling.vllm_engine import EngineSettings, create_engine, push_weights
from tests.architectures import make, move_off_neutral
from tests.toy import toy_trainer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "experts": ("qwen3_moe", EXPERTS | {"head_dim": 32}),
    "experts that the model copies itself": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 16},
    ),
    "a state": (
        "falcon_h1",
        {"head_dim": 32, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    ),
    "transformers' own class": ("smollm3", {}),
    "a window that vLLM widens": (
        "cohere2",
        {"head_dim": 32, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "a convolution": ("lfm2", {"layer_types": ["conv", "full_attention"], "tie_word_embeddings": True}),
    "latent attention": (
        "deepseek_v2",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "kv_lora_rank": 32}
        | {"q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
        | {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    ),
    "another activation": ("bloom", {"n_layer": 2, "n_head": 2, "tie_word_embeddings": True}),
    "an activation with weights": ("apertus", {"head_dim": 32, "hidden_act": "xielu"}),
    "a bias of the router": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    ),
    "a router with sigmoids": ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}),
    "a bias of the head": (
        "phimoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    ),
    "prompts that vLLM reads both ways": (
        "hrm_text",
        {"num_layers_per_stack": 1, "num_hidden_layers": 4, "L_cycles": 1, "L_bp_cycles": [1], "prefix_lm": False},
    ),
    "biases that vLLM's class has not": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "norms that vLLM's class has not": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "NaN in vLLM's class": (
        "gemma3n_text",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "laurel_rank": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24, "head_dim": 32}
        | {"vocab_size_per_layer_input": 300, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}
        | {"intermediate_size": [96] * 4, "tie_word_embeddings": True},
    ),
}
IDS = torch.randint(5, 290, (1, 50), generator=torch.Generator().manual_seed(3))


def save_model(path, kind: str, **settings: object):
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    move_off_neutral(model)
    model.save_pretrained(path)
    return path


def save_other_weights(folder, path):
    """A copy of a folder in which each weight is another."""
    path.mkdir()
    (path / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    changed = {name: weight * (1 + 0.3 * torch.randn_like(weight)) for name, weight in weights.items()}
    save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
    return path


@torch.no_grad()
def logprobs_of_model(path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    logits = model(input_ids=IDS).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, IDS[0, 1:, None]).squeeze(1)  # (tokens - 1,)


def logprobs_of_engine(engine) -> Tensor:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": IDS[0].tolist()}]
    with vllm_corrections.kernels_for(engine.dtype):
        [output] = engine.llm.generate(prompts, params, use_tqdm=False)
    pairs = zip(output.prompt_logprobs[1:], IDS[0, 1:].tolist(), strict=True)
    return torch.tensor([found[token].logprob for found, token in pairs])


def engine_for(path):
    return create_engine(EngineSettings(model=str(path), dtype="float32", max_model_len=64, max_num_seqs=2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_has_the_weights_of_each_push(tmp_path, kind):
    torch.manual_seed(0)
    first = save_model(tmp_path / "first", KINDS[kind][0], **KINDS[kind][1])
    second = save_other_weights(first, tmp_path / "second")
    engine = engine_for(first)
    expected = [logprobs_of_model(path) for path in (first, second)]
    assert (expected[0] - expected[1]).abs().mean() > 0.05
    for path, logprobs in zip((first, second), expected, strict=True):
        push_weights(engine, load_file(path / "model.safetensors").items())
        assert (logprobs_of_engine(engine) - logprobs).abs().max() < 3e-5
    # transformers is as before: the policy still runs, and its configuration is of its own class.
    assert torch.equal(logprobs_of_model(first), expected[0])


@pytest.mark.slow
def test_a_head_that_the_policy_ties_is_tied_although_the_folder_has_a_copy(tmp_path):
    torch.manual_seed(0)
    path = save_model(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    weights = load_file(path / "model.safetensors")
    copy = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | copy, path / "model.safetensors", metadata={"format": "pt"})
    engine = create_engine(EngineSettings(model=str(path), dtype="float32", max_model_len=64, max_num_seqs=2))
    push_weights(engine, weights.items())
    assert (logprobs_of_engine(engine) - logprobs_of_model(path)).abs().max() < 3e-5


@pytest.mark.slow
def test_a_layerwise_reload_that_leaves_weights_is_refused(tmp_path):
    from common.sampling import vllm_reload

    kind, settings = KINDS["experts that the model copies itself"]
    path = save_model(tmp_path / "model", kind, **settings)
    engine = engine_for(path)
    weights = load_file(path / "model.safetensors")
    config = engine.llm.llm_engine.model_config
    with pytest.raises(ValueError, match=r"sinks|experts"):
        engine.llm.apply_model(lambda model: vllm_reload.load_layerwise(model, weights.items(), config))


def check(tmp_path, kind: str, *, max_model_len: int = 64, **settings: object) -> None:
    path = tmp_path / kind
    path.mkdir(exist_ok=True)
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(path)
    vllm_support.check_engine(str(path), dtype="float32", max_model_len=max_model_len)


@pytest.mark.slow
def test_what_vllm_does_not_sample_rightly_is_refused_by_its_configuration(tmp_path):
    check(tmp_path, "qwen2")
    with pytest.raises(ValueError, match="heads of 16"):
        check(tmp_path, "qwen2", num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(ValueError, match="selective scan"):
        check(tmp_path, "mamba")
    factors = {"short_factor": [1.0] * 16, "long_factor": [3.0] * 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    check(tmp_path, "phi3", original_max_position_embeddings=64, rope_parameters=rope)
    with pytest.raises(ValueError, match="max_completion_length to 64 tokens in total"):
        check(tmp_path, "phi3", original_max_position_embeddings=64, rope_parameters=rope, max_model_len=65)
    with pytest.raises(ValueError, match="dynamic"):
        check(tmp_path, "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})


@pytest.mark.slow
def test_a_head_that_vllm_ties_and_the_policy_does_not_is_refused(tmp_path):
    kinds = {"layer_types": ["conv", "full_attention"], "tie_word_embeddings": False}
    path = save_model(tmp_path / "model", "lfm2", **kinds)
    with pytest.raises(ValueError, match="tie_word_embeddings=false"):
        engine_for(path)


@pytest.mark.slow
def test_an_engine_leaves_the_configuration_classes_of_transformers(tmp_path):
    check(tmp_path, "hyperclovax", head_dim=32)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "hyperclovax")).__module__.startswith(
        "transformers"
    )


@pytest.mark.slow
def test_a_model_that_vllm_cannot_build_is_refused_before_the_policy_is_loaded(tmp_path, monkeypatch):
    make("gpt2_scaled", tmp_path / "gpt2")
    monkeypatch.delattr("common.trainer.load_policy")
    groups, users = torch.distributed.is_initialized(), vllm_engine._Groups.users
    with pytest.raises(
        ValueError, match=r"cannot build .* config\.scale_attn_by_inverse_layer_idx\. Pass --sampler"
    ) as error:
        toy_trainer(tmp_path / "gpt2", tmp_path / "run", sampler="vllm", dtype="float32")
    assert "\n" not in str(error.value)
    assert (torch.distributed.is_initialized(), vllm_engine._Groups.users) == (groups, users)


@pytest.mark.slow
def test_an_engine_that_was_refused_leaves_room_for_another(tmp_path):
    torch.manual_seed(0)
    users = vllm_engine._Groups.users
    make("axk1", tmp_path / "axk1")  # its dense layers have a norm in vLLM that no checkpoint has
    with pytest.raises(ValueError, match="post_mlp_layernorm"):
        engine_for(tmp_path / "axk1")
    assert vllm_engine._Groups.users == users
    engine = engine_for(save_model(tmp_path / "qwen2", "qwen2"))
    push_weights(engine, load_file(tmp_path / "qwen2" / "model.safetensors").items())
    assert (logprobs_of_engine(engine) - logprobs_of_model(tmp_path / "qwen2")).abs().max() < 3e-5


@pytest.mark.slow
def test_an_engine_that_is_freed_while_another_starts_leaves_it_the_groups(tmp_path, monkeypatch):
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    path = save_model(tmp_path / "model", "qwen2")
    first = engine_for(path)
    load = CPUModelRunner.load_model
    # As the garbage collector does with an engine in a cycle.
    monkeypatch.setattr(CPUModelRunner, "load_model", lambda *args, **kw: (first.shut_down(), load(*args, **kw)))
    second = engine_for(path)
    assert not first.shut_down.alive
    assert type(second.llm.apply_model(lambda model: model)[0]).__module__.endswith("models.qwen2")


@pytest.mark.slow
def test_a_run_says_that_it_samples_from_transformers_class(tmp_path, caplog):
    kind, settings = KINDS["biases that vLLM's class has not"]
    with caplog.at_level("INFO", "nanorlhf"):
        engine_for(save_model(tmp_path / "model", kind, **settings))
    assert "drops 2 of" in caplog.text and "transformers' own class" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="the package is installed")
def test_a_package_that_vllm_misses_is_named_in_a_line(tmp_path, capfd):
    with pytest.raises(ValueError, match=r"torchvision.*Install what it is in, or pass --sampler") as error:
        check(tmp_path, "qwen3_5_text", layer_types=["linear_attention", "full_attention"])
    assert "\n" not in str(error.value) and not "".join(capfd.readouterr())


UNDECLARED = {
    "a window, a soft cap and half a rotation": (
        "llama",
        {"head_dim": 32},
        {"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"], "attn_logit_softcapping": 3.0}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "a scale of longrope": (
        "phi3",
        {},
        {"original_max_position_embeddings": 64}
        | {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
            | {"short_factor": [1.1] * 16, "long_factor": [3.0] * 16, "short_mscale": 1.3, "long_mscale": 1.2}
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", UNDECLARED)
def test_a_key_that_transformers_does_not_know_changes_nothing_in_vllm(tmp_path, case):
    torch.manual_seed(0)
    kind, settings, keys = UNDECLARED[case]
    path = save_model(tmp_path / "model", kind, **settings)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | keys))
    engine = engine_for(path)
    push_weights(engine, load_file(path / "model.safetensors").items())
    assert (logprobs_of_engine(engine) - logprobs_of_model(path)).abs().max() < 3e-5


ASSUMED = {
    "a clip and normed experts": (
        "olmoe",
        EXPERTS | {"intermediate_size": 32, "clip_qkv": 0.5, "norm_topk_prob": True},
    ),
    "an exact gelu": ("gemma", {"head_dim": 32, "hidden_act": "gelu", "tie_word_embeddings": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ASSUMED)
def test_a_value_that_vllms_class_does_not_read_counts(tmp_path, case):
    torch.manual_seed(0)
    path = save_model(tmp_path / "model", ASSUMED[case][0], **ASSUMED[case][1])
    engine = engine_for(path)
    push_weights(engine, load_file(path / "model.safetensors").items())
    assert (logprobs_of_engine(engine) - logprobs_of_model(path)).abs().max() < 3e-5


def test_only_keys_that_no_class_has_are_undeclared():
    config = transformers.LlamaConfig(sliding_window=24, final_logit_softcapping=2.0, rope_theta=1e3)
    assert vllm_corrections.undeclared(config) == {"sliding_window", "final_logit_softcapping"}
    assert vllm_corrections.undeclared(transformers.MistralConfig(sliding_window=24)) == set()


@pytest.mark.slow
def test_a_policy_with_nan_is_not_blamed_on_vllm(tmp_path):
    path = save_model(tmp_path / "model", "qwen2")
    engine = engine_for(path)
    weights = load_file(path / "model.safetensors")
    with pytest.raises(WrongNumbers, match=r"the policy's own weight has \d+ NaN among"):
        push_weights(engine, {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}.items())
    push_weights(engine, weights.items())  # the engine is as before
    assert (logprobs_of_engine(engine) - logprobs_of_model(path)).abs().max() < 3e-5
