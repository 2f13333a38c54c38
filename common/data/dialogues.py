"""Dialogues as hh-rlhf writes them: text of turns that begin with a speaker's name, and the same as chat messages."""

import re

# A turn begins a paragraph. A name and a colon anywhere else are words of the turn: the assistant of the records
# often goes on as "Human: ..." within its own answer.
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}


def turns(text: str) -> list[dict[str, str]]:
    """A dialogue as chat messages; the user is first, roles alternate, and none is empty.

    Turns of one role in a row become one, with a blank line between them. What comes before the first turn of the
    human is left out, since chat templates let only the user begin.

    Args:
        text: turns that begin with ``Human:`` or ``Assistant:`` after a blank line, or at the beginning of the text.

    Returns:
        Messages; none if the human says nothing.
    """
    _, *parts = _TURN.split(text)
    messages: list[dict[str, str]] = []
    for speaker, content in zip(parts[::2], map(str.strip, parts[1::2]), strict=True):
        role = _ROLES[speaker]
        if messages and content and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{content}"
        elif content and (messages or role == "user"):
            messages.append({"role": role, "content": content})
    return messages


def conversation(text: str) -> list[dict[str, str]]:
    """The dialogue up to and including the human's last turn, as `turns` gives it; empty without such a turn."""
    messages = turns(text)
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def dialogue(messages: list[dict[str, str]]) -> str:
    r"""Messages as the data set writes them, up to where the assistant answers.

    Example: ``\n\nHuman: Hi\n\nAssistant:``
    """
    return "".join(f"\n\n{_SPEAKERS[m['role']]}: {m['content']}" for m in messages) + "\n\nAssistant:"
