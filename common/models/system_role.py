"""Chat templates without a system role: the system's text joins the first user message, as in Gemma's own template.

Some templates refuse a system message, others leave out what it says. Both are found with a probe, once per template.
"""

from collections.abc import Iterable

import transformers

_takes_system: dict[str, bool] = {}  # by template


def fit_system(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: list[dict], template: str | None = None
) -> list[dict]:
    """The messages in the roles that a template writes.

    Args:
        tokenizer: with a chat template.
        messages: of one conversation; not changed.
        template: another template than the tokenizer's.

    Returns:
        The same messages; without a system role, the texts of the system messages at the start stand in the first user
        message, before its own text and a blank line. Where no user message follows them, nothing can be joined.
    """
    first = next((i for i, message in enumerate(messages) if message.get("role") != "system"), None)
    if not first or messages[first]["role"] != "user" or takes_system(tokenizer, template):
        return messages
    system = "".join(f"{text.strip()}\n\n" for message in messages[:first] for text in texts(message))
    content = messages[first].get("content")
    joined = system + content if isinstance(content, str) else [{"type": "text", "text": system}, *(content or [])]
    return [{**messages[first], "content": joined}, *messages[first + 1 :]]


def takes_system(tokenizer: transformers.PreTrainedTokenizerBase, template: str | None = None) -> bool:
    """Whether a chat template writes what a system message says; also True if it cannot even write a user's."""
    key = str(template or tokenizer.chat_template)
    if key not in _takes_system:
        _takes_system[key] = _writes_system(tokenizer, template)
    return _takes_system[key]


def _writes_system(tokenizer: transformers.PreTrainedTokenizerBase, template: str | None) -> bool:
    for as_content in (str, lambda text: [{"type": "text", "text": text}]):
        system, user = ({"role": role, "content": as_content(f"{role}probe")} for role in ("system", "user"))
        if "userprobe" in _written(tokenizer, [user], template):
            return "systemprobe" in _written(tokenizer, [system, user], template)
    return True


def texts(message: dict) -> list[str]:
    """What a message says: its content, or the texts in it."""
    content = message.get("content")
    if isinstance(content, str):
        return [content] if content.strip() else []
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]


def describe_system(tokenizer: transformers.PreTrainedTokenizerBase, prompts: Iterable[str | list[dict]]) -> list[str]:
    """What a run says once: a line if system messages of its prompts are joined to the user's.

    Args:
        tokenizer: the policy's.
        prompts: some of the run's, text or messages.
    """
    if any(isinstance(prompt, list) and fit_system(tokenizer, prompt) is not prompt for prompt in prompts):
        return ["the model's chat template has no system role: the system text begins the first user message"]
    return []


def _written(tokenizer: transformers.PreTrainedTokenizerBase, messages: list[dict], template: str | None) -> str:
    options = {} if template is None else {"chat_template": template}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options).lower()
    except Exception:  # the template is a program, and may raise anything
        return ""
