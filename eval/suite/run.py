"""The run: items in an order that keeps both halves of the machine busy, then everything written."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from eval.suite import config as settings
from eval.suite.claims import claims
from eval.suite.config import ITEMS, SuiteConfig
from eval.suite.context import Context, Stage, get, is_kept
from eval.suite.curves import fig3, fig4, fig5, noise, payload
from eval.suite.learning import fig6, fig7, pareto
from eval.suite.numbers import Record
from eval.suite.policies import LEARNERS, problem, start, training
from eval.suite.present.figures import draw
from eval.suite.present.report import report
from eval.suite.present.tables import csv_text, markdown
from eval.suite.table1 import table1
from eval.suite.table2 import table2
from eval.suite.timing import timings
from megjax.files import writable_folder, write_file

MAKE: dict[str, Callable[[Context], Record]] = {
    "table1": table1,
    "table2": table2,
    "fig3": fig3,
    "fig4": fig4,
    "fig5": fig5,
    "fig6": fig6,
    "fig7": fig7,
    "pareto": pareto,
    "noise": noise,
    "payload": payload,
    "claims": claims,
}
TIMED, LEARNED = {"table2", "fig3", "claims"}, {"fig6", "fig7", "pareto", "claims"}
"""Items that need a quiet machine, and those that need trained policies."""


def run(
    config: SuiteConfig,
    *,
    say: Callable[[str], None] = print,
    on_stage: Callable[[Stage], None] = lambda stage: None,
    on_share: Callable[[float, str], None] = lambda share, note: None,
    on_item: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Make the items and write `results.json`, `report.html`, `figures/` and `tables/` to `config.out`.

    Args:
        config: what to make.
        say: takes one line for the user.
        on_stage: told each stage before it is computed.
        on_share: told how far a long stage is.
        on_item: told each item that is done.

    Raises:
        MegError: settings that are not allowed, unreadable prompts, or a folder that cannot be written.
    """
    settings.check(config)
    writable_folder(config.out)
    wanted = settings.items(config)
    context = Context(config, say, on_stage, on_share)
    if config.prompts is not None:
        _ = context.prompts
    if TIMED & set(wanted):
        get(context, timings(config))
    if LEARNED & set(wanted):
        found = get(context, problem(config))
        for learner in LEARNERS:
            if not is_kept(context, stage := training(config, learner)):
                start(context, stage, found)
    made: dict[str, Record] = {}
    # What the policies are not needed for comes first, while they train.
    for name in sorted(wanted, key=lambda name: (name in LEARNED, list(ITEMS).index(name))):
        made[name] = MAKE[name](context)
        on_item(name)
    results = {
        "format": "megjax-suite-1",
        "settings": _plain(config),
        "device": context.device,
        "processors": os.cpu_count(),
        "versions": context.versions,
        "items": {name: {"title": ITEMS[name], **made[name]} for name in wanted},
        "stages": context.records,
    }
    # What JSON makes of it is what is drawn: nothing in the report is not in the file.
    text = json.dumps(results, indent=1)
    write(config.out, json.loads(text), text, say)
    return results


def write(out: Path, results: Record, text: str, say: Callable[[str], None] = print) -> None:
    """Write the results and all that is drawn from them."""
    write_file(out / "results.json", text)
    drawn: dict[str, dict[str, bytes]] = {}
    for item in results["items"].values():
        for table in item["tables"]:
            write_file(out / "tables" / f"{table['id']}.csv", csv_text(table))
            write_file(out / "tables" / f"{table['id']}.md", markdown(table))
        for figure in item["figures"]:
            drawn[figure["id"]] = draw(figure)
            for suffix, content in drawn[figure["id"]].items():
                write_file(out / "figures" / f"{figure['id']}{suffix}", content)
    write_file(out / "report.html", report(results, drawn))
    say(f"{out / 'report.html'}: {', '.join(results['items'])}")


def _plain(config: SuiteConfig) -> Record:
    fields = dataclasses.asdict(config)
    # Where results are written does not belong to them.
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items() if k not in ("out", "only")}


def cache_compilations(out: Path) -> None:
    """Keep compiled programs with the results, unless the environment says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(out.absolute() / "cache" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
