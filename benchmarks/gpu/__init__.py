"""What only a GPU can show, in one command of less than nine minutes: `python -m benchmarks.gpu`."""
