"""MegJAX beside its peers, one table: `python -m eval.bench`.

    python -m eval.bench [--only merge decode] [--rounds 3] [--core 0] [--json OUT.json]

| name | what | peer | needs |
|---|---|---|---|
| `merge` | match, merge and unmerge | tomesd | a minute |
| `decode` | SDXL's decoder, 256 x 256 | torch diffusers | minutes |
| `generate` | MEG-Tiny's networks, 8 guided steps and decoding | torch diffusers | minutes |
| `step` | their distillation step | torch diffusers and AdamW | minutes |
| `policy` | an update of the policy and its critics | PyTorch's forward pass | a minute |
| `unet` | SDXL's U-Net, 32 x 32 latents | torch diffusers | 11 GB, many minutes |
| `load` | loading SDXL's U-Net | its size on disk | 6 GB of memory, 5 GB of disk |
| `compile` | SDXL's U-Net compiled for a TPU v5e | Flax diffusers | libtpu, many minutes |

All on one CPU core in float32, `compile` aside; each side in its own process, alternating, one at a time.
Without `--only` the first five run. Times are processor seconds, which other load disturbs less than the
clock; the JSON has both. Start-up and compile time (to the first result, JAX's cache empty and filled) and
peak memory are part of `decode`, `generate` and `step`. Needs the extra `parity`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from eval.bench import child, save, start

Name = Literal["merge", "decode", "generate", "step", "policy", "unet", "load", "compile"]
USUAL: tuple[Name, ...] = ("merge", "decode", "generate", "step", "policy")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare.

    Args:
        only: names of the table above.
        rounds: pairs of processes.
        core: the CPU core.
        json: where to write all figures, if anywhere.
    """

    only: tuple[Name, ...] = USUAL
    rounds: int = 3
    core: int = 0
    json: Path | None = None


class Row(NamedTuple):
    """A line of the table.

    Args:
        what: is compared.
        ours: our figure.
        peer: the peer's.
        ratio: ours over the peer's.
    """

    what: str
    ours: float
    peer: float
    ratio: float


def main(config: Config) -> None:
    """Run the comparisons one after the other and print the table."""
    reports, rows = {}, []
    for name in dict.fromkeys(config.only):
        reports[name] = run(config, name)
        rows += rows_of(name, reports[name])
    table = Table("comparison", "MegJAX", "peer", "ratio", title="MegJAX over its peers: less is better")
    for row in rows:
        table.add_row(row.what, f"{row.ours:.4g}", f"{row.peer:.4g}", f"{row.ratio:.3f}")
    Console().print(table)
    save(config.json, {"rows": [row._asdict() for row in rows], "reports": reports})


def run(config: Config, name: Name) -> dict[str, Any]:
    """Run one comparison in a process of its own, which prints as it goes."""
    shared = [f"--rounds={config.rounds}"]
    pinned = [*shared, f"--core={config.core}"]
    module, args = {
        "merge": ("merging", pinned),
        "decode": ("tasks", ["decode", *pinned]),
        "generate": ("tasks", ["generate", *pinned]),
        "step": ("tasks", ["step", *pinned]),
        "policy": ("policy", ["update", *shared]),
        "unet": ("unet", pinned),
        "load": ("load", []),
        "compile": ("compile_tpu", [f"--core={config.core}"]),
    }[name]
    # The policy's comparison pins nothing by itself.
    env = {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        child(f"eval.bench.{module}", *args, f"--json={path}", env=env, core=config.core, show=True)
        return json.loads(path.read_text())


def rows_of(name: Name, report: dict[str, Any]) -> list[Row]:
    """The lines that a comparison's report gives."""
    if name == "policy":
        return [Row("policy update, ms", report["update_ms"], report["torch_forward_ms"], report["ratio"])]
    if name == "load":
        size, peak = report["checkpoint_gb"], report["peak_gb"]
        return [Row("loading, peak GB over size", peak, size, peak / size)]
    if name == "compile":
        ours, peer = report["megjax"], report["flax-diffusers"]
        names = ("compile_cpu_s", "peak_gib", "temporaries_gib", "accessed_gb", "estimate_s")
        return [Row(f"v5e, {n}", ours[n], peer[n], ours[n] / peer[n]) for n in names]
    ours, peer = (report["runs"][start::2] for start in (0, 1))
    if name == "merge":
        fields = {field: f"merge {field.removesuffix(' cpu_s')}, s" for field in ours[0] if "cpu_s" in field}
        ratios = {field: report[field] for field in fields}
    else:
        fields = {"cpu_s": f"{name}, s"}
        ratios = {"cpu_s": report["ratios"]["cpu_s"]}
        if name != "unet":
            fields["peak_mb"] = f"{name}, peak MB"
            ratios["peak_mb"] = report["ratios"]["peak_mb"]
    rows = [
        Row(
            what,
            statistics.median(run[field] for run in ours),
            statistics.median(run[field] for run in peer),
            ratios[field],
        )
        for field, what in fields.items()
    ]
    if name in ("decode", "generate", "step"):
        for kind, take in (("cold", slice(1)), ("warm", slice(1, None))):
            if ours[take]:
                mine, theirs = (
                    statistics.median(run["first_cpu_s"] for run in side[take]) for side in (ours, peer)
                )
                ratio = report["ratios"][f"{kind}_first_cpu_s"]
                rows.append(Row(f"{name}, start to first result, {kind}, s", mine, theirs, ratio))
    return rows


if __name__ == "__main__":
    start(main, Config, "eval.bench", "torch", "diffusers", "tomesd")
