"""What a tokenizer and a model know of a prompt.

Characters without a token, special tokens that are only spelled, and tokens without an embedding.
"""

import unicodedata

import transformers

from common.data.encoded import Encoded

# Separators, controls, format characters and marks: tokenizers that clean texts leave them out on purpose.
_CLEANED = ("Z", "C", "M")
# A space before a word, as a piece of its own.
_SPACES = (
    "\N{LOWER ONE EIGHTH BLOCK}",
    "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}",
)


class Characters:
    """Tells which characters a tokenizer knows; each is tried once.

    A character is unknown if no token stands for it, or only the unknown token. One that becomes another, such as a
    small letter for a capital, is known.

    Args:
        tokenizer: the policy's.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._unknown_id = tokenizer, tokenizer.unk_token_id
        self._is_known: dict[str, bool] = {}

    def unknown_in(self, texts: list[str], ids: list[list[int]]) -> list[str]:
        """The unknown characters of each text, each once, sorted; usually none.

        Args:
            texts: of prompts.
            ids: their token ids. Where the tokenizer has an unknown token, they say whether to look any further.
        """
        if self._unknown_id is not None:
            return [
                self._unknown(self._replaced(text)) if self._unknown_id in sequence else ""
                for text, sequence in zip(texts, ids, strict=True)
            ]
        if not self._unknown(set("".join(texts))):
            return [""] * len(texts)
        return [self._unknown(set(text)) for text in texts]

    def _unknown(self, characters: set[str]) -> str:
        for character in characters - self._is_known.keys():
            self._is_known[character] = self._try(character)
        return "".join(sorted(character for character in characters if not self._is_known[character]))

    def _replaced(self, text: str) -> set[str]:
        """The characters in whose place the unknown token stands."""
        if not self._tokenizer.is_fast:
            return set(text)
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        replaced = {text[start:end] for token, (start, end) in places if token == self._unknown_id}
        return set("".join(replaced - {self._tokenizer.unk_token}))  # which can also be written out

    def _try(self, character: str) -> bool:
        if unicodedata.category(character).startswith(_CLEANED):
            return True
        ids = self._tokenizer(character, add_special_tokens=False)["input_ids"]
        pieces = self._tokenizer.convert_ids_to_tokens(ids)
        return self._unknown_id not in ids and any(piece not in _SPACES or piece == character for piece in pieces)


def describe_unknown(prompts: Encoded) -> list[str]:
    """A line about prompts with characters that the tokenizer does not know, if there are any.

    Args:
        prompts: of the run.
    """
    rows = prompts.rows_with_unknown
    if not len(rows):
        return []
    characters = "".join(dict.fromkeys("".join(prompts.unknown[row] for row in rows[:1000].tolist())))
    shown = " ".join(characters[:10]) + (" ..." if characters[10:] else "")
    return [
        f"{len(rows)} of {len(prompts)} prompts have characters that the tokenizer does not know, so the model does "
        f"not see them: {shown}"
    ]


def describe_spelled(prompts: Encoded) -> list[str]:
    """A line about chat messages that spell special tokens, if there are any.

    Args:
        prompts: of the run.
    """
    rows = prompts.rows_with_spelled
    if not len(rows):
        return []
    return [
        f"{len(rows)} of {len(prompts)} prompts spell special tokens such as {prompts.spelled[rows[0]]} in their "
        "messages: they are encoded as plain text. To mean the tokens, give prompts as text, or a column prompt_ids"
    ]


def check_vocabulary(prompts: Encoded, num_tokens: int) -> None:
    """Refuse prompts with tokens that the model has no embedding for.

    Args:
        prompts: of the run.
        num_tokens: of the model.

    Raises:
        ValueError: names such a prompt and the token.
    """
    row = prompts.row_of_largest_id
    token = max(prompts.ids[row])
    if token >= num_tokens:
        raise ValueError(
            f"the prompt {prompts.texts[row]!r:.80} has the token {token}, and the model has {num_tokens}, from 0 to "
            f"{num_tokens - 1}: its tokenizer has tokens that were added without an embedding. Pass --model with a "
            "model after model.resize_token_embeddings(len(tokenizer)), or remove such tokens from the prompts."
        )
