"""Generation through the sampler against direct calls of vLLM, with the same requests and the same engine."""

from collections.abc import Callable
from dataclasses import replace

from benchmarks.timing import comparison, seconds_in_turns
from common.sampling.protocol import SamplingSettings, sampling_seed
from common.sampling.vllm_engine import sampling_params
from common.sampling.vllm_sampler import VLLMSampler
from common.trainer import OnPolicyTrainer


def compare_generation(trainer: OnPolicyTrainer, *, rounds: int, clock: Callable[[], float]) -> dict:
    """Completion tokens per second of both.

    Args:
        trainer: with vLLM as its sampler, which already has the weights.
        rounds: how often each of them is timed.
        clock: as in seconds_in_turns.

    Returns:
        The comparison. On the CPU the two draw with other noise, so their completions have other lengths.

    Raises:
        AssertionError: if their greedy completions are not the same.
    """
    config, sampler = trainer.config, trainer.policy_sampler.sampler
    prompts = trainer.prompts.batch(1, num_prompts=config.prompts_per_step)
    request = {
        "num_generations": config.num_generations,
        "seeds": [sampling_seed(config.seed, 1, row, "benchmark") for row in prompts.rows],
    }
    settings = SamplingSettings(
        temperature=config.temperature,
        max_tokens=config.max_completion_length,
        stop_token_ids=trainer.policy_sampler.end_token_ids,
    )
    sampled: dict[str, list[list[int]]] = {}

    def through_sampler() -> None:
        completions = sampler.generate(prompts.prompt_ids, settings, **request)
        sampled["sampler"] = [completion.token_ids for completion in completions]

    def bare() -> None:
        sampled["vllm"] = bare_vllm(sampler, prompts.prompt_ids, settings, **request)

    sampler.wake()
    same = same_greedy(sampler, prompts.prompt_ids, settings)
    # On a GPU kernels may sum in another order each time, and one different token changes the rest of a completion.
    assert same == 1 or trainer.models.device.type == "cuda", f"{same:.1%} of completions equal those of bare vLLM"
    seconds = seconds_in_turns({"sampler": through_sampler, "vllm": bare}, rounds=rounds, clock=clock)
    sampler.sleep()
    tokens = {name: sum(map(len, ids)) for name, ids in sampled.items()}
    return comparison(seconds, tokens=tokens, of="sampler", to="vllm") | {"same_greedy_completions": same}


def bare_vllm(
    sampler: VLLMSampler,
    prompt_ids: list[list[int]],
    settings: SamplingSettings,
    *,
    num_generations: int = 1,
    seeds: list[int] | None = None,
) -> list[list[int]]:
    """What `sampler.generate` is asked for, asked of vLLM itself, whose own code draws the tokens.

    Returns:
        Token ids of each completion.
    """
    params = [sampling_params(settings, num_generations, seed) for seed in seeds or [None] * len(prompt_ids)]
    # The engine is private to the sampler: only this comparison bypasses it.
    requests = [{"prompt_token_ids": ids} for ids in prompt_ids]
    outputs = sampler._engine.llm.generate(requests, params, use_tqdm=False)
    return [list(sample.token_ids) for output in outputs for sample in output.outputs]


def same_greedy(sampler: VLLMSampler, prompt_ids: list[list[int]], settings: SamplingSettings) -> float:
    """The share of greedy completions, of up to 16 tokens, that the sampler and bare vLLM both give."""
    greedy = replace(settings, temperature=0.0, top_p=1.0, top_k=0, max_tokens=min(settings.max_tokens, 16))
    own = [completion.token_ids for completion in sampler.generate(prompt_ids, greedy)]
    pairs = list(zip(own, bare_vllm(sampler, prompt_ids, greedy), strict=True))
    return sum(one == other for one, other in pairs) / len(pairs)
