"""A run's folder: checkpoints, metrics, logs and curves."""
