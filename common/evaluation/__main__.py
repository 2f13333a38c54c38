"""``python -m common.evaluation``."""

import signal

from common.cli import run_script
from common.evaluation.command import main

# What ends a job of a cluster, or a container, is answered as Ctrl-C is.
signal.signal(signal.SIGTERM, signal.default_int_handler)
run_script(main, interrupted="the same command continues with what is missing")
