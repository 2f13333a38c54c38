"""Merging: exact sums, complete folders, the best of a run, and nothing merged that does not belong together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.embedded.policy import build_tokenizer, save_untrained
from common.merge import MergeSettings, find_source, main, merge
from common.models.weights import policy_weights
from common.runs.checkpoints import save_checkpoint, save_final
from tests.layouts import loaded, logits, small_model, with_lora

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with a tokenizer, in both precisions."""
    folder = save_untrained(tmp_path_factory.mktemp("base") / request.param, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=request.param)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes every linear layer, with an end token and a chat template of its own."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(base, folder)
    return folder


def save_adapter(base: Path, folder: Path, **changes) -> PeftModel:
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[1, 7]).save_pretrained(folder)
    return model


def run_merge(output: Path, **settings) -> dict[str, torch.Tensor]:
    """The weights of the merged folder, which has to load without a word about missing ones."""
    merge(MergeSettings(output=str(output), **{name: str(value) for name, value in settings.items()}))
    _, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not list(output.parent.glob("*.tmp-*"))
    weights = {}
    for path in output.glob("*.safetensors"):
        weights |= load_file(path)
    return weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Adapters


def test_an_adapter_is_added_in_float32_and_rounded_once_to_the_precision_of_its_base(base, adapter, tmp_path):
    merged = run_merge(tmp_path / "merged", model=base, adapter=adapter)
    before, parts = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert merged.keys() == before.keys()
    num_changed = 0
    for name, weight in merged.items():
        prefix = "base_model.model." + name.removesuffix("weight")
        expected = before[name]
        if f"{prefix}lora_A.weight" in parts:
            delta = parts[f"{prefix}lora_B.weight"].float() @ parts[f"{prefix}lora_A.weight"].float()
            expected = (expected.float() + config["lora_alpha"] / config["r"] * delta).to(expected.dtype)
            num_changed += 1
        assert weight.dtype == expected.dtype and torch.equal(weight, expected)
    assert num_changed == 14 and not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], delta)


def test_the_merged_model_gives_the_logits_of_base_and_adapter(base, adapter, tmp_path):
    run_merge(tmp_path / "merged", adapter=adapter)  # its own base
    ids = torch.arange(2, 22)[None]
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    with torch.no_grad():
        difference = (apart.eval()(ids).logits - merged(ids).logits).abs().max()
    assert difference < (1e-4 if "float32" in str(base) else 0.2)


def test_tokenizer_chat_template_and_end_tokens_are_those_the_adapter_was_trained_with(base, adapter, tmp_path):
    run_merge(tmp_path / "merged", model=base, adapter=adapter)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [1, 7]
    for name in ("tokenizer_config.json", "generation_config.json", "adapter_config.json"):
        (adapter / name).rename(adapter / f"{name}.away") if name != "adapter_config.json" else None
    try:
        run_merge(tmp_path / "plain", model=base, adapter=adapter)
    finally:
        for path in adapter.glob("*.away"):
            path.rename(path.with_suffix(""))
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template is None
    assert GenerationConfig.from_pretrained(tmp_path / "plain").eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("has_file", [True, False])
def test_a_generation_config_that_transformers_would_not_save_is_merged_as_it_is(base, tmp_path, has_file):
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="20KB")
    shipped = {"temperature": 0.7, "top_p": 0.9, "pad_token_id": -1, "eos_token_id": [1, 7]}
    (sharded / "generation_config.json").write_text(json.dumps(shipped))
    if not has_file:
        (sharded / "generation_config.json").unlink()
        config = json.loads((sharded / "config.json").read_text())
        (sharded / "config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    run_merge(tmp_path / "merged", model=sharded)
    saved = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert saved["pad_token_id"] == -1
    assert not has_file or {name: saved[name] for name in shipped} == shipped


def test_the_folder_of_an_adapter_alone_is_enough(adapter, tmp_path):
    assert same(run_merge(tmp_path / "a", model=adapter), run_merge(tmp_path / "b", adapter=adapter))


# Shards


def test_shards_become_one_file_and_one_file_becomes_shards(base, adapter, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert same(run_merge(tmp_path / "one", model=tmp_path / "sharded"), load_file(base / "model.safetensors"))
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    whole = run_merge(tmp_path / "merged", adapter=adapter)
    assert same(run_merge(tmp_path / "split", adapter=adapter, max_shard_size="20KB"), whole)
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2


def test_a_missing_shard_is_named(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    gone = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"{gone.name} is missing, which model.safetensors.index.json lists"):
        run_merge(tmp_path / "one", model=tmp_path / "sharded")
    assert not (tmp_path / "one").exists()


def test_a_checkpoint_that_lacks_weights_is_refused(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["model.norm.weight"]
    content["weight_map"] = {name: part for name, part in content["weight_map"].items() if part != file}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"weights are missing, such as model"):
        run_merge(tmp_path / "one", model=tmp_path / "sharded")


# Architectures with other names, axes or buffers than Qwen's


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),  # their weights are (in, out)
        ("deepseek_v3", ["o_proj", "q_b_proj"]),  # a buffer of the router belongs to the model
        ("mixtral", "all-linear"),  # with fused experts
        ("gpt_neox", "all-linear"),
        ("gemma3", ["q_proj", "o_proj"]),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft", "ignore:fan_in_fan_out:UserWarning")
def test_the_merged_folder_is_the_policy_for_each_kind_of_layout(kind, targets, tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "base")
    small_model(kind).save_pretrained(tmp_path / "base")
    policy = with_lora(loaded(tmp_path / "base"), targets)
    policy.save_pretrained(tmp_path / "adapter")
    weights = run_merge(tmp_path / "merged", adapter=tmp_path / "adapter")
    assert weights.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    expected = logits(policy)
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), expected, atol=1e-5, rtol=0)
    assert (logits(loaded(tmp_path / "base")) - expected).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
def test_an_adapter_of_another_gpt2_is_refused_by_its_shapes(tmp_path):
    small_model("gpt2").save_pretrained(tmp_path / "base")
    policy = with_lora(loaded(tmp_path / "base"), ["c_attn"])
    policy.save_pretrained(tmp_path / "adapter")
    build_tokenizer().save_pretrained(tmp_path / "base")
    small_model("gpt2", n_embd=48).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"lora_A.weight has the shape \[2, 32\].* with \(144, 48\)"):
        run_merge(tmp_path / "merged", adapter=tmp_path / "adapter")


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_a_base_with_a_damaged_file_is_refused_before_it_is_loaded(base, adapter, tmp_path, size):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base", max_shard_size=size)
    shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    file = min((tmp_path / "base").glob("model*.safetensors"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*Download or write this file again"):
        run_merge(tmp_path / "merged", adapter=tmp_path / "adapter")
    assert not list(tmp_path.glob("merged*"))


# Runs


def make_run(folder: Path, base: Path, *, lora: bool, best: str | None, final: bool = True) -> None:
    """A run's folder with checkpoints of steps 2 and 4 that differ."""
    folder.mkdir()
    (folder / "config.yaml").write_text("num_steps: 4\n")

    def write(scale: float):
        def policy(path: Path) -> None:
            if lora:
                save_adapter(base, path, lora_alpha=scale)
            else:
                model = AutoModelForCausalLM.from_pretrained(base)
                model.lm_head.weight.data.mul_(scale)
                model.save_pretrained(path)
                AutoTokenizer.from_pretrained(base).save_pretrained(path)

        return policy

    pointer = {"checkpoint": best, "metric": "eval/accuracy", "value": 0.5} if best else None
    for step in (2, 4):
        save_checkpoint(folder, step, writers={"policy": write(step)}, state={"best": pointer})
    if final:
        save_final(folder, 4, fill=lambda path: write(9)(path))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("best", "final", "taken"),
    [
        ("checkpoint-2", True, "checkpoint-2/policy"),
        ("checkpoint-0", True, "final"),  # never saved: the untrained policy was the best
        (None, True, "final"),
        (None, False, "checkpoint-4/policy"),
    ],
)
def test_of_a_run_its_best_checkpoint_is_taken_and_else_its_final_or_last_model(
    tiny_folder, tmp_path, lora, best, final, taken
):
    make_run(tmp_path / "run", tiny_folder, lora=lora, best=best, final=final)
    weights = run_merge(tmp_path / "merged", model=tmp_path / "run")
    if lora:
        expected = run_merge(tmp_path / "expected", adapter=tmp_path / "run" / taken)
    else:
        expected = load_file(tmp_path / "run" / taken / "model.safetensors")
    assert same(weights, expected)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} | {
        "tokenizer_config.json",
        *(["chat_template.jinja"] if lora else []),
    }


def test_a_checkpoint_of_a_run_can_be_named(tiny_folder, tmp_path, capsys):
    make_run(tmp_path / "run", tiny_folder, lora=True, best=None)
    main(["--model", str(tmp_path / "run" / "checkpoint-2"), "--output", str(tmp_path / "merged")])
    said = capsys.readouterr().out
    assert "merged: checkpoint" in said and "an adapter, and its base" in said and "(model.safetensors)" in said
    by_policy = run_merge(tmp_path / "other", adapter=tmp_path / "run" / "checkpoint-2" / "policy")
    assert same(load_file(tmp_path / "merged" / "model.safetensors"), by_policy)


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("num_steps: 4\n")
    with pytest.raises(ValueError, match="neither a checkpoint nor a final model yet"):
        find_source(str(tmp_path / "run"), None)


# What is refused


def test_what_is_already_merged_is_refused(base, adapter, tmp_path):
    merge(MergeSettings(adapter=str(adapter), output=str(tmp_path / "merged")))
    for model in (base, tmp_path / "merged"):
        with pytest.raises(
            ValueError, match=r"nothing to merge: the folder holds no adapter, no shards and no run.*--adapter"
        ):
            run_merge(tmp_path / "again", model=model)
    with pytest.raises(ValueError, match=r"it belongs to the base model .*base.*merged was given"):
        run_merge(tmp_path / "again", model=tmp_path / "merged", adapter=adapter)
    assert not (tmp_path / "again").exists()


def test_an_adapter_of_another_base_is_refused_by_its_name(base, adapter, tmp_path):
    other = save_untrained(tmp_path / "other", **SIZES, seed=1)  # the same shapes
    with pytest.raises(ValueError, match=r"belongs to the base model .*Pass --model .*base_model_name_or_path"):
        run_merge(tmp_path / "merged", model=other, adapter=adapter)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 64}, "does not fit"),
        ({"num_hidden_layers": 1}, r"layers.1.*with None: it was trained on another"),
    ],
)
def test_an_adapter_of_another_base_is_refused_by_its_shapes(base, adapter, tmp_path, sizes, message, monkeypatch):
    other = save_untrained(tmp_path / "other", **SIZES | sizes)
    shutil.copytree(adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(other)}))
    monkeypatch.delattr("common.merge.load")  # refused before any weight is loaded
    with pytest.raises(ValueError, match=message):
        run_merge(tmp_path / "merged", model=other, adapter=tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of adapters on embeddings, which is what is tested
def test_embeddings_and_their_adapters_are_compared_by_their_shapes_too(tiny_folder, tmp_path):
    save_adapter(tiny_folder, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="ties the two"):  # this base has one tensor for both embeddings
        run_merge(tmp_path / "merged", model=tiny_folder, adapter=tmp_path / "adapter")
    assert not list(tmp_path.glob("merged*"))


def test_nothing_is_overwritten(base, adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, reason in (("full", "it is not empty, and nothing is overwritten"), ("file", "it is a file")):
        with pytest.raises(ValueError, match=rf"output=.*{reason}.*--output"):
            run_merge(tmp_path / name, adapter=adapter)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert run_merge(tmp_path / "empty", adapter=adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither model nor adapter"),
        ({"model": "./nowhere"}, "there is no such folder"),
        ({"model": "Qwen/Qwen2.5-0.5B"}, "nothing to merge"),
        ({"adapter": "nowhere"}, "there is no adapter_config.json in it"),
        ({"model": "x", "max_shard_size": "large"}, r"max_shard_size='large': need a size"),
    ],
)
def test_names_of_nothing_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        merge(MergeSettings(output=str(tmp_path / "merged"), **settings))


def test_an_adapter_without_weights_and_one_whose_base_is_gone_are_refused(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no adapter_model.safetensors in it"):
        run_merge(tmp_path / "merged", adapter=tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        run_merge(tmp_path / "merged", adapter=tmp_path / "adapter")


def test_an_adapter_with_a_damaged_file_is_refused_before_the_base_is_loaded(base, adapter, tmp_path, monkeypatch):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.delattr("common.merge.load")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged \(0 bytes; .*adapter again"):
        run_merge(tmp_path / "merged", adapter=tmp_path / "adapter")


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown setting 'size'"):
        main(["--output", str(tmp_path / "merged"), "--size", "3"])


def test_a_policy_that_was_trained_here_loads_as_it_was_pushed_to_the_sampler(base, adapter, tmp_path):
    """The merged folder holds what the trainer's own stream of weights gives."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    assert same(run_merge(tmp_path / "merged", adapter=adapter), dict(policy_weights(model)))
