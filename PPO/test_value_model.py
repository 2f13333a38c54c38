"""The value model: which state a value is of, where the model comes from, what it is written to."""

import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from common.config import RLConfig
from common.models.loading import load_policy
from common.update.batches import forward_context
from PPO.value_model import (
    ValueModel,
    explained_variance,
    load_scored_value_model,
    load_value_model,
    save_value_model,
    share_backbone,
    token_values,
    value_adapter,
)
from tests.toy import toy_trainer

NAN = float("nan")
FLOAT32 = {"dtype": torch.float32}


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return tensor


def value_model(folder, *, zero_head: bool = False, **settings: object) -> ValueModel:
    config = RLConfig(**({"lora_r": 4} | settings))
    return load_value_model(str(folder), config, dtype=torch.float32, zero_head=zero_head)


def save_classifier(folder, *, num_labels: int = 1, vocab_size: int = 459, kind: type | None = None):
    """An untrained model with a score, of the tiny policy's family."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=num_labels,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (kind or Qwen2ForSequenceClassification)(config).save_pretrained(folder)
    return folder


# Which state a value is of


def test_no_pass_is_needed_to_make_a_value_model(tiny_folder, monkeypatch):
    """Models are loaded on the CPU, and attention of a GPU does not run there."""

    def forward(*_, **__):
        raise AssertionError("a pass")

    monkeypatch.setattr("transformers.models.qwen2.modeling_qwen2.Qwen2Model.forward", forward)
    model = load_value_model(str(tiny_folder), RLConfig(), dtype=torch.float32, zero_head=True)
    assert model.head.in_features == model.backbone.config.hidden_size


def test_a_value_sees_what_precedes_its_token_and_nothing_else(tiny_folder, rollouts):
    model = value_model(tiny_folder)
    before = token_values(model, rollouts)
    for column in (0, 1, 3):
        changed = rollouts[:]
        changed.completion_ids = rollouts.completion_ids.clone()
        changed.completion_ids[:, column] += 7
        after = token_values(model, changed)
        assert torch.equal(after[:, : column + 1], before[:, : column + 1])
        longer = rollouts.lengths > column + 1
        assert (after[longer, column + 1] != before[longer, column + 1]).all() and longer.any()


def test_the_first_value_is_that_of_the_prompt_and_rows_of_a_prompt_share_it(tiny_folder, rollouts):
    first = token_values(value_model(tiny_folder), rollouts)[:, 0]
    torch.testing.assert_close(first[0::2], first[1::2], atol=1e-6, rtol=1e-5)
    assert len({round(value, 5) for value in first[0::2].tolist()}) == 3


def test_a_row_has_the_same_values_alone_and_in_company(tiny_folder, rollouts):
    model = value_model(tiny_folder)
    together = token_values(model, rollouts)
    for row in range(6):
        single = rollouts[row : row + 1].trimmed()
        values = token_values(model, single)
        torch.testing.assert_close(values, together[row : row + 1, : values.shape[1]], atol=1e-6, rtol=1e-5)


def test_values_of_padding_are_zero_and_garbage_there_changes_nothing(tiny_folder, rollouts):
    model = value_model(tiny_folder)
    before = token_values(model, rollouts)
    assert (before[~rollouts.completion_mask] == 0).all() and (before[rollouts.completion_mask] != 0).all()
    rollouts.completion_ids[~rollouts.completion_mask] = 99
    rollouts.prompt_ids[~rollouts.prompt_mask] = 99
    assert torch.equal(token_values(model, rollouts), before)


def test_values_are_not_rounded_where_passes_are_in_bfloat16(tiny_folder, rollouts):
    model = value_model(tiny_folder)
    with forward_context(torch.device("cpu"), torch.bfloat16):
        values = token_values(model, rollouts)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_neither_values_nor_gradient(tiny_folder, rollouts, use_lora):
    results = []
    for checkpointing in (False, True):
        model = value_model(tiny_folder, use_lora=use_lora, gradient_checkpointing=checkpointing)
        values = token_values(model, rollouts)
        values.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((values, gradients))
    (plain, ours), (checkpointed, theirs) = results
    assert torch.equal(plain, checkpointed) and ours.keys() == theirs.keys()
    assert sum(gradient is not None and bool(gradient.any()) for gradient in ours.values()) > 5
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient, msg=name)


# Where it comes from


def test_with_a_zero_head_every_value_is_zero(tiny_folder, rollouts):
    assert not token_values(value_model(tiny_folder, zero_head=True), rollouts).any()


def test_a_random_head_is_a_function_of_the_seed_and_of_no_global_generator(tiny_folder):
    heads = []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        heads.append(value_model(tiny_folder, seed=seed, use_lora=True).head.weight.detach())
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.01 < float(heads[0].std()) < 0.03


def test_with_lora_the_adapter_and_the_head_alone_are_trained(tiny_folder):
    model = value_model(tiny_folder, use_lora=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {"head.weight", "head.bias"} <= set(trained)
    assert all("lora" in name for name in trained if not name.startswith("head"))
    assert all(parameter.requires_grad for parameter in value_model(tiny_folder).parameters())


def test_a_reward_models_value_of_a_state_is_its_score_of_the_text_up_to_there(tmp_path, tokenizer, rollouts):
    folder = save_classifier(tmp_path / "model")
    model = load_scored_value_model(str(folder), RLConfig(), tokenizer=tokenizer, **FLOAT32)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    values = token_values(model, rollouts)
    ids, prompt_lengths = rollouts.sequences()
    for row, column in ((0, 0), (0, 3), (2, 6), (3, 1)):
        text = ids[row : row + 1, : int(prompt_lengths[row]) + column]
        score = classifier(input_ids=text).logits.item()
        assert values[row, column].item() == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_a_saved_value_model_is_read_back_with_its_bias(tiny_folder, tmp_path, tokenizer, rollouts, use_lora):
    model = value_model(tiny_folder, use_lora=use_lora)
    with torch.no_grad():
        model.head.bias.fill_(0.75)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_value_model(model, tokenizer, tmp_path / "saved")
    values = token_values(model, rollouts)
    again = load_scored_value_model(str(tmp_path / "saved"), RLConfig(), tokenizer=tokenizer, **FLOAT32)
    torch.testing.assert_close(token_values(again, rollouts), values, atol=1e-5, rtol=1e-5)
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved")
    ids, prompt_lengths = rollouts.sequences()
    row, start, length = 2, int(prompt_lengths[2]), int(rollouts.lengths[2])
    scores = plain(input_ids=ids[row : row + 1]).logits[0, start - 1 : start - 1 + length, 0]
    torch.testing.assert_close(scores, values[row, :length], atol=1e-5, rtol=1e-5)


OTHERS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},  # its classifier's head has another name
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 32, "do_layer_norm_before": False}
    | {"num_attention_heads": 2, "num_hidden_layers": 2},  # its output is smaller than its hidden states
    "gemma3_text": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 16},  # transformers has no classifier of it, as of the next two
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "olmoe": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_have_values_that_are_saved_and_read_back(kind, tmp_path, tokenizer, rollouts):
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ends, **OTHERS[kind]), attn_implementation="eager"
    )
    policy.save_pretrained(tmp_path / "policy")
    config = RLConfig(attn_implementation="eager")
    model = load_value_model(str(tmp_path / "policy"), config, zero_head=False, **FLOAT32).eval()
    with torch.no_grad():
        model.head.bias.fill_(0.75)
    values = token_values(model, rollouts)
    assert values[rollouts.completion_mask].std() > 0
    save_value_model(model, tokenizer, tmp_path / "saved")
    again = load_scored_value_model(str(tmp_path / "saved"), config, tokenizer=tokenizer, **FLOAT32).eval()
    torch.testing.assert_close(token_values(again, rollouts), values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 2}, r"2 labels and 459 tokens; need one .* with 1 label"),
        ({"vocab_size": 400}, r"1 label and 400 tokens; need .* the policy's 459 tokens"),
    ],
    ids=["two labels", "fewer tokens"],
)
def test_a_model_that_cannot_be_a_value_model_is_refused(tmp_path, tokenizer, settings, message):
    folder = save_classifier(tmp_path / "model", **settings)
    with pytest.raises(ValueError, match=rf"value_init='.*model'.*{message}.*Pass --value_init fit"):
        load_scored_value_model(str(folder), RLConfig(), tokenizer=tokenizer, **FLOAT32)


def test_a_language_model_and_a_folder_that_is_not_there_are_refused(tiny_folder, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path, message in ((tiny_folder, "Qwen2ForCausalLM"), ("no/such", "cannot be loaded")):
        with pytest.raises(ValueError, match=rf"value_init=.*{message}.*Pass --value_init"):
            load_scored_value_model(str(path), RLConfig(), tokenizer=tokenizer, **FLOAT32)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (cut_weights, "model.safetensors"),
    ],
    ids=["gone", "no weights", "cut off"],
)
def test_a_run_refuses_it_before_anything_is_loaded(spoil, message, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("common.trainer.load_policy", lambda *_, **__: pytest.fail("loaded"))
    path = save_classifier(tmp_path / "score")
    spoil(path)
    with pytest.raises(ValueError, match=rf"value_init='{path}': .*{message}"):
        toy_trainer(tiny_folder, tmp_path / "run", algorithm="PPO", value_init=str(path))
    assert not (tmp_path / "run").exists()


# Beside the policy


@pytest.fixture
def shared(tiny_folder):
    config = RLConfig(use_lora=True, lora_r=4)
    policy = load_policy(str(tiny_folder), config, dtype=torch.float32)
    return policy, share_backbone(policy, config, zero_head=False)


def test_the_policys_adapter_is_back_after_the_value_model_was_used_also_after_an_error(shared):
    policy, _ = shared
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained and all(".default." in name for name in trained)
    with pytest.raises(RuntimeError, match="inside"), value_adapter(policy):
        inside = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        assert inside == {name.replace(".default.", ".value.") for name in trained}
        raise RuntimeError("inside")
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained
    assert policy.active_adapter == "default"


def test_a_shared_base_has_an_adapter_for_each_of_the_two(shared, rollouts):
    policy, model = shared
    parameters = dict(policy.named_parameters())
    with value_adapter(policy):
        before = token_values(model, rollouts)
    for name, parameter in parameters.items():
        if "lora_B.default" in name:
            parameter.data.fill_(0.1)
    with value_adapter(policy):
        assert torch.equal(token_values(model, rollouts), before)
    for name, parameter in parameters.items():
        if "lora_B.value" in name:
            parameter.data.fill_(0.1)
    with value_adapter(policy):
        assert not torch.equal(token_values(model, rollouts), before)


def test_the_two_adapters_start_from_different_noise(shared):
    parameters = dict(shared[0].named_parameters())
    first = next(name for name in parameters if "lora_A.default" in name)
    assert not torch.equal(parameters[first], parameters[first.replace(".default.", ".value.")])


# Explained variance


MASK = torch.tensor([[True, True, True], [True, False, False]])
RETURNS = torch.tensor([[0.0, 2.0, 4.0], [6.0, NAN, 1e9]])  # mean 3, squared deviations 9 + 1 + 1 + 9


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 2.0, 4.0], [6.0, NAN, 1e9]], 1.0),
        ([[10.0, 12.0, 14.0], [16.0, 1e9, NAN]], 1.0),  # a constant offset is no missing foresight
        ([[3.0, 3.0, 3.0], [3.0, NAN, NAN]], 0.0),
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], 0.0),
        ([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], 0.75),  # half of each deviation is left
        ([[6.0, 4.0, 2.0], [0.0, 0.0, 0.0]], -3.0),  # the wrong way: twice each deviation
    ],
)
def test_explained_variance_by_hand(values, expected):
    assert explained_variance(torch.tensor(values), RETURNS, MASK, sum_over_processes=alone) == pytest.approx(expected)


def test_returns_that_are_all_equal_have_no_variance_to_explain():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for returns in (torch.full((2, 3), 2.0), torch.tensor([[0.3, 0.1 + 0.2, 0.30000001], [0.3, NAN, 7.0]])):
        assert explained_variance(values, returns, MASK, sum_over_processes=alone) is None
    assert explained_variance(values, RETURNS, MASK & False, sum_over_processes=alone) is None


def test_explained_variance_is_over_the_tokens_of_all_processes():
    """Two processes with the same rows: as one with these rows twice, and not as one with them once."""
    values = torch.tensor([[0.5, 1.0, 4.0], [7.0, 0.0, 0.0]])
    once = explained_variance(values, RETURNS, MASK, sum_over_processes=alone)
    twice = explained_variance(values, RETURNS, MASK, sum_over_processes=lambda tensor: 2 * tensor)
    assert twice == pytest.approx(once)


def test_choosing_rows_keeps_values_and_returns_with_them(rollouts):
    rollouts.values = rollouts.spread(torch.arange(6.0))
    rollouts.returns = rollouts.values + 10
    chosen = rollouts[torch.tensor([4, 2])].trimmed()
    assert chosen.values[:, 0].tolist() == [4, 2] and chosen.returns[:, 0].tolist() == [14, 12]
