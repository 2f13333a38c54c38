"""What is found out about vLLM from a push of zeros; the engines themselves are in test_vllm_models.py."""

import logging

import pytest
import torch

from common.sampling.vllm_memory import explained
from common.sampling.vllm_trial import Refused, all_read, reason, refused, zeros_of

SHAPES = {"copied": (4, 6), "split": (6, 4), "assigned": (3,), "dropped": (2, 2)}


def zeros():
    return zeros_of(SHAPES, dtype=torch.float32, device=torch.device("cpu"))


def load(weights):
    """What weight loaders do with weights."""
    torch.empty(4, 6).copy_(weights["copied"])
    torch.empty(3, 4).copy_(weights["split"].narrow(0, 3, 3))
    torch.empty(5)[:3] = weights["assigned"]


def test_zeros_for_a_large_model_take_no_memory():
    weights = zeros_of({"large": (1_000_000, 1_000_000)}, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert weights["large"].shape == (1_000_000, 1_000_000) and weights["large"].dtype == torch.bfloat16
    assert weights["large"].untyped_storage().nbytes() == 2


def test_a_weight_that_is_only_looked_at_counts_as_dropped():
    weights = zeros()
    message = r"drops 1 of 4 weights, such as dropped: its SomeModel .* transformers"
    with pytest.raises(Refused, match=message), all_read(weights, "SomeModel"):
        load(weights)
        assert weights["dropped"].shape == (2, 2) and weights["dropped"].numel() == weights["dropped"].size(0) * 2
        assert weights["dropped"].dtype == torch.float32


@pytest.mark.parametrize(
    "read", [torch.clone, lambda weight: torch.stack([weight, weight]), lambda weight: weight.data]
)
def test_a_weight_in_any_argument_is_read(read):
    weights = zeros()
    with all_read(weights, "SomeModel"):
        load(weights)
        read(weights["dropped"])


def test_every_error_of_vllm_becomes_a_refusal_in_a_line_and_its_log_is_silent(caplog):
    level = logging.getLogger("vllm.model_executor.models.registry").level
    with pytest.raises(Refused) as error, refused("a/model", "build"):
        logging.getLogger("vllm.model_executor.models.registry").error("fifty lines")
        assert 1 == 2, "heads of 3\nare odd"
    assert str(error.value).startswith("vLLM cannot build a/model: AssertionError: heads of 3 are odd")
    assert str(error.value).endswith(". Pass --sampler transformers.") and "\n" not in str(error.value)
    assert not caplog.text
    assert logging.getLogger("vllm.model_executor.models.registry").level == level


def test_a_missing_package_is_named_with_what_to_do():
    with (
        pytest.raises(Refused, match=r"No module named 'no_such_package'. Install what it is in, or pass --sampler"),
        refused("a/model", "run"),
    ):
        import no_such_package  # noqa: F401


def test_too_little_memory_is_no_refusal_of_the_model():
    with pytest.raises(ValueError, match="--vllm_memory_share") as error, refused("a/model", "build"):
        raise ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.")
    assert not isinstance(error.value, Refused)
    for error, remedy in {
        torch.OutOfMemoryError("CUDA out of memory"): "Pass --offload always, a smaller --vllm_max_num_seqs",
        ValueError("Free memory on device cuda:0 (3/24 GiB) is less than desired GPU memory utilization (0.4)."): (
            "Pass a smaller --vllm_memory_share, or end other processes"
        ),
        RuntimeError("CUDA out of memory occurred when warming up sampler with 256 dummy requests."): (
            "Pass a smaller --vllm_max_num_seqs"
        ),
    }.items():
        with pytest.raises(ValueError, match=remedy) as short, refused("a/model", "build"):
            raise error
        assert not isinstance(short.value, Refused)


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("sample", "--vllm_max_num_seqs"),
        ("take the new weights", "--offload always"),
        ("go to sleep", "--vllm_sleep_level 2"),
        ("wake up", "--offload always"),
    ],
)
def test_an_engine_that_is_short_of_memory_later_names_the_settings_that_help(what, remedy):
    said = "CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62"
    for error in (RuntimeError(said), torch.OutOfMemoryError(said)):
        expected = f"vLLM cannot {what}: CUDA Error: out of memory"
        with pytest.raises(ValueError, match=expected) as short, explained(what):
            raise error
        assert remedy in str(short.value) and "continues from the last checkpoint" in str(short.value)
    with pytest.raises(RuntimeError, match="another thing"), explained(what):
        raise RuntimeError("another thing")


def test_an_assertion_without_words_gives_its_condition():
    heads = 3
    try:
        assert heads % 2 == 0
    except AssertionError as error:
        assert "assert" in reason(error) or "heads % 2" in reason(error)
    assert reason(KeyError("blocks.0.w1")) == "KeyError: 'blocks.0.w1'."
