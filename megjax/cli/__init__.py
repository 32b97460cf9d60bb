"""The `megjax` command."""

from megjax.cli.main import main

__all__ = ["main"]
