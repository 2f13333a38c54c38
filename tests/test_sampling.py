import gc
import logging
import math
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from common.models.weights import policy_weights
from common.sampling.protocol import SamplingSettings, sampling_seed
from common.sampling.torch_sampler import TransformersSampler
from common.sampling.vllm_engine import check_installed
from common.sampling.vllm_sampler import VLLMSampler
from tests.fixtures_engine import (
    VOCABULARY,
    completion_logits,
    completion_logprobs,
    greedy_by_full_passes,
    untrained_model,
)

# The third one is longer than two blocks of vLLM's cache, which its completions share.
PROMPTS = [[5, 6, 7], [8], [9 + i % 100 for i in range(70)], [17, 18]]
GREEDY = SamplingSettings(temperature=0, max_tokens=16, stop_token_ids=())
SAMPLED = SamplingSettings(temperature=1.0, max_tokens=16, stop_token_ids=())


def on_the_policy(model, **options):
    return TransformersSampler(lambda: nullcontext(model), device=torch.device("cpu"), **options)


def seeds_of(step, count, purpose="train"):
    return [sampling_seed(0, step, row, purpose) for row in range(count)]


def tokens(completions):
    return [completion.token_ids for completion in completions]


@pytest.fixture(params=["vllm", "transformers"])
def make_sampler(request, make_vllm_sampler):
    """Function: either sampler with the weights of a model; every test that uses it runs for both."""
    return make_vllm_sampler if request.param == "vllm" else on_the_policy


@pytest.fixture
def sampler(make_sampler):
    return make_sampler(untrained_model(0))


# ---------------------------------------------------------------------------------------- the policy's distribution


def test_greedy_completions_are_the_policys(make_sampler):
    model = untrained_model(1)
    expected = [greedy_by_full_passes(model, prompt, 16) for prompt in PROMPTS]
    assert tokens(make_sampler(model).generate(PROMPTS, GREEDY)) == expected


def test_vllm_is_greedy_like_a_policy_whose_head_is_not_its_embeddings(make_vllm_sampler):
    model = untrained_model(1, tied=False)
    sampler = make_vllm_sampler(model, tied=False)
    assert tokens(sampler.generate(PROMPTS, GREEDY)) == [greedy_by_full_passes(model, p, 16) for p in PROMPTS]


def test_a_push_replaces_the_weights_and_everything_cached_under_the_old_ones(make_vllm_sampler):
    # Without a reset, the blocks of the cache with this prompt would be found again after the push.
    prompt = [3 + i % 100 for i in range(300)]
    for seed in (2, 3):
        model = untrained_model(seed)
        sampler = make_vllm_sampler(model)
        assert tokens(sampler.generate([prompt], GREEDY)) == [greedy_by_full_passes(model, prompt, 16)]


def test_training_on_does_not_change_what_was_pushed(make_vllm_sampler):
    model = untrained_model(4)
    sampler = make_vllm_sampler(model)
    before = tokens(sampler.generate(PROMPTS, GREEDY))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert tokens(sampler.generate(PROMPTS, GREEDY)) == before


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_policy_at_the_temperature(make_sampler, temperature):
    model = untrained_model(5)
    settings = SamplingSettings(temperature=temperature, max_tokens=24, stop_token_ids=(7,))
    completions = make_sampler(model).generate(PROMPTS, settings, num_generations=4, seeds=seeds_of(0, 4))
    for row, completion in enumerate(completions):
        expected = completion_logprobs(model, PROMPTS[row // 4], completion.token_ids, temperature)
        assert len(completion.logprobs) == len(completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_the_policy_is_sampled_in_the_precision_of_its_passes():
    model = untrained_model(5)
    sampler = on_the_policy(model, dtype=torch.bfloat16)
    completions = sampler.generate(PROMPTS, SAMPLED, num_generations=2, seeds=seeds_of(0, 4))
    errors = torch.cat(
        [
            torch.tensor(completion.logprobs)
            - completion_logprobs(model, PROMPTS[row // 2], completion.token_ids, 1.0)
            for row, completion in enumerate(completions)
        ]
    ).abs()
    assert 1e-4 < errors.mean() < 0.1


@pytest.mark.parametrize("num_generations", [1, 3])
def test_each_prompt_is_reported_once_with_its_own_completions_and_later_calls_are_not(sampler, num_generations):
    reported = {}
    request = {"num_generations": num_generations, "seeds": seeds_of(0, len(PROMPTS))}
    for _ in range(2):  # the second request is numbered from 0 again
        reported.clear()
        completions = sampler.generate(PROMPTS, SAMPLED, **request, finished=reported.__setitem__)
        assert sorted(reported) == list(range(len(PROMPTS)))
        assert [each for i in range(len(PROMPTS)) for each in reported[i]] == completions
    reported.clear()
    assert sampler.generate(PROMPTS, SAMPLED, **request) == completions and not reported


@pytest.mark.parametrize("kept", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8}])
def test_logprobs_of_a_cut_distribution_are_renormalised_over_what_is_kept(make_sampler, kept):
    model = untrained_model(5)
    settings = SamplingSettings(temperature=0.9, max_tokens=12, stop_token_ids=(), **kept)
    completions = make_sampler(model).generate(PROMPTS, settings, num_generations=4, seeds=seeds_of(0, 4))
    for row, completion in enumerate(completions):
        logits = completion_logits(model, PROMPTS[row // 4], completion.token_ids) / 0.9
        for token, logprob, column in zip(completion.token_ids, completion.logprobs, logits, strict=True):
            ordered = column.sort(descending=True)
            number = kept.get("top_k", VOCABULARY)
            probabilities = ordered.values[:number].softmax(-1)
            if "top_p" in kept:  # the smallest set that reaches top_p
                number = int((probabilities.cumsum(0) < kept["top_p"]).sum()) + 1
            assert token in ordered.indices[:number]
            assert logprob == pytest.approx(float(column[token] - ordered.values[:number].logsumexp(0)), abs=1e-4)


def test_tokens_come_as_often_as_their_probability_says(make_sampler):
    model = untrained_model(6)
    settings = SamplingSettings(temperature=1.5, top_k=4, max_tokens=1, stop_token_ids=())
    completions = make_sampler(model).generate([[5]] * 64, settings, num_generations=64, seeds=seeds_of(0, 64))
    values, indices = (completion_logits(model, [5], [0])[0] / 1.5).topk(4)
    drawn = torch.tensor(tokens(completions)).squeeze(1)
    frequencies = torch.stack([(drawn == index).float().mean() for index in indices])
    # 4096 draws: a standard error is at most 0.008.
    torch.testing.assert_close(frequencies, values.softmax(-1), atol=0.03, rtol=0)


def test_vllm_never_draws_a_token_beyond_the_vocabulary(make_vllm_sampler):
    uniform = untrained_model(0)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    settings = SamplingSettings(temperature=1.0, max_tokens=64, stop_token_ids=())
    completions = make_vllm_sampler(uniform).generate(PROMPTS, settings, num_generations=16, seeds=seeds_of(0, 4))
    assert {token for completion in completions for token in completion.token_ids} == set(range(VOCABULARY))
    assert completions[0].logprobs == pytest.approx([-math.log(VOCABULARY)] * 64)


# ------------------------------------------------------------------------------------------------------------ seeds


def test_seeds_decide_the_completions_and_nothing_else_does(sampler):
    def drawn(step):
        return tokens(sampler.generate(PROMPTS, SAMPLED, num_generations=4, seeds=seeds_of(step, 4)))

    first, second, again = drawn(0), drawn(1), drawn(0)
    assert first == again
    assert all(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kept", [{}, {"top_k": 20, "top_p": 0.8}])
def test_both_samplers_draw_the_same_completions_with_the_same_seeds(make_vllm_sampler, kept):
    model = untrained_model(3)
    settings = SamplingSettings(temperature=0.9, max_tokens=32, stop_token_ids=(7,), **kept)
    request = {"num_generations": 4, "seeds": seeds_of(0, len(PROMPTS))}
    samplers = make_vllm_sampler(model), on_the_policy(model)
    drawn = [tokens(sampler.generate(PROMPTS, settings, **request)) for sampler in samplers]
    assert drawn[0] == drawn[1]


def test_completions_of_a_prompt_differ_and_those_of_an_equal_prompt_too(sampler):
    completions = tokens(sampler.generate([[5, 6]] * 4, SAMPLED, num_generations=8, seeds=seeds_of(0, 4)))
    assert len({tuple(completion) for completion in completions}) == 32


def test_a_completion_does_not_depend_on_the_other_rows(sampler):
    seeds = seeds_of(0, 4)
    together = tokens(sampler.generate(PROMPTS, SAMPLED, num_generations=2, seeds=seeds))
    backwards = tokens(sampler.generate(PROMPTS[::-1], SAMPLED, num_generations=2, seeds=seeds[::-1]))
    alone = tokens(sampler.generate(PROMPTS[2:3], SAMPLED, num_generations=2, seeds=seeds[2:3]))
    assert [together[2 * row : 2 * row + 2] for row in (3, 2, 1, 0)] == [backwards[i : i + 2] for i in (0, 2, 4, 6)]
    assert together[4:6] == alone


def test_rows_in_several_batches_give_the_same_completions():
    model = untrained_model(0)
    settings = SamplingSettings(temperature=1.0, max_tokens=16, stop_token_ids=tuple(range(20)))
    at_once, in_twos = (
        tokens(
            on_the_policy(model, max_rows=rows).generate(PROMPTS, settings, num_generations=2, seeds=seeds_of(0, 4))
        )
        for rows in (256, 3)
    )
    assert at_once == in_twos


def test_prompts_longer_together_than_one_pass_of_vllm_are_drawn_with_their_seeds(vllm_sampler):
    # 60 prompts of 400 tokens are more than the tokens of one pass, where vLLM would cut a prompt in two.
    prompts = [[3 + (i * j) % 100 for j in range(400)] for i in range(60)]
    settings = SamplingSettings(temperature=1.0, max_tokens=3, stop_token_ids=())
    seeds = seeds_of(0, 60)
    together = tokens(vllm_sampler.generate(prompts, settings, seeds=seeds))
    alone = tokens(vllm_sampler.generate(prompts[59:], settings, seeds=seeds[59:]))
    assert together[59:] == alone


def test_sampling_seeds_are_56_bits_and_all_different():
    seeds = {
        sampling_seed(seed, step, row, stream)
        for seed in range(4)
        for step in range(16)
        for row in range(64)
        for stream in ("train", "eval")
    }
    assert len(seeds) == 4 * 16 * 64 * 2
    assert max(seeds).bit_length() == 56


# ---------------------------------------------------------------------------------------------- where completions end


def test_a_completion_ends_with_the_first_end_token_and_includes_it(sampler):
    free = tokens(sampler.generate(PROMPTS, SAMPLED, num_generations=4, seeds=seeds_of(0, 4)))
    # End tokens: one that the first row has in its middle and one that the second row has.
    ends = (free[0][7], free[1][3])
    settings = SamplingSettings(temperature=1.0, max_tokens=16, stop_token_ids=ends)
    completions = sampler.generate(PROMPTS, settings, num_generations=4, seeds=seeds_of(0, 4))
    stopped = 0
    for completion, without in zip(completions, free, strict=True):
        end = next((i + 1 for i, token in enumerate(without) if token in ends), None)
        assert completion.token_ids == without[:end]
        assert completion.truncated == (end is None)
        stopped += end is not None
    assert stopped >= 2


def test_an_end_token_on_the_last_place_is_not_a_truncation(sampler):
    free = sampler.generate(PROMPTS[:1], GREEDY)[0].token_ids
    at = next(i for i, token in enumerate(free) if i > 0 and token not in free[:i])
    settings = SamplingSettings(temperature=0, max_tokens=at + 1, stop_token_ids=(free[at],))
    [completion] = sampler.generate(PROMPTS[:1], settings)
    assert completion.token_ids == free[: at + 1] and not completion.truncated


def test_end_tokens_in_the_prompt_do_not_count(sampler):
    settings = SamplingSettings(temperature=0, max_tokens=16, stop_token_ids=(5,))
    [completion] = sampler.generate([[5, 6, 7]], settings)
    free = sampler.generate([[5, 6, 7]], GREEDY)[0].token_ids
    assert completion.token_ids == free[: free.index(5) + 1 if 5 in free else None]


def test_the_limit_truncates(sampler):
    settings = SamplingSettings(temperature=0, max_tokens=1, stop_token_ids=(1,))
    for completion in sampler.generate(PROMPTS, settings):
        assert len(completion.token_ids) == 1
        assert completion.truncated == (completion.token_ids != [1])


def test_no_prompts_give_no_completions(sampler):
    assert sampler.generate([], SAMPLED, num_generations=4, seeds=[]) == []


# -------------------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("problem", "prompts", "settings", "options"),
    [
        ("without tokens", [[5], []], SAMPLED, {"seeds": [0, 100]}),
        ("0 seeds for 1 prompts", [[5]], SAMPLED, {}),
        ("1 seeds for 2 prompts", [[5], [6]], SAMPLED, {"seeds": [0]}),
        ("share their noise", [[5], [6]], SAMPLED, {"seeds": [100, 103], "num_generations": 4}),
        ("share their noise", [[5], [5]], SAMPLED, {"seeds": [100, 100]}),
        ("greedy completions", [[5]], GREEDY, {"seeds": [0]}),
        ("greedy completions", [[5]], GREEDY, {"num_generations": 2}),
        ("num_generations=0", [[5]], SAMPLED, {"seeds": [0], "num_generations": 0}),
    ],
)
def test_requests_that_do_not_go_together_are_refused(sampler, problem, prompts, settings, options):
    with pytest.raises(ValueError, match=problem):
        sampler.generate(prompts, settings, **options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": 0.001},
        {"temperature": 2.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="="):
        SamplingSettings(**{"temperature": 1.0, "max_tokens": 4, "stop_token_ids": ()} | wrong)


def test_vllm_refuses_a_prompt_that_leaves_no_room_for_the_completion(vllm_sampler):
    with pytest.raises(ValueError, match="max_model_len=512"):
        vllm_sampler.generate([[5] * 500], GREEDY)


def test_on_the_cpu_vllm_has_memory_for_the_largest_request_and_gives_the_same_completions(
    vllm_sampler, model_folders, caplog
):
    request = {"num_generations": 2, "seeds": seeds_of(0, len(PROMPTS))}
    expected = vllm_sampler.generate(PROMPTS, SAMPLED, **request)
    small = VLLMSampler(model_folders[True], dtype="float32", max_model_len=120, max_num_seqs=64, most_rows=8)
    small.push(policy_weights(untrained_model(0)))
    config = small._engine.llm.llm_engine.vllm_config
    # 120 tokens are four blocks of 32, for each of eight sequences; one more block is vLLM's own.
    assert config.cache_config.num_gpu_blocks == 33 and config.scheduler_config.max_num_seqs == 8
    assert small.generate(PROMPTS, SAMPLED, **request) == expected
    assert not caplog.messages
    for _ in range(2):
        larger = small.generate(PROMPTS * 2, SAMPLED, num_generations=2, seeds=seeds_of(0, 2 * len(PROMPTS)))
    assert larger[:8] == expected
    assert len(caplog.messages) == 1 and "a request of 16 completions: vLLM has memory for 8" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("most_rows", [1, 3])
def test_on_the_cpu_layers_with_a_window_get_the_memory_that_they_need(tmp_path, most_rows):
    torch.manual_seed(0)
    kinds = ["sliding_attention"] * 4 + ["full_attention"] * 3
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 7, "sliding_window": 64}
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, **heads, layer_types=kinds, max_position_embeddings=512)
    ).eval()
    model.save_pretrained(tmp_path)
    sampler = VLLMSampler(str(tmp_path), dtype="float32", max_model_len=160, max_num_seqs=64, most_rows=most_rows)
    sampler.push(policy_weights(model))
    prompts = [[5 + i] * 100 for i in range(most_rows)]
    expected = [greedy_by_full_passes(model, prompt, 16) for prompt in prompts]
    assert tokens(sampler.generate(prompts, GREEDY)) == expected


def test_vllm_does_not_sample_while_it_sleeps(vllm_sampler):
    before = tokens(vllm_sampler.generate(PROMPTS, GREEDY))
    vllm_sampler.sleep()
    with pytest.raises(RuntimeError, match="wake"):
        vllm_sampler.generate(PROMPTS, GREEDY)
    vllm_sampler.push(policy_weights(untrained_model(0)))
    with pytest.raises(RuntimeError, match="kv_cache"):
        vllm_sampler.generate(PROMPTS, GREEDY)
    vllm_sampler.wake()
    assert tokens(vllm_sampler.generate(PROMPTS, GREEDY)) == before


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MemoryError])
def test_a_generation_that_fails_midway_leaves_nothing_behind(vllm_sampler, caplog, problem):
    passes = []

    def fail_in_the_third_pass(module, inputs, output):
        passes.append(1)
        if len(passes) == 3:
            raise problem

    logging.getLogger("vllm").addHandler(caplog.handler)  # its records do not reach the root logger
    before = tokens(vllm_sampler.generate(PROMPTS, GREEDY))
    llm = vllm_sampler._engine.llm
    [hook] = llm.collective_rpc(
        lambda worker: worker.model_runner.sampler.register_forward_hook(fail_in_the_third_pass)
    )
    with pytest.raises(problem):
        vllm_sampler.generate(PROMPTS, SAMPLED, num_generations=8, seeds=seeds_of(0, 4))
    hook.remove()
    vllm_sampler.push(policy_weights(untrained_model(0)))
    assert tokens(vllm_sampler.generate(PROMPTS, GREEDY)) == before
    logging.getLogger("vllm").removeHandler(caplog.handler)
    assert not caplog.records
    assert not llm.llm_engine.output_processor.parent_requests


@pytest.mark.slow
def test_deleting_one_engine_leaves_the_other_alone(vllm_sampler, model_folders):
    before = tokens(vllm_sampler.generate(PROMPTS, GREEDY))
    other = VLLMSampler(model_folders[True], dtype="float32", max_model_len=128, max_num_seqs=4)
    other.push(policy_weights(untrained_model(1)))
    assert tokens(other.generate(PROMPTS, GREEDY)) != before
    del other
    gc.collect()
    assert tokens(vllm_sampler.generate(PROMPTS, GREEDY)) == before


def test_without_vllm_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"make install.*--sampler transformers"):
        check_installed()


# ------------------------------------------------------------------------------------------------- what stays as it is


def test_sampling_leaves_the_random_state_alone(sampler):
    before = torch.get_rng_state()
    sampler.generate(PROMPTS, SAMPLED, num_generations=2, seeds=seeds_of(0, 4))
    sampler.generate(PROMPTS, GREEDY)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_policy_is_sampled_in_evaluation_mode_and_gets_its_modes_back():
    model = untrained_model(0)
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, inputs: torch.nn.functional.dropout(inputs[0], 0.5, training=module.training)
    )
    model.train()
    model.model.layers[1].eval()
    expected = [greedy_by_full_passes(untrained_model(0), prompt, 16) for prompt in PROMPTS]
    assert tokens(on_the_policy(model).generate(PROMPTS, GREEDY)) == expected
    assert model.training and model.model.layers[0].mlp.training and not model.model.layers[1].mlp.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


ONE_OF_TWO_PROCESSES = """
import common.environment; common.environment.prepare_environment()
import gc, os, random, sys
import numpy, torch, torch.distributed as dist
from common.sampling.protocol import SamplingSettings, sampling_seed
from common.sampling.vllm_sampler import VLLMSampler
from common.models.weights import policy_weights
from tests.fixtures_engine import untrained_model

torch.set_num_threads(2)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = untrained_model(0)
SETTINGS = SamplingSettings(temperature=1.0, max_tokens=8, stop_token_ids=())

def state():
    return (
        dict(os.environ), random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        torch.get_num_threads(), torch.set_num_threads,
        torch.get_float32_matmul_precision(), torch.get_default_dtype(),
        torch.accelerator.synchronize, torch.accelerator.empty_cache, gc.isenabled(), gc.get_freeze_count(),
        sys.excepthook,
    )

def total():
    number = torch.tensor([rank + 1])
    dist.all_reduce(number)
    return int(number)

class Local:
    pass

def make():
    held = Local()  # a frame that vLLM keeps would keep this too
    sampler = VLLMSampler(sys.argv[1], dtype="float32", max_model_len=64, max_num_seqs=8)
    return sampler, __import__("weakref").ref(held)

before = state()
sampler, held = make()
assert held() is None
for name, old, new in zip(range(99), before, state()):
    assert old == new, (name, old, new)
for step in range(1 + rank):  # engines of different processes do not wait for each other
    sampler.push(policy_weights(model))
    seeds = [sampling_seed(0, step, 2 * rank + i, "train") for i in range(2)]
    completions = sampler.generate([[5], [6]], SETTINGS, seeds=seeds)
assert state() == before
assert total() == 3
kept = __import__("weakref").ref(sampler._engine)
del sampler
gc.collect()
assert kept() is None
assert total() == 3, "the trainer's process group outlives the engine"
assert state()[1:] == before[1:]
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_an_engine_changes_nothing_else_in_its_process_and_says_nothing(model_folders, tmp_path):
    environment = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    arguments = [sys.executable, "-c", ONE_OF_TWO_PROCESSES, model_folders[True], str(tmp_path / "store")]
    processes = [
        subprocess.Popen(
            arguments,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert outputs == ["", ""]


PREPARES_BEFORE_TORCH = """
import os, sys
from common.environment import prepare_environment
prepare_environment()
assert not {"torch", "vllm", "transformers"} & set(sys.modules)
print(os.environ["OMP_WAIT_POLICY"], os.environ["VLLM_LOGGING_LEVEL"])
"""


def run_python(script, **environment):
    cleaned = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "VLLM_"))}
    return subprocess.run(
        [sys.executable, "-S", "-c", script],
        env=cleaned | {"PYTHONPATH": os.pathsep.join([".", *sys.path])} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_environment_is_prepared_without_importing_torch_and_keeps_what_is_set():
    assert run_python(PREPARES_BEFORE_TORCH, VLLM_LOGGING_LEVEL="INFO").stdout.split() == ["PASSIVE", "INFO"]


@pytest.mark.slow
def test_an_environment_prepared_too_late_says_what_will_be_slow():
    late = "import torch; from common.environment import prepare_environment; prepare_environment()"
    assert "OMP_WAIT_POLICY=PASSIVE comes too late" in run_python(late).stderr
    assert run_python(late, OMP_WAIT_POLICY="PASSIVE").stderr == ""


def test_sampling_leaves_the_number_of_threads_alone(vllm_sampler):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        vllm_sampler.generate([[5, 6, 7]], SAMPLED, seeds=[1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
