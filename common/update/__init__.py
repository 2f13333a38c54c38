"""Which rows go together, and the optimizer steps that are taken on them."""
