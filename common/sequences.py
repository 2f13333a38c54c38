"""What one forward pass is given: the token ids of its rows, and where the outputs for completion tokens are.

All of it is computed on the CPU, where lengths and masks are known, and then moved to the device: the device never
has to say how many tokens there are, for which it would have to finish all work before. So no shape depends on data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.rollouts import Rollouts


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The rows of one pass on a device, n completion tokens in all.

    Attributes:
        ids: (b, L) int64, padded on the right.
        sources: (n,) int64, where the outputs (b, L, ...), flattened to (b L, ...), predict each completion token.
        targets: (n,) int64, ids of the completion tokens.
        places: (n,) int64, where they are in the flattened completions (b C).
        first: the first column of `ids` that predicts a completion token in any row.
        shape: b and C.
    """

    ids: Tensor
    sources: Tensor
    targets: Tensor
    places: Tensor
    first: int
    shape: tuple[int, int]

    @staticmethod
    def of(rollouts: Rollouts) -> "Sequences":
        """The rows of a micro-batch, each padded on the right, on its device.

        Args:
            rollouts: b rows; if they are on a device, `Rollouts.to` brought them there, or a copy is made on the CPU.
        """
        rows, device = rollouts.on_host(), rollouts.completion_ids.device
        ids, prompt_lengths = rows.sequences()  # (b, L), (b,)
        row, column = rows.completion_mask.nonzero(as_tuple=True)  # (n,) both
        before = prompt_lengths[row] - 1 + column  # (n,) the column before each completion token
        tensors = {
            "ids": ids,
            "sources": row * ids.shape[1] + before,
            "targets": rows.completion_ids[row, column],
            "places": row * rows.completion_ids.shape[1] + column,
        }
        return Sequences(
            **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()},
            first=int(before.min()) if len(before) else 0,
            shape=tuple(rows.completion_ids.shape),
        )

    def outputs(self, model: nn.Module, **options: Any) -> Any:
        """What a transformers model gives for these rows, without a cache."""
        with _no_search_for_packed_rows():
            return model(input_ids=self.ids, use_cache=False, **options)

    def states(self, backbone: nn.Module) -> Tensor:
        """(n, hidden): the last hidden state before each completion token."""
        return self.chosen(self.outputs(backbone).last_hidden_state)

    def chosen(self, outputs: Tensor) -> Tensor:
        """(n, ...): those of (b, L, ...) that predict completion tokens; some of the first columns may be left out."""
        left_out = self.ids.shape[1] - outputs.shape[1]
        sources = self.sources
        if left_out:
            sources = sources - left_out * (sources // self.ids.shape[1] + 1)
        return outputs.flatten(0, 1).index_select(0, sources)

    def spread(self, values: Tensor) -> Tensor:
        """(b, C): the values (n,) of completion tokens in their places, 0 at padding."""
        zeros = torch.zeros(self.shape[0] * self.shape[1], dtype=values.dtype, device=values.device)
        return zeros.index_copy(0, self.places, values).view(self.shape)


@contextmanager
def _no_search_for_packed_rows() -> Iterator[None]:
    """Keep transformers from looking into the position ids for several sequences in one row.

    Rows here are one sequence each. On a GPU the search waits for all work in each pass; and with tensors that have no
    values (for a prediction of memory) it takes every row for packed and builds a mask of (L, L). transformers 5.17
    has no argument for that in most models: `find_packed_sequence_indices` in masking_utils.py. This can go once a
    pass without position ids is not searched.
    """
    from transformers import masking_utils  # importing it takes seconds

    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _nothing_packed
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


def _nothing_packed(position_ids: Tensor) -> None:
    """In the place of transformers' search: nothing is packed."""
