"""Turns rows into prompts of token ids, and chooses the prompts of each step.

The batch of a step is a pure function of (seed, step), so a resumed run needs no data cursor.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import transformers

from common.config import RLConfig
from common.data.encoded import Encoded
from common.data.encoding import encode
from common.data.order import PromptOrder
from common.data.prompt_weights import WeightsFile
from common.models.chat import check_keeps, render_chat, render_chats
from common.models.spellings import Spellings, Written
from common.rollouts import PromptBatch

PLACE = "{prompt}"  # the placeholder for the prompt in a template


@dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """What the run adds to the prompts of its data; reward models do not see it.

    Attributes:
        template: text with {prompt} in it, put around a prompt, or around the last user message of a chat.
        enable_thinking: passed to the chat template; None: its default.
        now: the time that a chat template sees which writes today's date; None: the clock.
    """

    template: str = PLACE
    enable_thinking: bool | None = None
    now: datetime | None = None

    @classmethod
    def of(cls, config: RLConfig, now: datetime | None = None) -> "PromptStyle":
        """The style that the settings prompt_file and enable_thinking describe.

        Raises:
            ValueError: if the file is missing or does not contain {prompt} exactly once.
        """
        if config.prompt_file is None:
            return cls(enable_thinking=config.enable_thinking, now=now)
        file = Path(config.prompt_file)
        if not file.is_file():
            raise ValueError(f"prompt_file={file}: there is no such file. Pass --prompt_file with a text file.")
        template = file.read_text(encoding="utf-8")
        if template.count(PLACE) != 1:
            raise ValueError(
                f"prompt_file={file}: it has {PLACE} {template.count(PLACE)} times; need it once, where each prompt "
                "of the data goes. Fix the file."
            )
        return cls(template=template, enable_thinking=config.enable_thinking, now=now)

    def around(self, prompt: str | list[dict]) -> str | list[dict]:
        """The prompt, text or chat messages, with the template around it.

        Raises:
            ValueError: the last user message has no text to put it around.
        """
        if isinstance(prompt, str):
            return self.template.replace(PLACE, prompt)
        last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
        if self.template == PLACE or last is None:
            return prompt
        content = self._around_content(prompt[last].get("content"))
        return [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1 :]]

    def _around_content(self, content: str | list[dict] | None) -> str | list[dict]:
        if isinstance(content, str):
            return self.template.replace(PLACE, content)
        parts = list(content or [])
        places = [place for place, part in enumerate(parts) if isinstance(part.get("text"), str)]
        if not places:
            raise ValueError(
                f"prompt_file with a user message whose content is {content!r:.80}: it has no text, so that nothing "
                "can be put around it. Leave prompt_file out, or give the message some text."
            )
        before, after = self.template.split(PLACE)
        parts[places[0]] = {**parts[places[0]], "text": before + parts[places[0]]["text"]}
        parts[places[-1]] = {**parts[places[-1]], "text": parts[places[-1]]["text"] + after}
        return parts

    def identity(self, tokenizer: transformers.PreTrainedTokenizerBase) -> list | None:
        """All that the text of a prompt depends on besides the prompt and the tokenizer; None: on the clock."""
        template = str(tokenizer.chat_template)
        if "strftime_now" not in template:
            return [self.template, self.enable_thinking]
        if self.now is None:
            return None
        formats = re.findall(r"""\bstrftime_now\s*\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""", template)
        asked = re.findall(r"\bstrftime_now\s+is\s+(?:not\s+)?defined\b", template)
        if len(formats) + len(asked) != template.count("strftime_now"):  # another use, or a format that is computed
            return [self.template, self.enable_thinking, self.now.isoformat()]
        return [self.template, self.enable_thinking, [self.now.strftime(one or other) for one, other in formats]]


AS_IT_IS = PromptStyle()


def render_prompt(
    tokenizer: transformers.PreTrainedTokenizerBase, prompt: str | list[dict], style: PromptStyle = AS_IT_IS
) -> str:
    """The text the policy continues.

    Args:
        tokenizer: the policy's.
        prompt: text, used as it is, or chat messages, rendered by the chat template. A last message by the assistant
            is a prefilled start of the answer, which the policy continues.
        style: what is added to the prompt.

    Returns:
        The text; with a chat template it contains all special tokens, including the first one.

    Raises:
        ValueError: for messages without a chat template, or that it refuses, and for enable_thinking if the template
            does not use it.
    """
    prompt = style.around(prompt)
    if isinstance(prompt, str):
        return prompt
    return render_chat(tokenizer, prompt, **_options(tokenizer, prompt, style))


def render_prompts(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
    style: PromptStyle,
    spellings: Spellings,
) -> list[Written]:
    """What the policy continues, as `render_prompt` gives each; the template writes many at a time.

    Args:
        tokenizer: the policy's.
        prompts: see render_prompt.
        style: what is added to them. Its own words may mean special tokens, as prompts that are text may.
        spellings: finds the special tokens that chat messages spell.

    Raises:
        ValueError: see render_prompt.
    """
    written = [Written(prompt) if isinstance(prompt, str) else None for prompt in map(style.around, prompts)]
    chats = [place for place, each in enumerate(written) if each is None]
    places: dict[bool, list[int]] = {}  # of ordinary chats, by whether they end with the beginning of an answer
    for place in chats:
        prompt = prompts[place]
        if spellings.may_occur(prompt):
            written[place] = spellings.written(prompt, partial(render_prompt, tokenizer, style=style))
        else:
            places.setdefault(prompt[-1]["role"] == "assistant", []).append(place)
    for chosen in places.values():
        texts = _written_together(tokenizer, [style.around(prompts[place]) for place in chosen], style)
        for place, text in zip(chosen, texts, strict=True):
            written[place] = Written(text)
    return written


def _written_together(
    tokenizer: transformers.PreTrainedTokenizerBase, chats: list[list[dict]], style: PromptStyle
) -> list[str]:
    options = _options(tokenizer, chats[0], style)
    try:
        return render_chats(tokenizer, chats, **options)
    except Exception:  # the template is a program, and may raise anything; one by one, the message says what
        return [render_chat(tokenizer, chat, **options) for chat in chats]


def _options(tokenizer: transformers.PreTrainedTokenizerBase, prompt: list[dict], style: PromptStyle) -> dict:
    """How the chat template is called for a prompt."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{len(prompt)} chat messages for a tokenizer without a chat template, which turns messages into text. "
            "Pass --model with an instruction-tuned model, or prompts that are plain text."
        )
    switches = {}
    if style.enable_thinking is not None:
        if "enable_thinking" not in str(tokenizer.chat_template):
            raise ValueError(
                f"enable_thinking={style.enable_thinking}: this model's chat template has no such switch, so it would "
                "have no effect. Leave the setting out, or pass --model with one that has it, such as Qwen/Qwen3-0.6B."
            )
        switches = {"enable_thinking": style.enable_thinking}
    prefilled = prompt[-1]["role"] == "assistant"
    ends = {"add_generation_prompt": not prefilled, "continue_final_message": prefilled}
    return {"now": style.now, **ends, **switches}


class PromptSet:
    """Prompts as token ids, in a random order that is a function of (seed, epoch).

    Args:
        rows: {"prompt": text or chat messages, **columns}, all with the same columns. A column `prompt_ids` has token
            ids, which are taken as they are; `prompt`, if it is there too, is then what rewards see.
        tokenizer: the policy's.
        max_prompt_length: in tokens; longer prompts are dropped.
        seed: the run's seed.
        style: what is added to each prompt.
        weights: how often each prompt comes in an epoch; None: once.
        progress: show a bar, or a line in a file, while a large set is encoded for the first time.

    Attributes:
        num_dropped: number of prompts that were too long.
        column_names: the other columns, which rewards get.
        weights: of the prompts that are short enough; None: all equal.

    Raises:
        ValueError: if a prompt is missing or empty, none is short enough, the chat template leaves out what a message
            says, a column's name is taken, or the weights are those of other prompts.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        tokenizer: transformers.PreTrainedTokenizerBase,
        *,
        max_prompt_length: int,
        seed: int,
        style: PromptStyle = AS_IT_IS,
        weights: WeightsFile | None = None,
        progress: bool = True,
    ) -> None:
        encoded = _encode(rows, tokenizer, style, progress)
        kept = np.flatnonzero(encoded.lengths <= max_prompt_length)
        self.num_dropped = len(rows) - len(kept)
        if not len(kept):
            shortest = f", the shortest has {encoded.lengths.min()} tokens" if len(rows) else ""
            raise ValueError(
                f"max_prompt_length={max_prompt_length}: no prompt of {len(rows)} is short enough{shortest}. Pass "
                "a larger --max_prompt_length, or other data."
            )
        self.column_names = [name for name in rows[0] if name not in ("prompt", "prompt_ids")]
        if taken := {"prompts", "completions"}.intersection(self.column_names):
            raise ValueError(
                f"columns {', '.join(sorted(taken))}: a reward function gets every column as an argument, and "
                "its other arguments have these names. Rename the columns."
            )
        self.encoded = encoded.select(kept)
        self._rows, self._kept = rows, kept
        self.weights = None if weights is None else weights.of(rows, kept)
        self._order = PromptOrder(len(kept), seed, self.weights and self.weights.values)

    @property
    def texts(self) -> Sequence[str]:
        """What the policy continues, of each prompt; read when asked for."""
        return self.encoded.texts

    @property
    def ids(self) -> Sequence[list[int]]:
        """The token ids of each prompt; read when asked for."""
        return self.encoded.ids

    @property
    def one_of_each_shape(self) -> list[str | list[dict]]:
        """The first prompt of each sequence of roles, and the first text, as the data set has them."""
        return self.select(0, [], self.encoded.one_of_each_shape).raw_prompts

    @property
    def raw(self) -> list[str | list[dict]]:
        """All prompts as the data set has them."""
        return self.select(0, [], range(len(self))).raw_prompts

    @property
    def rows(self) -> Iterator[dict]:
        """The rows of all prompts as the data set has them."""
        return (self._rows[int(index)] for index in self._kept)

    @property
    def columns(self) -> dict[str, list]:
        """All values of the data set's other columns."""
        return self.select(0, [], range(len(self))).columns

    @classmethod
    def of(
        cls,
        rows: Sequence[dict],
        tokenizer: transformers.PreTrainedTokenizerBase,
        config: RLConfig,
        now: datetime | None = None,
        weights: WeightsFile | None = None,
    ) -> "PromptSet":
        """The prompts of a run, by its max_prompt_length, seed, prompt_file and enable_thinking.

        Args:
            rows: see PromptSet.
            tokenizer: see PromptSet.
            config: the run's settings.
            now: the time that chat templates see; None: the clock.
            weights: see PromptSet.

        Raises:
            ValueError: see PromptSet and PromptStyle.
        """
        options = {"max_prompt_length": config.max_prompt_length, "seed": config.seed, "progress": config.progress}
        return cls(rows, tokenizer, **options, style=PromptStyle.of(config, now), weights=weights)

    def __len__(self) -> int:
        """Number of prompts that are short enough."""
        return len(self._kept)

    def batch(
        self, step: int, *, num_prompts: int, refill: int = 0, process: int = 0, num_processes: int = 1
    ) -> PromptBatch:
        """The prompts that this process samples at `step`.

        Without weights every prompt is used once before any is used again, each epoch in another order; refills have
        their own orders.

        Args:
            step: counted from 1.
            num_prompts: total of the step over all processes; a multiple of num_processes.
            refill: 0 for the step's own prompts; k gives the k-th additional batch, with its own seeds.
            process: index of this process.
            num_processes: number of processes; each takes a contiguous part.

        Returns:
            num_prompts / num_processes prompts.
        """
        count = num_prompts // num_processes
        rows = range(process * count, (process + 1) * count)
        chosen = self._chosen([(step - 1) * num_prompts + row for row in rows], refill=refill)
        return self.select(step, [refill * num_prompts + row for row in rows], chosen, refill=refill)

    def spare(self, step: int, *, num_prompts: int) -> Iterator[int]:
        """Prompts that may take the place of a step's own, in random order; those with more weight tend to come first.

        No one has weight 0, the tokens of another one, or those of one of the step's own.

        Args:
            step: counted from 1.
            num_prompts: total of the step over all processes.

        Yields:
            Index of each prompt among all prompts, the same ones on every process.
        """
        own = self._chosen(range((step - 1) * num_prompts, step * num_prompts))
        known = {tuple(self.ids[i]) for i in own}
        for index in self._order.drawn(step, "spare prompts"):
            ids = tuple(self.ids[index])
            if ids not in known:
                known.add(ids)
                yield index

    def _chosen(self, positions: Iterable[int], *, refill: int = 0) -> list[int]:
        """Indices of the prompts at positions of the endless sequence of epochs."""
        orders: dict[int, list[int]] = {}
        chosen = []
        for each in positions:
            epoch, position = divmod(each, len(self))
            if epoch not in orders:
                orders[epoch] = self.order(epoch, refill=refill)
            chosen.append(orders[epoch][position])
        return chosen

    def order(self, epoch: int, *, refill: int = 0) -> list[int]:
        """The order in which an epoch, from 0, uses the prompts; with weights some come several times, some not."""
        return self._order.of_epoch(epoch, f"prompts refill {refill}" if refill else "prompts")

    def share(self, *, process: int = 0, num_processes: int = 1) -> PromptBatch:
        """This process's part of all prompts, unshuffled, for evaluation (step 0)."""
        chosen = list(range(process, len(self), num_processes))
        return self.select(0, chosen, chosen)

    def select(self, step: int, rows: list[int], chosen: Sequence[int], *, refill: int = 0) -> PromptBatch:
        """Chosen prompts as a batch.

        Args:
            step: decides the noise of their completions, with the rows.
            rows: number of each prompt in the step; each at most once over all processes.
            chosen: index of each prompt among all prompts.
            refill: as in `batch`.
        """
        found = [self._rows[int(self._kept[i])] for i in chosen]
        prompts = [self.texts[i] for i in chosen]
        return PromptBatch(
            step=step,
            rows=rows,
            refill=refill,
            prompt_ids=[self.ids[i] for i in chosen],
            prompts=prompts,
            columns={name: [row[name] for row in found] for name in self.column_names},
            raw_prompts=[_raw(row, text) for row, text in zip(found, prompts, strict=True)],
        )


def _raw(row: dict, text: str) -> str | list[dict]:
    """The prompt as the data set has it; the text of its token ids if it has only these."""
    return text if row.get("prompt") is None else row["prompt"]


def _encode(
    rows: Sequence[dict], tokenizer: transformers.PreTrainedTokenizerBase, style: PromptStyle, progress: bool
) -> Encoded:
    render = partial(render_prompts, tokenizer, style=style, spellings=Spellings(tokenizer))

    def check(messages: list[dict]) -> None:
        check_keeps(lambda messages: render_prompt(tokenizer, messages, style), messages)

    encoded = encode(rows, tokenizer, render, check=check, identity=style.identity(tokenizer), progress=progress)
    if style.enable_thinking is not None and not encoded.has("chat"):
        raise ValueError(
            f"enable_thinking={style.enable_thinking} with prompts that are plain text: it is a switch of chat "
            "templates, so it would have no effect. Leave the setting out, or use chat messages."
        )
    if style.template != PLACE and encoded.has("ids"):
        raise ValueError(
            "prompt_file with a column prompt_ids: token ids are taken as they are, and no text can be put around "
            "them. Leave prompt_file out, or give a column `prompt`."
        )
    return encoded
