"""Settings that every test runs under: shapes and dtypes checked at run time, no silent rank promotion."""

import jax
import jaxtyping

# Before any `megjax` module is imported, so that each public function's annotations are checked.
jaxtyping.install_import_hook("megjax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
