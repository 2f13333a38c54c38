"""GSPO: group sequence policy optimization."""
