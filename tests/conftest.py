"""Settings that every test runs under: shapes and dtypes checked at run time, no silent rank promotion."""

import os
import shutil
import tempfile
from pathlib import Path

import jax
import jaxtyping
import pytest

# Before any `megjax` module is imported, so that each public function's annotations are checked.
jaxtyping.install_import_hook("megjax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")

COMPILE_QUICKLY = (
    "client/",
    "distill/",
    "eval/test_mains.py",
    "models/test_networks.py",
    "models/test_parity.py",
    "pipeline/",
    "serve/test_choice.py",
    "serve/test_http.py",
    "serve/test_queue.py",
    "training/test_pretrain.py",
)
"""Tests that compile for far longer than they run, and whose bars do not depend on how well."""

FIRST = ("test_meshes.py", "test_pretrain.py", "test_policies.py", "test_captions.py")
"""Files that take longest: begun last, they would keep one process busy while the others wait."""


def pytest_configure(config):
    """Let all processes of one run, those that tests start included, share what they compile."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # the user's, or the run's in its workers
        return
    config.compilations = tempfile.mkdtemp(prefix="megjax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compilations
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", config.compilations)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_unconfigure(config):
    if hasattr(config, "compilations"):
        shutil.rmtree(config.compilations, ignore_errors=True)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(autouse=True, scope="module")
def compilation(request):
    quickly = request.path.relative_to(Path(__file__).parent).as_posix().startswith(COMPILE_QUICKLY)
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
