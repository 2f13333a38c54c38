"""``python -m common.evaluation``."""

from common.cli import run_script
from common.evaluation.command import main

run_script(main, interrupted="the same command continues with what is missing")
