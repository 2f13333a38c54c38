# make install  creates .venv with everything in it; instant when nothing changed
# make demo     sets up and trains the embedded Countdown policy, on the CPU too: make demo ARGS="--seed 1"
# make test     sets up and runs the whole test suite: make test ARGS="tests/test_losses.py"
# make style    sets up, then corrects what ruff can correct and formats
# Another interpreter than the first suitable one on the path: make install PYTHON=/path/to/python3.12

PYTHON ?= $(or $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$python && break; done),python3)

.PHONY: install demo test style

install:
	@$(PYTHON) tools/install.py

demo: install
	cd GRPO && ../.venv/bin/python grpo.py --preset cpu $(ARGS)

test: install
	.venv/bin/python -m pytest $(ARGS)

style: install
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
