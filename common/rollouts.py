"""Rollouts: the batch that every other module works on.

Notation, used everywhere:
    B completions on this process, P prompt columns, C completion columns, G completions per prompt,
    b rows of a micro-batch, L columns of a prompt joined with its completion, V vocabulary.

Masks: True = real token. Masked positions hold 0 (token 0, 0.0), and every reduction uses the mask. Rows of one
prompt are adjacent. Everything lives on the CPU; only micro-batches move to the device. No maths of any algorithm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Completion:
    """One completion, as a sampler returns it.

    Attributes:
        token_ids: the sampled tokens, the end token included when it was sampled.
        logprobs: log-probability of each of them under the distribution it was sampled from (after temperature).
        truncated: True when the length limit stopped it.
    """

    token_ids: list[int]
    logprobs: list[float]
    truncated: bool

    def __post_init__(self) -> None:
        """Check that each token has a log-prob: without one it was not sampled, and must not get into the loss."""
        assert len(self.token_ids) == len(self.logprobs)


@dataclass(kw_only=True)
class PromptBatch:
    """The prompts of one step on this process.

    Attributes:
        step: the step they belong to; with `rows` it decides the sampling seeds.
        rows: position of each prompt among all prompts of the step, over all processes.
        prompt_ids: token ids of each prompt.
        prompts: their text, for rewards and tables.
        columns: the data set's other columns, one list each.
        raw_prompts: the prompts as the data set has them, text or chat messages; empty: as `prompts`.
        refill: 0 for the step's own prompts; 1, 2, ... for additional ones.
    """

    step: int
    rows: list[int]
    prompt_ids: list[list[int]]
    prompts: list[str]
    columns: dict[str, list]
    raw_prompts: list[str | list[dict]] = field(default_factory=list)
    refill: int = 0

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)


@dataclass(kw_only=True)
class Rollouts:
    """Prompts, their completions, and everything that is computed about each token later.

    Attributes:
        rows: (B,) int64, number of the row among all rows of the step, over all processes.
        prompt_ids: (B, P) int64, left-padded.
        prompt_mask: (B, P) bool.
        completion_ids: (B, C) int64, right-padded; the end token counts as real.
        completion_mask: (B, C) bool.
        truncated: (B,) bool, stopped by the length limit.
        loss_mask: (B, C) bool, real tokens that are trained on; without one it is completion_mask.
        step_lengths: int64, trained tokens of each row by row number. One entry per row of the whole step over all
            processes; kept when rows are dropped, so that these still count in the means. None: only the present rows
            count; they are numbered before their first forward pass.
        sampling_logprobs: (B, C) float32, as the sampler reported them.
        prompts: B strings.
        completions: B strings, without end token and padding.
        columns: the data set's other columns, a list of B values each.
        raw_prompts: B prompts as the data set has them, text or chat messages; empty: as `prompts`.
        scores: (B,) float32, one number per completion.
        parts: (B,) float32 for each reward by name, unweighted; NaN where it does not apply.
        extra: what reward functions logged of each completion, a list of B values by column.
        old_logprobs: (B, C) float32 under the policy that sampled; None when that policy is the one being updated.
        ref_logprobs: (B, C) float32 under the reference; None without a reference.
        values: (B, C) float32; column t is the value of the state in which completion token t was chosen.
        advantages: (B, C) float32.
        returns: (B, C) float32.
        token_weights: (B, C) float32, weight in the loss; sums to 1 over the mini-batch of all processes.

    Raises:
        ValueError: if a mask has a hole, or loss_mask names a token that is padding.
    """

    rows: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    truncated: Tensor
    sampling_logprobs: Tensor
    loss_mask: Tensor | None = None
    step_lengths: Tensor | None = None
    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    columns: dict[str, list] = field(default_factory=dict)
    raw_prompts: list[str | list[dict]] = field(default_factory=list)
    scores: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, list] = field(default_factory=dict)
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    token_weights: Tensor | None = None
    # The same rows on the CPU, of rows that `to` moved to a device.
    _host: "Rollouts | None" = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Set a missing loss_mask and check the masks, on the CPU only: elsewhere the check would cost time."""
        if self.loss_mask is None:
            self.loss_mask = self.completion_mask
        if self.completion_mask.device.type == "cpu":
            self._check_masks()

    def _check_masks(self) -> None:
        left_padded = (self.prompt_mask[:, 1:] >= self.prompt_mask[:, :-1]).all()
        right_padded = (self.completion_mask[:, 1:] <= self.completion_mask[:, :-1]).all()
        if not (left_padded and right_padded):
            name, side = ("completion_mask", "right") if left_padded else ("prompt_mask", "left")
            raise ValueError(
                f"{name} has a hole: the tokens after padding between real tokens would get the log-probs of their "
                f"neighbours. Put all padding on the {side}; for real tokens that are not trained on, set only "
                "loss_mask to False."
            )
        if (self.loss_mask > self.completion_mask).any():
            raise ValueError(
                "loss_mask is True where completion_mask is False: only real tokens can be trained on. Pass "
                "loss_mask & completion_mask."
            )

    @classmethod
    def from_completions(
        cls, prompts: PromptBatch, completions: Sequence[Completion], texts: list[str], *, num_generations: int
    ) -> "Rollouts":
        """Pad the sampler's lists into B = len(prompts) x G rows, as wide as their longest prompt and completion.

        Args:
            prompts: the prompts that were sampled from.
            completions: len(prompts) x num_generations, rows of one prompt adjacent.
            texts: the completions decoded, in the same order.
            num_generations: G.
        """
        repeated = [index for index in range(len(prompts)) for _ in range(num_generations)]
        prompt_ids, prompt_mask = _pad([prompts.prompt_ids[i] for i in repeated], torch.int64, left=True)
        completion_ids, completion_mask = _pad([c.token_ids for c in completions], torch.int64)
        sampling_logprobs, _ = _pad([c.logprobs for c in completions], torch.float32)
        rows = [prompts.rows[i] * num_generations + g for i in range(len(prompts)) for g in range(num_generations)]
        return cls(
            rows=torch.tensor(rows, dtype=torch.int64),
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            truncated=torch.tensor([c.truncated for c in completions], dtype=torch.bool),
            sampling_logprobs=sampling_logprobs,
            prompts=[prompts.prompts[i] for i in repeated],
            completions=texts,
            columns={name: [values[i] for i in repeated] for name, values in prompts.columns.items()},
            raw_prompts=[prompts.raw_prompts[i] for i in repeated] if prompts.raw_prompts else [],
        )

    def __len__(self) -> int:
        """B, the number of completions."""
        return len(self.rows)

    @staticmethod
    def joined(parts: Sequence["Rollouts"]) -> "Rollouts":
        """Join the rows of rollouts of one step, such as those of refills, padded to the widest.

        Rows that count in the means of a part still count; `renumbered` takes dropped rows out of the means.

        Args:
            parts: at least one, as `sample` returns them, with or without dropped rows; all with the same fields.

        Raises:
            ValueError: if a part is not numbered, or the parts have different fields.
        """
        contents = [dict(part._content()) for part in parts]
        if len({frozenset(content) for content in contents}) != 1 or "step_lengths" not in contents[0]:
            raise ValueError(
                f"joining rollouts with the fields {', or '.join(' '.join(content) for content in contents)}: need "
                "the same fields in all, including step_lengths. Join what `sample` returned, before `renumbered` and "
                "after the same verbs."
            )
        # Row numbers of a part start after the rows that the parts before it count on all processes.
        first_rows = accumulate((len(part.step_lengths) for part in parts[:-1]), initial=0)
        joined = {"rows": torch.cat([part.rows + first for part, first in zip(parts, first_rows, strict=True)])}
        for name in contents[0].keys() - joined.keys():
            values = [content[name] for content in contents]
            if isinstance(values[0], Tensor):
                joined[name] = _stacked(values, left=name.startswith("prompt"))
            elif name == "parts":
                joined[name] = {part: torch.cat([value[part] for value in values]) for part in values[0]}
            elif name == "extra":  # a function may log a column in one part only
                keys = dict.fromkeys(key for value in values for key in value)
                absent = [[None] * len(part) for part in parts]
                pairs = [*zip(values, absent, strict=True)]
                joined[name] = {key: [item for value, no in pairs for item in value.get(key, no)] for key in keys}
            elif isinstance(values[0], dict):
                joined[name] = {key: [item for value in values for item in value[key]] for key in values[0]}
            else:
                joined[name] = [item for value in values for item in value]
        return Rollouts(**joined)

    def only(self, index: Tensor | slice) -> "Rollouts":
        """Keep the rows at `index` (int64 tensor, bool mask or slice) for all later forward passes.

        Dropped rows still count in the means, so the gradient of the others stays the same. old_logprobs is cleared:
        forward passes of fewer rows may round differently, and the ratio before the first optimizer step must be 1.
        """
        return replace(self[index], old_logprobs=None)

    def renumbered(self, counted: Tensor | None = None) -> "Rollouts":
        """Renumber the rows; dropped rows leave the means.

        Args:
            counted: (n,) int64 ascending row numbers over all processes that stay in the means, including these rows.
                None: only these rows of all processes.

        Returns:
            The same rows, numbered without gaps; for None, before their next forward pass. Clears old_logprobs as
            `only` does.
        """
        if counted is None:
            return replace(self, step_lengths=None, old_logprobs=None)
        rows, lengths = torch.searchsorted(counted, self.rows), self.step_lengths[counted]
        return replace(self, rows=rows, step_lengths=lengths, old_logprobs=None)

    def __getitem__(self, index: Tensor | slice) -> "Rollouts":
        """The rows at `index` (an int64 tensor, a bool mask or a slice), as Rollouts of the same width."""
        numbers = torch.arange(len(self))[index].tolist()
        chosen = {}
        for name, value in self._content():
            if name == "step_lengths":
                chosen[name] = value
            elif isinstance(value, Tensor):
                chosen[name] = value[index]
            elif name == "parts":
                chosen[name] = {part: values[index] for part, values in value.items()}
            elif isinstance(value, dict):
                chosen[name] = {column: [values[i] for i in numbers] for column, values in value.items()}
            else:
                chosen[name] = [value[i] for i in numbers] if value else value
        return Rollouts(**chosen)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, real completion tokens of each row."""
        return self.completion_mask.sum(1)

    @property
    def total_lengths(self) -> Tensor:
        """(B,) int64, real tokens of each row, prompt and completion."""
        return self.prompt_mask.sum(1) + self.lengths

    @property
    def completion_tokens(self) -> list[list[int]]:
        """The real completion tokens of each row."""
        rows = zip(self.completion_ids, self.completion_mask, strict=True)
        return [ids[mask].tolist() for ids, mask in rows]

    def spread(self, per_row: Tensor) -> Tensor:
        """(B, C) float32, 0 at padding: one number per row, (B,) float, repeated for all real tokens of the row."""
        return torch.where(self.completion_mask, per_row.float()[:, None], 0.0)  # (B, C)

    def trimmed(self) -> "Rollouts":
        """The same rows without columns that are padding in all of them."""
        completion_width = max(int(self.lengths.max()), 1) if len(self) else 1
        prompt_start = self.prompt_mask.shape[1] - (int(self.prompt_mask.sum(1).max()) if len(self) else 0)
        return replace(
            self,
            **{
                name: value[:, prompt_start:] if name.startswith("prompt") else value[:, :completion_width]
                for name, value in self._content()
                if isinstance(value, Tensor) and value.dim() == 2
            },
        )

    def to(self, device: torch.device) -> "Rollouts":
        """The same rows with every tensor on `device`; what is on the CPU now stays reachable by `on_host`."""
        moved = replace(
            self,
            **{name: value.to(device, non_blocking=True) for name, value in self._content() if torch.is_tensor(value)},
        )
        if self.completion_mask.device.type == "cpu" and device.type != "cpu":
            moved._host = self
        return moved

    def on_host(self) -> "Rollouts":
        """The same rows with their ids and masks on the CPU; no copy is made of rows that `to` moved."""
        if self.completion_mask.device.type == "cpu":
            return self
        return self._host or self.to(torch.device("cpu"))

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Prompt and completion of each row joined without a gap, padded on the right.

        With padding on the right only, a causal model needs neither an attention mask nor position ids: no real token
        sees padding. So a row gives the same numbers whatever the other rows are.

        Returns:
            (b, L) int64 token ids, 0 at padding, and (b,) int64 lengths of the prompts.
        """
        prompt_lengths = self.prompt_mask.sum(1)  # (b,)
        ids = torch.cat([self.prompt_ids, self.completion_ids], dim=1)
        shift = self.prompt_mask.shape[1] - prompt_lengths  # left padding of each row
        width = int(self.total_lengths.max()) if len(self) else 0
        columns = torch.arange(width, device=ids.device)[None, :] + shift[:, None]  # (b, L)
        sequence_ids = ids.gather(1, columns.clamp(max=ids.shape[1] - 1))
        real = torch.arange(width, device=ids.device)[None, :] < self.total_lengths[:, None]
        return torch.where(real, sequence_ids, 0), prompt_lengths

    def _content(self) -> list[tuple[str, object]]:
        """The fields that have a value, by name."""
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.init and getattr(self, f.name) is not None]


def filler(like: Rollouts) -> Rollouts:
    """One row without any effect, for a process that has no rows left while others still have some.

    It has the optional fields of `like`, which may be empty: a prompt of one token, one masked completion token, and 0
    in every other field.
    """
    fields_of_one_row = {
        name: torch.zeros(1, *((1,) * (value.dim() - 1)), dtype=value.dtype)
        for name, value in like._content()
        if torch.is_tensor(value) and name != "step_lengths"
    }
    return Rollouts(**(fields_of_one_row | {"prompt_mask": torch.ones(1, 1, dtype=torch.bool)}))


def _stacked(tensors: list[Tensor], *, left: bool) -> Tensor:
    """Concatenate the rows of tensors (B_i, C_i) or (B_i,), padded with 0 to the widest."""
    if tensors[0].dim() == 1:
        return torch.cat(tensors)
    width = max(tensor.shape[1] for tensor in tensors)
    missing = [width - tensor.shape[1] for tensor in tensors]
    sides = [(more, 0) if left else (0, more) for more in missing]
    return torch.cat([pad(tensor, side) for tensor, side in zip(tensors, sides, strict=True)])


def _pad(rows: list[list], dtype: torch.dtype, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as one (B, longest) tensor and its bool mask."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = max(int(lengths.max()), 1) if rows else 1
    mask = torch.arange(width)[None, :] < lengths[:, None]
    if left:
        mask = mask.flip(1)
    padded = torch.zeros(len(rows), width, dtype=dtype)
    padded[mask] = torch.tensor([item for row in rows for item in row], dtype=dtype)
    return padded, mask
