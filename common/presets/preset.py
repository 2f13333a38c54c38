"""A preset and the lines of a script that it replaces.

For each setting, it names the value that the scripts ship with and its own value. A line of a script with any other
value was edited by the user: it stays, and the run says so.
"""

import textwrap
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.config import MEMORY_SETTINGS
from common.embedded import is_embedded
from common.yaml_files import read_yaml_file

PRESETS = Path(__file__).parent
# Data and rewards belong to one task: if one of these is edited, the preset replaces none of them.
TASK_GROUP = ("task", "dataset", "rewards", "reward_weights")
# Presets with learning settings for embedded policies and for pretrained models, which reach no other models.
FOR_EMBEDDED, FOR_PRETRAINED = "cpu", "cpu-small"

Pairs = dict[str, tuple[Any, Any]]  # setting -> (value that the scripts ship with, the preset's value)


@dataclass(frozen=True)
class Preset:
    """A preset, read from its file.

    Attributes:
        name: of its file, or "none".
        pairs: for each setting the value that the scripts ship with, and the preset's.
        of_some: the same for settings that only some algorithms have.
        why: the reason for using this preset, for messages.
    """

    name: str
    pairs: Pairs
    why: str = "asked for"
    of_some: Pairs = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, *, has_gpu: bool | None = None) -> "Preset":
        """Read a preset.

        Args:
            name: of a file in common/presets, "none", or "auto": cpu without a CUDA GPU, none with one.
            has_gpu: whether the run has one; None: whether this machine has one.

        Raises:
            ValueError: if there is no such preset, or its file has another form.
        """
        why = cls.why
        if name == "auto":
            name, why = ("none", why) if _has_gpu(has_gpu) else ("cpu", "there is no CUDA GPU")
        pairs, of_some = ({}, {}) if name == "none" else _pairs(name)
        return cls(name, pairs, why, of_some)

    def with_settings_of(self, algorithm: Collection[str]) -> "Preset":
        """The preset with those of `of_some` that an algorithm has, given the names of its settings."""
        own = {name: pair for name, pair in self.of_some.items() if name in algorithm}
        return replace(self, pairs=self.pairs | own)

    def replacements(
        self, written: dict[str, Any], given: Collection[str], *, model: str | None, class_defaults: dict[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Decide what the preset replaces.

        Args:
            written: the settings of the script.
            given: names of the settings from a file or the command line, which a preset never replaces.
            model: the model from a file or the command line; None: there is none.
            class_defaults: by setting, another value that counts as not edited.

        Returns:
            Replaced settings, and the names of those that were edited and stay.
        """
        edited = {
            name
            for name, (shipped, value) in self.pairs.items()
            if written[name] not in (shipped, value)
            and (name not in class_defaults or written[name] != class_defaults[name])
        }
        stay = edited | set(TASK_GROUP) if edited.intersection(TASK_GROUP) else edited
        replaced = {name: value for name, (_, value) in self.pairs.items() if name not in stay and name not in given}
        kept = [name for name in self.pairs if name in stay and name not in given and self._differs(name, written)]
        embedded = is_embedded(model or replaced.get("model", written["model"]))
        if self.name == (FOR_PRETRAINED if embedded else FOR_EMBEDDED):
            replaced = {name: value for name, value in replaced.items() if name in MEMORY_SETTINGS}
            kept = [name for name in kept if name in MEMORY_SETTINGS]
        return replaced, kept

    def _differs(self, name: str, written: dict[str, Any]) -> bool:
        return written[name] != self.pairs[name][1]

    def misfit(self, model: str, *, has_gpu: bool | None = None) -> list[str]:
        """A line that says so, if this preset is for another machine or another model.

        Args:
            model: what the run trains.
            has_gpu: whether the run has one; None: whether this machine has one.
        """
        if self.name == FOR_PRETRAINED and is_embedded(model):
            return [
                f"warning: preset {self.name} is for pretrained models, so of it only memory settings are used for "
                f"{model}. Pass --preset {FOR_EMBEDDED}, or another --model."
            ]
        if self.name == FOR_EMBEDDED and not is_embedded(model) and not _has_gpu(has_gpu):
            return [
                f"preset {self.name} is for embedded policies, so of it only memory settings are used for {model}. "
                f"--preset {FOR_PRETRAINED} has settings for training a model of up to a billion weights on a CPU."
            ]
        if not self.name.startswith("gpu-") or _has_gpu(has_gpu):
            return []
        hours = "" if is_embedded(model) else f", where {model} and the settings of the script may take hours a step"
        return [
            f"warning: preset {self.name} is for a GPU, and this machine has no CUDA GPU{hours}. Leave --preset out "
            "for the tiny policy that learns on a CPU in minutes, or start this on a machine with a GPU."
        ]

    def notes(self, script: str, written: dict[str, Any], replaced: dict[str, Any], kept: list[str]) -> list[str]:
        """Lines about what was replaced, with old and new values, and what stays; none if nothing changed."""
        changed = [name for name in replaced if self._differs(name, written)]
        lines = []
        if changed:
            shown = ", ".join(f"{name} {_shown(written[name])} -> {_shown(replaced[name])}" for name in changed)
            lines.append(f"preset {self.name} ({self.why}) replaces lines of {script}; --preset none keeps them:")
            lines += textwrap.wrap(shown, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        if kept:
            shown = ", ".join(f"{name}={_shown(written[name])}" for name in kept)
            lines.append(f"as written in {script}, since you edited them or what belongs to them: {shown}")
        return lines


def _has_gpu(known: bool | None) -> bool:
    import torch

    return torch.cuda.is_available() if known is None else known


def _pairs(name: str) -> tuple[Pairs, Pairs]:
    """What a preset's file holds for all algorithms, and for some."""
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in PRESETS.glob("*.yaml"))
        raise ValueError(
            f"preset={name!r}: there is no such preset. Pass --preset with one of {', '.join(known)}, none."
        )
    pairs = read_yaml_file(path)
    of_some = pairs.pop("of_some_algorithms", {})
    for setting, pair in (pairs | of_some).items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"{path}: {setting} is {pair!r}: need two values, the one that the scripts ship with and the "
                f"preset's, to tell which lines were edited. Write {setting}: [shipped, preset's]."
            )
    return tuple({setting: tuple(pair) for setting, pair in part.items()} for part in (pairs, of_some))


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
