"""Thin mains that train: `python -m train.NAME PRESET`."""
