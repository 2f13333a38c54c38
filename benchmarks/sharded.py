"""Memory of each process while a model is loaded into shards and pushed to a sampler, on the CPU.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.sharded

The model is made on the spot, with Qwen2's architecture. The sampler is a stand-in that takes tensors one by one and
keeps none. Memory is what Linux calls RssAnon: pages of the model's file, which the kernel drops when it needs their
memory, are not in it. A tiny model is loaded and pushed first, so that libraries and buffers are there.
"""

import argparse
import gc
import json
import multiprocessing
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from common.logprobs import without_adapter
from common.models.loading import load_policy
from common.models.parts import spread
from common.sampling.pushing import push_policy
from GRPO.grpo_trainer import GRPOConfig

MIB = 2**20
# 70 million weights, 269 MiB in float32; embeddings and head are one matrix of 39 MiB.
SIZES = {
    **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "vocab_size": 20000, "tie_word_embeddings": True},
}
TINY = SIZES | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 200}
# Seconds between two looks at the memory.
INTERVAL = 0.0005


class TakesOneByOne:
    """A sampler that has all of a push and keeps none of it."""

    needs_push, weights_dtype = True, None

    def __init__(self) -> None:
        self.num_taken = 0

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take all weights."""
        for _, tensor in weights:
            self.num_taken += tensor.numel()


def anonymous() -> int:
    """Bytes of this process that are in memory and in no file."""
    return int(Path("/proc/self/status").read_text("utf-8").partition("RssAnon:")[2].split()[0]) * 1024


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` gives, and the most memory of this process meanwhile, in bytes above what it had before."""
    gc.collect()
    before, most, ended = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        most[0] = max(most[0], anonymous())
        ended.set()
        watcher.join()
    return result, most[0] - before


def make_model(folder: str, sizes: dict[str, int]) -> None:
    """Write a random model, in float32."""
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.save_pretrained(folder)


def measure(folder: str, **settings: Any) -> dict[str, float]:
    """Load a policy into shards and push it; all processes of a group call this together.

    Args:
        folder: of the model.
        settings: of GRPO, such as use_lora.

    Returns:
        In MiB: weights of the whole model and its largest tensor; the bound, that is this process's share of the
        model and two tensors; and above what the process had before, the peak while loading, what stays, and the peak
        while pushing.
    """
    config = GRPOConfig(model=folder, output_dir=folder, shard="full", sampler="vllm", **settings)

    def load() -> torch.nn.Module:
        model = load_policy(folder, config, dtype=torch.float32)
        spread(without_adapter(model), torch.device("cpu"))
        return model

    start = anonymous()
    model, loading = peak_of(load)
    gc.collect()
    loaded, sampler = anonymous() - start, TakesOneByOne()
    _, pushing = peak_of(lambda: push_policy(sampler, model, None))
    sizes = [parameter.numel() * parameter.element_size() for parameter in without_adapter(model).parameters()]
    bound = sum(sizes) / torch.distributed.get_world_size() + 2 * max(sizes)
    found = {"model": sum(sizes), "largest": max(sizes), "bound": bound}
    found |= {"loading": loading, "loaded": loaded, "pushing": loaded + pushing}
    return {name: size / MIB for name, size in found.items()}


def in_new_process(work: Callable, *arguments: Any) -> None:
    """Have something done elsewhere, so that its memory is not this process's."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def measure_all(**settings: Any) -> list[dict[str, float]]:
    """The figures of each process, for a model of SIZES."""
    with TemporaryDirectory() as own:
        folders = [own]
        torch.distributed.broadcast_object_list(folders)
        [folder] = folders
        is_main = torch.distributed.get_rank() == 0
        for name, sizes in (("tiny", TINY), ("model", SIZES)):
            if is_main:
                in_new_process(make_model, f"{folder}/{name}", sizes)
            torch.distributed.barrier()
            found = measure(f"{folder}/{name}", **settings)
        everyone = [found] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, found)
    return everyone


def main() -> None:
    """Print the figures of each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use_lora", action="store_true", help="with an adapter of rank 16 on all linear layers")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    torch.distributed.init_process_group("gloo")
    everyone = measure_all(**({"use_lora": True, "lora_r": 16} if arguments.use_lora else {}))
    if torch.distributed.get_rank() == 0:
        if arguments.json:
            print(json.dumps(everyone))
        for process, found in enumerate([] if arguments.json else everyone):
            figures = ", ".join(f"{name} {size:.0f}" for name, size in found.items())
            print(f"process {process}, MiB: {figures}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
