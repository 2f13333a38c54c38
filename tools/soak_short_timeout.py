"""Runs a script whose processes wait for each other for less than the minute that `process_timeout` is at least."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
del sys.argv[0]  # the script and its arguments are left
sys.path.insert(0, str(Path(sys.argv[0]).parent))

import common.config  # noqa: E402

common.config._SHORTEST_TIMEOUT = 0.0
runpy.run_path(sys.argv[0], run_name="__main__")
