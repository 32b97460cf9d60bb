"""Every answer against the same request in this process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.load.config import Config
from eval.load.drive import Outcome
from megjax.client import PictureRequest, viewer
from megjax.errors import MegError
from megjax.pipeline import Pipeline, Request
from megjax.pipeline.device import device_of
from megjax.serve.engine import Task, messages, prepare

CLOSE = 2
"""Of 255: how far a pixel may be from the picture made alone."""


def verify(
    config: Config, pipeline: Pipeline, asked: Sequence[PictureRequest], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Compare each answer's message and picture with this process's.

    Here a request's neighbours are the next ones of the list, not those that it had on the server.

    Args:
        config: see there.
        pipeline: the server's backbone.
        asked: the distinct requests.
        outcomes: from `drive`.
    """
    size = pipeline.image_size, pipeline.image_size
    show = viewer(device_of(pipeline, size))
    tasks = [_task(pipeline, request) for request in asked]
    wanted: dict[int, set[int]] = defaultdict(set)
    for outcome in outcomes:
        if outcome.message is not None:
            wanted[outcome.batch].add(outcome.which)
    wanted[1] |= {which for each in wanted.values() for which in each}
    made = {
        (which, batch): message
        for batch, which_s in wanted.items()
        for which, message in _made(pipeline, tasks, sorted(which_s), batch).items()
    }
    pictures = {key: show(message, asked[key[0]].seed, config.psnr_db) for key, message in made.items()}
    shown: dict[tuple[int, bytes], np.ndarray] = {}
    messages_equal = pictures_equal = close = answered = 0
    differences: list[int] = []
    for outcome in outcomes:
        if outcome.message is None:
            continue
        answered += 1
        seen = outcome.which, outcome.message
        if seen not in shown:
            shown[seen] = show(outcome.message, asked[outcome.which].seed, config.psnr_db)
        expected, alone = (pictures[outcome.which, batch] for batch in (outcome.batch, 1))
        messages_equal += outcome.message == made[outcome.which, outcome.batch]
        pictures_equal += np.array_equal(shown[seen], expected)
        apart = np.abs(np.round(255 * shown[seen]) - np.round(255 * alone)).max()
        differences.append(int(apart))
        close += bool(apart <= CLOSE)
    return {
        "answered": answered,
        "messages_equal": messages_equal,
        "pictures_equal": pictures_equal,
        "close_to_batch_1": close,
        "share_close_to_batch_1": close / answered if answered else None,
        "largest_difference_to_batch_1": max(differences, default=None),
        "distinct_messages": len(shown),
        "compared_at_batch_sizes": {str(batch): len(each) for batch, each in sorted(wanted.items())},
    }


def _task(pipeline: Pipeline, request: PictureRequest) -> Task:
    assert request.steps is not None
    assert request.ratio is not None
    assert request.guidance is not None
    return prepare(
        pipeline,
        Request(
            request.prompt,
            steps=request.steps,
            ratio=request.ratio,
            guidance=request.guidance,
            seed=request.seed,
        ),
        "float16",
    )


def _made(pipeline: Pipeline, tasks: Sequence[Task], which_s: Sequence[int], batch: int) -> dict[int, bytes]:
    """Messages at one batch size."""
    made: dict[int, bytes] = {}
    for start in range(0, len(which_s), batch):
        group = which_s[start : start + batch]
        sent, _ = messages(pipeline, [tasks[which] for which in group], batch)
        for which, each in zip(group, sent, strict=True):
            if isinstance(each, MegError):
                raise each
            made[which] = each.message
    return made
