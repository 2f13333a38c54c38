"""The text of a completion: what rewards, the samples and evaluation see of its tokens."""

from collections.abc import Collection
from itertools import groupby

import transformers

from common.models.chat import turn_end_token


def completion_texts(
    tokenizer: transformers.PreTrainedTokenizerBase, completions: list[list[int]], end_token_ids: Collection[int]
) -> list[str]:
    """The text of each completion, up to its first end token, without that and without padding.

    Every other token is text, even if the tokenizer holds it as special: it may be the tag that a reward looks for, or
    a turn that the model had no business to begin. An end token that is ordinary text, such as a line break, stays.

    Args:
        tokenizer: the policy's.
        completions: token ids of each, padded or not.
        end_token_ids: a completion ends with the first of these.
    """
    ends = set(end_token_ids) & set().union(*completions)  # those that occur
    left_out = {tokenizer.pad_token_id}
    left_out |= {token for token in ends if not tokenizer.decode([token], skip_special_tokens=True)}
    # The token that ends a turn does so also in a tokenizer that does not call it special.
    turn_end = turn_end_token(tokenizer)
    left_out |= {tokenizer.convert_tokens_to_ids(turn_end)} & ends if turn_end is not None else set()
    misspelled = _misspelled(tokenizer)
    texts = []
    for token_ids in completions:
        length = next((place + 1 for place, token in enumerate(token_ids) if token in ends), len(token_ids))
        texts.append(_text(tokenizer, [token for token in token_ids[:length] if token not in left_out], misspelled))
    return texts


def _text(tokenizer: transformers.PreTrainedTokenizerBase, token_ids: list[int], misspelled: dict[int, str]) -> str:
    """The text of tokens exactly as written: no token is skipped, no space is taken away before punctuation."""
    pieces = []
    for is_misspelled, tokens in groupby(token_ids, misspelled.__contains__):
        if is_misspelled:
            pieces += [misspelled[token] for token in tokens]
        else:
            pieces.append(
                tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )
    return "".join(pieces)


def _misspelled(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[int, str]:
    """Added tokens that the tokenizer decodes wrongly, with their text.

    A tokenizer of bytes takes some letters of an added token, such as the é of <réponse>, for bytes.
    """
    foreign = {token: content for content, token in tokenizer.get_added_vocab().items() if not content.isascii()}
    unknown = "\N{REPLACEMENT CHARACTER}"
    return {token: content for token, content in foreign.items() if unknown in tokenizer.decode([token])}
