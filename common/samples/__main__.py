"""``python -m common.samples``."""

from common.cli import run_script
from common.samples.command import main

run_script(main, interrupted="nothing was written")
