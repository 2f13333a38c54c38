"""Sampling: the protocol, the two samplers, and the one that always has the policy's weights."""
