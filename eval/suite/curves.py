"""Figs. 3 to 5, and two curves that the paper lacks: against noise, and against the message's length."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from eval.suite import methods, physical
from eval.suite.codecs import QUALITY, codecs
from eval.suite.context import Context, get
from eval.suite.measure import reference, sweep
from eval.suite.methods import LABELS, Name
from eval.suite.numbers import Record, axis, line, mean, number
from eval.suite.paper import FIG5_RATIOS, TABLE_II
from eval.suite.policies import STEPS, counts, quality
from eval.suite.table2 import entries, pruning_said, shown, stronger
from eval.suite.timing import DECODER, PICTURES, PLAIN, TOME, timings
from megjax.link.counts import largest_ratio
from megjax.link.payload import rounds_of
from megjax.rl.problem import SDXL_GRID

SHOWN_STEPS = 8
"""T of the curves that do not vary it."""
THUMBNAIL = 256
"""Longest side of a sample in results.json; pixels."""
SHARES = (0.9, 0.7, 0.5, 0.3, 0.15)
"""Of the uncompressed latent's bits, longest first: where methods of many lengths are measured."""


def fig3(context: Context) -> Record:
    """Return Fig. 3: this machine's latency against FLOPs, the fitted line and R^2."""
    found = get(context, timings(context.config))
    overall = found["lines"]["all"]
    curves = []
    for kind in (PLAIN, TOME, DECODER):
        own = [p for p in found["points"] if p["kind"] == kind]
        x, y = [p["flops"] / 1e9 for p in own], [1e3 * p["seconds"] for p in own]
        curves.append(line(kind, kind, x, y, "measured", points=True, timed=True))
    most = max(p["flops"] for p in found["points"])
    ends = [1e3 * (overall["intercept_s"] + f / overall["flops_per_s"]) for f in (0.0, most)]
    curves.append(line("fit", "fitted line", [0.0, most / 1e9], ends, "measured", dash=True, timed=True))
    figures = [
        {
            "id": "fig3",
            "title": "Latency against FLOPs on this machine",
            "caption": f"{context.config.model} on {context.device}: T denoising steps of one picture under "
            f"guidance {context.config.guidance:g}, with and without token merging, and the decoder on "
            f"{PICTURES[0]} to {PICTURES[-1]} pictures. FLOPs are counted from the program.",
            "alt": "Measured latency of U-Net and decoder against their FLOPs, with a straight line fitted.",
            "panels": [{"x": axis("work", "GFLOP"), "y": axis("latency", "ms"), "lines": curves}],
        }
    ]
    if found["meter"]:
        own = [p for p in found["points"] if p["joules"] is not None]
        x, y = [p["flops"] / 1e9 for p in own], [p["joules"] for p in own]
        joules = line("energy", found["meter"], x, y, "measured", points=True, timed=True)
        figures[0]["panels"].append({"x": axis("work", "GFLOP"), "y": axis("energy", "J"), "lines": [joules]})
    rows = [
        {
            "label": kind,
            "cells": {
                "speed": number(own["flops_per_s"] / 1e9, "measured", "GFLOP/s", timed=True),
                "start": number(1e3 * own["intercept_s"], "measured", "ms", timed=True),
                "r2": number(own["r_squared"], "measured", timed=True),
            },
        }
        for kind, own in found["lines"].items()
    ]
    lines = {
        "id": "fig3-lines",
        "title": "Fitted lines",
        "caption": "latency = t0 + FLOPs / f by least squares.",
        "columns": [
            {"key": "speed", "label": "f", "unit": "GFLOP/s", "digits": 3},
            {"key": "start", "label": "t0", "unit": "ms", "digits": 2},
            {"key": "r2", "label": "R²", "unit": "", "digits": 4},
        ],
        "rows": rows,
    }
    meter = "" if found["meter"] else " No energy meter can be read here (NVML on NVIDIA GPUs, RAPL on CPUs)."
    text = "The latency and energy model, Eqs. (1)-(3), takes both to be linear in FLOPs." + meter
    return {"text": [text], "tables": [lines], "figures": figures}


def fig4(context: Context) -> Record:
    """Return Fig. 4: one prompt, the same seed, every method."""
    config = context.config
    clean = get(context, reference(config))
    samples: list[Record] = [{"label": "Centralized, perfect channel", "image": encoded(clean["first"])}]
    for entry in entries(context):
        if entry.name is None:
            continue
        found = get(context, shown(config, entry.row, entry.name))
        ratio = f", ratio {entry.row.ratio:g}" if entry.row.ratio else ""
        label = f"{LABELS[entry.name]}, {entry.row.steps} steps{ratio}"
        mse = number(found["mse"][0], "measured")
        samples.append({"label": label, "image": encoded(found["first"]), "mse": mse})
    return {
        "text": [],
        "tables": [],
        "figures": [
            {
                "id": "fig4",
                "title": "One prompt, the same seed, every method",
                "caption": f"“{context.prompts[0]}”, drawn by {config.model}, features at "
                f"{config.feature_psnr_db:g} dB PSNR; under each method its MSE against the reference, the "
                "first.",
                "alt": "Pictures of one prompt: the clean reference, then what the device shows by each "
                "method.",
                "samples": samples,
            }
        ],
    }


def encoded(image: np.ndarray) -> str:
    """Return a small copy of a picture as PNG in base64."""
    picture, content = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def meg_mse(context: Context, steps: int, ratio: float) -> np.ndarray:
    """Return MEG's MSE of each picture, from the table where it holds that ratio."""
    config = context.config
    if ratio in config.ratios:
        return get(context, quality(config)[steps - STEPS[0]])["mse"][config.ratios.index(ratio), 0]
    return get(context, sweep(config, "meg", steps, (ratio,), (config.feature_psnr_db,)))["mse"][0, 0]


def fig5_data(context: Context) -> dict[str, dict[int, np.ndarray]]:
    """Return each series' MSE of each picture at each T, by `method/ratio`; prunings at equal bits."""
    config = context.config
    noise = (config.feature_psnr_db,)
    series: dict[str, dict[int, np.ndarray]] = {}
    for name, ratios in FIG5_RATIOS.items():
        variants = context.prunings if name == "pruning" else (name,)
        for variant in variants:
            levels = [methods.level_of(variant, ratio) for ratio in ratios]
            for steps in STEPS:
                for i, ratio in enumerate(ratios):
                    if variant == "meg":
                        own = meg_mse(context, steps, ratio)
                    else:
                        own = get(context, sweep(config, variant, steps, levels, noise))["mse"][i, 0]
                    series.setdefault(f"{variant}/{ratio:g}", {})[steps] = own
    return series


def stronger_pruning(context: Context, data: dict[str, dict[int, np.ndarray]]) -> Name:
    """Return the pruning of lower mean MSE over Fig. 5."""

    def total(name: Name) -> float:
        return sum(
            float(np.mean(v)) for k, own in data.items() if k.split("/")[0] == name for v in own.values()
        )

    return min(context.prunings, key=total)


def fig5(context: Context) -> Record:
    """Return Fig. 5: MSE against T for each method and ratio."""
    config, data = context.config, fig5_data(context)
    best = stronger_pruning(context, data)
    most = largest_ratio(SDXL_GRID, rounds_of(config.rules))  # the rules `paper` merge no more
    curves = []
    for key, own in data.items():
        name, ratio = key.split("/")
        if name in methods.PRUNINGS and name != best:
            continue
        merged = min(float(ratio), most) if name.startswith("meg") else float(ratio)
        shown_ratio = "" if name.startswith("split") else f", ratio {merged:g}"
        label = f"{LABELS[name]}{shown_ratio}"  # type: ignore[index]
        dash = name == "meg_plain"
        curves.append(line(key, label, list(own), [mean(v) for v in own.values()], "measured", dash=dash))
    return {
        "text": [
            f"{pruning_said(context, best)} MEG and MEG-Pruning merge tokens inside the U-Net (ToMe) as the "
            "paper has it; the dashed line is MEG without. Ratios are shares of tokens merged or of scalars "
            "pruned; where magnitudes are pruned, of the bits."
        ],
        "tables": [],
        "figures": [
            {
                "id": "fig5",
                "title": "MSE against denoising steps",
                "caption": f"Measured on {config.model} through the link at {config.feature_psnr_db:g} dB "
                f"PSNR, {config.pictures} paired pictures; bands are 95 % bootstrap intervals.",
                "alt": "MSE of each method and ratio against the number of denoising steps, four to twelve.",
                "panels": [{"x": axis("denoising steps T"), "y": axis("MSE", "", "log"), "lines": curves}],
            }
        ],
    }


def noise(context: Context) -> Record:
    """Return MSE against the features' PSNR, off the training range too."""
    config = context.config
    pruning = stronger(context, TABLE_II[3])
    ratios: dict[Name, float] = {"split": 0.0, "split_finetune": 0.0, pruning: 0.1, "meg": 0.4}
    curves = []
    for name, ratio in ratios.items():
        levels = (methods.level_of(name, ratio),)
        found = get(context, sweep(config, name, SHOWN_STEPS, levels, config.noise_psnrs_db))["mse"][0]
        label = LABELS[name] + (f", ratio {ratio:g}" if ratio else "")
        curves.append(
            line(f"{name}/{ratio:g}", label, config.noise_psnrs_db, [mean(v) for v in found], "measured")
        )
    trained = {"axis": "x", "from": 5.0, "to": 20.0, "label": "trained"}
    rules = "on un-normalised tokens" if config.rules == "paper" else "relative to the message's power"
    return {
        "text": ["How a decoder does on channels better and worse than it was trained for."],
        "tables": [],
        "figures": [
            {
                "id": "noise",
                "title": "MSE against the channel's noise",
                "caption": f"Measured on {config.model} at T = {SHOWN_STEPS}; noise {rules}. Shaded: the "
                "range of PSNR that the decoders were trained on.",
                "alt": "MSE of each method against the PSNR of the received features.",
                "panels": [
                    {
                        "x": axis("PSNR of the features", "dB"),
                        "y": axis("MSE", "", "log"),
                        "lines": curves,
                        "spans": [trained] if config.rules == "default" else [],
                    }
                ],
            }
        ],
    }


def payload_data(context: Context) -> dict[Name, tuple[list[float], np.ndarray]]:
    """Return each method's messages in bits and its MSE, L x P, at as many of `SHARES` as it reaches."""
    config = context.config
    shape = physical.scale(config.physical, get(context, counts(config)), config.guidance).latent
    whole, psnrs_db = methods.bits("split", shape, 0.0), (config.feature_psnr_db,)
    data: dict[Name, tuple[list[float], np.ndarray]] = {}
    for name in (*context.prunings, "meg"):
        found = [methods.level_at(name, shape, int(share * whole), config.rules) for share in SHARES]
        levels = [level for level in found if level is not None]
        own = get(context, sweep(config, name, SHOWN_STEPS, levels, psnrs_db))["mse"][:, 0]
        data[name] = ([float(methods.bits(name, shape, x, config.rules)) for x in levels], own)
    for name in ("split", "split_finetune"):
        own = get(context, sweep(config, name, SHOWN_STEPS, (0.0,), psnrs_db))["mse"][:, 0]
        data[name] = ([float(whole)], own)
    return data


def payload(context: Context) -> Record:
    """Return MSE against the message's bytes: merging, both prunings, the whole latent and JPEG."""
    config = context.config
    curves: list[Any] = []
    for name, (bits, errors) in payload_data(context).items():
        single = len(bits) == 1
        x, y = [b / 8e3 for b in bits], [mean(e) for e in errors]
        curves.append(line(name, LABELS[name], x, y, "measured", points=single))
    coded = get(context, codecs(config))
    scale = physical.scale(config.physical, get(context, counts(config)), config.guidance)
    photographs = coded["photographs"] if config.physical == "sdxl" else None
    area = scale.picture[0] * scale.picture[1]
    size = float((photographs or coded["own"])["jpeg_bits"].mean()) * area / 8e3
    jpeg = f"Centralized, JPEG {QUALITY}"
    curves.append(line("jpeg", jpeg, [size], [mean(coded["own"]["jpeg_mse"])], "measured", points=True))
    stand_in = " JPEG's bits a pixel are those of photographs." if photographs else ""
    return {
        "text": ["What the same number of bytes is worth by each method, side information charged."],
        "tables": [],
        "figures": [
            {
                "id": "payload",
                "title": "MSE against the message's length",
                "caption": f"Two sources joined: MSE measured on {config.model} at T = {SHOWN_STEPS} and "
                f"{config.feature_psnr_db:g} dB PSNR; bytes are those of {config.charged}."
                f"{stand_in} JPEG has no channel noise.",
                "alt": "MSE of merging and of pruning against kilobytes sent, with the whole latent and "
                "JPEG.",
                "panels": [{"x": axis("message", "kB", "log"), "y": axis("MSE", "", "log"), "lines": curves}],
            }
        ],
    }
