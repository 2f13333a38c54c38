"""Mini-batches and micro-batches, and the optimizer steps on them."""
