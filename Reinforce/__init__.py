"""REINFORCE with whitened rewards to go."""
