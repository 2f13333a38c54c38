"""SFT, merge, evaluation, RL, merge, evaluation as one command: `python pipeline.py --config RECIPE/pipeline.yaml`.

Each stage is the command that a user would type, in its own folder. The same command continues after an interruption
and skips finished stages. `--stage.setting value` changes a setting, such as `--rl.num_steps 100`.
"""

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: F401, I001  it prepares the environment before torch loads

from filelock import FileLock, Timeout
from transformers.utils import CONFIG_NAME

from common.runs.checkpoints import FINAL_FOLDER, STATE_FILE, write_file
from common.mistakes import ROOT
from common.cli import as_arguments, parse_config, parse_settings, read_yaml, run_script
from common.data.files import is_data_file
from common.evaluation.results import SCORE_FILE, table
from common.evaluation.settings import EvaluationSettings
from common.runs.writable import make_folder
from common.yaml_files import parse_yaml
from examples.compare_algorithms.compare_algorithms import find_algorithms
from examples.pipeline.records import TEST_FILE, TRAIN_FILE, RecordSettings
from examples.pipeline.stages import Stage
from examples.sft import sft as sft_script

DEFAULT_CONFIG = Path(__file__).parent / "gsm8k-tiny" / "pipeline.yaml"
PARTS = ("records", "sft", "rl", "evaluate")
# Settings of each part that the pipeline sets itself.
RESERVED = {
    "records": ("output_dir",),
    "sft": ("output_dir",),
    "rl": ("output_dir", "model", "resume"),
    "evaluate": ("output_dir", "model", "adapter"),
}
Product = tuple[Stage, str]  # a stage and a path in its folder
FIX_NAME = "A recipe names YAML files in its own folder; fix the name."


@dataclass(kw_only=True)
class PipelineSettings:
    """A recipe.

    Attributes:
        algorithm: folder of the RL algorithm.
        parts: settings of each of PARTS by name; None for records: the data sets exist already.
        output_dir: folder of the stages' folders.
    """

    algorithm: str
    parts: dict[str, dict[str, Any] | None]
    output_dir: Path


def read_settings(arguments: list[str] | None = None) -> PipelineSettings:
    """Read the recipe, its YAML files and what the command line changes.

    Raises:
        ValueError: a file is missing or holds something else, or there is no such setting.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="pipeline.yaml of a recipe")
    parser.add_argument("--output_dir", type=Path, help="runs/pipeline-<name of the recipe's folder> if not given")
    parser.add_argument("--algorithm", help="folder of an algorithm, in place of the recipe's")
    options, rest = parser.parse_known_args(arguments)
    recipe = read_yaml(options.config, remedy=FIX_NAME)
    if unknown := sorted(recipe.keys() - {"algorithm", *PARTS}):
        raise ValueError(
            f"{options.config}: nothing reads {', '.join(unknown)}; a recipe has algorithm, and the files of "
            f"{', '.join(PARTS)}. Fix the file."
        )
    parts = {part: _read_part(options.config, part, recipe.get(part)) for part in PARTS}
    for name, value in _changes(rest):
        part, _, setting = name.partition(".")
        if not setting and part == "records" and value is None:
            parts[part] = None
        elif part not in PARTS or not setting or parts[part] is None:
            raise ValueError(
                f"--{name}: there is no such setting. Write --part.setting value, with one of the recipe's parts "
                f"{', '.join(PARTS)}, or --records none."
            )
        else:
            parts[part][setting] = value
    output_dir = options.output_dir or Path("runs") / f"pipeline-{options.config.resolve().parent.name}"
    algorithm = options.algorithm or recipe.get("algorithm", "GRPO")
    return PipelineSettings(algorithm=algorithm, parts=parts, output_dir=output_dir.absolute())


def _read_part(recipe: Path, part: str, name: object) -> dict[str, Any] | None:
    """The settings in the file that a recipe names for a part."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise ValueError(
            f"{recipe}: {part} holds {name!r:.60}; need the name of a YAML file in the recipe's folder, so that each "
            f"part can also be run alone. Write these settings into {part}.yaml, and here `{part}: {part}.yaml`."
        )
    return read_yaml(recipe.parent / name, remedy=FIX_NAME)


def _changes(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Pairs of --name and value; YAML parses the values."""
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ValueError(f"{' '.join(words)}: need pairs --stage.setting value. See --help.")
    for name, value in zip(words[::2], words[1::2], strict=True):
        yield name[2:], None if value == "none" else parse_yaml(value.encode(errors="surrogateescape"), name)


def make_stages(settings: PipelineSettings) -> list[Stage]:
    """The stages in their order; settings that a stage would refuse are refused before any starts.

    Raises:
        ValueError: for such a setting, an unknown algorithm or a missing data file.
    """
    found = find_algorithms(ROOT)
    if settings.algorithm not in found:
        raise ValueError(
            f"algorithm={settings.algorithm}: no such folder. Pass --algorithm with one of {', '.join(found)}."
        )
    check_parts(settings, found[settings.algorithm])
    parts = settings.parts
    records = [_records(parts["records"])] if parts["records"] is not None else []

    def data(part: str, file: str) -> dict[str, Product]:
        """The made-up records, if a part names no data set of its own."""
        return {"dataset": (records[0], file)} if records and "dataset" not in parts[part] else {}

    sft = _training("sft", "examples/sft/sft.py", parts["sft"], data("sft", TRAIN_FILE))
    after_sft = _merge("sft-merged", sft)
    script = str(found[settings.algorithm].relative_to(ROOT))
    rl = _training("rl", script, parts["rl"], data("rl", TRAIN_FILE) | {"model": (after_sft, "")})
    after_rl = _merge("rl-merged", rl)
    base = sft_script.read_settings(as_arguments(parts["sft"])).model
    measured = {
        "evaluate-base": (sft, sft_script.BASE_FOLDER) if base == "tiny" else base,
        "evaluate-sft": (after_sft, ""),
        "evaluate-rl": (after_rl, ""),
    }
    evaluations = {
        name: _evaluation(name, model, parts["evaluate"], data("evaluate", TEST_FILE))
        for name, model in measured.items()
    }
    return [
        *(*records, sft, after_sft, evaluations["evaluate-base"], evaluations["evaluate-sft"]),
        *(rl, after_rl, evaluations["evaluate-rl"]),
    ]


def _records(settings: dict[str, Any]) -> Stage:
    command = ("examples/pipeline/records.py",)
    return Stage(name="records", command=command, settings=settings, inputs={}, result=TEST_FILE)


def _training(name: str, script: str, settings: dict[str, Any], inputs: dict[str, Product]) -> Stage:
    result = f"{FINAL_FOLDER}/{STATE_FILE}"
    return Stage(name=name, command=(script,), settings=settings, inputs=inputs, result=result)


def _merge(name: str, run: Stage) -> Stage:
    return Stage(
        name=name,
        command=("-m", "common.merge"),
        settings={},
        inputs={"model": (run, "")},
        result=CONFIG_NAME,
        takes_config=False,
        folder_setting="output",
    )


def _evaluation(name: str, model: Product | str, settings: dict[str, Any], inputs: dict[str, Product]) -> Stage:
    is_made_here = not isinstance(model, str)
    return Stage(
        name=name,
        command=("-m", "common.evaluation"),
        settings=settings if is_made_here else settings | {"model": model},
        inputs=inputs | ({"model": model} if is_made_here else {}),
        result=SCORE_FILE,
        takes_config=False,
    )


def check_parts(settings: PipelineSettings, script: Path) -> None:
    """Read each part's settings as its command will.

    Raises:
        ValueError: the error of that command, or a setting that the pipeline sets itself.
    """
    parts = settings.parts
    for part in ("sft", "rl", "evaluate"):
        if parts[part] is None:
            raise ValueError(f"the recipe names no file for {part}, and every pipeline has that stage. Add `{part}:`.")
    for part, names in RESERVED.items():
        if given := sorted(set(names) & (parts[part] or {}).keys()):
            raise ValueError(
                f"{part}: {', '.join(given)} is given, and the pipeline sets it itself: each stage has its own folder "
                "and the model of an earlier stage. Leave it out."
            )
        source = str((parts[part] or {}).get("dataset", ""))
        if is_data_file(source) and not Path(source).is_file():
            raise ValueError(f"{part}: dataset={source}: there is no such file. Give an existing one, or a hub id.")
    if parts["records"] is not None:
        parse_settings(RecordSettings, as_arguments(parts["records"]))
    sft_script.check_settings(sft_script.read_settings(as_arguments(parts["sft"])))
    parse_settings(EvaluationSettings, ["--model", "any", *as_arguments(parts["evaluate"])])
    module = importlib.import_module(f"{script.parent.name}.{script.stem}")
    parse_config(module.SETTINGS, script=module.__file__, args=as_arguments(parts["rl"]))


def run_pipeline(settings: PipelineSettings) -> str:
    """Run the stages that are not complete, one by one.

    Returns:
        The table, which is also written into the folder.

    Raises:
        ValueError: for settings that do not fit, another pipeline running in the folder, and a stage that failed.
    """
    stages = make_stages(settings)
    output_dir = settings.output_dir
    make_folder(output_dir)
    try:
        with FileLock(output_dir / ".lock", timeout=0):
            for number, stage in enumerate(stages, start=1):
                label = f"[{number}/{len(stages)}] {stage.name}: {stage.folder(output_dir).name}"
                if stage.is_complete(output_dir):
                    print(f"{label}, finished before", flush=True)
                    continue
                print(f"{label} ...", flush=True)
                print(f"    {stage.run(output_dir):.0f} s", flush=True)
            text = make_table(stages, output_dir)
            write_file(output_dir / f"table-{stages[-1].digest}.md", text.encode())
            return text
    except Timeout:
        raise ValueError(
            f"output_dir={output_dir}: another pipeline is running there. Wait for it, or pass another --output_dir."
        ) from None


def make_table(stages: list[Stage], output_dir: Path) -> str:
    """The three models in one table, from the evaluations' score.json."""
    names = {"evaluate-base": "base", "evaluate-sft": "after SFT", "evaluate-rl": "after RL"}
    folders = {names[stage.name]: stage.folder(output_dir) for stage in stages if stage.name in names}
    scores = [
        json.loads((folder / SCORE_FILE).read_text(encoding="utf-8")) | {"model": name}
        for name, folder in folders.items()
    ]
    return table(scores)


def main() -> None:
    """Run the pipeline of the command line and print its table."""
    # SIGTERM acts like an interruption, so that the running stage ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = read_settings()
    print(f"pipeline: {settings.output_dir}")
    print("\n" + run_pipeline(settings), end="")


if __name__ == "__main__":
    run_script(main)
