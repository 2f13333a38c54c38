"""LoRA: which modules a name means, what is refused, and what is said."""

import json
import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from common.cli import parse_config
from common.config import RLConfig
from common.logprobs import token_logprobs
from common.models.loading import add_adapter, load_policy
from common.models.lora import check_targets, describe_adapter
from GRPO.grpo_trainer import GRPOConfig
from PPO.value_model import load_value_model, share_backbone
from tests.architectures import configuration, make, move_off_neutral
from tests.toy import LORA, toy_trainer

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def model(*, tied: bool = False) -> Qwen2ForCausalLM:
    """Two layers without storage."""
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=tied))


def adapted(targets: str | list[str], *, tied: bool = False) -> list[str]:
    """Names of the modules that get an adapter."""
    config = RLConfig(use_lora=True, lora_r=4, lora_target_modules=targets)
    whole = model(tied=tied)
    check_targets(whole, config)
    names = add_adapter(whole, config, task_type="CAUSAL_LM").state_dict()
    return sorted({name.split(".lora_")[0].split("base_model.model.")[1] for name in names if ".lora_" in name})


# How names are given


@pytest.mark.parametrize(
    "given",
    [
        *("q_proj,v_proj", "q_proj, v_proj", " q_proj ,\tv_proj\n", "q_proj,v_proj,", "q_proj,,v_proj"),
        *("q_proj,v_proj,q_proj", ["q_proj", "v_proj"], ["q_proj, v_proj"], ["q_proj ", " v_proj", ""]),
    ],
)
def test_names_are_stripped_and_counted_once(given):
    assert RLConfig(lora_target_modules=given).lora_target_modules == "q_proj,v_proj"
    layers = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    assert adapted(given) == layers


@pytest.mark.parametrize("line", ["q_proj, v_proj", "[q_proj, v_proj]", '"q_proj , v_proj,"', "[' q_proj', v_proj]"])
def test_a_yaml_file_gives_names_as_text_or_as_a_list(tmp_path, line):
    (tmp_path / "lora.yaml").write_text(f"use_lora: true\nlora_target_modules: {line}\n")
    config = parse_config(GRPOConfig(), args=["--config", str(tmp_path / "lora.yaml"), "--preset", "none"])
    assert config.lora_target_modules == "q_proj,v_proj"


@pytest.mark.parametrize("words", [["q_proj, v_proj"], ["q_proj,v_proj"], [" q_proj,v_proj "]])
def test_the_command_line_gives_names_as_text(words):
    config = parse_config(GRPOConfig(), args=["--lora_target_modules", *words, "--preset", "none"])
    assert config.lora_target_modules == "q_proj,v_proj"


@pytest.mark.parametrize("given", ["", " ", ",", [], [""], "all-linear,q_proj", ["all-linear", "lm_head"]])
def test_no_name_at_all_and_a_name_beside_all_linear_are_refused(given):
    with pytest.raises(ValueError, match=r"lora_target_modules=.*need names of modules, or all-linear alone"):
        RLConfig(lora_target_modules=given)


@pytest.mark.parametrize("given", [["q_proj", 3], 3, None])
def test_names_are_text(given):
    with pytest.raises(ValueError, match="lora_target_modules"):
        RLConfig(lora_target_modules=given)


# What they mean


@pytest.mark.parametrize("given", ["all-linear", " All-Linear "])
@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_is_every_linear_layer_but_the_head(given, tied):
    names = adapted(given, tied=tied)
    assert len(names) == 14 and all(name.startswith("model.layers.") for name in names)


def test_a_name_is_the_end_of_a_modules_name():
    assert adapted("layers.1.self_attn.q_proj") == ["model.layers.1.self_attn.q_proj"]
    # The second is all of the first's end, and covers it.
    assert adapted("self_attn.q_proj,q_proj") == adapted("q_proj")
    assert adapted("model.embed_tokens, lm_head") == ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize(
    ("given", "unmatched"),
    [
        ("q_proj,c_attn", "c_attn"),
        ("proj", "proj"),  # not a part between dots
        ("q_proj,v-proj,k_porj", "v-proj or k_porj"),
        (r".*\.q_proj", r"\.\*.*q_proj"),
        ("Q_PROJ", "Q_PROJ"),
        ("q_proj v_proj", "q_proj v_proj"),
        ("model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.q_proj"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_what_there_is(given, unmatched):
    with pytest.raises(ValueError, match=rf"nothing in the model is called {unmatched}, .*The model has .*q_proj"):
        adapted(given)


@pytest.mark.parametrize(
    ("given", "named"), [("mlp", "Qwen2MLP"), ("q_proj,norm", "Qwen2RMSNorm"), ("layers", "ModuleList")]
)
def test_a_module_that_has_no_adapter_is_refused_by_its_kind(given, named):
    with pytest.raises(ValueError, match=rf"is a {named}, .*q_proj"):
        adapted(given)


@pytest.mark.parametrize(
    "given",
    ["lm_head", "embed_tokens", "model.embed_tokens", "q_proj,lm_head", ["q_proj", " lm_head", "embed_tokens"]],
)
def test_tied_embeddings_are_refused(given):
    with pytest.raises(ValueError, match=r"ties lm_head and model.embed_tokens.*Leave it out"):
        adapted(given, tied=True)
    assert adapted(given)  # without the tie each has its own weight


def test_conv1d_layers_are_linear_layers():
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    check_targets(gpt2, RLConfig(lora_target_modules="c_attn"))
    with pytest.raises(ValueError, match=r"ties lm_head and transformer\.wte"):
        check_targets(gpt2, RLConfig(lora_target_modules="wte"))
    with pytest.raises(ValueError, match="The model has wpe, c_attn, c_proj, c_fc"):
        check_targets(gpt2, RLConfig(lora_target_modules="q_proj"))


@pytest.mark.parametrize(
    "model_class, options", [(Qwen2ForCausalLM, {}), (Gemma2ForCausalLM, {"final_logit_softcapping": 0.5})]
)
def test_an_adapter_on_the_head_is_part_of_the_logprobs(tmp_path, rollouts, model_class, options):
    sizes = {**SIZES, **HEADS, "tie_word_embeddings": False, **options}
    model_class(model_class.config_class(**sizes)).save_pretrained(tmp_path)
    config = RLConfig(use_lora=True, lora_r=4, lora_target_modules="lm_head", attn_implementation="eager")
    policy = load_policy(str(tmp_path), config, dtype=torch.float32)
    before = token_logprobs(policy, rollouts, 1.0)[0].detach()
    with torch.no_grad():
        policy.get_output_embeddings().lora_B["default"].weight.add_(0.1)
    after = token_logprobs(policy, rollouts, 1.0)[0].detach()
    assert not torch.equal(after, before)
    length, end = int(rollouts.prompt_mask[0].sum()), int(rollouts.total_lengths[0])
    ids = rollouts.sequences()[0][:1, :end]
    logits = policy(input_ids=ids).logits[0, length - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, ids[0, length:, None]).squeeze(1)
    torch.testing.assert_close(after[0, : end - length], expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of adapters on embeddings, which is what is tested
@pytest.mark.parametrize("targets", ["embed_tokens", "lm_head,embed_tokens"])
def test_embeddings_are_adapted_in_a_run(tmp_path, tokenizer, targets):
    sizes = {**SIZES, **HEADS, "tie_word_embeddings": False, "vocab_size": len(tokenizer)}
    Qwen2ForCausalLM(Qwen2ForCausalLM.config_class(**sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    metrics = toy_trainer(tmp_path / "model", tmp_path / "run", **LORA, lora_target_modules=targets).train()
    assert metrics["policy/first_ratio"] == 1 and metrics["sampler/logprob_diff"] < 1e-5
    before, after = (
        load_file(path / "model.safetensors") for path in (tmp_path / "model", tmp_path / "run" / "final")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight".replace("embed", "model.embed") for name in targets.split(",")}


def test_a_value_model_gets_the_same_layers_under_its_shorter_names(tiny_folder):
    def backbone(targets: str) -> list[str]:
        config = RLConfig(use_lora=True, lora_r=4, lora_target_modules=targets)
        value = load_value_model(str(tiny_folder), config, dtype=torch.float32, zero_head=True)
        return [name for name, part in value.backbone.named_modules() if hasattr(part, "lora_A")]

    assert backbone("model.layers.0.self_attn.q_proj,lm_head") == ["base_model.model.layers.0.self_attn.q_proj"]
    assert len(backbone("q_proj,v_proj")) == 4
    for targets, problem in (("lm_head", "a value model has no lm_head"), ("c_attn", "is called c_attn")):
        with pytest.raises(ValueError, match=problem):
            backbone(targets)


# What is said


def test_the_line_counts_modules_and_parameters():
    config = RLConfig(use_lora=True, lora_r=4, lora_target_modules="q_proj,v_proj")
    line = describe_adapter(add_adapter(model(), config, task_type="CAUSAL_LM"), config)
    # q: 16 -> 16, v: 16 -> 8, rank 4: 4 x 32 and 4 x 24 in two layers.
    total = sum(parameter.numel() for parameter in model().parameters()) + 448
    assert line == f"LoRA: 4 modules adapted (q_proj 2, v_proj 2), 448 of {total:,} parameters train"


def test_a_run_says_once_what_it_adapts_and_a_mistake_leaves_no_folder(tiny_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="nanorlhf"):
        toy_trainer(tiny_folder, tmp_path / "run", **LORA, lora_target_modules=" q_proj, v_proj").train()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("LoRA: ")]
    assert len(lines) == 1 and lines[0].startswith("LoRA: 4 modules adapted (q_proj 2, v_proj 2), ")
    for targets in ("lm_head", "embed_tokens", "c_attn"):
        with pytest.raises(ValueError, match=f"lora_target_modules={targets}"):
            toy_trainer(tiny_folder, tmp_path / "wrong", **LORA, lora_target_modules=targets)
    assert not (tmp_path / "wrong").exists()


def test_an_embedded_policy_is_checked_before_it_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr("common.trainer.resolve_model", lambda model, **_: pytest.fail("it was built"))
    with pytest.raises(ValueError, match="ties lm_head"):
        toy_trainer("tiny", tmp_path / "run", **LORA, lora_target_modules="lm_head")


# What no adapter can be added to


def random_model(architecture: str) -> PreTrainedModel:
    """A tiny random model with eager attention and all weights off their neutral values."""
    random = AutoModelForCausalLM.from_config(configuration(architecture), attn_implementation="eager").float()
    move_off_neutral(random)
    return random


@pytest.mark.parametrize(
    ("architecture", "left_out"),
    [
        ("qwen3_moe", ["experts", "gate", "gate_proj"]),  # gate_proj of the dense layer: peft means the experts'
        ("mixtral", ["experts", "gate"]),
        ("qwen2_moe", ["experts", "gate"]),
        ("llama4_text", ["experts", "router"]),  # the router derives from nn.Linear and returns two tensors
        ("deepseek_v3", ["experts", "gate", "up_proj"]),
        ("gpt_oss", ["experts", "router"]),
        ("mamba", ["out_proj", "x_proj", "dt_proj"]),
        ("falcon_h1", ["out_proj"]),
        ("jamba", ["dt_proj", "experts"]),
        ("deepseek_v4", ["o_a_proj", "experts"]),
        ("gemma3n_text", ["correction_coefs", "prediction_coefs"]),
    ],
)
def test_all_linear_leaves_out_what_is_no_linear_layer_and_the_run_says_so(architecture, left_out):
    config = RLConfig(use_lora=True, lora_r=4)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(configuration(architecture))
    check_targets(whole, config)
    adapted = add_adapter(whole, config, task_type="CAUSAL_LM")
    line = describe_adapter(adapted, config)
    said = line.partition("; left out: ")[2]
    assert all(name in said for name in left_out)
    names = {name.split(".lora_")[0].split(".")[-1] for name in adapted.state_dict() if ".lora_" in name}
    assert not names.intersection(left_out)
    # One name is no such request.
    with pytest.raises(ValueError, match=f"lora_target_modules={left_out[0]}: .*"):
        with torch.device("meta"):
            again = AutoModelForCausalLM.from_config(configuration(architecture))
        check_targets(again, RLConfig(use_lora=True, lora_target_modules=left_out[0]))


@pytest.mark.parametrize("architecture", ["qwen2", "falcon", "cohere_qk", "bloom"])
def test_layers_of_a_models_own_class_are_adapted_if_they_are_linear(architecture):
    config = RLConfig(use_lora=True, lora_r=4)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(configuration(architecture))
    line = describe_adapter(add_adapter(whole, config, task_type="CAUSAL_LM"), config)
    assert "dense_h_to_4h 2" in line or "left out" not in line


@pytest.mark.parametrize(
    "architecture", ["qwen3_moe", "qwen2_moe", "mixtral", "mamba", "jamba", "falcon_h1", "zamba2"]
)
def test_every_adapter_learns_and_merging_leaves_the_policy_as_it_is(architecture):
    adapted = add_adapter(random_model(architecture), RLConfig(use_lora=True, lora_r=4), task_type="CAUSAL_LM").eval()
    ids = torch.randint(20, 200, (2, 40))
    adapted(input_ids=ids).logits.square().sum().backward()
    second = {name: weight for name, weight in adapted.named_parameters() if ".lora_B." in name}
    assert second and all(weight.grad.abs().max() > 0 for weight in second.values())
    with torch.no_grad():
        for weight in second.values():
            weight.normal_(std=0.02)
        before = adapted(input_ids=ids).logits
        assert (before - adapted.merge_and_unload()(input_ids=ids).logits).abs().max() < 5e-5


def test_a_value_model_of_experts_has_adapters_where_the_policy_has_them(tmp_path):
    make("qwen3_moe", tmp_path)
    config = RLConfig(use_lora=True, lora_r=4)
    policy = load_policy(str(tmp_path), config, dtype=torch.float32)
    own = load_value_model(str(tmp_path), config, dtype=torch.float32, zero_head=True)
    shared = share_backbone(policy, config, zero_head=True)

    def adapted(module: torch.nn.Module, adapter: str) -> set[str]:
        ends = [name.split("layers.")[1] for name in module.state_dict() if f"lora_A.{adapter}" in name]
        return {name.split(".lora_A")[0] for name in ends}

    wanted = adapted(policy, "default")
    assert wanted and adapted(own.backbone, "default") == adapted(shared.backbone, "value") == wanted


@pytest.mark.parametrize("architecture", ["laguna", "gpt2", "mixtral"])
def test_an_adapter_is_loaded_whole_whatever_its_modules_are_called(architecture, tmp_path):
    make(architecture, tmp_path / "model")
    config = RLConfig(model=str(tmp_path / "model"), use_lora=True, lora_r=4)
    policy = load_policy(config.model, config, dtype=torch.float32)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.normal_()
    policy.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_policy(config.model, config, dtype=torch.float32, checkpoint=tmp_path / "adapter")
    for weight, same in zip(policy.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(weight, same) and weight.requires_grad == same.requires_grad
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"of the \d+ tensors that its configuration asks for, and not .*lora_B"):
        load_policy(config.model, config, dtype=torch.float32, checkpoint=tmp_path / "adapter")


def test_an_adapter_is_written_with_the_same_bytes_in_every_process(tiny_folder, tmp_path):
    toy_trainer(tiny_folder, tmp_path / "run", **LORA, num_steps=1, save_every=1).train()
    for folder in ("final/adapter", "checkpoint-1/policy"):
        names = json.loads((tmp_path / "run" / folder / "adapter_config.json").read_text())["target_modules"]
        assert len(names) > 6 and names == sorted(names)
