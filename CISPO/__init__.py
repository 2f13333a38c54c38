"""CISPO: clipped importance-sampling weights instead of a clipped surrogate."""
