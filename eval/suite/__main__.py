"""`python -m eval.suite [PRESET] [--only fig5,table2] [--out DIR]`: the paper's tables and figures."""

from __future__ import annotations

import sys

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from configs.suite import PRESETS
from eval.suite.config import SuiteConfig, items
from eval.suite.run import cache_compilations, prepare, run
from megjax.errors import MegError


def main(arguments: list[str]) -> int:
    """Run the suite; return the exit code."""
    preset = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if preset is not None and preset not in PRESETS:
        print(f"error: unknown preset {preset!r}: choose from {', '.join(PRESETS)}", file=sys.stderr)
        return 2
    rest = arguments[1:] if preset is not None else arguments
    name = preset or "tiny"
    summary, default = PRESETS[name]
    config = tyro.cli(
        SuiteConfig,
        prog=f"python -m eval.suite {name}",
        description=f"{summary} Presets: {', '.join(PRESETS)}.",
        default=default,
        args=rest,
    )
    try:
        _run(config)
    except MegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(config: SuiteConfig) -> None:
    wanted = items(config)
    prepare(config.out)
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
            say=progress.console.print,
            on_stage=lambda found: stage(found.name),
            on_share=lambda share, note: progress.update(
                task, description=f"{current[0]}: {share:.0%}, {note}"
            ),
            on_item=lambda _: progress.advance(task),
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
