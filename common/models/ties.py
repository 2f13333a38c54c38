"""The same choice among equal scores in every pass of a model with sparse attention.

Its indexers score all earlier tokens and keep the k best. Their scores are sums of ReLUs, so that many are exactly 0,
and which of equal scores `torch.topk` takes depends on how many there are: a token would attend to others with a cache
than without, and to others in a longer row. Here it is the first of them.
"""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# End of the names of transformers' classes for these modules.
_INDEXER = "Indexer"


class _FirstOfEquals(TorchFunctionMode):
    """Within it, topk takes the first of equal values, in a row of any length."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in (torch.Tensor.topk, torch.topk):
            return func(*args, **(kwargs or {}))
        return _topk(*args, **(kwargs or {}))


def _topk(scores: torch.Tensor, k: int, dim: int = -1, **_: bool) -> torch.return_types.topk:
    ordered = scores.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk([part.narrow(dim, 0, k) for part in ordered])


def settle_ties(model: nn.Module) -> None:
    """Let each indexer of a model take the first of equal scores; other models stay as they are.

    Args:
        model: of transformers. Its weights and their names do not change.
    """
    for module in model.modules():
        if type(module).__name__.endswith(_INDEXER):
            modes: list[_FirstOfEquals] = []

            def enter(_module: nn.Module, _inputs: tuple, modes: list[_FirstOfEquals] = modes) -> None:
                modes.append(_FirstOfEquals())
                modes[-1].__enter__()

            def leave(_module: nn.Module, *_: Any, modes: list[_FirstOfEquals] = modes) -> None:
                modes.pop().__exit__(None, None, None)

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)
