"""Completions: what a sampler is, the two that there are, and the one that always has the policy's weights."""
