"""`report.html`: one file, readable offline, on a phone, in light and dark; it asks for nothing else."""

from __future__ import annotations

import base64
import html
from importlib import resources

from eval.suite.numbers import Record
from eval.suite.present.tables import TAGS, chip, html_table

MEANING = {
    "measured": "measured in this run",
    "modelled": "computed from counted FLOPs and bits, a hardware profile and a channel",
    "calibrated": "from a profile fitted to the paper's own numbers: agreement is no evidence",
    "paper": "the paper's own",
    "setting": "set for this run",
}


def report(results: Record, drawn: dict[str, dict[str, bytes]]) -> str:
    """Return the page.

    Args:
        results: what `results.json` holds.
        drawn: each figure's files.
    """
    style = resources.files("eval.suite.present").joinpath("report.css").read_text()
    settings = results["settings"]
    legend = "".join(f"<li>{chip(tag)} {html.escape(MEANING[tag])}</li>" for tag in TAGS)
    links = "".join(
        f'<a href="#{name}">{html.escape(_short(item["title"]))}</a>'
        for name, item in results["items"].items()
    )
    sections = "".join(_section(name, item, drawn) for name, item in results["items"].items())
    joined = (
        "Two sources are joined: quality is measured on the model's own pictures through the link; payload, "
        "FLOPs, latency and energy are those of full SDXL at 1024 × 1024 under a hardware profile."
        if settings["physical"] == "sdxl"
        else "Quality, payload, FLOPs, latency and energy are all those of the model itself."
    )
    lead = (
        f"Model <b>{html.escape(str(settings['model']))}</b>, rules <b>{settings['rules']}</b>, profile "
        f"<b>{html.escape(str(settings['profile']))}</b>, {settings['pictures']} pictures, "
        f"{settings['seeds']} seeds "
        f"of each policy. {joined}"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>MegJAX: the evaluation suite</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="name">MegJAX · evaluation suite</p>
<h1>Accelerating Mobile Edge Generation by Constrained Learning, reproduced</h1>
<p>{lead}</p>
<ul class="legend">{legend}</ul>
<nav>{links}</nav>
</header>
<main>{sections}</main>
<footer>{_footer(results)}</footer>
</body>
</html>
"""


def _short(title: str) -> str:
    return {"What the paper claims, and what holds": "Claims"}.get(title, title.split(":")[0])


def _section(name: str, item: Record, drawn: dict[str, dict[str, bytes]]) -> str:
    parts = [f'<section id="{name}"><h2>{html.escape(item["title"])}</h2>']
    if "summary" in item:
        tiles = "".join(
            f'<li data-verdict="{verdict}"><b>{int(count["value"])}</b> {verdict}</li>'
            for verdict, count in item["summary"].items()
        )
        parts.append(f"<ul class=summary>{tiles}</ul>")
    parts += [f"<p>{html.escape(text)}</p>" for text in item["text"]]
    parts += [_figure(figure, drawn[figure["id"]]) for figure in item["figures"]]
    parts += [html_table(table) for table in item["tables"]]
    return "".join(parts) + "</section>"


def _figure(figure: Record, files: dict[str, bytes]) -> str:
    light, dark = (
        f"data:image/svg+xml;base64,{base64.b64encode(files[name]).decode()}"
        for name in (".svg", "-dark.svg")
    )
    tags = sorted(set(_tags(figure)), key=TAGS.index)
    return (
        f'<figure id="figure-{figure["id"]}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(figure["alt"])}"></picture>'
        f"<figcaption><b>{html.escape(figure['title'])}.</b> {html.escape(figure['caption'])} "
        f"{''.join(map(chip, tags))}</figcaption></figure>"
    )


def _tags(figure: Record) -> list[str]:
    if "samples" in figure:
        return ["measured"]
    if "bars" in figure:
        return [figure["bars"]["tag"]]
    return [curve["tag"] for panel in figure["panels"] for curve in panel["lines"]]


def _footer(results: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seconds = sum(record["seconds"] for record in results["stages"].values())
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td class=n>{record['seconds']:.1f}</td>"
        f"<td>{html.escape(record['device'])}</td><td>{html.escape(record['finished'])}</td></tr>"
        for name, record in results["stages"].items()
    )
    return (
        f"<p>Computed on {html.escape(results['device'])}, {results['processors']} processors; "
        f"{html.escape(versions)}. {len(results['stages'])} stages took {seconds:.0f} s; some of them ran "
        "side by side, and some may come from the cache of an earlier run. Every number is in "
        "<code>results.json</code>.</p><details><summary>Stages</summary><div class=scroll "
        "tabindex=0><table><thead><tr><th></th><th scope=col>s</th><th scope=col>device</th><th "
        f"scope=col>finished</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
