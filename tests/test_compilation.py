"""A second start compiles nothing."""

import os
import subprocess
import sys

import pytest

from tests.small import save_random

RUN = """
import sys
import jax
from jax import monitoring
from megjax.cli import main

counts = {"hits": 0, "misses": 0}

def count(event, **_):
    for name in counts:
        counts[name] += event == f"/jax/compilation_cache/cache_{name}"

monitoring.register_event_listener(count)
try:
    main()
finally:
    print(counts["hits"], counts["misses"], file=sys.stderr)
"""


@pytest.mark.long
def test_a_second_start_compiles_nothing(tmp_path):
    model = save_random(tmp_path / "model")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    args = [
        "generate",
        "a red circle",
        "--model",
        str(model),
        "--steps",
        "4",
        "-o",
        str(tmp_path / "out.png"),
    ]
    found = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", RUN, *args], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        found.append(tuple(map(int, run.stderr.split()[-2:])))
    (_, first), (hits, second) = found
    assert first > 20
    assert (hits, second) == (first + found[0][0], 0)
