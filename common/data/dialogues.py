"""Dialogues in the form of hh-rlhf, text whose turns begin with the speaker's name, to and from chat messages."""

import re

# A turn begins a paragraph. A name and a colon elsewhere are part of the turn: in this data the assistant often
# continues with "Human: ..." inside its own answer.
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}


def turns(text: str) -> list[dict[str, str]]:
    """A dialogue as chat messages; the user is first, roles alternate, and none is empty.

    Consecutive turns of one role are joined by a blank line. Everything before the human's first turn is dropped,
    since chat templates let only the user begin.

    Args:
        text: turns that begin with ``Human:`` or ``Assistant:`` after a blank line, or at the beginning of the text.

    Returns:
        Messages; an empty list if the human says nothing.
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
    r"""Messages as text in the form of the data set, up to where the assistant answers.

    Example: ``\n\nHuman: Hi\n\nAssistant:``
    """
    return "".join(f"\n\n{_SPEAKERS[m['role']]}: {m['content']}" for m in messages) + "\n\nAssistant:"
