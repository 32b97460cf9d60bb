"""The device: asks an edge server for a message, receives it through its channel and shows the picture."""

from megjax.client.channel import Channel, Throughput, emulated
from megjax.client.http import Answer, PictureRequest, connect, fetch
from megjax.client.memory import recall, remember
from megjax.pipeline.viewer import largest_message_bytes, silence, viewer

__all__ = [
    "Answer",
    "Channel",
    "PictureRequest",
    "Throughput",
    "connect",
    "emulated",
    "fetch",
    "largest_message_bytes",
    "recall",
    "remember",
    "silence",
    "viewer",
]
