"""Thin mains that measure: `python -m eval.NAME`."""
