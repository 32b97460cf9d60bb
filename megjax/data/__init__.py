"""Procedural data: the captioned pictures `scenes`."""
