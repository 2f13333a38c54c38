"""Two processes load models in parts and push them; test_sharded_loading.py starts this by torchrun.

Arguments: the folder with the models, and the file for the results, JSON by case. At the end the second process fails
in the middle of a push, in a way in which it cannot go on: the first one must not wait for it.
"""

import json
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common  # noqa: F401
from benchmarks.sharded import TINY, in_new_process, make_model, measure
from common.logprobs import without_adapter
from common.mistakes import WrongNumbers
from common.models import weights
from common.models.loading import load_policy, load_reference
from common.models.parts import spread
from common.models.weights import gathered, policy_weights
from common.sampling.pushing import push_policy
from common.sampling.server_sampler import ServerSampler
from common.sharding import is_part, rows_of
from PPO.value_model import load_scored_value_model, load_value_model
from tests.toy import toy_config

CPU = torch.device("cpu")
SHARD = {"shard": "full", "sampler": "vllm"}
LORA = {"use_lora": True, "lora_r": 4}
# Linear layers and experts, layers that keep (in, out), embeddings that are tied, and rows that two do not divide.
ADAPTED = ("mixtral", "gpt2", "qwen2", "odd rows")
# 41 MiB, most of it in the layers, so that half of it and the two largest tensors are clearly less.
SMALL = TINY | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10, "vocab_size": 4000}


def differences(one: nn.Module, two: nn.Module) -> list[str]:
    """What is not the same in a whole model and in one that is in parts."""
    found, shared = [], []
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(each, kind)(remove_duplicate=False)) for each in (one, two))
        found += [f"only one has {name}" for name in ours.keys() ^ theirs.keys()]
        for name in filter(theirs.__contains__, ours):  # in the same order on both processes
            tensor = theirs[name].detach()
            tensor = gathered(tensor.to_local(), tensor) if is_part(tensor) else tensor
            same = torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype
            if not same or ours[name].requires_grad != theirs[name].requires_grad:
                found.append(name)
        shared.append([[theirs[name] is theirs[other] for other in theirs] for name in theirs])
        shared.append([[ours[name] is ours[other] for other in ours] for name in ours])
    found += ["tied"] * (shared[0] != shared[1])
    modes = [[module.training for module in each.modules()] for each in (one, two)]
    return found + ["modes"] * (modes[0] != modes[1])


def unequal_pushes(one: nn.Module, two: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Names of weights that would be pushed otherwise."""
    found = []
    for (name, tensor), (other, part) in zip(policy_weights(one), policy_weights(two, None, dtype), strict=True):
        if dtype is not None and tensor.dim() > 1:
            tensor = tensor.to(dtype)
        if name != other or tensor.dtype != part.dtype or not torch.equal(tensor, part):
            found.append(f"{name} {other} {(tensor.float() - part.float()).abs().max():.1e}")
    return found


def train_adapter(one: nn.Module, two: nn.Module) -> None:
    """Give both the same adapter, which changes every layer."""
    torch.manual_seed(1)
    for (name, whole), part in zip(one.named_parameters(), two.parameters(), strict=True):
        if "lora_" in name:
            with torch.no_grad():
                whole.copy_(0.1 * torch.randn(whole.shape))
                first, end = rows_of(len(whole), torch.distributed.get_rank(), 2)
                part.to_local().copy_(whole[first:end])


def loaded(folder: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The policy of a folder, whole and in parts."""
    settings = {"gradient_checkpointing": True} | settings
    one = load_policy(folder, toy_config(folder, folder, **settings), dtype=dtype)
    return one, load_policy(folder, toy_config(folder, folder, **settings, **SHARD), dtype=dtype)


def same(folder: str, dtype: torch.dtype = torch.float32, **settings: Any) -> list[str]:
    """Differences of a policy before and after it is spread, and of its pushes."""
    one, two = loaded(folder, dtype, **settings)
    matrices = [each for each in without_adapter(two).parameters() if each.dim() > 1 and len(each) > 1]
    found = ["a whole matrix"] * (not any(is_part(each) for each in matrices))
    found += differences(one, two)
    spread(without_adapter(two), CPU)
    found += [f"spread: {name}" for name in differences(one, two)]
    if settings.get("use_lora"):
        train_adapter(one, two)
    found += unequal_pushes(one, two)
    return found + unequal_pushes(one, two, torch.bfloat16)


def message_of(work: Callable[[], Any]) -> str:
    """What it raises; empty if nothing."""
    try:
        work()
    except (ValueError, RuntimeError, WrongNumbers) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def value_models(folder: str, scored: str) -> list[str]:
    """Differences of value models, and of the reference."""
    from transformers import AutoTokenizer

    found = []
    for lora in ({}, LORA):
        whole, parts = (toy_config(folder, folder, algorithm="PPO", **lora, **more) for more in ({}, SHARD))
        one, two = (load_value_model(folder, each, dtype=torch.float32, zero_head=False) for each in (whole, parts))
        found += differences(one, two) + differences(one, spread(without_adapter(two), CPU))
        scores = {"dtype": torch.float32, "tokenizer": AutoTokenizer.from_pretrained(scored)}
        one, two = (load_scored_value_model(scored, each, **scores) for each in (whole, parts))
        found += differences(one, two) + differences(one, spread(without_adapter(two), CPU))
    one, two = (load_reference(folder, each) for each in (whole, parts))
    return found + differences(one, two)


class Counting:
    """A sampler that keeps a tensor until it has the next one, and counts how many are alive then."""

    needs_push, weights_dtype = True, None

    def __init__(self) -> None:
        self.most_alive = 0

    def push(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        got, last = [], None
        for _, tensor in tensors:
            got.append(weakref.ref(tensor))
            self.most_alive = max(self.most_alive, sum(each() is not None for each in got))
            last = tensor  # until the next one is there
            del tensor
        del last


class Failing:
    """A sampler that does not take the third tensor on the processes that are named."""

    needs_push, weights_dtype = True, None

    def __init__(self, processes: tuple[int, ...], error: Exception | None) -> None:
        self.fails = torch.distributed.get_rank() in processes
        self.error = error

    def push(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for number, _ in enumerate(tensors):
            if self.fails and number == 2:
                if self.error is None:
                    return
                raise self.error


class WithoutServer(ServerSampler):
    """The sampler on a server, whose transfer ends at the third tensor."""

    def __init__(self) -> None:
        super().__init__(client=None, about=None)

    def _push(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        for number, _ in enumerate(tensors):
            if number == 2:
                raise OSError("the network is gone")


def main() -> None:
    """Try every case."""
    folder, file = Path(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    is_main = torch.distributed.get_rank() == 0
    results: dict[str, Any] = {}

    def note(case: str, result: Any) -> None:
        everyone = [result] * 2
        torch.distributed.all_gather_object(everyone, result)
        results[case] = everyone

    # First: memory that was used once is used again, and would not be seen.
    for name, sizes in (("a tiny one", TINY), ("small", SMALL)):
        if is_main:
            in_new_process(make_model, str(folder / name), sizes)
        torch.distributed.barrier()
        note("memory", measure(str(folder / name)))
    for each in sorted(folder.glob("kind *")):
        note(each.name, same(str(each)))
        if each.name.removeprefix("kind ") in ADAPTED:
            note(f"{each.name}, adapter", same(str(each), **LORA))
    plain = str(folder / "kind qwen2")
    note("bfloat16", same(plain, torch.bfloat16, **LORA) + same(plain, torch.bfloat16, optimizer="adamw_host"))
    note("hub id", same("someone/tiny"))
    weights.GATHERED_AT_ONCE = 1000
    note("pieces", same(str(folder / "kind odd rows"), **LORA))
    note("value models", value_models(plain, str(folder / "scored")))
    for each in sorted(folder.glob("bad *")):
        config = toy_config(each, each, **SHARD)
        note(each.name, message_of(lambda each=each, config=config: load_policy(each, config, dtype=torch.float32)))

    _, policy = loaded(plain)
    spread(policy, CPU)
    counting = Counting()
    push_policy(counting, policy, None)
    note("alive", counting.most_alive)
    for name, sampler in (
        ("second", Failing((1,), RuntimeError("no room for it"))),
        ("both", Failing((0, 1), WrongNumbers("NaN"))),
        ("leaves early", Failing((0,), None)),
        ("server", WithoutServer()),
    ):
        note(f"push fails: {name}", message_of(lambda sampler=sampler: push_policy(sampler, policy, None)))
    if is_main:
        file.write_text(json.dumps(results))

    @contextmanager
    def on_device(parts: list[Tensor]):
        if not is_main and len(parts[0]) == len(policy.lm_head.weight):
            raise RuntimeError("out of memory while a weight is made")
        yield

    push_policy(counting, policy, on_device)


if __name__ == "__main__":
    main()
