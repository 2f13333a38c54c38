"""The formulas of a pass's memory are what passes allocate now, and layers are told apart by what they are."""

import time
from dataclasses import replace

import pytest
import torch
import transformers

from common.memory import fit, formulas
from common.memory.depth import layer_kinds, two_depths, with_depth
from common.memory.fake import extended_passes, rows_of, skeleton
from common.memory.passes import PassSettings, pass_bytes


@pytest.mark.parametrize(("name", "method", "rows"), [("1.5B", "lora", 4), ("0.5B", "full", 2)])
def test_a_formula_is_within_three_percent_of_the_pass(name, method, rows):
    """If it is not, what a pass allocates has changed: run python -m common.memory.fit."""
    config, settings = fit.configuration(name), PassSettings(method=method)
    lengths = {"rows": rows, "row_tokens": 1536, "completion_tokens": 1024}
    predicted = pass_bytes(config, settings, **lengths)
    training, forward = extended_passes(config, settings, rows_of(*lengths.values()))
    beside = fit.standing(config, settings)
    assert predicted.source == "formula"
    assert beside + predicted.training == pytest.approx(beside + training.peak, rel=0.03)
    assert beside + predicted.forward == pytest.approx(beside + forward.peak, rel=0.03)
    assert predicted.training == pytest.approx(training.peak, rel=0.06)  # nor is it weights that hide an error


def test_predictions_by_formula_take_milliseconds():
    config, settings = fit.configuration("7B"), PassSettings()
    formulas.coefficients.cache_clear()
    start = time.process_time()
    for rows in range(1, 33):  # more than a plan asks for
        assert pass_bytes(config, settings, rows=rows, row_tokens=2048, completion_tokens=1024).source == "formula"
    assert time.process_time() - start < 0.02


@pytest.mark.parametrize(
    "settings",
    [{"lora_target_modules": "q_proj,v_proj"}, {"checkpointing": False}, {"attention": "sdpa"}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_formula_was_not_fitted_to_has_none(settings):
    lengths = {"tokens": 2048, "completion_tokens": 1024}
    assert formulas.formula(fit.configuration("1.5B"), PassSettings(), **lengths)
    assert formulas.formula(fit.configuration("1.5B"), replace(PassSettings(), **settings), **lengths) is None
    assert formulas.formula(transformers.LlamaConfig(), PassSettings(), **lengths) is None


# First layers of another kind, periods of settings that are no list, of a list, and none.
DEPTHS = {
    transformers.DeepseekV3Config: [5, 6],  # three dense layers before the experts
    transformers.JambaConfig: [8, 16],  # attention each 8 layers, experts each 2
    transformers.Qwen3NextConfig: [4, 8],
    transformers.Gemma3TextConfig: [8, 14],  # 26 layers, of six the last one sees everything
    transformers.LlamaConfig: [2, 3],
}


@pytest.mark.parametrize("cls", DEPTHS, ids=lambda cls: cls.model_type)
def test_two_depths_have_the_same_kinds_of_layers(cls):
    config = cls()
    kinds = layer_kinds(skeleton(config, PassSettings()))
    depths = two_depths(kinds)
    assert depths == DEPTHS[cls]
    assert layer_kinds(skeleton(with_depth(config, depths[1]), PassSettings())) == kinds[: depths[1]]
    assert (len(kinds) - depths[1]) % (depths[1] - depths[0]) == 0


def test_lists_that_are_of_no_layers_keep_their_length():
    config = transformers.FalconH1Config(num_hidden_layers=5)
    shorter = with_depth(config, 2)
    assert len(config.ssm_multipliers) == 5 and shorter.ssm_multipliers == config.ssm_multipliers
    assert shorter.num_hidden_layers == 2


def test_a_model_whose_code_needs_numbers_is_said_to_be_unpredictable(monkeypatch):
    base = transformers.LlamaModel.forward

    def forward(self, *args, **kwargs):
        output = base(self, *args, **kwargs)
        output["last_hidden_state"].nonzero().tolist()
        return output

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    config = transformers.LlamaConfig(**{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2})
    with pytest.raises(ValueError, match=r"llama cannot be predicted: its code needs the numbers of its tensors"):
        pass_bytes(
            config, PassSettings(method="full", weights=torch.float32), rows=1, row_tokens=8, completion_tokens=4
        )
