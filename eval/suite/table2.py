"""Table II: every method at its setting, quality measured, costs calibrated, modelled and timed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from eval.metrics import psnr_db
from eval.suite import methods, physical
from eval.suite.codecs import QUALITY, codecs
from eval.suite.config import SuiteConfig
from eval.suite.context import Context, Stage, get
from eval.suite.measure import pictures, reference
from eval.suite.methods import LABELS, Name
from eval.suite.numbers import Record, geometric, interval, mean, number, psnr
from eval.suite.paper import TABLE_II, Row
from eval.suite.physical import SDXL_LATENT, SDXL_PICTURE, TABLE2_RATE_BPS, Scale
from eval.suite.policies import counts
from eval.suite.timing import timings
from megjax.link.payload import rgb_bits
from megjax.link.profiles import AnyProfile, compute, load


class Entry(NamedTuple):
    """A row of our Table II: the paper's, or a picture sent by the server in another way."""

    label: str
    row: Row
    name: Name | None
    """None is centralised generation."""
    codec: str | None = None
    """`png` or `jpeg`, for a centralised server."""


class Message(NamedTuple):
    """What a row sends, in bits."""

    table2: float
    """SDXL's, merging's side information free, as Table II has it."""
    modelled: float
    """With side information, of the model that is charged."""


def entries(context: Context) -> tuple[Entry, ...]:
    """Return the rows: the paper's six, and after the first the same server with PNG and JPEG."""
    first, *others = TABLE_II
    return (
        Entry(f"{first.label}, raw 16-bit RGB", first, None),
        Entry(f"{first.label}, PNG", first, None, "png"),
        Entry(f"{first.label}, JPEG {QUALITY}", first, None, "jpeg"),
        *(
            Entry(row.label, row, stronger(context, row) if row.method == "pruning" else row.method)
            for row in others
        ),
    )


def stronger(context: Context, row: Row) -> Name:
    """Return the better of both prunings at equal bits: the gate, or magnitudes with their map charged."""
    return min(
        context.prunings, key=lambda name: get(context, shown(context.config, row, name))["mse"].mean()
    )


def shown(config: SuiteConfig, row: Row, name: Name) -> Stage:
    """Return the stage of a row's pictures."""
    return pictures(config, name, row.steps, methods.level_of(name, row.ratio))


def table2(context: Context) -> Record:
    """Return Table II and what belongs beside it."""
    config, rows = context.config, entries(context)
    counted, coded = get(context, counts(config)), get(context, codecs(config))
    clean = get(context, reference(config))
    scale = physical.scale(config.physical, counted, config.guidance)
    sent = {entry.label: message(entry, scale, coded, config) for entry in rows}
    calibrated = {e.label: _calibrated(e, sent[e.label].table2) for e in rows}
    modelled = {e.label: _modelled(context, e, scale, sent[e.label].modelled) for e in rows}
    found = {e.label: quality(context, e, coded, clean) for e in rows}
    return {
        "text": [_about(context, rows, clean["tome_mse"].mean())],
        "tome_mse": interval(mean(clean["tome_mse"]), "measured"),
        "tables": [
            _quality_table(config, rows, found),
            _calibrated_table(rows, calibrated),
            _modelled_table(config, rows, modelled, sent),
            _machine_table(context, rows),
            _speed_up_table(calibrated, modelled),
        ],
        "figures": [_timeline(config, scale, rows, modelled)],
    }


def message(entry: Entry, scale: Scale, coded: Any, config: SuiteConfig) -> Message:
    """Return the bits that a row sends."""
    if entry.name is None and entry.codec is None:
        return Message(rgb_bits(*SDXL_PICTURE), scale.raw_bits)
    if entry.name is None:
        key = f"{entry.codec}_bits"
        own = float(coded["own"][key].mean())
        # SDXL's pictures are taken to code as photographs do, if there are any.
        stood_in = own if coded["photographs"] is None else float(coded["photographs"][key].mean())
        area, sdxl = np.prod(scale.picture), np.prod(SDXL_PICTURE)
        return Message(stood_in * sdxl, (stood_in if config.physical == "sdxl" else own) * area)
    at = methods.level_of(entry.name, entry.row.ratio)
    return Message(
        methods.bits(entry.name, SDXL_LATENT, at, "free"),
        methods.bits(entry.name, scale.latent, at, config.rules),
    )


def _calibrated(entry: Entry, bits: float) -> dict[str, float]:
    found = compute(load("table2"), tome=entry.row.tome)
    seconds = physical.real(found.es_fixed_s) + physical.real(found.es_step_s) * entry.row.steps
    return {"transmission": bits / TABLE2_RATE_BPS, "computation": seconds}


def _modelled(context: Context, entry: Entry, scale: Scale, bits: float) -> dict[str, Any]:
    config = context.config
    profile: AnyProfile = load(config.profile)
    work = physical.computation(profile, scale, tome=entry.row.tome, centralised=entry.name is None)
    snr_P = physical.draw_channels(config.seed, config.pictures)
    return physical.costs(work, entry.row.steps, bits, snr_P)


def quality(context: Context, entry: Entry, coded: Any, clean: Any) -> dict[str, Any]:
    """Return a row's metrics over the pictures."""
    if entry.name is not None:
        return get(context, shown(context.config, entry.row, entry.name))
    if entry.codec == "jpeg":
        return {"mse": coded["own"]["jpeg_mse"], "ssim": coded["own"]["jpeg_ssim"], "captions": None}
    if entry.codec == "png":  # eight bits a value, the reference's sixteen are taken as exact
        return {
            "mse": coded["own"]["png_mse"],
            "ssim": np.ones_like(coded["own"]["png_mse"]),
            "captions": None,
        }
    return {"mse": np.zeros(context.config.pictures), "ssim": clean["ssim"], "captions": clean["captions"]}


def pruning_said(context: Context, name: Name) -> str:
    """Return the report's sentence on what MEG-Pruning is in it."""
    if len(context.prunings) == 1:
        return "MEG-Pruning prunes by magnitude, its index map charged: this model has no learned gate."
    return f"MEG-Pruning is the stronger of both prunings at equal bits, here {LABELS[name]}."


def _about(context: Context, rows: tuple[Entry, ...], tome_mse: float) -> str:
    config, pruned = context.config, next(e for e in rows if e.row.method == "pruning")
    assert pruned.name is not None
    tome = (
        f" Token merging inside the U-Net alone leaves {psnr_db(tome_mse):.1f} dB PSNR to the reference."
        if tome_mse > 0
        else ""
    )
    return (
        f"{config.pictures} prompts, each with its own noise, partition and channel, the same for every "
        f"method; features at {config.feature_psnr_db:g} dB PSNR, rules {config.rules}, guidance "
        f"{config.guidance:g}. The reference is the picture of 12 steps, undistilled decoder, perfect "
        f"channel. {pruning_said(context, pruned.name)}{tome} Settings of steps and ratios that the paper's "
        "text does not state are inferred from its figures."
    )


def _column(key: str, label: str, unit: str = "", digits: int = 3) -> Record:
    return {"key": key, "label": label, "unit": unit, "digits": digits}


def _quality_table(config: SuiteConfig, rows: tuple[Entry, ...], found: dict[str, Any]) -> Record:
    records = []
    for entry in rows:
        own = found[entry.label]
        cells: Record = {
            "steps": number(entry.row.steps, "setting"),
            "ratio": None if entry.name is None else number(entry.row.ratio, "setting"),
            "mse": interval(mean(own["mse"]), "measured"),
            "paper": None if entry.codec else number(entry.row.mse, "paper"),
            "geometric": geometric(own["mse"]),
            "psnr": psnr(own["mse"]),
            "ssim": number(own["ssim"].mean(), "measured"),
        }
        if own["captions"] is not None:
            cells["captions"] = number(100 * own["captions"].mean(), "measured", "%")
        records.append({"label": entry.label, "cells": cells})
    return {
        "id": "table2",
        "title": "Quality",
        "caption": f"Quality measured on {config.model} with 95 % bootstrap intervals over pictures, pixels "
        "in [0, 1]; beside it the MSE of the paper's Table II, of other pictures, another model and mixed "
        "ranges.",
        "columns": [
            _column("steps", "steps T"),
            _column("ratio", "ratio r"),
            _column("mse", "MSE"),
            _column("paper", "MSE, paper"),
            _column("geometric", "geometric mean"),
            _column("psnr", "PSNR", "dB"),
            _column("ssim", "SSIM"),
            _column("captions", "captions right", "%"),
        ],
        "rows": records,
    }


def _calibrated_table(rows: tuple[Entry, ...], calibrated: dict[str, Any]) -> Record:
    records = []
    for entry in rows:
        own, row = calibrated[entry.label], entry.row
        cells = {
            "transmission": number(own["transmission"], "calibrated", "s"),
            "computation": number(own["computation"], "calibrated", "s"),
            "total": number(sum(own.values()), "calibrated", "s"),
        }
        if entry.codec is None:
            total = row.transmission_s + row.computation_s
            cells |= {
                "paper_transmission": number(row.transmission_s, "paper", "s"),
                "paper_computation": number(row.computation_s, "paper", "s"),
                "paper_total": number(total, "paper", "s"),
                "off": number(100 * (sum(own.values()) / total - 1), "calibrated", "%"),
            }
        records.append({"label": entry.label, "cells": cells})
    return {
        "id": "table2-calibrated",
        "title": "Latency, calibrated on the paper",
        "caption": "Latency under profile table2 and a mean rate of 0.83235 Mbit/s, both fitted to the "
        "paper's own columns: agreement is calibration, not evidence. SDXL at 1024 x 1024, merging's side "
        "information free as in the paper. PNG and JPEG: bits a pixel of photographs.",
        "columns": [
            _column("transmission", "sending", "s", 4),
            _column("paper_transmission", "paper", "s", 4),
            _column("computation", "computing", "s", 4),
            _column("paper_computation", "paper", "s", 4),
            _column("total", "in all", "s", 4),
            _column("paper_total", "paper", "s", 4),
            _column("off", "off by", "%", 2),
        ],
        "rows": records,
    }


def _modelled_table(
    config: SuiteConfig, rows: tuple[Entry, ...], modelled: dict[str, Any], sent: dict[str, Message]
) -> Record:
    records = []
    for entry in rows:
        own = modelled[entry.label]
        cells = {
            "bits": number(sent[entry.label].modelled / 1e6, "modelled", "Mbit"),
            "server": number(own["latency_es_s"].mean(), "modelled", "s"),
            "air": interval(mean(own["latency_tx_s"]), "modelled", "s"),
            "device": number(own["latency_ue_s"].mean(), "modelled", "s"),
            "total": interval(mean(own["latency_s"]), "modelled", "s"),
            "energy": number(own["energy_j"].mean(), "modelled", "J"),
        }
        records.append({"label": entry.label, "cells": cells})
    return {
        "id": "table2-modelled",
        "title": "Latency and energy, modelled",
        "caption": f"Bits and FLOPs of {config.charged}, counted from the program, under hardware profile "
        f"{config.profile}; "
        "every picture over its own channel, 200 to 300 m, the same for all methods. Side information "
        "charged.",
        "columns": [
            _column("bits", "message", "Mbit"),
            _column("server", "server", "s"),
            _column("air", "air", "s"),
            _column("device", "device", "s"),
            _column("total", "in all", "s"),
            _column("energy", "energy", "J"),
        ],
        "rows": records,
    }


def _machine_table(context: Context, rows: tuple[Entry, ...]) -> Record:
    parts = get(context, timings(context.config))["parts"]
    records = []
    for entry in rows:
        if entry.codec is not None:
            continue
        step = parts["tome_step_s" if entry.row.tome else "step_s"]
        server, device = parts["text_s"] + entry.row.steps * step, parts["decode_s"]
        if entry.name is None:
            server, device = server + device, 0.0
        cells = {
            "server": number(1e3 * server, "measured", "ms", timed=True),
            "device": number(1e3 * device, "measured", "ms", timed=True),
            "total": number(1e3 * (server + device), "measured", "ms", timed=True),
        }
        records.append({"label": entry.label, "cells": cells})
    return {
        "id": "table2-machine",
        "title": "Computation on this machine",
        "caption": f"{context.config.model} itself, one picture at a time, timed on {context.device}: text "
        f"encoders, T steps under guidance {context.config.guidance:g}, decoder.",
        "columns": [_column(k, k if k != "total" else "in all", "ms") for k in ("server", "device", "total")],
        "rows": records,
    }


def _speed_up_table(calibrated: dict[str, Any], modelled: dict[str, Any]) -> Record:
    first, *others = TABLE_II
    against = [label for label in calibrated if label.startswith(first.label)] + [others[1].label]
    paper = {row.label: row.transmission_s + row.computation_s for row in TABLE_II}
    paper[f"{first.label}, raw 16-bit RGB"] = paper[first.label]
    records = []
    for fast in (TABLE_II[5].label, TABLE_II[4].label):
        for slow in against:
            whole = {label: own["latency_s"].mean() for label, own in modelled.items()}
            fitted = saving(sum(calibrated[fast].values()), sum(calibrated[slow].values()))
            cells = {
                "calibrated": number(fitted, "calibrated", "%"),
                "modelled": number(saving(whole[fast], whole[slow]), "modelled", "%"),
            }
            if slow in paper:
                cells["paper"] = number(saving(paper[fast], paper[slow]), "paper", "%")
            records.append({"label": f"{fast}, against {slow}", "cells": cells})
    return {
        "id": "table2-savings",
        "title": "Latency saved",
        "caption": "Share of the whole latency that MEG saves; negative where it is slower. The paper's "
        "column follows from its Table II.",
        "columns": [_column(k, k, "%") for k in ("calibrated", "paper", "modelled")],
        "rows": records,
    }


def saving(fast: float, slow: float) -> float:
    """Return the share of the latency that is saved; percent."""
    return 100 * (1 - fast / slow)


def _timeline(config: SuiteConfig, scale: Scale, rows: tuple[Entry, ...], modelled: dict[str, Any]) -> Record:
    # To scale, so without the raw picture, beside which nothing else would be seen.
    kept = [e for e in rows if e.codec is not None or e.name is not None]
    bars = [
        {
            "label": e.label,
            "parts": {k: float(modelled[e.label][f"latency_{k}_s"].mean()) for k in ("es", "tx", "ue")},
            "steps": e.row.steps,
            **_server_seconds(config, scale, e),
        }
        for e in kept
    ]
    return {
        "id": "timeline",
        "title": "One frame's timeline, to scale",
        "caption": f"Modelled latency of one frame by part: {config.charged} under profile "
        f"{config.profile}, mean over the channels; marks within the server's part are denoising steps. "
        "Centralised generation with raw 16-bit RGB is left out: it would be many times as long.",
        "alt": "Stacked horizontal bars of server, air and device seconds for each method.",
        "bars": {"x": {"label": "latency", "unit": "s", "scale": "linear"}, "tag": "modelled", "rows": bars},
    }


def _server_seconds(config: SuiteConfig, scale: Scale, entry: Entry) -> dict[str, float]:
    """A denoising step's, and what the server does after the last: a centralised one decodes."""
    profile = load(config.profile)
    work = physical.computation(profile, scale, tome=entry.row.tome)
    central = physical.computation(profile, scale, tome=entry.row.tome, centralised=entry.name is None)
    step_s, after_s = (physical.real(x) for x in (work.es_step_s, central.es_fixed_s - work.es_fixed_s))
    return {"step_s": step_s, "after_s": after_s}
