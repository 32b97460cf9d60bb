"""Presets of the mains in `train` and `eval`."""
