"""Whether a reward function gets text or chat messages, trl's conversational form.

With the setting "auto" a function says so itself. First by its annotation: `completions: list[list[dict]]` asks for
messages, `list[str]` for text. Without one, it gets text; if it fails on that as a function of messages does, it is
called again with messages, and gets these from then on. What works with text is never given anything else.
"""

import re
from typing import Any

from common.rewards.reward_model import as_messages
from common.rewards.signatures import parameters_of

AUTO, TEXT, CONVERSATIONAL = ("auto", "text", "conversational")
SHOWN = {TEXT: "text", CONVERSATIONAL: "chat messages"}
ANNOTATED = {TEXT: "list[str]", CONVERSATIONAL: "list[list[dict]]"}

# What Python says when text is used as a message: message["content"], message.get("content"), **message. Nothing that
# depends on the text itself, such as an index beyond its end: a function of text may fail so, and must be refused.
_TEXT_AS_MESSAGE = re.compile(
    r"string indices must be integers|'str' object has no attribute '(get|keys|items|values)'"
    r"|must be a mapping, not str"
)


def form_of(function: Any) -> str:
    """The form that a function's annotations name, else "auto"."""
    parameters = parameters_of(function) or {}
    for name in ("completions", "prompts"):
        annotation = parameters[name].annotation if name in parameters else ""
        written = annotation if isinstance(annotation, str) else repr(annotation)
        if re.search(r"\||\bUnion\b", written):  # both will do
            return AUTO
        if re.search(r"\b(dict|Dict|Mapping|Message\w*|ChatMessage\w*)\b", written):
            return CONVERSATIONAL
        if re.search(r"\bstr\b", written):
            return TEXT
    return AUTO


def expects_messages(error: str) -> bool:
    """Whether this is how a function of messages fails on text."""
    return _TEXT_AS_MESSAGE.search(error) is not None


def in_form(form: str, prompts: list[str], completions: list[str], raw_prompts: list) -> dict[str, list]:
    """Prompts and completions as text or as messages.

    Args:
        form: "text" or "conversational".
        prompts: B strings, as the policy continued them.
        completions: B strings.
        raw_prompts: B prompts as the data set has them, text or chat messages.
    """
    if form != CONVERSATIONAL:
        return {"prompts": prompts, "completions": completions}
    return {
        "prompts": [as_messages(prompt) for prompt in raw_prompts],
        "completions": [[{"role": "assistant", "content": text}] for text in completions],
    }
