"""Proximal policy optimization with Monte-Carlo values."""
