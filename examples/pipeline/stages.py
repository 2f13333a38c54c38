"""A stage of the pipeline: a command with its settings, in a folder whose name depends on all of its inputs.

The name ends in a hash of the command, its settings, the stages before it and the data files. So the same pipeline
finds its finished stages again, and a changed setting gives new folders from that stage on.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.cli import as_arguments
from common.mistakes import ROOT
from common.runs.checkpoints import write_file
from examples.compare_algorithms.processes import run_environment

DIGITS = 6  # of a hash in a folder's name
LINES_OF_LOG = 5


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command that writes a folder.

    Attributes:
        name: for the user; the folder's name begins with it.
        command: what Python runs: a script's path from the repository's root, or -m and a module.
        settings: of the command, without those that name folders of the pipeline.
        inputs: a setting's name -> an earlier stage, and a path in its folder.
        result: a file that the folder has once the stage is complete.
        takes_config: the settings are passed in a file, by --config; else on the command line.
        folder_setting: the command's setting for its folder.
    """

    name: str
    command: tuple[str, ...]
    settings: dict[str, Any]
    inputs: dict[str, tuple["Stage", str]]
    result: str
    takes_config: bool = True
    folder_setting: str = "output_dir"

    @property
    def digest(self) -> str:
        """Hash of all inputs."""
        parts = {name: (stage.digest, path) for name, (stage, path) in self.inputs.items()}
        files = {name: _file_digest(value) for name, value in self.settings.items()}
        content = json.dumps([self.command, self.settings, parts, files], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:DIGITS]

    def folder(self, output_dir: Path) -> Path:
        """The stage's folder."""
        return output_dir / f"{self.name}-{self.digest}"

    def is_complete(self, output_dir: Path) -> bool:
        """True once the stage has written its last file."""
        return (self.folder(output_dir) / self.result).exists()

    def arguments(self, output_dir: Path) -> list[str]:
        """The command line after the Python interpreter; a config file is written next to the folder."""
        folder = self.folder(output_dir)
        command = self.command if self.command[0] == "-m" else (str(ROOT / self.command[0]),)
        paths = {name: str(stage.folder(output_dir) / path) for name, (stage, path) in self.inputs.items()}
        paths[self.folder_setting] = str(folder)
        if not self.takes_config:
            return [*command, *as_arguments(self.settings | paths)]
        config = folder.with_name(f"{folder.name}.yaml")
        write_file(config, yaml.safe_dump(self.settings, sort_keys=False).encode())
        return [*command, "--config", str(config), *as_arguments(paths)]

    def run(self, output_dir: Path) -> float:
        """Run the command, or continue it; its output is appended to a log next to the folder.

        Returns:
            Seconds.

        Raises:
            ValueError: the command failed; the message has the end of its log.
        """
        folder, start = self.folder(output_dir), time.monotonic()
        log = folder.with_name(f"{folder.name}.log")
        arguments = self.arguments(output_dir)
        environment = run_environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
        with (
            log.open("ab") as file,
            subprocess.Popen(
                [sys.executable, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
            ) as process,
        ):
            try:
                status = process.wait()
            except BaseException:  # interrupted: the command would keep running
                process.terminate()
                raise
        if status or not self.is_complete(output_dir):
            last = "\n    ".join(log.read_text(errors="replace", encoding="utf-8").splitlines()[-LINES_OF_LOG:])
            raise ValueError(
                f"stage {self.name} ended with status {status}, and later stages need its result. Its log {log} "
                f"ends:\n    {last}\nFix the error; the same command continues from there."
            )
        return time.monotonic() - start


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _file_digest(value: object) -> str | None:
    """Hash of a file's content if the setting names a file: its content may change under the same name."""
    if not (isinstance(value, str) and Path(value).is_file()):
        return None
    with open(value, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
