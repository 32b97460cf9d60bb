"""Presets of `python -m eval.merging`."""

from eval.merging.study import MergingStudyConfig

TINY = MergingStudyConfig()
"""MEG-Tiny, 128 scenes and 64 crops: `python -m eval.merging tiny`, two CPU cores, minutes.

Expected: the default's MSE at most 0.85 of the baseline's at equal bits, on both kinds of pictures. With
`--document docs/merging-study.md` the page's figures are written anew.
"""

PRESETS = {"tiny": ("MEG-Tiny on scenes and on crops of held-out photographs.", TINY)}
"""By the name on the command line."""
