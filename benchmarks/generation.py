"""Generation through the sampler against direct calls of vLLM, with the same requests and the same engine."""

from benchmarks.timing import comparison, seconds_in_turns
from common.sampling.protocol import SamplingSettings, sampling_seed
from common.trainer import OnPolicyTrainer


def compare_generation(trainer: OnPolicyTrainer, *, rounds: int) -> dict:
    """Completion tokens per second of both.

    Args:
        trainer: with vLLM as its sampler, which already has the weights.
        rounds: how often each of them is timed.

    Returns:
        The comparison, and the share of completions that are the same token by token in both.

    Raises:
        AssertionError: on the CPU, if they are not all the same.
    """
    from vllm import SamplingParams  # not at the top: its import changes the process, which the engine undoes

    config, sampler = trainer.config, trainer.policy_sampler.sampler
    prompts = trainer.prompts.batch(1, num_prompts=config.prompts_per_step)
    seeds = [sampling_seed(config.seed, 1, row, "benchmark") for row in prompts.rows]
    settings = SamplingSettings(
        temperature=config.temperature,
        max_tokens=config.max_completion_length,
        stop_token_ids=trainer.policy_sampler.end_token_ids,
    )
    # The engine is private to the sampler: only this comparison bypasses it.
    llm = sampler._engine.llm
    sampled: dict[str, list[list[int]]] = {}

    def through_sampler() -> None:
        completions = sampler.generate(
            prompts.prompt_ids, settings, num_generations=config.num_generations, seeds=seeds
        )
        sampled["sampler"] = [completion.token_ids for completion in completions]

    def bare() -> None:
        params = [
            SamplingParams(
                n=config.num_generations,
                seed=seed,
                temperature=config.temperature,
                max_tokens=config.max_completion_length,
                stop_token_ids=list(trainer.policy_sampler.end_token_ids),
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": ids} for ids in prompts.prompt_ids]
        outputs = llm.generate(requests, params, use_tqdm=False)
        sampled["vllm"] = [list(sample.token_ids) for output in outputs for sample in output.outputs]

    sampler.wake()
    seconds = seconds_in_turns({"sampler": through_sampler, "vllm": bare}, rounds=rounds)
    sampler.sleep()
    pairs = zip(sampled["sampler"], sampled["vllm"], strict=True)
    same = sum(own == other for own, other in pairs) / len(sampled["vllm"])
    # On a GPU kernels may sum in another order each time, and one different token changes the rest of a completion.
    assert same == 1 or trainer.models.device.type == "cuda", f"{same:.1%} of completions equal those of bare vLLM"
    tokens = sum(map(len, sampled["sampler"]))
    return comparison(seconds, tokens=tokens, of="sampler", to="vllm") | {"same_completions": same}
