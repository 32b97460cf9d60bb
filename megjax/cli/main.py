"""`megjax COMMAND ...`: one line and exit code 2 for whatever the user can mend."""

from __future__ import annotations

import sys

import tyro

from megjax.allocator import keep_freed_memory
from megjax.cli.device import device_command
from megjax.cli.export_ue import export_ue_command
from megjax.cli.generate import generate_command
from megjax.cli.plan import plan_command
from megjax.cli.serve import serve_command
from megjax.compilation import keep_compilations
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
    keep_compilations()
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="megjax")
    except MegError as error:
        print(f"megjax: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
