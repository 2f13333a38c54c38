"""Special tokens that messages spell in ordinary characters, such as <|im_end|>: they are encoded as text.

A chat template writes its own tokens around what messages say. Data and completions that spell the same characters
would otherwise begin and end turns of their own. Rows that spell none are encoded as the tokenizer does it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import transformers

from common.models.chat import render_chat
from common.models.normalizing import Normalizing

# A tag, such as <answer>: models and data write it, and mean it.
_TAG = re.compile(r"</?\w+>")
# A padding token may be an ordinary word or sign, such as "!", and is then no spelling of anything.
_NO_WORD = re.compile(r"(?=.*[^\w\s]).{3,}", re.DOTALL)
# A token that is not flagged as special opens or closes turns only if it looks like <|user|> or [INST].
_LIKE_A_MARKER = re.compile(r"[^\w\s].+[^\w\s]", re.DOTALL)
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))
_ANCHORS = ("a", "\n", "0")  # characters that hardly any tokenizer joins with what follows


@dataclass(frozen=True)
class Written:
    """A conversation as a chat template writes it.

    Attributes:
        text: what the model reads.
        spelled: where in the text, from and to, messages spell a special token.
    """

    text: str
    spelled: list[tuple[int, int]] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The first such spelling; empty if there is none."""
        return self.text[slice(*self.spelled[0])] if self.spelled else ""


class Spellings:
    """Finds special tokens that are spelled in messages, and encodes them as ordinary text.

    Meant are the tokens that the tokenizer flags or names as special, and others that it added if the chat template
    writes them around turns. Tags, such as <think>, are left alone, unless they are special and the template writes
    them: models and data use them.

    Args:
        tokenizer: with a chat template or without.
        template: another chat template than the tokenizer's.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._tokens = _markers(tokenizer, template)
        self._ids = {tokenizer.convert_tokens_to_ids(token) for token in self._tokens}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._tokens, key=len, reverse=True))) or r"(?!)")
        self._longest = max(map(len, self._tokens), default=1) - 1
        self._normalizing = Normalizing(tokenizer, self._tokens)
        forms = self._tokens | {*map(self._normalizing.of, self._tokens)} if self._normalizing else self._tokens
        self._opens, self._closes = {form[0] for form in forms}, {form[-1] for form in forms}
        self._heads = {form[:end] for form in forms for end in range(1, len(form))}
        self._tails = {form[start:] for form in forms for start in range(1, len(form))}

    def in_text(self, text: str) -> str:
        """The first special token that a text spells; empty if there is none."""
        found = self._scan(text)
        return text[slice(*found[0])] if found else ""

    def may_occur(self, messages: list[dict]) -> bool:
        """Whether messages spell a special token, or the beginning or end of one at the end or beginning of a text."""
        return any(self._scan(text) or any(self._ends(text.strip())) for text in _strings(messages))

    def written(self, messages: list[dict], render: Callable[[list[dict]], str]) -> Written:
        """A conversation as text, with the places where it spells special tokens.

        What messages spell goes through the template as characters for private use, so that a template may trim, move
        or leave out what they say. What is a special token only together with the text beside it counts too.

        Args:
            messages: of one conversation; all their texts, roles and names come from data.
            render: from messages to text, with the template.
        """
        if not self.may_occur(messages):
            return Written(render(messages))
        marks = _Marks(messages)
        text, own, end = "", set(), 0
        marked = render(_mapped(messages, lambda said: self._marked(said, marks)))
        for place in re.finditer(marks.pattern, marked):
            own |= {(len(text) + a, len(text) + b) for a, b in self._scan(marked[end : place.start()])}
            text += marked[end : place.start()] + marks.meanings[place[0]]
            end = place.end()
        own |= {(len(text) + a, len(text) + b) for a, b in self._scan(marked[end:])}
        text += marked[end:]
        places = [place for place in self._scan(text) if place not in own]
        return Written(text, places) if places else Written(render(messages))

    def encode(self, written: Written) -> list[int]:
        """Token ids: those of the tokenizer, but what messages spell becomes tokens of ordinary characters."""
        ids = self._ordinary(written.text)
        if not written.spelled:
            return ids
        replaced = self.replacements(written, ids)
        if replaced is None:
            return self._encode_pieces(written)
        return [each for position, token in enumerate(ids) for each in replaced.get(position, [token])]

    def replacements(self, written: Written, ids: list[int]) -> dict[int, list[int]] | None:
        """Positions of the special tokens that messages spell, each with the ordinary tokens that belong there.

        Args:
            written: the conversation.
            ids: the tokenizer's for its text.

        Returns:
            None if the tokenizer finds other special tokens than are spelled.
        """
        text, places = written.text, self._scan(written.text)
        found = [position for position, token in enumerate(ids) if token in self._ids]
        names = [self._name(text[start:end]) for start, end in places]
        if [ids[position] for position in found] != self._tokenizer.convert_tokens_to_ids(names):
            return None
        spelled, plain, replaced = {*written.spelled}, {}, {}
        for position, place in zip(found, places, strict=True):
            if place in spelled:
                spelling = self._with_spaces(text, place)
                if spelling not in plain:
                    plain[spelling] = self._plain(spelling)
                replaced[position] = plain[spelling]
        return replaced

    def as_text(self, text: str) -> Written:
        """A text that no template writes, all of whose special tokens are spelled."""
        return Written(text, self._scan(text))

    def _encode_pieces(self, written: Written) -> list[int]:
        """As `encode`, for a tokenizer that finds other special tokens in a text than are spelled there."""
        ids, end = [], 0
        for start, stop in written.spelled:
            ids += self._ordinary(written.text[end:start]) + self._plain(written.text[start:stop])
            end = stop
        return ids + self._ordinary(written.text[end:])

    def _scan(self, text: str) -> list[tuple[int, int]]:
        places = [found.span() for found in self._pattern.finditer(text)]
        return self._normalizing.places(text, places) if self._normalizing else places

    def _name(self, spelling: str) -> str:
        return spelling if spelling in self._tokens or not self._normalizing else self._normalizing.name(spelling)

    def _ends(self, text: str) -> tuple[int, int]:
        """How much of a text's start may end a special token, and of its end may begin one."""
        first, last = text[: self._longest], text[-self._longest :]
        tail = head = 0
        for start, end in {(first, last), (self._normalized(first), self._normalized(last))}:
            if not self._closes.isdisjoint(start):  # hardly any text has these characters there
                lengths = range(len(start), tail, -1)
                tail = next((length for length in lengths if start[:length] in self._tails), tail)
            if not self._opens.isdisjoint(end):
                lengths = range(len(end), head, -1)
                head = next((length for length in lengths if end[-length:] in self._heads), head)
        return tail, head

    def _normalized(self, text: str) -> str:
        return self._normalizing.of(text) if self._normalizing else text

    def _marked(self, text: str, marks: "_Marks") -> str:
        said = text.strip()  # templates trim
        if not said:
            return text
        before = text.index(said)
        tail, head = self._ends(said)
        start, end = before + tail, before + max(tail, len(said) - head)
        whole = self._scan(text)
        if any(a < start or b > end for a, b in whole):  # whole spellings come first
            start, end = before, before + len(said)
        pieces, done = [text[:before], marks.of(text[before:start])], start
        for a, b in whole:
            pieces += [text[done:a], marks.of(text[a:b])]
            done = b
        return "".join([*pieces, text[done:end], marks.of(text[end : before + len(said)]), text[before + len(said) :]])

    def _with_spaces(self, text: str, place: tuple[int, int]) -> str:
        """What a special token stands for: some take the spaces beside them too."""
        start, end = place
        token = self._flags.get(self._name(text[start:end]))
        if token is not None and token.lstrip:
            while start and text[start - 1].isspace():
                start -= 1
        if token is not None and token.rstrip:
            while end < len(text) and text[end].isspace():
                end += 1
        return text[start:end]

    @cached_property
    def _flags(self) -> dict[str, Any]:
        return {token.content: token for token in self._tokenizer.added_tokens_decoder.values()}

    def _plain(self, text: str) -> list[int]:
        """Ids of a spelling as ordinary characters; one by one where it would be a special token all the same."""
        for pieces in ([text], list(text)):
            ids = [token for piece in pieces for token in self._in_the_middle(piece)]
            if self._ids.isdisjoint(ids):
                return ids
        # A character that no token stands for is unknown wherever it is.
        return [token for token in ids if token not in self._ids or token == self._tokenizer.unk_token_id]

    def _in_the_middle(self, text: str) -> list[int]:
        """Ids of a text that follows another: without the space that some tokenizers put at the start."""
        for anchor in _ANCHORS:
            before, both = (self._ordinary(each, split_special_tokens=True) for each in (anchor, anchor + text))
            if 0 < len(before) < len(both) and both[: len(before)] == before:
                return both[len(before) :]
        return self._ordinary(text, split_special_tokens=True)

    def _ordinary(self, text: str, **options: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"] if text else []


class _Marks:
    """Characters for private use that stand for spellings while a template writes the messages.

    Args:
        messages: in which none of these characters occurs.
    """

    def __init__(self, messages: list[dict]) -> None:
        used = set("".join(_strings(messages)))
        self._free = (char for char in map(chr, chain(*_PRIVATE_USE)) if char not in used)
        self._marks: dict[str, str] = {}

    def of(self, spelling: str) -> str:
        """The mark of a spelling; nothing for none."""
        if spelling and spelling not in self._marks:
            free = next(self._free, None)
            if free is None:
                raise ValueError(
                    f"messages that spell {spelling!r} have all 137,468 characters for private use in them: "
                    "need one of them to encode it as text. Remove the row."
                )
            self._marks[spelling] = free
        return self._marks.get(spelling, "")

    @property
    def meanings(self) -> dict[str, str]:
        """The spelling of each mark."""
        return {mark: spelling for spelling, mark in self._marks.items()}

    @property
    def pattern(self) -> str:
        """Matches a mark."""
        return f"[{''.join(self._marks.values())}]"


def _markers(tokenizer: transformers.PreTrainedTokenizerBase, template: str | None) -> set[str]:
    """The tokens that text must not become."""
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    named |= {tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token}
    flagged = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    flagged |= {*tokenizer.all_special_tokens}
    added = {*tokenizer.get_added_vocab()}
    text = _around_turns(tokenizer, template)
    written = {token for token in added if token in text}
    special = named - {None} | {token for token in flagged if token in written or not _TAG.fullmatch(token)}
    others = {token for token in written - special if _LIKE_A_MARKER.fullmatch(token) and not _is_paired(token, added)}
    return {token for token in special if _NO_WORD.fullmatch(token)} | others


def _is_paired(token: str, added: set[str]) -> bool:
    """Whether a token is a tag, such as <think>, that has its </think>: what stands between is said by the model."""
    other = token.replace("</", "<") if token.startswith("</") else token.replace("<", "</", 1)
    return bool(_TAG.fullmatch(token)) and other in added


def _around_turns(tokenizer: transformers.PreTrainedTokenizerBase, template: str | None) -> str:
    """What the chat template writes for harmless conversations of several shapes, one after the other."""
    options = {} if template is None else {"chat_template": template}
    if template is None and tokenizer.chat_template is None:
        return ""
    texts = []
    for roles in ("user", "user assistant", "user assistant user", "system user assistant user"):
        for as_content in (str, lambda text: [{"type": "text", "text": text}]):
            messages = [{"role": role, "content": as_content("a word")} for role in roles.split()]
            for asks in (False, True):
                try:
                    text = render_chat(tokenizer, messages, add_generation_prompt=asks, **options)
                except ValueError:  # another shape may fit
                    continue
                texts.append(text)
    return "\n".join(texts)


def _strings(value: Any) -> Iterator[str]:
    """All texts in messages, wherever they stand."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _strings(part)
            if _is_said(name):
                yield name
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)


def _is_said(name: Any) -> bool:
    """Whether the name of a value, such as of a tool's argument, may be more than one that a template asks for."""
    return isinstance(name, str) and not name.isidentifier()


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Messages with each text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key) if _is_said(key) else key: _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, (list, tuple)) else value
