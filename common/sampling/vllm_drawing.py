"""How vLLM draws tokens on the CPU while a request of ours runs: as sampler=transformers does, in any version.

Up to 0.31 its own way takes longer than a small model's pass. It makes as much noise as there are logits, twice: once
for all rows, which is thrown away, and once for each row from the generator of its seed
(vllm/v1/sample/ops/topk_topp_sampler.py). Then it counts how many tokens are more likely than the drawn one. For 128
rows of 49,152 tokens that is 210 ms, and the way here takes 12. 0.32 has a kernel with other noise.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from common.sampling.drawing import draw, uniform
from common.sampling.vllm_corrections import replaced

_HALF = torch.tensor(0.5, dtype=torch.float64)


@contextmanager
def quick_drawing() -> Iterator[None]:
    """Let vLLM on the CPU draw with one random number per token, and leave out ranks, inside."""
    import vllm.v1.sample.sampler as sampler
    from vllm.platforms import current_platform
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    with ExitStack() as stack:
        if current_platform.is_cpu():
            stack.enter_context(replaced(TopKTopPSampler, "__call__", _draw))
            # Compiling vLLM's function would delay the first token by 14 s.
            stack.enter_context(replaced(sampler, "batched_count_greater_than", _no_ranks))
        yield


def _draw(
    sampler: Any, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens (rows,) int64, and log-probs (rows, V) of the distribution after temperature, top_k and top_p."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logprobs = apply_top_k_top_p(logits, k, p)
    # A row without a generator is a greedy one between others: its token here counts for nothing.
    rows = (generators.get(row) for row in range(len(logits)))
    noise = torch.stack([_HALF if each is None else uniform((), each) for each in rows])
    return draw(logprobs, noise), logprobs


def _no_ranks(logprobs: Tensor, chosen: Tensor) -> Tensor:
    """(rows,) int64 zeros in place of the ranks of chosen, (rows, 1), in (rows, V): nothing of ours reads them."""
    return torch.zeros(len(logprobs), dtype=torch.int64)
