"""`python -m train.policy default`: train policies of the constrained problem under their limits."""

from __future__ import annotations

import tyro

from configs.policy import PRESETS
from megjax.compilation import keep_compilations
from megjax.errors import one_line_errors
from megjax.files import writable_folder
from megjax.rl.training import PolicyRunConfig, train_policies


def main(config: PolicyRunConfig) -> None:
    """Train, then print what each policy is worth against its optimum."""
    keep_compilations()
    with one_line_errors():
        writable_folder(config.folder, "folder")
        results = train_policies(config)
    for result in results:
        worth = result["deterministic"]
        latency, energy = worth["costs"]
        over = any(cost > 1.01 * limit for cost, limit in zip(worth["costs"], result["limits"], strict=True))
        print(
            f"limits {result['limits']} seed {result['seed']}: reward {worth['reward']:.4f} "
            f"(optimum {result['optimum']:.4f}), {latency:.4f} s, {energy:.4f} kJ"
            + (", over its limits" if over else "")
        )


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            PRESETS, prog="python -m train.policy", config=(tyro.conf.AvoidSubcommands,)
        )
    )
