"""DAPO: GRPO with decoupled clip, dynamic sampling and a price of length."""
