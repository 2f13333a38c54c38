"""A vLLM engine shared by the whole test session, and the untrained models it is compared with."""

import gc
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from common.models.weights import policy_weights
from common.sampling.vllm_sampler import VLLMSampler

# vLLM pads the vocabulary to a multiple of 64: 8 rows of its head belong to no token.
VOCABULARY = 120


def untrained_model(seed: int = 0, *, tied: bool = True) -> Qwen2ForCausalLM:
    """A tiny policy with weights far enough from 0 that its distributions are not nearly uniform."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM on the CPU needs a head size of at least 32
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


@torch.no_grad()
def greedy_by_full_passes(model: torch.nn.Module, prompt: list[int], length: int) -> list[int]:
    """Greedy completion without a cache: slow but simple."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def completion_logits(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """(C, V) float32 logits that the tokens of a completion were chosen from."""
    device = next(model.parameters()).device
    return model(torch.tensor([prompt + completion], device=device)).logits[0, len(prompt) - 1 : -1].float().cpu()


def completion_logprobs(
    model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float
) -> Tensor:
    """(C,) log-probabilities of a completion's tokens at a temperature."""
    logprobs = (completion_logits(model, prompt, completion) / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A folder with tied embeddings (True) and one without (False)."""
    folders = {tied: str(tmp_path_factory.mktemp("tied" if tied else "untied")) for tied in (True, False)}
    for tied, folder in folders.items():
        untrained_model(tied=tied).save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def session_samplers(model_folders: dict[bool, str]) -> Iterator[dict[bool, VLLMSampler]]:
    """The session's samplers with tied embeddings (True) and without (False). Tests use `vllm_sampler`."""
    samplers: dict[bool, VLLMSampler] = {}
    yield samplers
    samplers.clear()
    gc.collect()


@pytest.fixture
def make_vllm_sampler(model_folders: dict[bool, str], session_samplers: dict[bool, VLLMSampler]):
    """A function that gives the session's sampler, tied or not, with the weights of a model."""

    def make(model: torch.nn.Module, *, tied: bool = True) -> VLLMSampler:
        if tied not in session_samplers:
            excepthook = sys.excepthook
            session_samplers[tied] = VLLMSampler(
                model_folders[tied], dtype="float32", max_model_len=512, max_num_seqs=64
            )
            # torch.distributed, which vLLM initializes where the trainer did not, puts "[rank0]:" before each line.
            assert sys.excepthook is excepthook
        sampler = session_samplers[tied]
        sampler.wake()
        sampler.push(policy_weights(model))
        return sampler

    return make


@pytest.fixture
def vllm_sampler(make_vllm_sampler) -> VLLMSampler:
    """The session's vLLM with the weights of untrained_model(0)."""
    return make_vllm_sampler(untrained_model(0))
