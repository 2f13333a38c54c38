"""Chat templates: messages become the text that a model continues.

A template is a program that came with the tokenizer. Here it sees a date that can be fixed, what it cannot write or
leaves out is refused, and the end of the assistant's turn is read from where this turn ends.
"""

import re
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

import transformers

from common.models.system_role import fit_system, texts
from common.models.template_limit import check_template

# A probe is long enough to notice a template that cuts texts off.
_PROBE_WORDS = 400
_QUESTION, _ANSWER, _NEXT = "questionprobe", "answerprobe", "nextprobe"


def render_chat(
    tokenizer: transformers.PreTrainedTokenizerBase,
    messages: list[dict],
    *,
    now: datetime | None = None,
    **options: Any,
) -> str:
    """The messages as text; where the template has no system role, the system's text begins the first user message.

    Args:
        tokenizer: with a chat template.
        messages: at least one.
        now: what a template that writes the date takes for it, by `strftime_now`; None: the clock.
        options: others of apply_chat_template, and variables of the template.

    Raises:
        ValueError: if the template refuses the messages or cannot be run.
    """
    try:
        return render_chats(tokenizer, [messages], now=now, **options)[0]
    except Exception as error:  # the template is a program, and may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if options.get("continue_final_message") and "final message" in reason:
            reason = "it changes or leaves out the beginning of the answer, which the policy has to continue"
        raise ValueError(
            f"the chat template does not write the messages {_shown(messages)}: {reason}. Use a model whose "
            "template takes such messages, or prompts with other roles, or as plain text."
        ) from error


def render_chats(
    tokenizer: transformers.PreTrainedTokenizerBase,
    conversations: list[list[dict]],
    *,
    now: datetime | None = None,
    **options: Any,
) -> list[str]:
    """Several conversations as text, as `render_chat` writes each, but faster.

    Raises:
        Exception: of any kind, if the template refuses one of them; `render_chat` then says what is wrong.
    """
    _check_template(tokenizer, conversations[0], clock(now) | options)
    fitting = [fit_system(tokenizer, messages, options.get("chat_template")) for messages in conversations]
    return tokenizer.apply_chat_template(fitting, tokenize=False, **clock(now), **options)


def _check_template(tokenizer: transformers.PreTrainedTokenizerBase, messages: list[dict], options: dict) -> None:
    """Refuse a template that takes far too much time or memory, before it runs in this process."""
    question = {"role": "user", "content": "a question"}
    tried = [messages, [question], [question, {"role": "assistant", "content": "an answer"}, question]]
    render = partial(tokenizer.apply_chat_template, tokenize=False, **options)
    check_template(options.get("chat_template") or tokenizer.chat_template, [partial(render, each) for each in tried])


def clock(now: datetime | None) -> dict[str, Any]:
    """The variables with which a template sees another time than the clock's; none for None."""
    return {} if now is None else {"strftime_now": now.strftime}


def check_keeps(render: Callable[[list[dict]], str], messages: list[dict]) -> None:
    """Refuse a template that leaves out what a message says, such as one that writes only the last turn.

    Each message is replaced by a probe, which must be in the text; spaces around it and upper case are no fault. Of
    the real messages only the user's are looked for, and half of their words: templates may edit texts a little.

    Args:
        render: from messages to text, with the template.
        messages: of one prompt; others with the same roles need no check of their own.

    Raises:
        ValueError: names the roles that are left out.
    """
    probes = [" ".join(f"m{number}w{word}" for word in range(_PROBE_WORDS)) for number in range(len(messages))]
    lost = _lost_probes(render, messages, probes)
    if not lost:
        text = render(messages).lower()
        said = [re.findall(r"[a-z0-9]+", " ".join(texts(m)).lower()) for m in messages if m["role"] == "user"]
        lost = ["user" for words in said if sum(word in text for word in words) < len(words) / 2]
    if not lost:
        return
    wants_parts = _keeps_parts(render, messages, probes)
    hint = " (it reads contents that are lists of parts, not text)" if wants_parts else ""
    raise ValueError(
        f"the chat template leaves out the text of {' and '.join(dict.fromkeys(lost))} messages{hint}, such as "
        f"{_shown(messages)}: the model would never read it. Use a model whose template writes every message, "
        "correct the template (chat_template.jinja or tokenizer_config.json), or use prompts without such messages."
    )


def why_no_chat(tokenizer: transformers.PreTrainedTokenizerBase) -> str | None:
    """Why a chat template does not write a question; None if it does.

    Args:
        tokenizer: with a chat template.
    """
    messages = [{"role": "user", "content": "a question"}]
    try:
        check_keeps(lambda each: render_chat(tokenizer, each, add_generation_prompt=True), messages)
    except ValueError as error:
        return str(error)
    return None


def _lost_probes(render: Callable[[list[dict]], str], messages: list[dict], probes: list[str]) -> list[str]:
    """The roles whose probe is not in the text; a begun answer stays as it is if its probe cannot be continued."""
    for last in (len(messages), len(messages) - 1):
        pairs = list(zip(messages, probes, strict=True))[:last]
        try:
            text = render([*(_with_text(*pair) for pair in pairs), *messages[last:]]).lower()
        except ValueError:  # it takes these messages, but not a probe in their place: a tool's answer may be JSON only
            continue
        return [message["role"] for message, probe in pairs if texts(message) and probe not in text]
    return []


def turn_end_token(tokenizer: transformers.PreTrainedTokenizerBase) -> str | None:
    """The token that the chat template writes after an answer; None without a template, or if it writes none.

    It is the first special token after the answer of a dialogue that ends there. A token that opens a turn is none,
    nor is one that follows text which the template writes only at the end.
    """
    if tokenizer.chat_template is None:
        return None
    for as_content in (str, lambda text: [{"type": "text", "text": text}]):
        turns = [
            {"role": role, "content": as_content(text)}
            for role, text in (("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT))
        ]
        whole = _split(_rendered(tokenizer, turns[:2]), _QUESTION, _ANSWER)
        if whole is not None:
            return _closing(tokenizer, turns, *whole)
    return None


def _closing(
    tokenizer: transformers.PreTrainedTokenizerBase, turns: list[dict], start: str, between: str, after: str
) -> str | None:
    """The token that closes the answer.

    Args:
        tokenizer: with the template.
        turns: question, answer and next question.
        start: what the template writes before the question, if the dialogue is question and answer.
        between: between the two.
        after: after the answer.
    """
    middle = _split(_rendered(tokenizer, turns), _QUESTION, _ANSWER, _NEXT)
    follows = middle[2] if middle else ""  # what stands between an answer and the next question
    opening = _opening(tokenizer, start, between)
    marks = _marks(tokenizer, after)
    if marks:
        (token, gap), others = marks[0], marks[1:]
        if gap.strip() and not follows.startswith(gap + token):
            return None
        # Where the template opens the next answer whether it is asked to or not, the only token may be its opening.
        alone = not others and [mark for mark, _ in _marks(tokenizer, between)][-1:] == [token]
        if alone and _always_opens(tokenizer, turns, between):
            return None
    else:  # some templates close an answer only if another turn follows; one token alone may be this turn's opening
        marks = _marks(tokenizer, follows)
        if len(marks) < 2 or marks[0][1].strip():
            return None
        token = marks[0][0]
    return None if token == opening and token != tokenizer.eos_token else token


def _opening(tokenizer: transformers.PreTrainedTokenizerBase, start: str, between: str) -> str | None:
    """The first token of a dialogue, or the second if the first begins only the text: no turn ends with it."""
    tokens = [token for token, _ in _marks(tokenizer, start)]
    if tokens[:1] == [tokenizer.bos_token] and tokens[0] not in tokens[1:] and tokens[0] not in between:
        tokens = tokens[1:]
    return tokens[0] if tokens else None


def _always_opens(tokenizer: transformers.PreTrainedTokenizerBase, turns: list[dict], between: str) -> bool:
    """Whether a question is followed by the opening of an answer even without add_generation_prompt."""
    asked = _split(_rendered(tokenizer, turns[:1]), _QUESTION)
    return asked is not None and asked[1] == between


def _marks(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[tuple[str, str]]:
    """The special tokens in a text, each with the text before it; other added tokens only if they come first."""
    special = {*tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # Added tokens may be words, numbers or spaces; those with other signs in them, such as <end>, may end a turn.
    added = {token for token in tokenizer.get_added_vocab() if re.search(r"[^\w\s]", token)}
    pattern = "|".join(map(re.escape, sorted(special | added, key=len, reverse=True)))
    marks, end = [], 0
    for found in re.finditer(pattern, text) if pattern else ():
        gap = text[end : found.start()]
        if found[0] in special or (not marks and not gap.strip()):
            marks.append((found[0], gap))
            end = found.end()
    return marks


def _rendered(tokenizer: transformers.PreTrainedTokenizerBase, messages: list[dict]) -> str | None:
    try:
        return render_chat(tokenizer, messages)
    except ValueError:
        return None


def _split(text: str | None, *probes: str) -> list[str] | None:
    """The text around probes in this order, in any case; None if one is missing or comes twice."""
    parts = re.split("|".join(probes), text or "", flags=re.IGNORECASE)
    found = re.findall("|".join(probes), text or "", flags=re.IGNORECASE)
    return parts if [probe.lower() for probe in found] == list(probes) else None


def _with_text(message: dict, text: str) -> dict:
    """The message with another text in place of its own; one without a text as it is."""
    if not texts(message):
        return message
    if isinstance(message["content"], str):
        return {**message, "content": text}
    others = [part for part in message["content"] if not (isinstance(part, dict) and "text" in part)]
    return {**message, "content": [*others, {"type": "text", "text": text}]}


def _keeps_parts(render: Callable[[list[dict]], str], messages: list[dict], probes: list[str]) -> bool:
    """Whether the template writes contents that are lists of parts."""
    pairs = zip(messages, probes, strict=True)
    try:
        text = render([{**message, "content": [{"type": "text", "text": probe}]} for message, probe in pairs]).lower()
    except (ValueError, TypeError, AttributeError):  # a prompt file goes around text only
        return False
    return all(probe in text for probe in probes)


def _shown(messages: list[dict]) -> str:
    """The beginning of messages, for an error message."""
    shown = [f"{message.get('role')}: {str(message.get('content'))[:60]!r}" for message in messages[:4]]
    return f"({', '.join(shown)}{', ...' if messages[4:] else ''})"
