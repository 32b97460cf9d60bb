"""Token merging, Eqs. (15)-(18) and (20): match, merge, unmerge as pure functions, explicit key and plan."""

from megjax.link.counts import Grid, Rounds, merged_counts
from megjax.merging.layout import Layout, from_tokens, to_tokens, token_grid
from megjax.merging.matching import least_change, match, match_best, match_partition
from megjax.merging.message import Received, carried, carried_shapes, pack, rebuild_plan, unpack
from megjax.merging.operator import merge, unmerge
from megjax.merging.partition import Partition, fixed_partition, partition
from megjax.merging.plan import Plan
from megjax.merging.similarity import Similarity, cosine, euclidean
from megjax.merging.tome import tome

__all__ = [
    "Grid",
    "Layout",
    "Partition",
    "Plan",
    "Received",
    "Rounds",
    "Similarity",
    "carried",
    "carried_shapes",
    "cosine",
    "euclidean",
    "fixed_partition",
    "from_tokens",
    "least_change",
    "match",
    "match_best",
    "match_partition",
    "merge",
    "merged_counts",
    "pack",
    "partition",
    "rebuild_plan",
    "to_tokens",
    "token_grid",
    "tome",
    "unmerge",
    "unpack",
]
