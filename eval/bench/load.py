"""Peak host memory of loading a full-size SDXL U-Net.

    python -m eval.bench.load [--folder /tmp] [--shard-gb 1] [--json OUT.json]

Writes random float16 weights as sharded safetensors (5.1 GB), loads them in a process of its own, and prints
that process's peak resident memory (`ru_maxrss`, the interpreter and its libraries included) over the
checkpoint's size. The files are removed.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import tempfile
from pathlib import Path

import numpy as np

from eval.bench import child, save, start, timed
from megjax.files import writable_folder


@dataclasses.dataclass(frozen=True)
class Config:
    """What to load.

    Args:
        folder: of the temporary folder that takes the checkpoint.
        shard_gb: size of one file.
        json: where to write the figures, if anywhere.
        load: load this checkpoint in this process and print its figures as JSON.
    """

    folder: Path = Path(tempfile.gettempdir())
    shard_gb: float = 1.0
    json: Path | None = None
    load: Path | None = None


def main(config: Config) -> None:
    """Write the checkpoint and load it, or load what is given."""
    if config.load is not None:
        print(json.dumps(loaded(config.load)))
        return
    writable_folder(config.folder, "folder")
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        write(Path(folder), config.shard_gb)
        text = child("eval.bench.load", "--load", folder, env={"JAX_PLATFORMS": "cpu"})
        figures = json.loads(text.splitlines()[-1])
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    figures |= {"checkpoint_gb": size / 1e9, "peak_over_size": figures["peak_gb"] * 1e9 / size}
    print(json.dumps(figures))
    save(config.json, figures)


def write(folder: Path, shard_gb: float) -> None:
    """Write random weights; a leaf repeats one block along its leading axes, which takes no memory."""
    import jax

    from megjax import weights
    from megjax.models import UNetConfig, to_dict, unet

    block = (0.02 * np.random.default_rng(0).standard_normal(2**16)).astype(np.float16)
    params = jax.tree.map(lambda x: np.broadcast_to(block[: x.shape[-1]], x.shape), unet(UNetConfig()).shapes)
    weights.save(folder, params, to_dict(UNetConfig()), max_shard_bytes=int(shard_gb * 1e9))


def loaded(folder: Path) -> dict[str, float]:
    """Load, and return the seconds and the peak."""
    import jax
    import jax.numpy as jnp

    from megjax import weights
    from megjax.models import UNetConfig, unet

    shapes = unet(UNetConfig()).shapes
    params, timing = timed(lambda: weights.load(folder, shapes, dtype=jnp.float16))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    return {
        "peak_gb": peak * 1024 / 1e9,
        "weights_gb": size / 1e9,
        "load_s": timing.wall_s,
        "load_cpu_s": timing.cpu_s,
    }


if __name__ == "__main__":
    start(main, Config, "eval.bench.load")
