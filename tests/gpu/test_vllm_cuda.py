"""vLLM on a GPU: pushes into captured graphs, sleep and wake at both levels, log-probs against the trainer's."""

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from common.models.weights import policy_weights
from common.sampling.protocol import SamplingSettings, sampling_seed
from common.sampling.vllm_sampler import VLLMSampler

pytestmark = pytest.mark.gpu

SHARE = 0.1
PROMPTS = [[5, 6, 7], [8], list(range(9, 60)), [17, 18]]
GREEDY = SamplingSettings(temperature=0, max_tokens=32, stop_token_ids=())
SAMPLED = SamplingSettings(temperature=0.7, max_tokens=64, stop_token_ids=(3,))
# vLLM's allocator for sleeping serves one engine per process, so each kind is made when its first test comes.
KINDS = {
    "float32": {"dtype": "float32", "sleep_level": 0, "enforce_eager": True},
    "level 1": {"dtype": "bfloat16", "sleep_level": 1, "enforce_eager": False},
    "level 2": {"dtype": "bfloat16", "sleep_level": 2, "enforce_eager": False},
}


def model_on_gpu(seed=0):
    """An untrained model, its weights in float32 as the trainer has them."""
    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).eval().to("cuda")


@pytest.fixture(scope="module", params=KINDS)
def engine(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    model_on_gpu().save_pretrained(folder)
    sampler = VLLMSampler(folder, max_model_len=512, max_num_seqs=64, memory_share=SHARE, **KINDS[request.param])
    yield request.param, sampler
    del sampler
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def kind(engine):
    return engine[0]


@pytest.fixture
def sampler(engine):
    """Awake, with the weights of model_on_gpu(0)."""
    engine[1].push(policy_weights(model_on_gpu(0)))
    engine[1].wake()
    return engine[1]


def sample(sampler, step=0):
    seeds = [sampling_seed(0, step, row, "train") for row in range(4)]
    return sampler.generate(PROMPTS, SAMPLED, num_generations=8, seeds=seeds)


@torch.no_grad()
def logprob_differences(model, completions, dtype):
    """What the sampler reported minus what the trainer computes, for all tokens of all completions."""
    differences = []
    for row, completion in enumerate(completions):
        prompt = PROMPTS[row // 8]
        ids = torch.tensor([prompt + completion.token_ids], device="cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / 0.7
        logprobs = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()
        differences.append(torch.tensor(completion.logprobs) - logprobs)
    return torch.cat(differences)


def assert_close_to_the_trainer(model, completions, kind):
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    differences = logprob_differences(model, completions, dtype).abs()
    mean, largest = (1e-4, 2e-3) if kind == "float32" else (5e-2, 1.0)
    assert differences.mean() < mean and differences.max() < largest


def test_logprobs_are_the_trainers_after_each_push(kind, sampler):
    for seed in (1, 2):
        model = model_on_gpu(seed)
        sampler.push(policy_weights(model))
        assert_close_to_the_trainer(model, sample(sampler), kind)


def test_logprobs_of_other_weights_are_far_off(kind, sampler):
    assert logprob_differences(model_on_gpu(1), sample(sampler), torch.float32).abs().mean() > 0.5


def test_an_adapter_is_pushed_merged(kind, sampler):
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model_on_gpu(1), config).eval()
    sampler.push(policy_weights(model))
    assert_close_to_the_trainer(model, sample(sampler), kind)


def test_a_push_clears_the_cache_of_prompts(kind, sampler):
    prompts = [[3 + i % 900 for i in range(400)]] * 2
    before = sampler.generate(prompts, GREEDY)
    sampler.push(policy_weights(model_on_gpu(1)))
    other = sampler.generate(prompts, GREEDY)
    sampler.push(policy_weights(model_on_gpu(0)))
    assert [c.token_ids for c in sampler.generate(prompts, GREEDY)] == [c.token_ids for c in before]
    assert other[0].token_ids != before[0].token_ids


def test_seeds_decide_the_completions(kind, sampler):
    first, second, again = (tuple(tuple(c.token_ids) for c in sample(sampler, step)) for step in (0, 1, 0))
    assert first == again
    assert len({*first, *second}) == 64


def test_sampling_leaves_the_random_state_alone(kind, sampler):
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    sample(sampler)
    sampler.generate(PROMPTS, GREEDY)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])


def test_sleep_gives_the_memory_back_and_wake_the_same_logprobs(kind, sampler):
    before = sample(sampler)
    awake = torch.cuda.mem_get_info()[0]
    sampler.sleep()
    freed = torch.cuda.mem_get_info()[0] - awake
    with pytest.raises(RuntimeError, match="wake"):
        sample(sampler)
    if kind == "float32":
        assert freed == 0
    else:
        # Weights, cache and activations have SHARE of the memory together; activations are not given back.
        assert freed > 0.6 * SHARE * torch.cuda.get_device_properties().total_memory
        assert sampler.resident_bytes == 0
    assert sampler.has_weights == (kind != "level 2")
    if kind == "level 2":
        sampler.push(policy_weights(model_on_gpu(0)))
        with pytest.raises(RuntimeError, match="kv_cache"):
            sample(sampler)
    sampler.wake()
    after = sample(sampler)
    assert [c.token_ids for c in after] == [c.token_ids for c in before]
    assert [c.logprobs for c in after] == [c.logprobs for c in before]


def test_many_cycles_of_push_and_sleep_keep_the_memory_flat(kind, sampler):
    free = []
    for cycle in range(20):
        model = model_on_gpu(cycle % 3)
        sampler.push(policy_weights(model))
        sampler.wake()
        completions = sample(sampler, cycle)
        sampler.sleep()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[5] - free[-1] < 64 * 2**20
    assert_close_to_the_trainer(model, completions, kind)


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 64}
ARCHITECTURES = {
    "dense": ("qwen2", {"num_key_value_heads": 2}),
    "experts": ("qwen3_moe", EXPERTS | {"num_experts": 4, "num_key_value_heads": 2}),
    "latent attention": (
        "deepseek_v2",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
        | {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_of_two_pushes_arrives_in_every_kind_of_layer(architecture, tmp_path):
    kind, settings = ARCHITECTURES[architecture]
    sizes = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, **sizes | {"num_attention_heads": 4, "initializer_range": 0.1} | settings)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to("cuda"))
    models[0].save_pretrained(tmp_path)
    sampler = VLLMSampler(
        str(tmp_path), dtype="bfloat16", max_model_len=512, max_num_seqs=8, memory_share=SHARE, enforce_eager=True
    )
    for model in models:
        sampler.push(policy_weights(model))
        for prompt, completion in zip(PROMPTS, sampler.generate(PROMPTS, GREEDY), strict=True):
            ids = torch.tensor([prompt + completion.token_ids], device="cuda")
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            expected = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()
            assert (expected - torch.tensor(completion.logprobs)).abs().mean() < 0.1
    del sampler
    gc.collect()
