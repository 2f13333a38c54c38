"""A server of vLLM beside an own engine: seconds of a push, and tokens per second, in one alternating run.

    python -m benchmarks.server              # the embedded policy; a minute or two on two cores

Both sample the same completions of the same prompts from the same seeds, one after the other, so that neither has the
cores while the other one works.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM

import common  # noqa: F401  it prepares the environment before torch loads
from common.embedded import resolve_model
from common.models.weights import policy_weights
from common.sampling.protocol import Sampler, SamplingSettings
from common.sampling.server_client import check_model, check_server
from common.sampling.server_sampler import ServerSampler
from common.sampling.vllm_sampler import VLLMSampler

ROOT = Path(__file__).parent.parent
LENGTHS = {"max_prompt_length": 64, "max_completion_length": 64}


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    num_rows = arguments.prompts * arguments.generations
    path = resolve_model(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    with serving(arguments.model, arguments.prompts, arguments.generations) as url:
        client = check_server(url, timeout=120)
        about = check_model(client, path, max_model_len=sum(LENGTHS.values()), dtype="float32")
        own = VLLMSampler(path, dtype="float32", max_model_len=about.max_model_len, most_rows=num_rows)
        samplers: dict[str, Sampler] = {"own engine": own, "server": ServerSampler(client, about)}
        pushes: dict[str, list[float]] = {name: [] for name in samplers}
        speeds: dict[str, list[float]] = {name: [] for name in samplers}
        for _ in range(arguments.rounds + 1):  # the first round warms up
            for name, sampler in samplers.items():
                start = time.perf_counter()
                sampler.push(policy_weights(model))
                pushed = time.perf_counter()
                sampler.wake()
                tokens = draw(sampler, arguments.prompts, arguments.generations)
                pushes[name].append(pushed - start)
                speeds[name].append(tokens / (time.perf_counter() - pushed))
    for name in samplers:
        push, speed = median(pushes[name][1:]), median(speeds[name][1:])
        print(f"{name}: push {push * 1000:.0f} ms, {num_rows} completions at {speed:,.0f} tokens/s")


def draw(sampler: Sampler, prompts: int, generations: int) -> int:
    """Sample completions of full length, and return how many tokens they have."""
    settings = SamplingSettings(temperature=1.0, max_tokens=LENGTHS["max_completion_length"], stop_token_ids=())
    ids = [[5, 7, 9, 11, 13 + i] for i in range(prompts)]
    seeds = [1000 * i for i in range(prompts)]
    drawn = sampler.generate(ids, settings, num_generations=generations, seeds=seeds)
    return sum(len(completion.token_ids) for completion in drawn)


@contextmanager
def serving(model: str, prompts: int, generations: int) -> Iterator[str]:
    """The address of a server that was started as its user starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    settings = {"model": model, "preset": "none", "sampler_url": url, "prompts_per_step": prompts}
    settings |= {"num_generations": generations, "eval_every": 0, "task": "countdown", **LENGTHS}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "GRPO" / "grpo.py", *words, "--serve"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        if not any(line.startswith("serving ") for line in process.stdout):
            sys.exit(f"the server ended with status {process.wait()}; its messages are above")
        yield url
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
