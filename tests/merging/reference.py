"""Eqs. (15)-(18) and (20) in plain loops: an independent reference for matching, merging and unmerging."""

import numpy as np


def corners(offsets, grid):
    """Destination and source tokens of one round, from the corner of each cell that is its destination."""
    h, w = grid
    destinations = []
    for cell, corner in enumerate(offsets):
        row, column = divmod(cell, w // 2)
        destinations.append((2 * row + corner // 2) * w + 2 * column + corner % 2)
    return destinations, [t for t in range(h * w) if t not in set(destinations)]


def merge_round(x, sizes, offsets, grid, count, similarity, weighted):
    """Return {source: destination} of the pairs merged, and the destinations' averages and sizes."""
    destinations, sources = corners(offsets, grid)
    a, b = x[sources].astype(np.float64), x[destinations].astype(np.float64)
    if not destinations:
        return {}, x, sizes, destinations
    if similarity == "cosine":
        norm = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
        scores = a @ b.T / norm
    else:
        scores = -np.linalg.norm(a[:, None] - b[None], axis=2)
    best = scores.argmax(axis=1)
    order = np.argsort(-scores.max(axis=1), kind="stable")[:count]
    merged = {sources[i]: destinations[best[i]] for i in order}
    weight = sizes if weighted else np.ones_like(sizes)
    values = x.astype(np.float64).copy()
    new_sizes = sizes.copy()
    for d in destinations:
        group = [d] + [s for s, to in merged.items() if to == d]
        values[d] = sum(weight[t] * x[t] for t in group) / sum(weight[t] for t in group)
        new_sizes[d] = sum(sizes[t] for t in group)
    return merged, values, new_sizes, destinations


def merge_unmerge(x, offsets, grid, counts, similarity="cosine", weighted=True):
    """Return unmerge(merge(x)), {token: token it ends in} and the tokens in each, for one or two rounds."""
    x = np.asarray(x, np.float64)
    n = len(x)
    root = {t: t for t in range(n)}
    merged, values, sizes, destinations = merge_round(
        x, np.ones(n), offsets[0], grid, counts[0], similarity, weighted
    )
    root |= merged
    if len(counts) > 1 and counts[1]:
        half = (grid[0] // 2, grid[1] // 2)
        again, values2, sizes2, _ = merge_round(
            values[destinations], sizes[destinations], offsets[1], half, counts[1], similarity, weighted
        )
        up = {d: destinations[again.get(i, i)] for i, d in enumerate(destinations)}
        root = {t: up.get(r, r) for t, r in root.items()}
        values[destinations], sizes[destinations] = values2, sizes2
    return np.stack([values[root[t]] for t in range(n)]), root, sizes


def offsets_of(partitions, grid):
    """Read the corners back from our partitions."""
    out = []
    for part in partitions:
        h, w = grid
        destination = np.asarray(part.destination_B)
        cell = np.arange(len(destination))
        row, column = cell // max(w // 2, 1), cell % max(w // 2, 1)
        out.append((destination // w - 2 * row) * 2 + destination % w - 2 * column)
        grid = (h // 2, w // 2)
    return out
