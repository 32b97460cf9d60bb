"""Run a load test: see `eval.load`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import platform
import sys

import tyro

from eval.load.config import Config
from eval.load.draw import draw, figures, save
from eval.load.drive import drive, requests, serving
from eval.load.verify import verify
from megjax.client import largest_message_bytes
from megjax.errors import one_line_errors
from megjax.files import writable_folder
from megjax.pipeline import load_pipeline
from megjax.pipeline.device import device_of


def main(config: Config) -> bool:
    """Send the load, verify the answers, write the figures; returns whether all was answered and right."""
    config = dataclasses.replace(config, token=config.token or os.environ.get("MEGJAX_TOKEN") or None)
    writable_folder(config.out)
    asked = requests(config)
    pipeline = load_pipeline(config.model)
    size = pipeline.image_size, pipeline.image_size
    most_bytes = largest_message_bytes(device_of(pipeline, size))
    with serving(config) as address:
        print(f"{config.requests} requests from {config.clients} clients to {address}", file=sys.stderr)
        outcomes, samples, took_s = asyncio.run(drive(config, address, asked, most_bytes))
    numbers = figures(outcomes, samples, took_s)
    print("comparing every answer with this process's", file=sys.stderr)
    numbers["verified"] = verify(config, pipeline, asked, outcomes)
    numbers["config"] = dataclasses.asdict(config) | {
        "out": str(config.out),
        "token": config.token is not None,
    }
    numbers["machine"] = {"processors": os.cpu_count(), "processor": platform.machine()}
    save(config.out, numbers, draw(numbers, outcomes, samples))
    print(json.dumps({name: value for name, value in numbers.items() if name != "config"}, indent=2))
    verified = numbers["verified"]
    lost = config.requests - numbers["answered"] if config.patience_s else 0
    wrong = verified["answered"] - min(verified["messages_equal"], verified["pictures_equal"])
    print(f"{lost} lost, {wrong} wrong", file=sys.stderr)
    return not lost and not wrong


if __name__ == "__main__":
    with one_line_errors():
        ok = main(tyro.cli(Config, prog="python -m eval.load", description=__doc__))
    sys.exit(0 if ok else 1)
