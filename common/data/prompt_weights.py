"""How often each prompt comes: the file of the setting `prompt_weights`, and the weight that a pass rate gives.

A row of the file names a prompt as the data set has it, so that it holds for any tokenizer and chat template.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import READABLE, is_data_file
from common.data.rows import read_rows


def weight_of(num_right: int, num_samples: int) -> float:
    """The weight of a prompt that a policy solved in some of its samples.

    Learnability p (1 - p), the variance of a right answer (Foster et al., huggingface.co/papers/2502.12272): it is
    largest at 1/2, and scores that are all equal teach nothing. p is (right + 1/2) / (samples + 1), so that
    prompts never or always solved still come now and then.

    Args:
        num_right: from 0 to num_samples.
        num_samples: at least 1.
    """
    rate = (num_right + 0.5) / (num_samples + 1)
    return rate * (1 - rate)


def naming(row: dict) -> dict[str, Any]:
    """The part of a row that names its prompt: `prompt`, or `prompt_ids` if there is nothing else."""
    return {"prompt_ids": row["prompt_ids"]} if row.get("prompt") is None else {"prompt": row["prompt"]}


def prompt_digest(row: dict) -> int:
    """64 bits that are equal for rows with the same prompt."""
    ((name, prompt),) = naming(row).items()
    text = prompt if isinstance(prompt, str) else json.dumps(_plain(prompt), sort_keys=True, default=str)
    content = f"{name} {type(prompt).__name__} {text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _plain(value: Any) -> Any:
    """Chat messages without keys that hold nothing, which some formats of files add."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of N prompts.

    Attributes:
        values: (N,) float64, finite, 0 or more, not all 0.
        said: what somebody who reads the run's output should know, a line.
    """

    values: np.ndarray
    said: str


class WeightsFile:
    """The weights in a file, by prompt.

    Args:
        file: .jsonl or another kind of data; its rows have `prompt` (or `prompt_ids`) and `weight`, and anything else.

    Raises:
        ValueError: there is no such file, a row has no prompt or no weight that is a number from 0 on, one prompt has
            two weights, or all are 0; with the number of the row.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        rows = _read(file)
        self._first = naming(self._checked(rows[0], 1))
        digests, weights = array("Q"), array("d")
        for number, row in enumerate(rows, start=1):
            digests.append(prompt_digest(self._checked(row, number)))
            weights.append(self._weight(row, number))
        digests, weights = np.asarray(digests), np.asarray(weights)
        if not weights.any():
            raise ValueError(
                f"prompt_weights={file}: all {len(weights)} weights are 0, so that no prompt would ever come. Give "
                "those that should come a weight above 0."
            )
        order = np.argsort(digests, kind="stable")
        self._digests, self._weights = digests[order], weights[order]
        same = self._digests[1:] == self._digests[:-1]
        if (differ := np.flatnonzero(same & (self._weights[1:] != self._weights[:-1]))).size:
            one, other = order[differ[0]], order[differ[0] + 1]
            raise ValueError(
                f"prompt_weights={file}: rows {one + 1} and {other + 1} give one prompt the weights {weights[one]:g} "
                f"and {weights[other]:g}; a prompt has one weight. Remove one of the rows."
            )

    def of(self, rows: Sequence[dict], kept: np.ndarray) -> Weights:
        """The weights of a run's prompts; one without an entry gets the mean weight of the others.

        Args:
            rows: of the data set, each with `prompt` or `prompt_ids`.
            kept: (N,) int64, which of them are the prompts.

        Raises:
            ValueError: no prompt has an entry, or all that have one have weight 0.
        """
        asked = np.fromiter(map(prompt_digest, rows), np.uint64, len(rows))[kept]
        places = np.minimum(np.searchsorted(self._digests, asked), len(self._digests) - 1)
        known = self._digests[places] == asked
        if not known.any():
            shown = naming(rows[int(kept[0])])
            raise ValueError(
                f"prompt_weights={self._file}: none of its {len(self._digests)} rows is of one of the run's "
                f"{len(kept)} prompts; its first row has {_shown(self._first)}, the first prompt is {_shown(shown)}. "
                "A row names a prompt as the data set or the task gives it, before prompt_file and chat template. "
                "Pass a file that was made for this task and data."
            )
        values = self._weights[places]
        if not values[known].any():
            raise ValueError(
                f"prompt_weights={self._file}: all {known.sum()} of the run's prompts that it names have weight 0, so "
                "that none would ever come. Pass a file that was made for this task and data."
            )
        values[~known] = math.fsum(values[known] / known.sum())
        return Weights(values=values, said=self._describe(values, known))

    def _describe(self, values: np.ndarray, known: np.ndarray) -> str:
        count = len(values)
        often = values / values.max() * (count / math.fsum(values / values.max()))  # places of each in an epoch
        least, most = often[often > 0].min(), often.max()
        parts = [
            f"prompt_weights={self._file}: in an epoch of {count} places a prompt comes {least:.2g} to {most:.2g} "
            "times on average"
        ]
        if never := int((often == 0).sum()):
            parts.append(f"{never} of {count} never come")
        if missing := int((~known).sum()):
            parts.append(f"{missing} of {count} have no row in the file and get the mean weight of the others")
        return "; ".join(parts)

    def _checked(self, row: dict, number: int) -> dict:
        if not all(isinstance(value, str | list) and value for value in naming({"prompt_ids": None} | row).values()):
            raise ValueError(
                f"prompt_weights={self._file}: row {number} names no prompt; need `prompt`, text or chat messages as "
                "the data set or the task gives it, or `prompt_ids`. Correct or remove the row."
            )
        return row

    def _weight(self, row: dict, number: int) -> float:
        if "weight" not in row:
            raise ValueError(
                f"prompt_weights={self._file}: row {number} has no `weight`, only {', '.join(row)}; it says how often "
                "the prompt comes in relation to the others. Give the row one, or correct the name."
            )
        weight, value = row["weight"], math.nan
        if isinstance(weight, int | float | str) and not isinstance(weight, bool):  # the cells of a CSV file are text
            with suppress(ValueError, OverflowError):
                value = float(weight)
        if not 0 <= value < math.inf:
            raise ValueError(
                f"prompt_weights={self._file}: row {number} has weight={weight!r:.80}; need a finite number, 0 "
                "or more, which says how often the prompt comes in relation to the others. Correct or remove the row."
            )
        return value


def _read(file: str) -> Sequence[dict]:
    if not Path(file).is_file() or not is_data_file(file):
        what = "a file of another kind" if Path(file).is_file() else "there is no such file"
        raise ValueError(
            f"prompt_weights={file}: {what}. Pass --prompt_weights with a file ({READABLE}) whose rows have `prompt` "
            "and `weight`, as python -m common.evaluation --write_pass_rates makes it."
        )
    try:
        return read_rows(file, "train", None)
    except ValueError as error:  # it speaks of the setting that other files are read for
        raise ValueError(
            str(error).replace("dataset=", "prompt_weights=").replace("--dataset", "--prompt_weights")
        ) from error


def _shown(named: dict[str, Any]) -> str:
    ((name, value),) = named.items()
    return f"{name}={value!r:.60}"
