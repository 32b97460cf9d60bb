"""Figures from their records: light and dark, PNG and SVG."""

from __future__ import annotations

import base64
import io
from typing import Any, Literal, TypeAlias

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from eval.suite.numbers import Record
from eval.suite.present.tables import significant

Theme: TypeAlias = Literal["light", "dark"]

INK = {"light": "#1f2630", "dark": "#e4e8ee"}
FAINT = {"light": "#c9d0d9", "dark": "#3d4653"}
PAPER = {"light": "#ffffff", "dark": "#14181e"}
WIDTH = 5.8
"""Inches; text of 9 points is then read at a phone's width too."""

TEAL = {"light": ("#7cc7bd", "#2a9d8f", "#14655c"), "dark": ("#a5e3da", "#3fbfae", "#23877a")}
AMBER = {"light": ("#e9a23b", "#b8700a"), "dark": ("#ffcf7d", "#e09a2b")}
BLUE, GREY, PLUM, RED = (
    {"light": "#2f6fb7", "dark": "#76aef0"},
    {"light": "#7b8592", "dark": "#98a3b2"},
    {"light": "#7d4f9e", "dark": "#c79be6"},
    {"light": "#c8443c", "dark": "#ff8a7f"},
)


def colour(series: str, theme: Theme) -> str:
    """Return the colour of a series: a method keeps its own through all figures."""
    teal, amber = TEAL[theme], AMBER[theme]
    known = {
        "split": GREY[theme],
        "split_finetune": BLUE[theme],
        "pruning": amber[0],
        "pruning_magnitude": amber[1],
        "meg": teal[1],
        "meg_plain": teal[1],
        "meg/0.1": teal[0],
        "meg/0.4": teal[1],
        "meg/0.5": teal[1],
        "meg/0.8": teal[2],
        "pruning/0.1": amber[0],
        "pruning/0.2": amber[1],
        "pruning_magnitude/0.1": amber[0],
        "pruning_magnitude/0.2": amber[1],
        "jpeg": PLUM[theme],
        "cvpo": teal[1],
        "ppo": amber[0],
        "optimum": INK[theme],
        "static": GREY[theme],
        "loose": teal[1],
        "middle": PLUM[theme],
        "tight": RED[theme],
        "U-Net": BLUE[theme],
        "U-Net, ToMe": teal[1],
        "VAE decoder": amber[0],
        "fit": INK[theme],
        "energy": RED[theme],
        "es": BLUE[theme],
        "tx": amber[0],
        "ue": teal[1],
    }
    return known.get(series, known.get(series.split("/")[0], INK[theme]))


MARKERS = {
    "split": "s",
    "split_finetune": "D",
    "pruning": "v",
    "pruning_magnitude": "v",
    "meg": "o",
    "jpeg": "P",
    "ppo": "^",
    "VAE decoder": "s",
    "U-Net, ToMe": "^",
}


def draw(figure: Record) -> dict[str, bytes]:
    """Return a figure's files by what follows its name."""
    files = {}
    themes: tuple[tuple[Theme, str], ...] = (("light", ""), ("dark", "-dark"))
    for theme, suffix in themes:
        drawn = _figure(figure, theme)
        for kind in ("png", "svg"):
            content = io.BytesIO()
            # Without a date and with fixed ids, the same results give the same file.
            metadata = {"Date": None} if kind == "svg" else {}
            with matplotlib.rc_context({"svg.hashsalt": "megjax", "svg.fonttype": "path"}):
                drawn.savefig(content, format=kind, dpi=200, metadata=metadata)
            files[f"{suffix}.{kind}"] = content.getvalue()
    return files


def _figure(figure: Record, theme: Theme) -> Figure:
    with matplotlib.rc_context(_style(theme)):
        if "samples" in figure:
            return _samples(figure["samples"], theme)
        if "bars" in figure:
            return _bars(figure["bars"], theme)
        return _panels(figure, theme)


def _style(theme: Theme) -> Any:
    ink = INK[theme]
    return {
        "figure.facecolor": PAPER[theme],
        "axes.facecolor": PAPER[theme],
        "savefig.facecolor": PAPER[theme],
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": GREY[theme],
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT[theme],
        "grid.linewidth": 0.6,
        "grid.alpha": 0.7,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
    }


def _panels(figure: Record, theme: Theme) -> Figure:
    panels, columns = figure["panels"], figure.get("columns", 1)
    rows = -(-len(panels) // columns)
    height = (3.5 if columns == 1 else 2.45) * rows + 0.55
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = np.atleast_1d(drawn.subplots(rows, columns, squeeze=False)).ravel()
    for one, panel in zip(axes, panels, strict=True):
        _panel(one, panel, theme)
    for name in {panel["row"] for panel in panels if "row" in panel}:
        own = [one for one, panel in zip(axes, panels, strict=True) if panel.get("row") == name]
        ends = np.asarray([one.get_ylim() for one in own])
        for one in own:
            one.set_ylim(ends[:, 0].min(), ends[:, 1].max())
        for one in own[1:]:
            one.set_ylabel("")
    found: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) > 1:
        ncols = min(len(found), 3 if max(map(len, found)) < 22 else 2)
        drawn.legend(list(found.values()), list(found), loc="outside lower center", ncols=ncols)
    return drawn


def _panel(axes: Any, panel: Record, theme: Theme) -> None:
    for span in panel.get("spans", ()):
        axes.axvspan(span["from"], span["to"], color=FAINT[theme], alpha=0.35, linewidth=0)
        axes.text(span["from"], 0.99, f" {span['label']}", transform=axes.get_xaxis_transform(), va="top",
                  fontsize=8, color=GREY[theme])  # fmt: skip
    drawn = [curve for curve in panel["lines"] if not curve.get("points")]
    crowded = max((len(curve["x"]) for curve in drawn), default=0) > 20
    for curve in panel["lines"]:
        own = colour(curve["series"], theme)
        marker = MARKERS.get(curve["series"].split("/")[0], "o")
        style = "none" if curve.get("points") else (0, (5, 2)) if curve.get("dash") else "-"
        if curve.get("dash") or (crowded and not curve.get("points")):
            marker = ""
        if curve.get("points") and "low" in curve:
            ends = np.abs(np.asarray([curve["low"], curve["high"]]) - np.asarray(curve["y"]))
            axes.errorbar(curve["x"], curve["y"], ends, color=own, fmt=marker or "o", label=curve["label"],
                          elinewidth=1.2, markersize=6)  # fmt: skip
            continue
        axes.plot(curve["x"], curve["y"], color=own, marker=marker, linestyle=style, label=curve["label"])
        if "low" in curve:
            axes.fill_between(curve["x"], curve["low"], curve["high"], color=own, alpha=0.16, linewidth=0)
    for level in panel.get("levels", ()):
        axes.axhline(
            level["value"], color=colour(level["series"], theme), linestyle=(0, (4, 2)), linewidth=1.1
        )
    for which in ("x", "y"):
        spec = panel[which]
        getattr(axes, f"set_{which}label")(spec["label"] + (f" / {spec['unit']}" if spec["unit"] else ""))
        if spec["scale"] == "log":
            _logarithmic(axes, which)
    if title := panel.get("title"):
        axes.set_title(title)


def _logarithmic(axes: Any, which: Literal["x", "y"]) -> None:
    """Put a logarithmic scale with plain numbers, as many of each decade as there is room for."""
    getattr(axes, f"set_{which}scale")("log")
    own = getattr(axes, f"{which}axis")
    low, high = getattr(axes, f"get_{which}lim")()
    decades = np.log10(high / low)
    subs = (1, 1.2, 1.5, 2, 3, 4, 5, 7) if decades < 0.7 else (1, 2, 3, 5) if decades < 1 else (1, 2, 5)
    own.set_major_locator(LogLocator(10, subs=subs if decades < 2 else (1,)))
    own.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if 1e-4 <= x < 1e5 else significant(x, 1)))
    own.set_minor_formatter(NullFormatter())


def _bars(bars: Record, theme: Theme) -> Figure:
    rows, names = bars["rows"], {"es": "server", "tx": "air", "ue": "device"}
    drawn = Figure(figsize=(WIDTH, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = drawn.subplots()
    longest = max(sum(row["parts"].values()) for row in rows)
    left = np.zeros(len(rows))
    places = np.arange(len(rows))[::-1]
    for part, name in names.items():
        values = np.asarray([row["parts"][part] for row in rows])
        axes.barh(places, values, left=left, color=colour(part, theme), label=name, height=0.62)
        left += values
    for place, total, row in zip(places, left, rows, strict=True):
        # Backwards from the last step's end: only what a centralised server decodes comes after it.
        ends = row["parts"]["es"] - row["after_s"] - row["step_s"] * np.arange(row["steps"])
        ends = ends[ends < row["parts"]["es"]]
        axes.vlines(ends, place - 0.31, place + 0.31, color=PAPER[theme], linewidth=0.7)
        axes.text(total + 0.01 * longest, place, f"{total:.2f}", va="center", fontsize=8.5)
    axes.set_yticks(places, [row["label"] for row in rows])
    axes.set_xlim(0, 1.1 * longest)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{bars['x']['label']} / {bars['x']['unit']}")
    drawn.legend(loc="outside lower center", ncols=3)
    return drawn


def _samples(samples: list[Record], theme: Theme) -> Figure:
    columns = 3
    rows = -(-len(samples) // columns)
    drawn = Figure(figsize=(WIDTH, 2.35 * rows), layout="constrained")
    for i, sample in enumerate(samples):
        axes = drawn.add_subplot(rows, columns, i + 1)
        picture = Image.open(io.BytesIO(base64.b64decode(sample["image"])))
        axes.imshow(np.asarray(picture), interpolation="nearest")
        axes.set_axis_off()
        label = sample["label"].replace(", ", "\n", 1)
        if "mse" in sample:
            label += f"\nMSE {significant(sample['mse']['value'], 3)}"
        axes.set_title(label, fontsize=8, loc="center", fontweight="normal", color=INK[theme])
    return drawn
