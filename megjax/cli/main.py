"""`megjax COMMAND ...`: one line and exit code 2 for whatever the user can mend."""

from __future__ import annotations

import tyro

from megjax.allocator import keep_freed_memory
from megjax.cli.device import device_command
from megjax.cli.export_ue import export_ue_command
from megjax.cli.generate import generate_command
from megjax.cli.plan import plan_command
from megjax.cli.serve import serve_command
from megjax.compilation import keep_compilations
from megjax.errors import one_line_errors

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
    with one_line_errors("megjax"):
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="megjax")
