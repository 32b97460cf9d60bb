"""Tables as CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import html
import io
import math
from typing import Any

from eval.suite.numbers import Record

TAGS = ("measured", "modelled", "calibrated", "paper", "setting")


def csv_text(table: Record) -> str:
    """Return a table as CSV: a column for the value, its interval's ends and its tag."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = [table.get("first", "")]
    for column in table["columns"]:
        name = column["label"] + (f", {column['unit']}" if column["unit"] else "")
        header += [name]
        if has_interval(table, column["key"]):
            header += [f"{name}, low", f"{name}, high"]
        if numeric(table, column["key"]):
            header += [f"{name}, tag"]
    writer.writerow(header)
    for row in table["rows"]:
        line = [row["label"]]
        for column in table["columns"]:
            key = column["key"]
            cell = row["cells"].get(key)
            if isinstance(cell, list):
                cell = text(cell, column["digits"])
            found = cell if isinstance(cell, dict) else {"value": cell}
            line.append("" if found["value"] is None else found["value"])
            if has_interval(table, key):
                line += [found.get("low", ""), found.get("high", "")]
            if numeric(table, key):
                line.append(found.get("tag", ""))
        writer.writerow(line)
    return out.getvalue()


def markdown(table: Record) -> str:
    """Return a table as Markdown with its caption."""
    heads = [""]
    for column in table["columns"]:
        tag = tag_of(table, column["key"])
        heads.append(head(column) + (f" ({tag})" if tag else ""))
    lines = [f"**{table['title']}.** {table['caption']}", "", _md_row(heads), "|" + "---|" * len(heads)]
    for row in table["rows"]:
        cells = [text(row["cells"].get(c["key"]), c["digits"]) for c in table["columns"]]
        lines.append(_md_row([row["label"], *cells]))
    return "\n".join(lines) + "\n"


def _md_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def html_cards(table: Record) -> str:
    """Return the claims as HTML: each with its verdict, its numbers and the rule."""
    cards = []
    for row in table["rows"]:
        cells = row["cells"]
        numbers = "".join(
            f"<li>{html.escape(c['label'])}: <b>{html.escape(text(c, 3))}</b> {html.escape(c['unit'])}"
            f"{chip(c['tag'])}</li>"
            for c in cells["found"]
        )
        untested = cells["verdict"].startswith("not")
        cards.append(
            f'<li><p class=verdict data-verdict="{cells["verdict"]}">{cells["verdict"]}</p><div>'
            f"<h3>{html.escape(row['label'])}</h3><ul class=found>{numbers}</ul>"
            f"<p class=rule>{'' if untested else 'Holds if '}{html.escape(cells['rule'])}. "
            f"<span>{html.escape(cells['where'])}</span></p></div></li>"
        )
    caption = f"<p class=caption>{html.escape(table['caption'])}</p>"
    return f"{caption}<ol class=claims id={table['id']}-list>{''.join(cards)}</ol>"


def html_table(table: Record) -> str:
    """Return a table as HTML: numbers aligned right, each column's tag in its head or in its cells."""
    if table.get("layout") == "cards":
        return html_cards(table)
    heads = []
    for column in table["columns"]:
        kind = tag_of(table, column["key"])
        unit = f"<small>{html.escape(column['unit'])}</small>" if column["unit"] else ""
        side = " class=n" if numeric(table, column["key"]) else ""
        heads.append(f"<th scope=col{side}>{html.escape(column['label'])} {unit}{chip(kind)}</th>")
    rows = []
    for row in table["rows"]:
        cells = []
        for column in table["columns"]:
            cell = row["cells"].get(column["key"])
            own = "" if tag_of(table, column["key"]) or not isinstance(cell, dict) else chip(cell["tag"])
            shown = (
                html.escape(text(cell, column["digits"])).replace(" [", " <small>[").replace("]", "]</small>")
            )
            kind = "" if isinstance(cell, str) else " class=n"
            cells.append(f"<td{kind}>{shown}{own}</td>")
        rows.append(f"<tr><th scope=row>{html.escape(row['label'])}</th>{''.join(cells)}</tr>")
    caption = f"<caption><b>{html.escape(table['title'])}.</b> {html.escape(table['caption'])}</caption>"
    first = html.escape(table.get("first", ""))
    body = f"<thead><tr><th>{first}</th>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody>"
    name = html.escape(table["title"])
    inner = f'<table id="{table["id"]}">{caption}{body}</table>'
    return f'<div class=scroll tabindex=0 role=region aria-label="{name}">{inner}</div>'


def chip(tag: str | None) -> str:
    """Return the mark that says where a number comes from."""
    return f"<span class='tag {tag}'>{tag}</span>" if tag else ""


def head(column: Record) -> str:
    """Return a column's label with its unit."""
    return column["label"] + (f", {column['unit']}" if column["unit"] else "")


def tag_of(table: Record, key: str) -> str | None:
    """Return the tag that all numbers of a column share, or None."""
    tags = {c["tag"] for c in _cells(table, key) if isinstance(c, dict)}
    return tags.pop() if len(tags) == 1 else None


def has_interval(table: Record, key: str) -> bool:
    """Say whether a column's numbers have intervals."""
    return any("low" in c for c in _cells(table, key) if isinstance(c, dict))


def numeric(table: Record, key: str) -> bool:
    """Say whether a column holds numbers."""
    return any(isinstance(c, dict) for c in _cells(table, key))


def _cells(table: Record, key: str) -> list[Any]:
    return [row["cells"].get(key) for row in table["rows"]]


def text(cell: Any, digits: int) -> str:
    """Return a cell as it is read: significant digits, and the interval in brackets."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list):
        return "; ".join(f"{c['label']}: {text(c, digits)} {c['unit']}".rstrip() for c in cell) or "–"
    # What somebody chose has the digits that he gave it.
    show = _given if cell["tag"] in ("setting", "paper") else significant
    shown = show(cell["value"], digits)
    if "low" in cell and cell["low"] != cell["high"]:
        shown += f" [{show(cell['low'], digits)}, {show(cell['high'], digits)}]"
    return shown


def _given(value: float, digits: int) -> str:
    return f"{value:.{max(digits, 4)}g}".replace("-", "−")


def significant(value: float, digits: int) -> str:
    """Return a number with so many significant digits, without an exponent where it is short enough."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if not -5 <= exponent < 7:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - exponent)
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.{decimals}f}".replace("-", "−")
