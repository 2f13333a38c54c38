"""Policies that this machine builds by itself, under the names that the setting `model` gives them.

Nothing else in the project knows that there are such models: whoever is given the value of `model` asks here what to
load.
"""

from common.embedded.resolve import check_model, is_embedded, load_tokenizer, resolve_model

__all__ = ["check_model", "is_embedded", "load_tokenizer", "resolve_model"]
