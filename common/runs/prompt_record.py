"""What the prompts of a run were when it began: the date that chat templates saw, and digests of what they wrote.

Some templates write today's date. A run that is continued tomorrow keeps the date of its start, and one whose prompts
are others for any reason is refused: it would not be the same run.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import hashlib
import json
from collections.abc import Iterable, Sized
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from common.data.prompts import PromptSet, PromptStyle
from common.runs.checkpoints import write_file
from common.runs.disk import reached
from common.runs.folder import CONFIG_FILE, PROMPTS_FILE, has_begun

if TYPE_CHECKING:
    from datasets import Dataset

# Token ids are compared in about this many rows: they follow from the text, and only another tokenizer changes them.
_ROWS_OF_TOKENS = 4096

VERSION = 3  # of a record; the digests of text and columns of an older one were made in another way

Record = dict[str, Any]


def start_time(folder: Path, resume: str, process: Accelerator | PartialState) -> datetime:
    """When the run in a folder began, for all processes the same; now, if it is new or does not say.

    Args:
        folder: the run's folder, which need not exist.
        resume: the setting; "never": the run is new.
        process: the main one reads folder and clock.

    Raises:
        ValueError: if the record of the run cannot be read.
    """
    found = [None]
    if process.is_main_process:
        is_continued = resume != "never" and reached(folder, lambda: has_begun(folder))
        record = reached(folder, lambda: _read(folder)) if is_continued else None
        found = [record["now"] if record else datetime.now().isoformat(timespec="seconds")]
    return datetime.fromisoformat(broadcast_object_list(found)[0])


def time_of_run(model: str | Path) -> datetime | None:
    """When the run began that a folder belongs to, such as its checkpoint-20/policy; None if it is none of a run."""
    folder = Path(model).absolute()
    for parent in [folder, *folder.parents][:4]:
        if (parent / CONFIG_FILE).is_file() and (record := _read(parent)):
            return datetime.fromisoformat(record["now"])
    return None


def describe_prompts(
    training: PromptSet,
    held_out: PromptSet | None,
    *,
    tokenizer: transformers.PreTrainedTokenizerBase,
    style: PromptStyle,
    now: datetime,
) -> Record:
    """The record of a run's prompts.

    Args:
        training: the prompts to train on.
        held_out: those of the evaluations.
        tokenizer: which has written them.
        style: what was added to them.
        now: the time that chat templates saw.
    """
    parts = {"training": _digests(training), "held-out": held_out and _digests(held_out)}
    return _origins(tokenizer, style, now) | parts


def describe_examples(
    training: Dataset, held_out: Dataset, *, tokenizer: transformers.PreTrainedTokenizerBase, style: PromptStyle
) -> Record:
    """The record of a supervised run: its examples are token ids.

    Args:
        training: the examples to train on, with a column input_ids.
        held_out: the held-out examples.
        tokenizer: which has written them.
        style: what was added to their prompts, and the time that chat templates saw.
    """
    parts = {"training": training, "held-out": held_out}
    described = {
        name: {"number": len(rows), "token ids": _digest(rows[_few(rows)]["input_ids"])}
        for name, rows in parts.items()
    }
    return _origins(tokenizer, style, style.now) | described


def check_record(folder: Path, record: Record, *, is_new: bool) -> None:
    """Write the record of a new run; compare that of a run which is continued. Only the main process calls this.

    A run from before there were records gets one. In a record of an older version, number and token ids are compared;
    the rest is then recorded in the present form.

    Args:
        folder: the run's folder.
        record: of the prompts as they are now.
        is_new: the run begins, so that any record there is a failed start's.

    Raises:
        ValueError: says what differs.
    """
    stored = None if is_new else _read(folder)
    changed = [] if stored is None else _changed(stored, record)
    if changed:
        what, cause = " and ".join(text for _, text in changed), _cause(stored, record, {name for name, _ in changed})
        raise ValueError(
            f"output_dir={folder}: the run there was started with other prompts: {what} differ, {cause}. A resumed "
            "run continues exactly as the interrupted one would have. Bring back what has changed, or pass another "
            "--output_dir for a new run. To continue with the new prompts all the same, delete "
            f"{folder / PROMPTS_FILE}."
        )
    if stored is None or stored.get("version") != VERSION:
        write_file(folder / PROMPTS_FILE, (json.dumps(record, indent=2) + "\n").encode())


def _changed(stored: Record, record: Record) -> list[tuple[str, str]]:
    """What differs first in each part, and its description."""
    compared = ["number", "text", "token ids", "columns", "weights"]
    if stored.get("version") != VERSION:
        compared = ["number", "token ids", "weights"]
    changed = []
    for part in ("training", "held-out"):
        old, new = (side[part] or {} for side in (stored, record))
        names = [name for name in compared if old.get(name) != new.get(name)]
        changed += [(name, f"the {name} of the {part} prompts") for name in names[:1]]
    return changed


def check_processes_agree(record: Record, accelerator: Accelerator) -> None:
    """Refuse prompts that differ between processes, such as those of another version of the data on one machine.

    Raises:
        ValueError: on all processes.
    """
    if accelerator.num_processes == 1:
        return
    everyone = gather_object([record])
    if any(other != everyone[0] for other in everyone):
        different = [str(process) for process, other in enumerate(everyone) if other != everyone[0]]
        raise ValueError(
            f"the prompts of process {', '.join(different)} are not those of process 0: all processes train on the "
            "same prompts. Give every machine the same data, tokenizer and packages; a chat template must not write "
            "anything random."
        )


def _cause(stored: Record, record: Record, names: set[str]) -> str:
    """Why the prompts differ, as far as digests tell."""
    if names <= {"token ids"}:
        return "because the tokenizer has changed, or special tokens that chat messages spell were not yet text"
    if names <= {"columns"}:
        return "because the data have changed"
    if names <= {"weights"}:
        return "because the file of prompt_weights has changed"
    for name, what in (("chat_template", "the model's chat template"), ("prompt_file", "the text of prompt_file")):
        if stored[name] != record[name]:
            return f"because {what} has changed"
    return "because the data have changed, or the versions of packages that read and write them"


def _read(folder: Path) -> Record | None:
    path = folder / PROMPTS_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        datetime.fromisoformat(record["now"])
        parts = [record[name] for name in ("chat_template", "prompt_file", "training", "held-out")]
        readable = isinstance(parts[2], dict)
    except (ValueError, KeyError, TypeError):
        readable = False
    if not readable:
        raise ValueError(
            f"{path}: not readable as the record of a run's prompts. Restore the file; or delete it, and the run "
            "continues without comparing its prompts, with today's date where a chat template writes one."
        )
    return record


def _origins(tokenizer: transformers.PreTrainedTokenizerBase, style: PromptStyle, now: datetime) -> Record:
    return {
        "version": VERSION,
        "now": now.isoformat(timespec="seconds"),
        "chat_template": _digest([tokenizer.chat_template]),
        "prompt_file": _digest([style.template]),
    }


def _digests(prompts: PromptSet) -> dict[str, int | str]:
    """What is compared; the digests of rows were made with their token ids, and are kept with these."""
    encoded, weights = prompts.encoded, prompts.weights
    return {
        "number": len(prompts),
        "text": hashlib.sha256(encoded.text_digests.tobytes()).hexdigest()[:16],
        "token ids": _digest(prompts.ids[_few(prompts)]),
        "columns": hashlib.sha256(encoded.value_digests.tobytes()).hexdigest()[:16],
        **({} if weights is None else {"weights": hashlib.sha256(weights.values.tobytes()).hexdigest()[:16]}),
    }


def _few(rows: Sized) -> slice:
    return slice(None, None, len(rows) // _ROWS_OF_TOKENS + 1)


def _digest(parts: Iterable) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()[:16]
