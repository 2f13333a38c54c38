"""PPO: proximal policy optimization with a value model."""
