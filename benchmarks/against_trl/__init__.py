"""The same training by TRL and by this project, each in a process of its own: `python -m benchmarks.against_trl`."""
