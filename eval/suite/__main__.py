"""`python -m eval.suite [PRESET] [--only fig5,table2] [--out DIR]`: the paper's tables and figures."""

from __future__ import annotations

import sys

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from configs.suite import PRESETS
from eval.suite.config import SuiteConfig, check, items
from eval.suite.run import cache_compilations, run
from megjax.errors import MegError, one_line_errors
from megjax.files import writable_folder


@one_line_errors()
def main(arguments: list[str]) -> None:
    """Run the suite."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if named else ("tiny", arguments)
    if name not in PRESETS:
        raise MegError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    summary, default = PRESETS[name]
    config = tyro.cli(
        SuiteConfig,
        prog=f"python -m eval.suite {name}",
        description=f"{summary} Presets: {', '.join(PRESETS)}.",
        default=default,
        args=rest,
    )
    _run(config)


def _run(config: SuiteConfig) -> None:
    check(config)
    wanted = items(config)
    writable_folder(config.out)
    cache_compilations(config.out)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=len(wanted))
        current = ["starting"]

        def stage(name: str) -> None:
            current[0] = name
            progress.update(task, description=name)

        run(
            config,
            say=lambda line: progress.console.print(line, markup=False),
            on_stage=lambda found: stage(found.name),
            on_share=lambda share, note: progress.update(
                task, description=f"{current[0]}: {share:.0%}, {note}"
            ),
            on_item=lambda _: progress.advance(task),
        )


if __name__ == "__main__":
    main(sys.argv[1:])
