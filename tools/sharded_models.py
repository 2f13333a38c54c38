"""Every tiny architecture of the tests, spread over processes, against itself whole: what is read, gradients, a push.

    torchrun --standalone --nproc_per_node 2 -m tools.sharded_models                         # all weights trained
    torchrun --standalone --nproc_per_node 2 -m tools.sharded_models --use_lora qwen2 gpt2   # of some, an adapter

Each line says of one architecture: the largest difference of a gradient as a share of the largest gradient, and how
many of the pushed tensors differ, by how much. Takes some minutes, so it is no test.
"""

import argparse
import logging
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from torch import Tensor, distributed, nn

from common.logprobs import token_logprobs, without_adapter
from common.models.loading import load_policy
from common.models.parts import spread
from common.models.weights import policy_weights
from common.packing import _compared_rows
from common.rollouts import Rollouts
from common.sharding import is_part, rows_of, whole
from tests.architectures import ARCHITECTURES, make
from tests.toy import toy_config

# Deviation of the weights of trained adapters: a new one is 0, and would hide what it changes.
_OF_ADAPTERS = 0.05


def main() -> None:
    """Go through the architectures, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help="of tests/architectures.py; none: all")
    parser.add_argument("--use_lora", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    arguments = parser.parse_args()
    settings = {"gradient_checkpointing": arguments.gradient_checkpointing}
    settings |= {"use_lora": True, "lora_r": 4} if arguments.use_lora else {}
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(minutes=5))
    places = [tempfile.mkdtemp() if distributed.get_rank() == 0 else ""]
    distributed.broadcast_object_list(places)
    worst, num_equal, num_failed = 0.0, 0, 0
    names = arguments.names or [*ARCHITECTURES]
    for name in names:
        folder = Path(places[0]) / name
        if distributed.get_rank() == 0:
            make(name, folder)
        distributed.barrier()
        said = _compared_together(folder, settings)
        if isinstance(said, str):
            num_failed += 1
            _print(f"{name}: {said}")
            continue
        of_gradients, of_push = said
        worst, num_equal = max(worst, of_gradients), num_equal + (not of_push)
        pushed = (
            f"{len(of_push)} pushed tensors differ by up to {max(of_push):.1e}" if of_push else "the push is equal"
        )
        _print(f"{name}: gradients differ by {of_gradients:.1e}, {pushed}")
    rest = f", {num_failed} failed" if num_failed else ""
    _print(f"{len(names)} architectures{rest}: gradients within {worst:.1e}, {num_equal} pushes equal")
    distributed.destroy_process_group()


def _compared_together(folder: Path, settings: dict) -> tuple[float, list[float]] | str:
    """What was found; in words, if a process failed before they went through the model together."""
    try:
        found: tuple[float, list[float]] | str = _compared(folder, settings)
    except (ValueError, RuntimeError, AssertionError, AttributeError) as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
    everyone = [found] * distributed.get_world_size()
    distributed.all_gather_object(everyone, found)
    return next((each for each in everyone if isinstance(each, str)), found)


def _compared(folder: Path, settings: dict) -> tuple[float, list[float]]:
    """The largest difference of a gradient, as a share of the largest one, and the differences of pushed tensors."""
    alone = load_policy(str(folder), toy_config(folder, folder, **settings), dtype=torch.float32)
    of_shards = toy_config(folder, folder, shard="full", sampler="vllm", **settings)
    spread_out = load_policy(str(folder), of_shards, dtype=torch.float32)
    spread(without_adapter(spread_out), torch.device("cpu"))
    _fill_adapters(alone, spread_out)
    rows = _compared_rows(200)
    rows.token_weights = torch.linspace(-1, 1, rows.completion_mask.numel()).view_as(rows.completion_mask)
    _add_gradient(alone, rows)
    _add_gradient(spread_out, rows[torch.arange(distributed.get_rank(), len(rows), distributed.get_world_size())])
    largest, difference = 0.0, 0.0
    for (name, one), (other_name, other) in zip(alone.named_parameters(), spread_out.named_parameters(), strict=True):
        assert name == other_name and one.requires_grad == other.requires_grad
        if other.grad is None:
            assert one.grad is None or not one.grad.any(), f"{name} has a gradient in the whole model only"
            continue
        gathered = whole(other.grad)
        expected = torch.zeros_like(gathered) if one.grad is None else one.grad
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((expected - gathered).abs().max()))
    pushes = zip(policy_weights(alone), policy_weights(spread_out), strict=True)
    of_push = []
    for (name, one), (other_name, other) in pushes:
        assert (name, one.shape, one.dtype) == (other_name, other.shape, other.dtype)
        of_push.append(float((one.float() - other.float()).abs().max()))
    return difference / largest, [each for each in of_push if each]


def _fill_adapters(alone: nn.Module, spread_out: nn.Module) -> None:
    """Give both models the same numbers in their adapters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for (name, one), other in zip(alone.named_parameters(), spread_out.parameters(), strict=True):
            if "lora_" in name:
                one.copy_(_OF_ADAPTERS * torch.randn(one.shape, generator=generator))
                _set(other, one)


def _set(parameter: Tensor, values: Tensor) -> None:
    if is_part(parameter):
        first, end = rows_of(len(values), distributed.get_rank(), distributed.get_world_size())
        parameter.to_local().copy_(values[first:end])
    else:
        parameter.copy_(values)


def _add_gradient(model: nn.Module, rows: Rollouts) -> None:
    logprobs, _ = token_logprobs(model, rows, 1.0)
    torch.where(rows.loss_mask, logprobs * rows.token_weights, 0.0).sum().backward()


def _print(line: str) -> None:
    if distributed.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
