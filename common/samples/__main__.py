"""``python -m common.samples``."""

from common.cli import run_script
from common.samples.page import main

run_script(main)
