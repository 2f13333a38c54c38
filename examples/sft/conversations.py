"""Data for supervised fine-tuning: rows of four forms, as token ids with labels on the assistant's turns.

Prompts are those of the RL tasks, written and encoded by the same functions, so that RL continues where this ends. The
end of the assistant's turn is learned too. The trainer does the packing.
"""

import re
import sys
from dataclasses import replace
from datetime import datetime

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

from common.data.prompts import AS_IT_IS, PromptSet, PromptStyle
from common.data.rows import read_rows
from common.models.chat import check_keeps, clock, render_chat, turn_end_token
from common.models.spellings import Spellings, Written
from common.models.system_role import fit_system
from common.tasks import gsm8k, math

# The columns of each form; a data set is read in the first form whose columns it has.
FORMS = {
    "completion": ("prompt", "completion"),
    "gsm8k": ("question", "answer"),
    "math": ("problem", "solution"),
    "messages": ("messages",),
}
IGNORED = -100  # the label of a token without a loss

_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")


def read_examples(source: str, split: str, *, form: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict], int]:
    """Read every row as an example: {"prompt": text or chat messages, "completion": text} or {"messages": messages}.

    Args:
        source: hub id or local file.
        split: of a hub data set.
        form: a name in FORMS, or "auto".
        tokenizer: with a chat template, the tasks' prompts are chat messages.

    Returns:
        The examples, and how many rows were left out: solutions without the boxed answer that RL rewards.

    Raises:
        ValueError: the source cannot be read, or a row is not of the form.
    """
    rows = read_rows(source, split, None)
    form = find_form(rows[0], source) if form == "auto" else form
    for number, row in enumerate(rows, start=1):
        if missing := [column for column in FORMS[form] if row.get(column) in (None, "", [])]:
            raise ValueError(
                f"dataset={source}: row {number} has no {' and no '.join(missing)}; rows of the form {form!r} need "
                f"the columns {', '.join(FORMS[form])}. Correct or remove the row, or pass another --form."
            )
    is_chat = tokenizer.chat_template is not None
    if form == "gsm8k":
        if bare := [number for number, row in enumerate(rows, start=1) if "####" not in str(row["answer"])]:
            raise ValueError(
                f"dataset={source}: row {bare[0]} has an answer without ####: the reasoning comes before it, and "
                "the number after it. Correct or remove the row."
            )
        write_prompt = gsm8k.chat_prompt if is_chat else gsm8k.plain_prompt
        problems = gsm8k.read_problems(source, split, write_prompt)
        return [_gsm8k_example(row, problem) for row, problem in zip(rows, problems, strict=True)], 0
    if form == "math":
        boxed = math.boxed_reward([""] * len(rows), [row["solution"] for row in rows])
        kept = [row for row, is_boxed in zip(rows, boxed, strict=True) if is_boxed == 1.0]
        examples = [
            {"prompt": math.write_prompt(row["problem"], is_chat=is_chat), "completion": row["solution"].strip()}
            for row in kept
        ]
        return examples, len(rows) - len(kept)
    check = _check_messages if form == "messages" else _check_completion
    return [check(row, f"dataset={source}: row {number}") for number, row in enumerate(rows, start=1)], 0


def find_form(row: dict, source: str) -> str:
    """The form that has a row's columns.

    Raises:
        ValueError: no form has them.
    """
    for form, columns in FORMS.items():
        if set(columns) <= row.keys():
            return form
    known = "; ".join(f"{form} ({', '.join(columns)})" for form, columns in FORMS.items())
    raise ValueError(
        f"dataset={source}: the first row has the columns {', '.join(row)}; an example needs the columns of one of "
        f"the forms {known}. Rename the columns."
    )


def example_key(example: dict) -> str:
    """The key that examples of one question share: the prompt, or all messages before the first answer."""
    if "prompt" in example:
        return str(example["prompt"])
    roles = [message["role"] for message in example["messages"]]
    return str(example["messages"][: roles.index("assistant")])


def _gsm8k_example(row: dict, problem: dict) -> dict:
    """The reasoning without its calculator notes, and the number, in the layout that the task rewards."""
    reasoning = _CALCULATOR_NOTE.sub("", row["answer"].rpartition("####")[0]).strip()
    completion = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{problem['answer']}\n</answer>\n"
    return {"prompt": problem["prompt"], "completion": completion}


def _check_completion(row: dict, where: str) -> dict:
    completion = row["completion"]
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content")
    if not isinstance(completion, str):
        raise ValueError(
            f"{where} has completion={row['completion']!r:.80}; text is needed, or one message of the assistant in "
            "the conversational form of trl. Correct or remove the row."
        )
    return {"prompt": row["prompt"], "completion": completion}


def _check_messages(row: dict, where: str) -> dict:
    messages = row["messages"]
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )
    if not is_chat or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where} has messages={messages!r:.80}; a list of messages is needed, each with a role and a content "
            "that are text, and the last one the assistant's: it is what is learned. Correct or remove the row."
        )
    return {"messages": messages}


# Token ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends the assistant's turn: that of the chat template, or else the tokenizer's end token.

    A base model's end token often differs from its template's, and completions end only with the token learned here.

    Raises:
        ValueError: there is no such token.
    """
    found = turn_end_token(tokenizer)
    if found is not None:
        return found
    if tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has no end token, and no chat template that writes one after an answer: completions could "
            "never end. Set eos_token in tokenizer_config.json."
        )
    return tokenizer.eos_token


def encode(
    examples: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int, style: PromptStyle = AS_IT_IS
) -> Dataset:
    """Token ids of the examples, and labels that ignore all but the assistant's turns.

    Args:
        examples: of one form.
        tokenizer: the model's.
        max_length: longer examples are dropped: cut off, they would teach to stop anywhere.
        style: what RL will add to the prompts, and the time that chat templates see.

    Returns:
        Columns `input_ids` and `labels`; as long as `examples` minus what was too long.

    Raises:
        ValueError: no example is short enough, or the chat template does not say what the assistant's turns are.
    """
    if "prompt" in examples[0]:
        columns = _encode_completions(examples, tokenizer, style)
    elif replace(style, now=None) == AS_IT_IS:
        columns = _encode_messages(examples, tokenizer, style.now)
    else:
        raise ValueError(
            "prompt_file or enable_thinking with rows of the form messages: they change prompts of a single "
            "answer, but dialogues are learned as they are. Leave them out."
        )
    kept = [row for row, ids in enumerate(columns["input_ids"]) if len(ids) <= max_length]
    if not kept:
        raise ValueError(
            f"max_length={max_length}: no example of {len(examples)} is short enough, the shortest has "
            f"{min(map(len, columns['input_ids']))} tokens. Pass a larger --max_length, or other data."
        )
    return Dataset.from_dict({name: [rows[row] for row in kept] for name, rows in columns.items()})


def _encode_completions(
    examples: list[dict], tokenizer: PreTrainedTokenizerBase, style: PromptStyle
) -> dict[str, list]:
    """Prompts as RL encodes them; completions separately, since RL also continues after the prompt's last token."""
    prompts = PromptSet(examples, tokenizer, max_prompt_length=sys.maxsize, seed=0, style=style)
    end = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))
    completions = tokenizer(prompts.columns["completion"], add_special_tokens=False)["input_ids"]
    spellings = Spellings(tokenizer)
    for row, (example, text) in enumerate(zip(examples, prompts.columns["completion"], strict=True)):
        if isinstance(example["prompt"], list) and spellings.in_text(text):  # but the end of the turn may be spelled
            said = text.removesuffix(end_of_turn(tokenizer))
            completions[row] = spellings.encode(spellings.as_text(said))
    answers = [ids if ids[-1:] == [end] else [*ids, end] for ids in completions]
    rows = list(zip(prompts.ids, answers, strict=True))
    return {
        "input_ids": [prompt + answer for prompt, answer in rows],
        "labels": [[IGNORED] * len(prompt) + answer for prompt, answer in rows],
    }


def _encode_messages(
    examples: list[dict], tokenizer: PreTrainedTokenizerBase, now: datetime | None
) -> dict[str, list]:
    template = _training_template(tokenizer)
    shapes = {tuple(message["role"] for message in example["messages"]): example["messages"] for example in examples}
    for messages in shapes.values():
        check_keeps(lambda messages: render_chat(tokenizer, messages, now=now, chat_template=template), messages)
    options = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True, **clock(now)}
    conversations = [fit_system(tokenizer, example["messages"], template) for example in examples]
    encoded = [tokenizer.apply_chat_template(messages, **options) for messages in conversations]
    spellings = Spellings(tokenizer, template)
    for row, messages in enumerate(conversations):
        if spellings.may_occur(messages):
            written = spellings.written(
                messages, lambda messages: render_chat(tokenizer, messages, now=now, chat_template=template)
            )
            encoded[row] = _as_text(encoded[row], written, spellings)
    masks = [[bool(bit) for bit in row["assistant_masks"]] for row in encoded]
    labels = [
        [token if spoken else IGNORED for token, spoken in zip(row["input_ids"], mask, strict=True)]
        for row, mask in zip(encoded, masks, strict=True)
    ]
    return {"input_ids": [row["input_ids"] for row in encoded], "labels": labels}


def _as_text(row: dict[str, list[int]], written: Written, spellings: Spellings) -> dict[str, list[int]]:
    """A row in which special tokens that the messages spell are ordinary text; each keeps its bit of the mask.

    Raises:
        ValueError: the tokenizer does not read them as they are spelled.
    """
    replaced = spellings.replacements(written, row["input_ids"]) if written.spelled else {}
    if replaced is None:
        raise ValueError(
            f"messages that spell the special token {written.first}, which this tokenizer does not read as it is "
            f"spelled: {written.text!r:.80}. The text of a message must not become a turn. Remove the row."
        )
    counts = [len(replaced.get(position, [0])) for position in range(len(row["input_ids"]))]
    ids = [each for at, token in enumerate(row["input_ids"]) for each in replaced.get(at, [token])]
    mask = [bit for bit, count in zip(row["assistant_masks"], counts, strict=True) for _ in range(count)]
    return {"input_ids": ids, "assistant_masks": mask}


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template that marks the assistant's turns and their ends; trl's version if the tokenizer's does not."""
    advice = "Write {% generation %} and {% endgeneration %} around them, or pass rows with prompt and completion."
    if tokenizer.chat_template is None:
        raise ValueError(
            "column messages with a tokenizer without a chat template, which turns messages into text. Pass --model "
            "with a tokenizer that has one, or rows with prompt and completion as text."
        )
    try:
        template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:
        raise ValueError(
            "column messages with a chat template that does not mark the assistant's turns, and that trl does not "
            f"know: the loss must be on these turns alone. {advice}"
        ) from None
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        raise ValueError(
            "column messages with a chat template that leaves the end of a turn out of the assistant's part: the "
            f"model would not learn to stop. {advice}"
        )
    return template
