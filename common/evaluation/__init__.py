"""Evaluates models: ``python -m common.evaluation``."""
