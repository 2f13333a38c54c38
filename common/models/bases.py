"""How an adapter names its base model: by hub id, or by a relative path, so that no path of this machine is shared.

transformers and peft look for a relative path where they run. So an adapter of a checkpoint, which is used here, names
its base as seen from where the run was started; one in final/, which is moved and shared, as seen from its own folder.
Our own commands find both from anywhere.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import transformers

from common.models.configs import ADAPTER_CONFIG
from common.yaml_files import read_yaml_file

_PARENTS = 4  # of an adapter, among which its run's folder is


def base_from_here(path: str | Path) -> str:
    """A model's name for an adapter: a hub id as it is, a folder relative to the working directory.

    Args:
        path: hub id or folder.
    """
    return _relative(path, Path.cwd()) if Path(path).is_dir() else str(path)


def name_base_from_folder(folder: Path) -> None:
    """Let an adapter that was saved name its base as seen from its own folder; a hub id stays.

    Args:
        folder: that peft wrote, with its model card.
    """
    config = folder / ADAPTER_CONFIG
    settings = json.loads(config.read_text(encoding="utf-8"))
    name = settings["base_model_name_or_path"]
    if not name or not Path(name).is_dir():
        return
    relative = _relative(name, folder.resolve())
    settings["base_model_name_or_path"] = relative
    config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    card = folder / "README.md"
    if card.is_file():
        lines = card.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [line.replace(name, relative) if "base_model" in line else line for line in lines]
        card.write_text("".join(lines), encoding="utf-8")


def find_base(adapter: Path, name: str, is_known: Callable[[str], bool] = lambda model: False) -> str:
    """Hub id or folder of an adapter's base, from what the adapter calls it.

    A relative path is tried from the adapter's folder, then from each folder above it, then from here. If nothing is
    there, the base is the model of the run that the adapter belongs to, as its config.yaml has it.

    Args:
        adapter: its folder.
        name: base_model_name_or_path of its configuration.
        is_known: whether a run's model is one that is built where it is missing, such as the embedded policy.

    Returns:
        The name itself, if it is no path or nothing is found.
    """
    folder = adapter.resolve()
    is_id = not name.startswith((".", os.sep)) and not Path(name).is_dir()
    if is_id or os.path.isabs(name):
        places = [Path(name)]
    else:
        places = [parent / name for parent in (folder, *folder.parents, Path.cwd())]
    found = next((place for place in places if is_there(place)), None)
    if found is not None or is_id:
        return name if found is None else os.path.normpath(found)
    for parent in list(folder.parents)[:_PARENTS]:
        if (parent / "config.yaml").is_file():
            settings = read_yaml_file(parent / "config.yaml")
            model = settings.get("model") if isinstance(settings, dict) else None
            if isinstance(model, str) and (is_there(model) or is_known(model)):
                return model
    return name


def is_there(name: str | Path) -> bool:
    """Whether a name is that of a folder with a model."""
    return (Path(name) / "config.json").is_file()


def is_lost(adapter: Path, name: str) -> bool:
    """Whether an adapter names its base by a path at which there is nothing any more."""
    found = find_base(adapter, name)
    return found.startswith((".", os.sep)) and not is_there(found)


def forget_origin(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedTokenizerBase:
    """The same tokenizer, which will not write into its folder how it was found on this machine."""
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _relative(path: str | Path, start: Path) -> str:
    relative = os.path.relpath(os.path.realpath(path), start)
    return relative if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)
