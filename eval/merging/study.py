"""Measure every method on both kinds of pictures, and write the table, the plot and the figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from eval.merging.curves import Curve, mse_at, ratio_to
from eval.merging.methods import DEFAULT, TOMESD, Method, methods
from megjax.checks import LARGEST_SEED, within
from megjax.data.photos import HELD_OUT, load_photos, random_crops
from megjax.data.render import render
from megjax.data.scenes import sample_scenes
from megjax.errors import MegError
from megjax.files import replacing, writable_folder, write_file
from megjax.pipeline.load import Pipeline, load_pipeline
from megjax.pipeline.split import decode, encode

SHARES = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
"""Of the uncompressed latent's bits: the table's columns."""
COMPARED = SHARES[(SHARES > 0.29) & (SHARES < 0.91)]
"""Where the ratio to the baseline is taken: one round cannot send less, and at the top all are exact."""
DRAWN = (
    TOMESD,
    "patch, cosine, 2 rounds",
    DEFAULT,
    DEFAULT + ", Lloyd, best of 16",
    DEFAULT + ", 8 bits",
    DEFAULT + ", 5 bits",
    "magnitude pruning",
    "random dropping",
    "2 x 2 average pooling",
    "lower precision",
)
"""The plot's lines; the table has all methods."""
FIGURES = "## Figures"
"""The heading in a document below which all is written by the study."""


@dataclasses.dataclass(frozen=True)
class MergingStudyConfig:
    """What to compare on, and where to write it."""

    model: str = "tiny"
    """An embedded backbone, a model folder or a hub id."""
    scenes: int = 128
    """Pictures of `scenes`."""
    crops: int = 64
    """Crops of the photographs that the autoencoder never saw."""
    psnr_db: float | None = None
    """Of the features on the air; None sends them without noise."""
    batch: int = 32
    """Pictures that are decoded at once."""
    seed: int = 0
    folder: Path = Path("runs/merging")
    document: Path | None = None
    """A page such as `docs/merging-study.md`, whose figures, from `## Figures` on, are written anew."""


class Pictures(NamedTuple):
    """A data set: latents and how well the autoencoder alone does on them."""

    z_PxHxWxC: np.ndarray
    psnr_db: float


def run(config: MergingStudyConfig) -> dict[str, Any]:
    """Run the study; writes `results.json`, `table.md` and `merging-study.png` to `config.folder`.

    Raises:
        MegError: fewer than two pictures of a kind, a batch below 1, a seed out of range, a folder that
            cannot be written, or a document that has no figures.
    """
    if min(config.scenes, config.crops) < 2 or config.batch < 1:
        raise MegError(
            f"{config.scenes} scenes, {config.crops} crops, batch {config.batch}: need 2 of each, 1 a batch"
        )
    within(config, 0, LARGEST_SEED, "seed")
    within(config, -100, 1000, "psnr_db")
    writable_folder(config.folder, "folder")
    prose = None if config.document is None else prose_of(config.document)
    pipeline = load_pipeline(config.model)
    pictures = {
        "scenes": scenes(pipeline, config),
        "photographs": crops(pipeline, config),
    }
    z_PxHxWxC = np.concatenate([kind.z_PxHxWxC for kind in pictures.values()])
    reference = decoded(pipeline, z_PxHxWxC, config.batch)
    curves: dict[str, Curve] = {}
    for name, method in methods().items():
        curves[name] = measure(pipeline, method, z_PxHxWxC, reference, config)
        print(f"{name}: {len(method.levels)} levels", flush=True)
    results = {
        "model": config.model,
        "psnr_db": config.psnr_db,
        "baseline": TOMESD,
        "default": DEFAULT,
        "shares": SHARES.tolist(),
        "kinds": {},
    }
    first = 0
    for kind, of_kind in pictures.items():
        chosen = slice(first, first + len(of_kind.z_PxHxWxC))
        first = chosen.stop
        mine = {name: Curve(c.share_L, c.mse_LxP[:, chosen]) for name, c in curves.items()}
        results["kinds"][kind] = {
            "pictures": len(of_kind.z_PxHxWxC),
            "autoencoder_psnr_db": of_kind.psnr_db,
            "methods": {name: summary(mine[TOMESD], curve) for name, curve in mine.items()},
        }
    write_file(config.folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_file(config.folder / "table.md", table(results) + "\n")
    plot(results, config.folder / "merging-study.png")
    if config.document is not None:
        write_file(config.document, f"{prose}{FIGURES}\n\n{table(results)}\n")
        plot(results, config.document.parent / "images" / "merging-study.png")
    return results


def prose_of(document: Path) -> str:
    """Return a page's text before its figures.

    Raises:
        MegError: a page that cannot be read or has none.
    """
    try:
        prose, found, _ = document.read_text().partition(f"\n{FIGURES}\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MegError(f"document {document}: cannot be read ({error})") from None
    if not found:
        raise MegError(f"document {document}: has no line {FIGURES!r}, after which the figures go")
    return f"{prose}\n"


def scenes(pipeline: Pipeline, config: MergingStudyConfig) -> Pictures:
    """Encode pictures of every combination of attributes."""
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    images = render(sample_scenes(key, config.scenes, split="all"), pipeline.image_size)
    return encoded(pipeline, np.asarray(images), config.batch)


def crops(pipeline: Pipeline, config: MergingStudyConfig) -> Pictures:
    """Encode crops of the two held-out photographs."""
    rng = np.random.default_rng(config.seed)
    images = random_crops(load_photos(HELD_OUT), rng, config.crops, pipeline.image_size)
    return encoded(pipeline, images, config.batch)


def encoded(pipeline: Pipeline, images: np.ndarray, batch: int) -> Pictures:
    """Return the latents' means and the autoencoder's PSNR, from the mean over pictures of its MSE."""
    params = pipeline.params["vae_encoder"]
    z_PxHxWxC = in_batches(lambda x: encode(pipeline, params, x), images, batch)
    mse = np.mean((decoded(pipeline, z_PxHxWxC, batch) - images) ** 2)
    return Pictures(z_PxHxWxC, float(-10 * np.log10(mse)))


def decoded(pipeline: Pipeline, z_PxHxWxC: np.ndarray, batch: int) -> np.ndarray:
    """Decode to pictures in [0, 1]."""
    params = pipeline.params["vae_decoder"]
    return in_batches(lambda z: decode(pipeline, params, z), z_PxHxWxC, batch)


def in_batches(function: Any, x: np.ndarray, batch: int) -> np.ndarray:
    """Apply to batches of one size, so that one executable serves all."""
    parts = []
    for start in range(0, len(x), batch):
        part = x[start : start + batch]
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        parts.append(np.asarray(function(jnp.asarray(padded)))[: len(part)])
    return np.concatenate(parts)


def measure(
    pipeline: Pipeline,
    method: Method,
    z_PxHxWxC: np.ndarray,
    reference_PxHxWx3: np.ndarray,
    config: MergingStudyConfig,
) -> Curve:
    """Return the MSE against the pictures of the uncompressed latents, and the bits, at every level."""
    psnr_db = jnp.asarray(jnp.inf if config.psnr_db is None else config.psnr_db, jnp.float32)
    # Every picture has its own partition and noise, the same ones at all levels.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2), len(z_PxHxWxC))
    send = jax.jit(jax.vmap(method.compress, in_axes=(0, 0, None, None)))
    h, w, c = z_PxHxWxC.shape[1:]
    shares, errors = [], []
    for level in method.levels:
        received = send(keys, jnp.asarray(z_PxHxWxC), jnp.asarray(level, jnp.float32), psnr_db)
        difference = decoded(pipeline, np.asarray(received), config.batch) - reference_PxHxWx3
        shares.append(method.bits((h, w, c), level) / (16 * h * w * c))
        errors.append(np.mean(difference.astype(np.float64) ** 2, axis=(1, 2, 3)))
    return Curve(np.array(shares), np.stack(errors))


def summary(baseline: Curve, curve: Curve) -> dict[str, Any]:
    """Return one method's figures as JSON has them."""
    at = [None if np.isnan(mse) else float(mse) for mse in mse_at(curve, SHARES)]
    ratio = ratio_to(baseline, curve, COMPARED)
    return {
        "share": curve.share_L.tolist(),
        "mse": curve.mse_LxP.mean(axis=1).tolist(),
        "mse_at_shares": at,
        "ratio_to_baseline": None if np.isnan(ratio.value) else ratio._asdict(),
    }


def table(results: dict[str, Any]) -> str:
    """Return the Markdown tables: every method over the baseline, then each kind of pictures."""
    kinds: dict[str, Any] = results["kinds"]
    lines = ["MSE over the baseline's at equal bits:", ""]
    lines += ["| method | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in next(iter(kinds.values()))["methods"]:
        cells = [over_baseline(of_kind["methods"][name]) for of_kind in kinds.values()]
        lines.append(f"| {label(results, name)} | " + " | ".join(cells) + " |")
    lines += ["", "MSE in units of 1e-4 at shares of the latent's bits:"]
    for kind, of_kind in kinds.items():
        lines += [
            "",
            f"### {of_kind['pictures']} {kind}, autoencoder alone {of_kind['autoencoder_psnr_db']:.2f} dB",
            "",
            "| method | " + " | ".join(f"{100 * s:.0f} %" for s in results["shares"]) + " |",
            "|---" * (len(results["shares"]) + 1) + "|",
        ]
        for name, figures in of_kind["methods"].items():
            cells = ["-" if mse is None else f"{1e4 * mse:.3g}" for mse in figures["mse_at_shares"]]
            lines.append(f"| {label(results, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def label(results: dict[str, Any], name: str) -> str:
    """Return a method's name, bold for the default."""
    return f"**{name}**" if name == results["default"] else name


def over_baseline(figures: dict[str, Any]) -> str:
    """Return a method's ratio to the baseline with its interval, or a dash."""
    ratio = figures["ratio_to_baseline"]
    return "-" if ratio is None else "{value:.3g} [{low:.3g}, {high:.3g}]".format(**ratio)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw MSE against bits, one panel for each kind of pictures."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (kind, of_kind) in zip(panels, results["kinds"].items(), strict=True):
        for i, name in enumerate(DRAWN):
            figures = of_kind["methods"][name]
            share, mse = np.array(figures["share"]), np.array(figures["mse"])
            order = np.argsort(share)
            axes.plot(
                100 * share[order],
                mse[order],
                label=name,
                color=f"C{i}",
                linestyle="-" if "round" in name else "--",
                linewidth=2.4 if name in (DEFAULT, TOMESD) else 1.4,
                marker=".",
            )
        axes.set(yscale="log", xlim=(0, 100), ylim=(1e-6, 0.2), xlabel="% of the latent's bits", title=kind)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("MSE after the decoder, pixels in [0, 1]")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
