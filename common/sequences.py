"""What one forward pass is given: the token ids of its rows, and where the outputs for completion tokens are.

All of it is computed on the CPU, where lengths and masks are known, and then moved to the device: the device never
has to say how many tokens there are, for which it would have to finish all work before. So no shape depends on data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from common.packed_attention import PackedRows, Segment
from common.rollouts import Rollouts

# Packing gathers keys and values, so it must cost less than that share of a padded pass. On the CPU the embedded
# policy, for which gathering weighs most, took as long at 0.74 and 4 % longer at 0.84.
WORTH_IT = 0.75


@dataclass(frozen=True)
class Packing:
    """How a model can be given packed rows.

    Attributes:
        max_tokens: of one pass; a model with a sliding window is right as long as the window holds all of them.
        hidden_size: of the model; it decides how much attention takes beside the other layers.
    """

    max_tokens: float
    hidden_size: int

    def pays(self, rows: Rollouts) -> bool:
        """Whether b rows on the CPU take clearly less time packed than padded."""
        if not len(rows):
            return False
        width = int(rows.total_lengths.max())
        packed = [self.of_group(*group) for group in grouped_lengths(rows)]
        num_tokens, cost = (sum(each) for each in zip(*packed, strict=True))
        return num_tokens <= self.max_tokens and cost < WORTH_IT * len(rows) * self.cost(width, width)

    def of_group(self, prompt: int, completions: list[int]) -> tuple[int, float]:
        """Tokens of a prompt and its completions, packed, and what they cost."""
        seen = [max(length - 1, 0) for length in completions]
        cost = self.cost(prompt, prompt) + sum(self.cost(each, 2 * prompt + each) for each in seen)
        return prompt + sum(seen), cost

    def cost(self, queries: int, keys: int) -> float:
        """Of tokens that see half as many keys in the mean, in tokens that see none.

        The layers beside attention take about 24 h^2 operations for a token, and attention 4 h for each key.
        """
        return queries * (1 + keys / (12 * self.hidden_size))


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The rows of one pass on a device, n completion tokens in all.

    Attributes:
        ids: (b, L) int64, padded on the right; or (1, N), packed: see common/packed_attention.py.
        sources: (n,) int64, where the outputs (b, L, ...), flattened to (b L, ...), predict each completion token.
        targets: (n,) int64, ids of the completion tokens.
        places: (n,) int64, where they are in the flattened completions (b C).
        first: the first column of `ids` that predicts a completion token in any row.
        shape: b and C.
        position_ids: (1, N) int64 of packed rows, which start anew with each prompt.
        packed_rows: which of the packed tokens attend to which.
    """

    ids: Tensor
    sources: Tensor
    targets: Tensor
    places: Tensor
    first: int
    shape: tuple[int, int]
    position_ids: Tensor | None = None
    packed_rows: PackedRows | None = None

    @staticmethod
    def of(rollouts: Rollouts, packing: Packing | None = None) -> "Sequences":
        """The rows of a micro-batch on its device: padded on the right, or packed where that is cheaper.

        Args:
            rollouts: b rows; if they are on a device, `Rollouts.to` brought them there, or a copy is made on the CPU.
            packing: what the model can do with packed rows; None: nothing.
        """
        rows, device = rollouts.on_host(), rollouts.completion_ids.device
        if packing is not None and packing.pays(rows):
            return Sequences.packed(rows, device)
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

    @staticmethod
    def packed(rows: Rollouts, device: torch.device) -> "Sequences":
        """The rows one after the other, on a device: each prompt once, then the completions of adjacent rows with it.

        The last token of a completion is left out: nothing is predicted from it.

        Args:
            rows: b rows on the CPU, at least one.
            device: where the pass is.
        """
        ids, positions, sources, segments = [], [], [], []
        lengths, size = rows.lengths.tolist(), 0
        for group in groups(rows):
            prompt = rows.prompt_ids[group[0]][rows.prompt_mask[group[0]]]
            start, length = size, len(prompt)
            ids.append(prompt)
            positions.append(torch.arange(length))
            size += length
            if len(group) > 1:
                segments.append(Segment(start, length))
            for row in group:
                seen = max(lengths[row] - 1, 0)  # tokens from which the next is predicted
                ids.append(rows.completion_ids[row, :seen])
                positions.append(torch.arange(length, length + seen))
                if lengths[row]:
                    sources += [torch.tensor([start + length - 1]), torch.arange(size, size + seen)]
                if len(group) == 1:
                    segments.append(Segment(start, length + seen))
                elif seen:
                    segments.append(Segment(size, seen, start, length))
                size += seen
        mask = rows.completion_mask
        tensors = {
            "ids": torch.cat(ids)[None],
            "position_ids": torch.cat(positions)[None],
            "sources": torch.cat([*sources, torch.zeros(0, dtype=torch.int64)]),
            "targets": rows.completion_ids[mask],
            "places": mask.flatten().nonzero().squeeze(1),
        }
        return Sequences(
            **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()},
            packed_rows=PackedRows.of(segments, size).to(device),
            first=0,
            shape=tuple(mask.shape),
        )

    def outputs(self, model: nn.Module, **options: Any) -> Any:
        """What a transformers model gives for these rows, without a cache."""
        if self.packed_rows is not None:
            options |= {"position_ids": self.position_ids, "packed_rows": self.packed_rows}
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


def groups(rows: Rollouts) -> list[list[int]]:
    """The adjacent rows that have the same prompt, as numbers of rows on the CPU."""
    same = (rows.prompt_ids[1:] == rows.prompt_ids[:-1]) & (rows.prompt_mask[1:] == rows.prompt_mask[:-1])
    begins = [0, *((~same.all(1)).nonzero().squeeze(1) + 1).tolist(), len(rows)]
    return [list(range(start, end)) for start, end in pairwise(begins) if end > start]


def grouped_lengths(rows: Rollouts) -> list[tuple[int, list[int]]]:
    """For each of the `groups`: the tokens of the prompt and of its completions."""
    prompts, completions = rows.prompt_mask.sum(1).tolist(), rows.lengths.tolist()
    return [(prompts[group[0]], completions[group[0] : group[-1] + 1]) for group in groups(rows)]


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
