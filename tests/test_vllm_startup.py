"""What the start of a vLLM engine reads, and what it leaves in the process."""

import gc
import importlib
from typing import Any

import pytest
import torch
import transformers

from common.sampling import vllm_engine, vllm_support
from common.sampling.protocol import SamplingSettings
from common.sampling.vllm_corrections import replaced
from common.sampling.vllm_engine import EngineSettings, create_engine
from common.sampling.vllm_group import Request
from tests.architectures import make
from tests.test_vllm_names import ATTRIBUTES, OF_CLASSES, look_up


def of_vllm() -> dict[str, Any]:
    """Every private name of vLLM that this project touches, and transformers' class of a small model."""
    with vllm_support.imported():
        owners = {path: importlib.import_module(path) for path in ATTRIBUTES}
        owners |= {path: look_up(*path.rsplit(".", 1)) for path in OF_CLASSES}
        groups = {"_EP"}  # of vLLM itself, and there as long as an engine is
        found = {
            f"{path}.{name}": vars(owner).get(name)
            for path, owner in owners.items()
            for name in (*ATTRIBUTES.get(path, ()), *OF_CLASSES.get(path, ()))
            if name not in groups
        }
        processor = look_up("vllm.model_executor.layers.logits_processor", "LogitsProcessor")
    found |= {f"LogitsProcessor.{name}": value for name, value in vars(processor).items() if callable(value)}
    found |= {f"SmolLM3.{name}": value for name, value in vars(transformers.SmolLM3Model).items()}
    return found | {"cpu": torch.cpu._is_avx512_bf16_supported, "bases": transformers.SmolLM3Model.__bases__}


@pytest.mark.slow
def test_an_engine_leaves_vllm_and_transformers_as_they_were(tmp_path):
    make("smollm3", tmp_path / "model")  # runs in transformers' own class
    before = of_vllm()
    engine = create_engine(
        EngineSettings(model=str(tmp_path / "model"), dtype="float32", max_model_len=64, max_num_seqs=2)
    )
    while_it_lives = of_vllm()
    assert {name for name, value in before.items() if while_it_lives[name] is not value} == set()
    settings = SamplingSettings(temperature=1.0, max_tokens=2, stop_token_ids=())
    vllm_engine.generate(engine, [Request(prompt_ids=[[5]], settings=settings, num_generations=1, seeds=[0])])
    del engine
    gc.collect()
    after = of_vllm()
    assert {name for name, value in before.items() if after[name] is not value} == set()


@pytest.mark.slow
def test_the_start_of_an_engine_reads_the_configuration_once_for_us(tmp_path, monkeypatch):
    make("qwen2", tmp_path / "model")
    with vllm_support.imported():
        pass
    reads, read = [], transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda *args, **kwargs: reads.append(args) or read(*args, **kwargs)
    )
    create_engine(EngineSettings(model=str(tmp_path / "model"), dtype="float32", max_model_len=64, max_num_seqs=2))
    assert len(reads) == 3  # ours, and vLLM's for what it supports and for the engine


def test_what_is_replaced_comes_back_and_what_was_not_there_goes():
    class Owner:
        there = 1

    with pytest.raises(KeyError), replaced(Owner, "there", 2), replaced(Owner, "missing", 3):
        assert (Owner.there, Owner.missing) == (2, 3)
        raise KeyError
    assert Owner.there == 1 and "missing" not in vars(Owner)
