"""Policies that need no download, by the names that the setting `model` accepts.

The rest of the project does not know these models: code that gets the value of `model` asks this package what to load.
"""

from common.embedded.resolve import check_model, is_embedded, load_tokenizer, resolve_model, skeleton

__all__ = ["check_model", "is_embedded", "load_tokenizer", "resolve_model", "skeleton"]
