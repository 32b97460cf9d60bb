"""What was done for a request, and what the model charges for it: the header `MegJAX-Result`."""

from __future__ import annotations

from typing import Any, Literal

from megjax.link import channel
from megjax.link.cost import Compute, frame_cost
from megjax.serve.engine import Sent, Task, Times

TX_POWER_W = float(channel.tx_power_w())


def account(
    task: Task,
    sent: Sent,
    times: Times,
    *,
    batch: int,
    chosen_by: Literal["request", "policy"],
    compute: Compute,
    rate_bps: float,
) -> dict[str, Any]:
    """Return a result without its id and its times in the queue and in all.

    Args:
        task: as it was generated.
        sent: its message.
        times: its batch's.
        batch: rows of the compiled programs.
        chosen_by: who chose steps and ratio.
        compute: the hardware's costs, Eqs. (1)-(3).
        rate_bps: of the device's link; bit/s.
    """
    assert task.steps is not None
    cost = frame_cost(compute, task.steps, sent.payload_bits, rate_bps, TX_POWER_W)
    return {
        "steps": task.steps,
        "ratio": task.ratio,
        "chosen_by": chosen_by,
        "batch": batch,
        "seed": task.seed,
        "tokens": sent.tokens,
        "payload_bits": sent.payload_bits,
        "timings": {name: round(seconds, 6) for name, seconds in times._asdict().items()},
        "latency_s": _numbers(
            es=cost.latency_es_s, tx=cost.latency_tx_s, ue=cost.latency_ue_s, total=cost.latency_s
        ),
        "energy_j": _numbers(
            es=cost.energy_es_j,
            tx=cost.energy_tx_j,
            ue=cost.energy_ue_j,
            fixed=cost.energy_fixed_j,
            total=cost.energy_j,
        ),
    }


def _numbers(**parts: Any) -> dict[str, float]:
    return {name: float(f"{float(value):.6g}") for name, value in parts.items()}
