"""The load test: it sends to this machine alone, counts what it saw, and notices what is wrong."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("httpx", reason="needs the extra `device`")

from eval.load import verify as verifying
from eval.load.config import Config
from eval.load.draw import draw, figures, growth, save
from eval.load.drive import REFUSED, Outcome, Sample, requests
from megjax.data.grammar import WORDS
from megjax.errors import MegError


@pytest.mark.parametrize(
    "server",
    ["http://example.com", "http://10.0.0.1:8000", "http://192.168.1.2", "http://localhost.evil.com", "x"],
)
def test_only_this_machine_is_sent_to(server):
    with pytest.raises(MegError, match="this machine alone"):
        Config(server=server)


def test_this_machine_has_several_addresses():
    for server in ("http://127.0.0.1:8000", "http://127.3.2.1", "http://[::1]:8000"):
        assert Config(server=server).server == server


@pytest.mark.parametrize(
    "change",
    [
        {"requests": 0},
        {"clients": 1000},
        {"steps": (6, 4)},
        {"most_s": 1e9},
        {"patience_s": float("nan")},
        {"patience_s": -1.0},
        {"psnr_db": float("nan")},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_it_is_bounded(change):
    with pytest.raises(MegError, match=next(iter(change))):
        Config(**change)


def test_requests_are_the_grammars_and_the_seeds():
    config = Config(distinct=30)
    drawn = requests(config)
    assert drawn == requests(config) != requests(dataclasses.replace(config, seed=1))
    assert {word for each in drawn for word in each.prompt.split()} <= set(WORDS)
    assert len({each.seed for each in drawn}) == 30
    assert {each.steps for each in drawn} == {4, 5, 6}


def test_refusals_keep_their_status():
    for text, status in (
        ("the server is not ready (429): full; tried once in 0.0 s", "429"),
        ("the server answers 504: not done within 2 s", "504"),
    ):
        found = REFUSED.search(text)
        assert (found[1] or found[2]) == status


def outcome(which, start_s, seconds, message=b"m", batch=2, refused=""):
    return Outcome(which, start_s, seconds, batch, message, 1, refused)


def test_figures_are_those_of_the_outcomes(tmp_path):
    outcomes = [outcome(0, 0.1 * i, 0.01 * (i + 1)) for i in range(100)]
    outcomes += [outcome(0, 0.0, 9.0, message=None, batch=0, refused="429")] * 3
    samples = [Sample(float(i), 1e8 * (1 + 0.0004 * i), i) for i in range(0, 104, 2)]
    numbers = figures(outcomes, samples, took_s=10.0)
    assert numbers["answered"] == 100
    assert numbers["refused"] == {"429": 3}
    assert numbers["pictures_per_s"] == 10.0
    assert numbers["batches"] == {"2": 100}
    assert numbers["latency_s"]["p50"] == pytest.approx(0.505, abs=1e-3)
    assert numbers["latency_s"]["p95"] == pytest.approx(0.9505, abs=1e-3)
    assert numbers["latency_s"]["max"] == 1.0
    # From requests 11 to 20 and from 93 on: 82 requests of 0.04 % each.
    assert numbers["memory"]["growth"] == pytest.approx(0.0004 * 82, rel=0.05)
    save(tmp_path, numbers, draw(numbers, outcomes, samples))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["load.json", "load.png"]
    with Image.open(io.BytesIO((tmp_path / "load.png").read_bytes())) as picture:
        assert picture.width > 1000


def test_growth_needs_samples():
    assert growth([], 10) is None
    assert growth([Sample(0.0, 1.0, 0)], 10) is None


def test_wrong_answers_are_counted(monkeypatch):
    """Right, one level off, far off, and a message of another batch size."""

    class Pipeline:
        image_size = 64

    monkeypatch.setattr(verifying, "device_of", lambda *_: None)
    pictures = {b"a1": 0.5, b"a8": 0.5, b"b1": 0.5, b"b8": 0.52, b"bad": 0.9}
    monkeypatch.setattr(
        verifying, "viewer", lambda _: lambda message, *_: np.full((2, 2, 3), pictures[message])
    )
    monkeypatch.setattr(verifying, "_task", lambda _, request: request.prompt)

    def made(_, tasks, which_s, batch):
        return {i: f"{tasks[i]}{batch}".encode() for i in which_s}

    monkeypatch.setattr(verifying, "_made", made)
    a, b = (dataclasses.replace(requests(Config(distinct=1))[0], prompt=name) for name in "ab")
    outcomes = [
        outcome(0, 0, 1, b"a8", 8),
        outcome(1, 0, 1, b"b8", 8),
        outcome(1, 0, 1, b"bad", 8),
        outcome(1, 0, 1, b"b1", 8),
        outcome(1, 0, 1, None, 0, "504"),
    ]
    found = verifying.verify(Config(), Pipeline(), [a, b], outcomes)
    assert found["answered"] == 4
    assert found["messages_equal"] == found["pictures_equal"] == 2
    # 0.52 is five levels from 0.5.
    assert found["close_to_batch_1"] == 2
    assert found["largest_difference_to_batch_1"] == round(255 * 0.9) - round(255 * 0.5)
    assert found["compared_at_batch_sizes"] == {"1": 2, "8": 2}
