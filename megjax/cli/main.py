"""`megjax COMMAND ...`: one line and exit code 2 for whatever the user can mend."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import tyro

from megjax.allocator import keep_freed_memory
from megjax.cli.device import device_command
from megjax.cli.export_ue import export_ue_command
from megjax.cli.generate import generate_command
from megjax.cli.plan import plan_command
from megjax.cli.serve import serve_command
from megjax.errors import MegError

COMMANDS = {
    "generate": generate_command,
    "plan": plan_command,
    "export-ue": export_ue_command,
    "serve": serve_command,
    "device": device_command,
}


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    _cache_compilations()
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="megjax")
    except MegError as error:
        print(f"megjax: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _cache_compilations() -> None:
    """Keep compiled programs between runs, unless the environment says where (or that JAX should not)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megjax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
