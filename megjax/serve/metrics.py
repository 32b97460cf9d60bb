"""What `/metrics` tells, in Prometheus' text format; each server has a registry of its own."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)


class Metrics:
    """The server's counters. No label holds anything that a client wrote."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"megjax_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"megjax_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Answers, by route and status", "route", "status")
        self.cancelled = counter("cancelled", "Requests nobody waited for to the end", "reason")
        self.payload_bits = counter("payload_bits", "Bits of all messages' bodies")
        self.chosen = counter("chosen", "Pictures, by who chose steps and ratio", "by")
        self.rows = histogram("batch_requests", "Requests a batch", (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0))
        self.parts = histogram("part_seconds", "Time of a picture's part", SECONDS, "part")
        self.ready = Gauge("megjax_ready", "1 while requests are taken", registry=self.registry)
        self.waiting = Gauge("megjax_queue_requests", "Requests that wait", registry=self.registry)
        self.running = Gauge("megjax_running_requests", "Requests that run", registry=self.registry)
