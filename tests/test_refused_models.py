"""A model that cannot be trained rightly is refused in one message, before its weights are loaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    Qwen2VLConfig,
    T5Config,
)

from common.config import RLConfig
from common.embedded import check_model, load_tokenizer, skeleton
from common.evaluation.command import evaluate
from common.evaluation.settings import EvaluationSettings
from common.merge import MergeSettings, merge
from common.models.configs import read_config
from common.models.files import check_weights_fit
from common.models.loading import load_policy, num_tokens
from common.models.saving import save_model
from common.models.unread import check_unexpected
from tests import forked
from tests.architectures import make
from tests.imports import ROOT
from tests.test_bad_input import assert_one_message, run_grpo
from tests.toy import toy_trainer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny policy, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(folder: Path, **values) -> None:
    """Set values in config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def refusal(folder: Path) -> str:
    """The message of check_model, which is short and names the model."""
    with pytest.raises(ValueError) as raised:
        check_model(str(folder))
    message = str(raised.value)
    assert message.startswith(f"model='{folder}': ") and message.count("\n") < 8 and len(message) < 800
    return message


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def lose_a_shard(folder):
    names = dict.fromkeys(load_file(folder / WEIGHTS), "model-00002-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / WEIGHTS).unlink()  # the index counts only without it


def damage_the_index(folder):
    (folder / INDEX).write_text('{"weight_map": ')
    (folder / WEIGHTS).unlink()


def lose_a_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def other_weights(folder):
    save_file({"transformer.wte.weight": torch.zeros(4, 4)}, folder / WEIGHTS, metadata={"format": "pt"})


def as_integers(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def untie(folder):
    change(folder, tie_word_embeddings=True)
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    check_model(str(folder))  # a copy may be there
    tensors["lm_head.weight"][-1] += 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def index_of_numbers(folder):
    (folder / INDEX).write_text('{"weight_map": {"a": 5}}')
    (folder / WEIGHTS).unlink()


def damaged_pickle(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    check_model(str(folder))
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def add(*names):
    """Tensors that the model has no place for."""

    def spoil(folder):
        extra = {name: torch.zeros(4) for name in names}
        save_file(load_file(folder / WEIGHTS) | extra, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


SPOILT = {
    "no config": (remove("config.json"), "the folder has no config.json"),
    "config without a type": (write("config.json", "{}"), "does not know its architecture"),
    "unreadable config": (write("config.json", "{"), "config.json is not readable as JSON"),
    "config of wrong types": (
        lambda folder: change(folder, hidden_size="wide"),
        "Field 'hidden_size' expected int, got str (value: 'wide'). Correct ",
    ),
    "config that contradicts itself": (lambda folder: change(folder, layer_types=[]), "`num_hidden_layers` (2)"),
    "unknown activation": (
        lambda folder: change(folder, hidden_act="nope"),
        "transformers knows no hidden_act 'nope'",
    ),
    "config that is a list": (write("config.json", "[1]"), "config.json holds no settings but [1]"),
    "class of another kind": (
        lambda folder: change(folder, architectures=["LlamaForCausalLM"]),
        "model_type 'qwen2', of which transformers makes Qwen2ForCausalLM, and architectures ['LlamaForCausalLM']",
    ),
    "no positions": (lambda folder: change(folder, max_position_embeddings=0), "max_position_embeddings 0"),
    "an adapter": (write("adapter_config.json", "{}"), "holds a LoRA adapter, which is no model without its base"),
    "quantised without saying so": (as_integers, "is of type I8, and config.json has no quantization_config"),
    "quantised without saying how": (lambda folder: change(folder, quantization_config={}), "quantization_config {}"),
    "a head that is not tied": (untie, "the files hold two different ones, model.embed_tokens and lm_head"),
    "a pointer in place of the weights": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1"),
        "is a pointer of Git LFS (42 bytes), not the file itself. Run git lfs pull",
    ),
    "weights of llama.cpp": (
        lambda folder: (folder / WEIGHTS).rename(folder / "model.gguf"),
        "has no weights that transformers loads; model.gguf is of llama.cpp",
    ),
    "an index of numbers": (index_of_numbers, f"{INDEX} is damaged"),
    "a damaged pickle": (damaged_pickle, "pytorch_model.bin is damaged"),
    "impossible sizes": (lambda folder: change(folder, pad_token_id=10_000), "cannot be built from its config.json"),
    "unknown architecture": (lambda folder: change(folder, model_type="qwen99"), "does not know its architecture"),
    "no weights": (remove(WEIGHTS), "has no weights"),
    "damaged weights": (cut, "model.safetensors is damaged"),
    "missing shard": (lose_a_shard, "model-00002-of-00002.safetensors is missing, which"),
    "damaged index": (damage_the_index, f"{INDEX} is damaged"),
    "missing tensor": (lose_a_tensor, "1 weight is missing, such as model.layers.1.mlp.up_proj.weight"),
    "another model's weights": (other_weights, "weights are missing"),
    "other shapes": (
        lambda folder: change(folder, vocab_size=500),
        "another shape than its config.json says, such as ",
    ),
    "unreadable generation config": (write("generation_config.json", "{"), "generation_config.json is not readable"),
    "end token in words": (write("generation_config.json", '{"eos_token_id": "</s>"}'), "eos_token_id '</s>'"),
    "generation config that is a list": (write("generation_config.json", "[]"), "holds no settings"),
    "a quantised checkpoint": (
        lambda folder: change(folder, quantization_config={"quant_method": "awq", "bits": 4}),
        "its weights are quantised (awq)",
    ),
    "a checkpoint in 4 bits": (
        lambda folder: change(folder, quantization_config={"load_in_4bit": True}),
        "its weights are quantised (bitsandbytes)",
    ),
    "an adapter beside the model": (
        write("adapter_config.json", "{}"),
        "the folder holds a LoRA adapter",
    ),
    "quantised by ModelOpt": (
        write("hf_quant_config.json", "{}"),
        "by hf_quant_config.json its weights are quantised",
    ),
    "biases that the class does not have": (
        add("model.layers.0.mlp.up_proj.bias", "model.layers.1.mlp.up_proj.bias"),
        "holds 2 weights for which Qwen2ForCausalLM has no place by this config.json: model.layers.0.mlp.up_proj.bias",
    ),
    "more layers than config.json says": (
        lambda folder: change(folder, num_hidden_layers=1, layer_types=["full_attention"]),
        "by this config.json: model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, ",
    ),
    "a reward model": (
        lambda folder: change(folder, architectures=["Qwen2ForSequenceClassification"]),
        "weights are those of Qwen2ForSequenceClassification",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_is_refused_with_the_reason(folder, name):
    check_model(str(folder))
    spoil, reason = SPOILT[name]
    spoil(folder)
    assert reason in refusal(folder)


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_weight_that_is_no_number_is_named_when_it_is_loaded(folder, use_lora):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / WEIGHTS)
    tensors[name][3, 4] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 weight is NaN or infinite, such as {name}, so that"):
        load_policy(str(folder), RLConfig(use_lora=use_lora), dtype=torch.bfloat16)


def test_what_to_do_about_quantised_weights_is_that_of_the_command(folder):
    change(folder, quantization_config={"quant_method": "awq"})
    assert "--load_in_4bit true" in refusal(folder)
    with pytest.raises(ValueError, match=r"quantised \(awq\).*Pass the model that it was made from\.$"):
        check_model(str(folder), is_trained=False)


def test_what_a_model_computes_or_does_not_need_may_lie_beside_its_weights(folder):
    change(folder, num_nextn_predict_layers=1)
    num_layers = read_config(folder).num_hidden_layers
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.h.0.attn.masked_bias"]
    later = [f"model.layers.{num_layers}.mlp.up_proj.weight", "model.mtp_layers.0.eh_proj.weight"]
    add(*buffers, *later)(folder)
    check_model(str(folder))
    load_policy(str(folder), RLConfig(), dtype=torch.float32)
    add(f"model.layers.{num_layers + 1}.mlp.up_proj.weight")(folder)
    assert "holds a weight for which" in refusal(folder)


def test_a_classifier_may_leave_out_heads_and_nothing_else(tiny_folder, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1).save_pretrained(tmp_path)
    add("lm_head.weight", "v_head.summary.weight")(tmp_path)
    kind, config = AutoModelForSequenceClassification, read_config(tmp_path)
    check_weights_fit(tmp_path, kind, config)
    check_weights_fit(tmp_path, AutoModel, config)
    add("model.layers.0.self_attn.o_proj.bias")(tmp_path)
    for auto_class in (kind, AutoModel):
        with pytest.raises(ValueError, match=r"no place by this config\.json: .*o_proj\.bias"):
            check_weights_fit(tmp_path, auto_class, config)


def test_a_language_model_may_leave_out_what_reads_images(tmp_path):
    make("gemma3", tmp_path)
    config = read_config(tmp_path)
    text = config.get_text_config()
    alone = AutoModelForCausalLM.from_config(text)
    found = {"unexpected_keys": {"vision_tower.embeddings.weight", "model.visual.patch_embed.weight"}}
    check_unexpected(found, alone, config, "the model")
    found["unexpected_keys"].add("model.layers.0.self_attn.q_proj.bias")
    with pytest.raises(ValueError, match=r"holds a weight .*: model\.layers\.0\.self_attn\.q_proj\.bias"):
        check_unexpected(found, alone, config, "the model")


def test_a_folder_without_a_tokenizer_is_refused(folder):
    remove("tokenizer.json", "tokenizer_config.json")(folder)
    with pytest.raises(ValueError, match=r"model='.*': its tokenizer cannot be loaded.*tokenizer\.json"):
        load_tokenizer(str(folder))


SMALL = {"vocab_size": 64, "d_model": 32}
OTHER_KINDS = {
    "T5": (T5Config(**SMALL), "encoder-decoder"),
    "BART": (BartConfig(**SMALL), "encoder-decoder"),
    "BERT": (BertConfig(vocab_size=64), "bert is of a family that fills in masked tokens"),
    "Qwen2-VL": (Qwen2VLConfig(), "AutoModelForCausalLM does not know qwen2_vl, a model for images and text"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_model_that_writes_no_text_by_itself_is_refused_by_its_configuration(tmp_path, name):
    config, reason = OTHER_KINDS[name]
    config.save_pretrained(tmp_path)
    assert reason in refusal(tmp_path)


def test_an_encoder_that_is_set_up_as_a_decoder_is_refused_too(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=True, **small)).save_pretrained(tmp_path)
    assert "bert is of a family that fills in masked tokens" in refusal(tmp_path)


def test_a_classifier_saved_by_transformers_is_refused(tiny_folder, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1).save_pretrained(tmp_path)
    assert "a model with one label can be a reward" in refusal(tmp_path)


@pytest.mark.slow
def test_a_script_refuses_it_in_one_line(folder, tmp_path):
    cut(folder)
    done = run_grpo("--model", str(folder), "--sampler", "transformers", "--output_dir", str(tmp_path / "run"))
    assert_one_message(done, "model.safetensors is damaged", "Download or write this file again")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_a_network_a_hub_id_takes_one_line_and_a_message(tmp_path):
    done = run_grpo(
        *("--model", "nobody/none", "--sampler", "transformers", "--output_dir", str(tmp_path / "run")),
        before="import httpx; httpx.Client.send = lambda *a, **k: (_ for _ in ()).throw(httpx.ConnectError('no'))\n"
        "import huggingface_hub.utils._http as http, types\n"
        "http.time = types.SimpleNamespace(sleep=lambda seconds: None)",  # it would wait for half a minute in all
        HF_HUB_OFFLINE="0",
        HF_HOME=str(tmp_path / "hub"),
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert "does not answer" in lines[0] and lines[1].startswith("error: model='nobody/none': cannot be loaded")


# Code that comes with the model

CONFIG_CODE = """
from transformers import Qwen2Config

class MarkedConfig(Qwen2Config):
    model_type = "marked"
"""
MODEL_CODE = """
from transformers import Qwen2ForCausalLM
from .configuration_marked import MarkedConfig

class MarkedForCausalLM(Qwen2ForCausalLM):
    config_class = MarkedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.variance_epsilon = 0.5  # so that Qwen2's own class would give other logits
"""


@pytest.fixture
def own_code(folder) -> Path:
    """A model whose architecture is Python code in its folder."""
    (folder / "configuration_marked.py").write_text(CONFIG_CODE)
    (folder / "modeling_marked.py").write_text(MODEL_CODE)
    places = {
        "AutoConfig": "configuration_marked.MarkedConfig",
        "AutoModelForCausalLM": "modeling_marked.MarkedForCausalLM",
    }
    change(folder, model_type="marked", architectures=["MarkedForCausalLM"], auto_map=places)
    return folder


BROKEN = {
    "a mistake in the code": ("configuration_marked.py", "class", "its own code cannot be run: SyntaxError"),
    "a package that is missing": (
        "configuration_marked.py",
        "import no_such_package",
        "no_such_package. Run `pip install no_such_package`. Install the package",
    ),
    "an error in the code": ("configuration_marked.py", "raise OSError('boom')", "its own code cannot be run: boom"),
    "a mistake in the model's code": ("modeling_marked.py", "class", "its own code cannot be run: SyntaxError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_code_that_cannot_be_run_is_refused_with_its_error(own_code, name):
    file, code, reason = BROKEN[name]
    (own_code / file).write_text(code)
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_config(own_code, trust_remote_code=True)


def test_code_that_takes_the_place_of_an_architecture_of_transformers_is_refused(own_code):
    change(own_code, model_type="gpt2")
    (own_code / "configuration_marked.py").write_text(CONFIG_CODE.replace('"marked"', '"gpt2"'))
    with pytest.raises(ValueError, match=r"defines the model_type gpt2.*Leave out --trust_remote_code"):
        read_config(own_code, trust_remote_code=True)


IN_A_PROCESS = """
import sys
from pathlib import Path
from tests.test_refused_models import {name}
{name}(*map(Path, sys.argv[1:]))
"""


def trust_and_train(folder: Path, output: Path) -> None:
    """Refuse a model's own code, then run it; in a process of its own, since it becomes known to transformers."""
    message = refusal(folder)
    assert "Python code that comes with the model" in message and "--trust_remote_code true" in message
    check_model(str(folder), trust_remote_code=True)
    assert num_tokens(str(folder)) == 459 and type(skeleton(str(folder))).__name__ == "MarkedForCausalLM"
    policy = load_policy(str(folder), RLConfig(trust_remote_code=True), dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    assert policy.model.norm.variance_epsilon == 0.5
    save_model(policy, load_tokenizer(str(folder)), output / "saved")
    # What is saved brings its code along.
    saved = AutoModelForCausalLM.from_pretrained(output / "saved", trust_remote_code=True)
    torch.testing.assert_close(saved(ids).logits, policy(ids).logits)
    assert (output / "saved" / "modeling_marked.py").is_file()
    trainer = toy_trainer(folder, output / "run", trust_remote_code=True, num_steps=1)
    metrics = trainer.train()
    assert metrics["policy/first_ratio"] == 1 and metrics["sampler/logprob_diff"] < 1e-5


def trust_and_evaluate(folder: Path, output: Path) -> None:
    """Refuse a model's own code in an evaluation and a merge, then run it; in a process of its own."""
    problems = output / "problems.jsonl"
    problems.write_text('{"nums": [1, 2, 3], "target": 6}\n')
    settings = {"model": [str(folder)], "task": str(problems), "sampler": "transformers", "num_samples": 1}
    settings |= {"max_completion_length": 4, "output_dir": str(output / "result")}
    merging = {"model": str(folder), "output": str(output / "merged")}
    for refused in (lambda: evaluate(EvaluationSettings(**settings)), lambda: merge(MergeSettings(**merging))):
        with pytest.raises(ValueError, match=r"Python code that comes with the model.*--trust_remote_code true"):
            refused()
    evaluate(EvaluationSettings(**settings, trust_remote_code=True))
    assert (output / "result" / "score.json").is_file()
    merge(MergeSettings(**merging, trust_remote_code=True))
    assert (output / "merged" / "modeling_marked.py").is_file()


def succeeds(function, folder, output):
    """A function in a process of its own, since the classes that it registers would stay."""
    (output / "call.py").write_text(IN_A_PROCESS.format(name=function.__name__))
    done = forked.run([output / "call.py", folder, output], cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_models_own_code_runs_only_if_it_is_trusted(own_code, tmp_path):
    succeeds(trust_and_train, own_code, tmp_path)


@pytest.mark.slow
def test_a_models_own_code_is_evaluated_and_merged_only_if_it_is_trusted(own_code, tmp_path):
    # In two shards, since there is nothing to merge in one file.
    tensors = load_file(own_code / WEIGHTS)
    half = len(tensors) // 2
    names = {}
    for number, part in enumerate((list(tensors)[:half], list(tensors)[half:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, own_code / file, metadata={"format": "pt"})
        names |= dict.fromkeys(part, file)
    (own_code / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (own_code / WEIGHTS).unlink()
    succeeds(trust_and_evaluate, own_code, tmp_path)


@pytest.mark.parametrize(("example", "count"), [("sft/sft.py", "prompts"), ("reward_model/reward_model.py", "pairs")])
def test_examples_say_that_they_run_no_code_of_a_model(own_code, tmp_path, example, count):
    rows = [{"prompt": f"{n}", "completion": f"{n}"} for n in range(40)]
    rows = [{"chosen": f"\n\nHuman: {n}\n\nAssistant: a", "rejected": f"\n\nHuman: {n}\n\nAssistant: b"} | row
            for n, row in enumerate(rows)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [ROOT / "examples" / example, "--model", own_code, "--dataset", "rows.jsonl"]
    command += ["--output_dir", "out", f"--num_eval_{count}", "4"]
    done = forked.run(command, cwd=tmp_path)
    assert done.returncode == 2 and "This example does not run it. Pass another model." in done.stderr, done.stderr
    assert "trust_remote_code" not in done.stderr


def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(tmp_path):
    assert "there is no such folder" in refusal(tmp_path / "nowhere")


def test_a_configuration_says_what_it_is_read_for(tmp_path):
    with pytest.raises(ValueError, match=r"^reward model 'x': the folder has no config\.json.*Pass another\.$"):
        read_config(tmp_path, label="reward model 'x'", remedy="Pass another.")
