"""Writes an HTML page of a run's completions: ``python -m common.samples``."""
