"""Rows of data, the prompts of each step, and dialogues."""
