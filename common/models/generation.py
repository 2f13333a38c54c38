"""The generation configuration of a model: kept as its folder has it, so that it can be saved with the policy."""

from __future__ import annotations  # for type hints whose import would take seconds

from pathlib import Path
from typing import Self

import transformers


class AsShipped(transformers.GenerationConfig):
    """A generation configuration that is saved as it was loaded.

    transformers loads values that it then refuses to save: temperature without do_sample, length_penalty with one
    beam, a negative pad_token_id. Many models ship such files. Training reads the end tokens only.
    """

    @classmethod
    def of(cls, config: transformers.GenerationConfig) -> Self:
        """The same values.

        Args:
            config: of a loaded model.
        """
        shipped = cls()
        vars(shipped).update(vars(config))
        return shipped

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The values of a folder's generation_config.json.

        Args:
            folder: with such a file.
        """
        return cls.of(transformers.GenerationConfig.from_pretrained(folder))

    def validate(self, *_: object, **__: object) -> None:
        """Take all values, as transformers does when it loads them."""
