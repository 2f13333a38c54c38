"""Presets: settings for a kind of machine, in YAML files, and which lines of a script they replace."""
