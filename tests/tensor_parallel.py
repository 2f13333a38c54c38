"""Engines that several processes share, beside engines of their own; test_tensor_parallel.py starts it by torchrun.

Arguments: the policy's folder, a folder for results, sizes of engines to sample with, separated by commas, and whole
runs: algorithm,size,shard.
"""

import gc
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM

import common  # noqa: F401
from common.mistakes import WrongNumbers
from common.models.weights import policy_weights
from common.rollouts import Completion
from common.sampling.protocol import SamplingSettings, sampling_seed
from common.sampling.vllm_sampler import VLLMSampler
from tests.toy import toy_trainer

# The third one is longer than two blocks of vLLM's cache, which its completions share.
PROMPTS = [[5, 6, 7], [8], [9 + i % 100 for i in range(70)], [17, 18], [400, 3, 250, 9], [30]]
# Prompts of each of up to four processes; the third has none.
OF_PROCESS = [[0, 1, 2], [3], [], [4, 5]]
LIMITS = {"max_tokens": 24, "stop_token_ids": tuple(range(3, 400, 40))}


def main() -> None:
    """Sample with engines of every size, then do every run."""
    model, folder, sizes, *runs = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    process, file = accelerator.process_index, Path(folder) / f"sampled-{accelerator.process_index}.pt"
    torch.save({size: sampled(model, process, int(size)) for size in sizes.split(",") if size}, file)
    for run in runs:
        algorithm, size, shard = run.split(",")
        settings = {"sampler": "vllm", "vllm_tensor_parallel": int(size), "shard": shard, "kl_coef": 0.05}
        if algorithm == "GRPO":  # groups of two short completions often have the same score
            settings |= {"refill_rounds": 2, "num_generations": 2, "max_completion_length": 4}
            settings |= {"eval_every": 1, "eval_num_samples": 2, "eval_top_p": 0.9}
        toy_trainer(Path(model), Path(folder) / run, algorithm=algorithm, **settings).train()
        gc.collect()  # engines of a process have one size
    accelerator.state.destroy_process_group()


def sampled(model: str, process: int, size: int) -> dict[str, list]:
    """What a process gets from an engine that `size` processes share, by case."""
    from vllm.distributed.parallel_state import get_tp_group

    limits = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 64, "memory_share": 0.05, "timeout": 2.0}
    sampler = VLLMSampler(model, most_rows=16 * size, tensor_parallel=size, **limits)
    assert get_tp_group().mq_broadcaster is None  # its shared memory would be left when the run ends
    weights = dict(policy_weights(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)))
    sampler.push(weights.items())
    prompts, seeds = (
        [PROMPTS[i] for i in OF_PROCESS[process]],
        [sampling_seed(0, 1, i, "a") for i in OF_PROCESS[process]],
    )
    greedy, drawn = SamplingSettings(temperature=0.0, **LIMITS), SamplingSettings(temperature=1.0, **LIMITS)
    found: dict[str, list] = {}

    def ask(case: str, settings: SamplingSettings, **request: object) -> None:
        if prompts:  # a process without prompts asks for nothing
            found[case] = sampler.generate(prompts, settings, **request)

    def all_sleep() -> None:
        sampler.sleep()
        sampler.wake()

    ask("greedy", greedy)
    all_sleep()
    reported: dict[int, list[Completion]] = {}
    ask("drawn", drawn, num_generations=3, seeds=seeds, finished=reported.__setitem__)
    found["reported"] = [each for i in sorted(reported) for each in reported[i]]
    all_sleep()
    for round_ in range(process + 1):  # as continuations of prefixes: a different number of requests in each process
        limit = SamplingSettings(temperature=0.7, max_tokens=4 + round_ + process, stop_token_ids=())
        ask(f"round {round_}", limit, num_generations=2, seeds=seeds)
    all_sleep()
    if process % 2:
        ask("mixed", greedy)
    else:
        ask("mixed", SamplingSettings(temperature=1.3, top_p=0.8, top_k=9, **LIMITS), seeds=seeds)
    all_sleep()
    sampler.push(changed(weights).items())
    ask("pushed", drawn, num_generations=2, seeds=seeds)
    all_sleep()
    name = next(iter(weights))
    try:
        sampler.push((weights | {name: weights[name] * torch.nan}).items())
    except WrongNumbers as error:
        found["NaN"] = [str(error)]
    sampler.push(weights.items())
    ask("again", greedy)
    sampler.sleep()
    return found


def changed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return {name: each * (1 + 0.3 * torch.randn(each.shape, generator=generator)) for name, each in weights.items()}


if __name__ == "__main__":
    main()
