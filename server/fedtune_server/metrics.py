"""Figures for Prometheus, served when `server.metrics_address` is set. No label is chosen by a client."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune_server.listen import cannot_bind, parse_address

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass
class Metrics:
    """Counters that the coordinator bumps: plain numbers, so that they cost nothing when nobody looks."""

    accepted: int = 0
    refused: int = 0
    late: int = 0
    commit_seconds: float = 0.0

    def committed(self, seconds: float) -> None:
        """Notes one durable update."""
        self.accepted += 1
        self.commit_seconds += seconds


@dataclass(frozen=True, slots=True)
class Reading:
    """What the endpoint shows at one moment."""

    gauges: Mapping[str, float]
    bytes_by: Mapping[tuple[str, str], int]


@contextmanager
def serve_metrics(address: str, metrics: Metrics, read: Callable[[], Reading]) -> Iterator[None]:
    """Serves `/metrics` on `address` while the context lasts; does nothing when it is empty.

    Raises:
        ConfigError: the address is taken or is not host:port.
    """
    if not address:
        yield
        return
    # Imported here: who does not ask for the endpoint does not pay for it.
    from prometheus_client import CollectorRegistry, start_http_server

    host, port = parse_address(address, "server.metrics_address")
    registry = CollectorRegistry()
    registry.register(_Collector(metrics, read))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise cannot_bind("server.metrics_address", address, error) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    """What prometheus_client asks for the figures of the moment."""

    def __init__(self, metrics: Metrics, read: Callable[[], Reading]) -> None:
        self._metrics, self._read = metrics, read

    def collect(self) -> "Iterator[Metric]":
        """Yields one family of figures after another."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        reading = self._read()
        for name, value in reading.gauges.items():
            yield GaugeMetricFamily(f"fedtune_{name}", name.replace("_", " "), value=value)
        updates = CounterMetricFamily("fedtune_updates", "updates by answer", labels=["answer"])
        for answer in ("accepted", "refused", "late"):
            updates.add_metric([answer], getattr(self._metrics, answer))
        yield updates
        yield CounterMetricFamily("fedtune_commit_seconds", "time spent on commits", value=self._metrics.commit_seconds)
        sums = CounterMetricFamily("fedtune_bytes", "bytes on the wire", labels=["direction", "kind"])
        for (direction, kind), nbytes in reading.bytes_by.items():
            sums.add_metric([direction, kind], nbytes)
        yield sums
