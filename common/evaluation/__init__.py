"""How good models are: ``python -m common.evaluation``."""
