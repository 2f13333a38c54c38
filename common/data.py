"""Prompts: from rows to token ids, and which prompts belong to which step.

The batch of a step is a pure function of (seed, step), so a resumed run needs no data cursor.
"""

from transformers import PreTrainedTokenizerBase

from common.batching import seeded_permutation
from common.rollouts import PromptBatch


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> str:
    """The text the policy continues.

    Args:
        tokenizer: the policy's.
        prompt: text, taken as it is; or chat messages, put through the chat template. A last message of the
            assistant is a prefilled start of the answer that the policy goes on from.

    Returns:
        The text; with a chat template it holds every special token, the first one included.

    Raises:
        ValueError: for messages with a tokenizer that has no chat template.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{len(prompt)} chat messages for a tokenizer without a chat template: it says how messages become text. "
            "Pass --model with an instruction-tuned model, or prompts that are plain text."
        )
    prefilled = prompt[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not prefilled, continue_final_message=prefilled
    )


class PromptSet:
    """Prompts as token ids, in a random order that is a function of (seed, epoch).

    Args:
        rows: {"prompt": text or chat messages, **columns}, all with the same columns.
        tokenizer: the policy's.
        max_prompt_length: longer prompts are dropped, in tokens.
        seed: the run's seed.

    Attributes:
        num_dropped: prompts that were too long.

    Raises:
        ValueError: if a row has no prompt or an empty one, or none is short enough.
    """

    def __init__(
        self, rows: list[dict], tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int, seed: int
    ) -> None:
        self.seed = seed
        texts, ids = _encode(rows, tokenizer)
        if not all(ids):
            raise ValueError(
                f"row {ids.index([])} has a prompt without tokens: there is nothing to continue. Remove the row, or "
                "give its prompt some text."
            )
        kept = [i for i in range(len(rows)) if len(ids[i]) <= max_prompt_length]
        self.num_dropped = len(rows) - len(kept)
        if not kept:
            shortest = f", the shortest has {min(map(len, ids))} tokens" if ids else ""
            raise ValueError(
                f"max_prompt_length={max_prompt_length}: no prompt of {len(rows)} is short enough{shortest}. Pass "
                "a larger --max_prompt_length, or other data."
            )
        self.texts = [texts[i] for i in kept]
        self.raw = [rows[i]["prompt"] for i in kept]
        self.ids = [ids[i] for i in kept]
        names = [name for name in rows[0] if name != "prompt"]
        if taken := {"prompts", "completions"}.intersection(names):
            raise ValueError(
                f"columns {', '.join(sorted(taken))}: a reward function gets every column by its name, and these "
                "names are those of its own arguments. Rename the columns."
            )
        self.columns = {name: [rows[i][name] for i in kept] for name in names}

    def __len__(self) -> int:
        """Number of prompts that are short enough."""
        return len(self.ids)

    def batch(self, step: int, *, num_prompts: int, process: int = 0, num_processes: int = 1) -> PromptBatch:
        """The prompts of a step that this process samples from.

        Every prompt comes once before any comes again, each time in another order.

        Args:
            step: from 1.
            num_prompts: prompts of the step over all processes; a multiple of num_processes.
            process: number of this process.
            num_processes: how many there are; each takes a contiguous part.

        Returns:
            num_prompts / num_processes prompts.
        """
        share = num_prompts // num_processes
        rows = list(range(process * share, (process + 1) * share))
        first = (step - 1) * num_prompts
        orders: dict[int, list[int]] = {}
        chosen = []
        for row in rows:
            epoch, place = divmod(first + row, len(self))
            if epoch not in orders:
                orders[epoch] = seeded_permutation(len(self), self.seed, epoch, "prompts").tolist()
            chosen.append(orders[epoch][place])
        return self._select(step, rows, chosen)

    def share(self, *, process: int = 0, num_processes: int = 1) -> PromptBatch:
        """This process's part of all prompts in their own order, for evaluation (step 0)."""
        chosen = list(range(process, len(self), num_processes))
        return self._select(0, chosen, chosen)

    def _select(self, step: int, rows: list[int], chosen: list[int]) -> PromptBatch:
        return PromptBatch(
            step=step,
            rows=rows,
            prompt_ids=[self.ids[i] for i in chosen],
            prompts=[self.texts[i] for i in chosen],
            columns={name: [values[i] for i in chosen] for name, values in self.columns.items()},
            raw_prompts=[self.raw[i] for i in chosen],
        )


def _encode(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[list[int]]]:
    """Texts and token ids of all rows; the tokenizer works on all of them at once, on several cores."""
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(f"row {number} has the columns {', '.join(row)}: need a column `prompt`. Rename one.")
    texts = [render_prompt(tokenizer, row["prompt"]) for row in rows]
    # A chat template writes the first special token itself; plain text gets it from the tokenizer.
    ids: list[list[int]] = [[] for _ in rows]
    for chat in (False, True):
        numbers = [i for i, row in enumerate(rows) if isinstance(row["prompt"], list) is chat]
        if numbers:
            encoded = tokenizer([texts[i] for i in numbers], add_special_tokens=not chat)["input_ids"]
            for i, sequence in zip(numbers, encoded, strict=True):
                ids[i] = sequence
    return texts, ids
