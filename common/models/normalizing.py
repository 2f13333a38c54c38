"""Special tokens that a tokenizer finds only after it has normalised a text, such as in fullwidth or upper case."""

import re
from collections.abc import Iterable

import transformers


class Normalizing:
    """What a tokenizer's normaliser makes of a text, character by character, and the tokens that it then finds.

    Args:
        tokenizer: fast ones alone have tokens that are looked for in normalised text.
        tokens: those that count.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, tokens: Iterable[str]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normalizer = None if backend is None else backend.normalizer
        self._known: dict[str, str] = {}
        late = {token.content for token in tokenizer.added_tokens_decoder.values() if token.normalized}
        self._names = {} if self._normalizer is None else {self.of(token): token for token in late & {*tokens}}
        self._names.pop("", None)
        names = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def __bool__(self) -> bool:
        """Whether there are such tokens."""
        return bool(self._names)

    def of(self, text: str) -> str:
        """The normalised text."""
        return "".join(map(self._of_character, text))

    def name(self, spelling: str) -> str:
        """The token that a spelling stands for."""
        return self._names.get(self.of(spelling), spelling)

    def places(self, text: str, others: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Where a text spells a token, from and to.

        Args:
            text: as it is before it is normalised.
            others: places of tokens that are found before; none of those returned overlaps them.

        Returns:
            The others and these, in order.
        """
        parts = [self._of_character(character) for character in text]
        origin = [place for place, part in enumerate(parts) for _ in part]
        found = [
            (origin[match.start()], origin[match.end() - 1] + 1) for match in self._pattern.finditer("".join(parts))
        ]
        return sorted([*others, *(new for new in found if all(new[1] <= a or b <= new[0] for a, b in others))])

    def _of_character(self, character: str) -> str:
        if character not in self._known:
            # In the middle of a text: some normalisers put a space in front of its start, or take one from its end.
            before = self._normalizer.normalize_str("aa")[:-1]
            whole = self._normalizer.normalize_str(f"a{character}a")
            inside = whole.startswith(before) and whole.endswith("a") and len(whole) > len(before)
            self._known[character] = whole[len(before) : -1] if inside else character
        return self._known[character]
