"""The file of `--write_pass_rates`: how often a model solved each prompt, and the weight that follows from it.

It is made from the result of the evaluation, so the same command writes it again, and nothing is sampled for that.
"""

import json
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from common.data.prompt_weights import naming, prompt_digest, weight_of
from common.data.prompts import PromptSet
from common.evaluation.results import OUTPUTS_FILE, SCORE_FILE
from common.runs.checkpoints import write_file
from common.runs.log import json_line
from common.runs.writable import check_folder, make_folder

logger = logging.getLogger("nanorlhf")


class PassRates:
    """Pass rates in a file.

    Args:
        file: where they are written.
        accuracy: the reward that gives 1 for a right answer; None if there is none.
        rewards: names of those that the evaluation has.

    Raises:
        ValueError: no reward says what is right, or nothing can be written there.
    """

    def __init__(self, file: str, accuracy: str | None, rewards: Collection[str]) -> None:
        if accuracy not in rewards:
            raise ValueError(
                f"write_pass_rates={file}: a prompt is solved where the reward for right answers gives 1, and none of "
                f"{', '.join(rewards)} is known to be that one. Pass --accuracy with its name; with rewards of other "
                "values, such as those of a reward model, there is no pass rate."
            )
        check_folder(Path(file).parent, setting="write_pass_rates")
        self._file = Path(file)

    def check(self, folder: Path, prompts: PromptSet) -> None:
        """Refuse to replace a file that the result in a folder does not make.

        Args:
            folder: of the result, if there is one.
            prompts: of the evaluation.

        Raises:
            ValueError: there is such a file.
        """
        if not self._file.exists():
            return
        is_of_result = self._file.is_file() and (folder / SCORE_FILE).is_file()
        if not is_of_result or self._file.read_bytes() != self._content(folder, prompts):
            raise ValueError(
                f"write_pass_rates={self._file}: the file is there and is not the one that this command makes; a run "
                "may train with it. Pass another name, or delete the file."
            )

    def write(self, folder: Path, prompts: PromptSet) -> None:
        """Write the file of a result, and make its folder.

        Args:
            folder: of the result.
            prompts: of the evaluation.
        """
        make_folder(self._file.parent, setting="write_pass_rates")
        write_file(self._file, self._content(folder, prompts))
        logger.info("pass rates: %s", self._file)

    def _content(self, folder: Path, prompts: PromptSet) -> bytes:
        return b"".join(map(json_line, _rows(folder, prompts)))


def _rows(folder: Path, prompts: PromptSet) -> Iterator[dict[str, Any]]:
    """A row per prompt; one that the data have several times counts as one."""
    found: dict[int, dict[str, Any]] = {}
    with open(folder / OUTPUTS_FILE, encoding="utf-8") as file:
        for line, row in zip(file, prompts.rows, strict=True):
            correct = [completion["correct"] for completion in json.loads(line)["completions"]]
            entry = found.setdefault(prompt_digest(row), {**naming(row), "right": 0, "samples": 0})
            entry["right"] += sum(correct)
            entry["samples"] += len(correct)
    for entry in found.values():
        right = entry.pop("right")
        rates = {"pass_rate": right / entry["samples"], "samples": entry["samples"]}
        yield entry | rates | {"weight": round(weight_of(right, entry["samples"]), 6)}
