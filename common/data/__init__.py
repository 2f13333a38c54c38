"""Rows of data, prompts of a step, and dialogues."""
