"""Reward functions of every kind, and the score that is made of them."""
