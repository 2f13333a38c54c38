"""Where the chunks of a completion begin, and the advantage of each."""

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from common.rollouts import Rollouts


def chunk_starts(
    rollouts: Rollouts, tokenizer: transformers.PreTrainedTokenizerBase, *, chunk_length: int, separator: str | None
) -> Tensor:
    """Split every completion into chunks.

    A chunk ends with its chunk_length-th token; with a separator, it ends with the first token from there on that
    completes the separator. Where it ends does not depend on later tokens.

    Args:
        rollouts: B rows.
        tokenizer: gives the text of each token.
        chunk_length: minimum tokens of a chunk except the last, at least 1; exact without a separator.
        separator: text, not empty; None: chunks of equal length.

    Returns:
        (B, C) bool: the first token of each chunk, including the completion's first one.
    """
    if separator is None:
        columns = torch.arange(rollouts.completion_mask.shape[1])
        return (columns % chunk_length == 0) & (rollouts.completion_mask | (columns == 0))
    starts = torch.zeros_like(rollouts.completion_mask)
    distinct = rollouts.completion_ids[rollouts.completion_mask].unique().tolist()
    # Exactly as written: a clean-up would take the space of " ." away, which the separator may begin with.
    exact = {"clean_up_tokenization_spaces": False}
    texts = dict(zip(distinct, tokenizer.batch_decode([[token] for token in distinct], **exact), strict=True))
    for row, length in enumerate(rollouts.lengths.tolist()):
        ids = rollouts.completion_ids[row, :length].tolist()
        ends = _completes(separator, [texts[token] for token in ids])
        row_starts = [0]
        for position in range(1, length):
            if position - row_starts[-1] >= chunk_length and ends[position - 1]:
                row_starts.append(position)
        starts[row, row_starts] = True
    return starts


def _completes(separator: str, pieces: list[str]) -> list[bool]:
    """For each piece of a text, whether it completes the separator, which may span several pieces."""
    tail, completed = "", []
    for piece in pieces:
        tail += piece
        completed.append(separator in tail)
        rest = tail.rpartition(separator)[2]
        tail = rest[max(len(rest) - len(separator) + 1, 0) :]
    return completed


def chunk_advantages(values: Tensor, starts: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Advantage of each chunk: the value at its end minus the value at its start, for all its tokens.

    The end of a chunk is the start of the next one, and the value at the end of the last one is the score: the
    advantages of huggingface.co/papers/2410.01679, section 4, if no reward comes before the end. The advantages of a
    completion's chunks add up to its score minus its first value.

    Args:
        values: (B, C) float; column t is the value of the state in which token t was chosen. Read where chunks start.
        starts: (B, C) bool, the first token of each chunk; True in column 0, False at padding.
        scores: (B,) float.
        mask: (B, C) bool.

    Returns:
        (B, C) float32, 0 at padding.
    """
    columns, width = torch.arange(mask.shape[1]), mask.shape[1]
    first = torch.where(starts, columns, 0).cummax(1).values  # (B, C): the column where the token's chunk begins
    later = torch.where(starts, columns, width).flip(1).cummin(1).values.flip(1)  # the first start from a column on
    following = pad(later[:, 1:], (0, 1), value=width)  # where the next chunk begins; the width: there is none
    at_end = torch.cat([values.float(), scores.float()[:, None]], dim=1)  # (B, C + 1)
    before, after = values.float().gather(1, first), at_end.gather(1, following)
    return torch.where(mask, after - before, 0.0)
