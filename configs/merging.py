"""Presets of `python -m eval.merging`."""

from eval.merging.study import MergingStudyConfig

TINY = MergingStudyConfig()
"""MEG-Tiny, 128 scenes and 64 crops: `python -m eval.merging tiny`, two CPU cores, minutes."""

PRESETS = {"tiny": ("MEG-Tiny on scenes and on crops of held-out photographs.", TINY)}
"""By the name on the command line."""
