"""Memory: what a pass needs, predicted before a model is loaded."""
