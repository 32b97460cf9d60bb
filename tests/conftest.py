"""Settings that every test runs under: shapes and dtypes checked at run time, no silent rank promotion."""

from pathlib import Path

import jax
import jaxtyping
import pytest

# Before any `megjax` module is imported, so that each public function's annotations are checked.
jaxtyping.install_import_hook("megjax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")

COMPILE_QUICKLY = ("distill/", "models/test_networks.py", "pipeline/")
"""Tests that compile for far longer than they run, and whose bars do not depend on how well."""

FIRST = ("test_pretrain.py", "test_meshes.py", "test_networks.py")
"""Files that take longest: begun last, they would keep one process busy while the others wait."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(autouse=True, scope="module")
def compilation(request):
    quickly = request.path.relative_to(Path(__file__).parent).as_posix().startswith(COMPILE_QUICKLY)
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
