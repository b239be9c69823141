"""A cloud's metrics, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvferry import __version__
from kvferry.checkpoint import known_as
from kvferry.cloud.monitor import OK, Record
from kvferry.errors import DependencyError, LinkError
from kvferry.link import parse_address

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from kvferry.models import VLM

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0)
RATES = (1e4, 1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9, 1e10)
PARTS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
STAGES = ("decode", "queue", "prefill", "first_token")


class Metrics:
    """Counts requests. Labels are modes, stages and kinds of errors: few, whatever arrives.

    Raises
    ------
    DependencyError
        The extra ``metrics`` is not installed.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as client
        except ImportError:
            raise DependencyError("metrics need prometheus-client: pip install 'kvferry[metrics]'") from None
        self.registry: CollectorRegistry = client.CollectorRegistry()
        client.ProcessCollector(registry=self.registry)  # memory and CPU seconds of the process

        def counter(name: str, what: str, *labels: str) -> client.Counter:
            return client.Counter(f"kvferry_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...], *labels: str) -> client.Histogram:
            return client.Histogram(f"kvferry_{name}", what, labels, registry=self.registry, buckets=buckets)

        self._gauge: Callable[[str, str], client.Gauge] = lambda name, what: client.Gauge(
            f"kvferry_{name}", what, registry=self.registry
        )
        self._build = client.Info("kvferry_build", "Version and model.", registry=self.registry)
        self._open = self._gauge("open_requests", "Requests that are under way.")
        self._requests = counter("requests", "Requests that have ended.", "mode", "outcome")
        self._errors = counter("errors", "Requests that ended with an error, by its kind.", "kind")
        self._late = counter("deadline_misses", "Requests whose deadline passed before the answer was complete.")
        self._bytes = counter("received_bytes", "Bytes of requests' chunks.", "mode")
        self._tokens = counter("answer_tokens", "Tokens of complete answers.", "mode")
        self._ratio = histogram("compression_ratio", "A cache in BF16 over the bytes that came of it.", RATIOS, "mode")
        self._total = histogram("request_seconds", "From opening a request to its end.", SECONDS, "mode")
        self._stage = histogram("stage_seconds", "Where the time of answered requests went.", SECONDS, "mode", "stage")
        self._rate = histogram("uplink_bits_per_second", "How fast chunks arrived.", RATES)
        self._foretold = histogram(
            "uplink_achieved_ratio", "How fast chunks arrived over what the edge had expected.", PARTS
        )

    def watch(self, vlm: VLM, values: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """Tell of a model, and of gauges that are looked up whenever the metrics are read.

        Parameters
        ----------
        values : mapping
            By name: what it is, and how to look it up.
        """
        self._build.info({"version": __version__, "model": known_as(vlm.name), "fingerprint": vlm.fingerprint})
        for name, (what, tell) in values.items():
            self._gauge(name, what).set_function(tell)

    def watch_fleet(self, ready: Callable[[], int]) -> None:
        """Tell of a gateway's replicas."""
        self._gauge("replicas_ready", "Replicas that questions go to.").set_function(ready)

    def began(self) -> None:
        """See :class:`kvferry.cloud.monitor.Observer`."""
        self._open.inc()

    def ended(self, record: Record) -> None:
        """See :class:`kvferry.cloud.monitor.Observer`."""
        mode = record.mode or "none"
        self._open.dec()
        self._requests.labels(mode, record.outcome).inc()
        self._bytes.labels(mode).inc(record.received_bytes)
        self._total.labels(mode).observe(record.total_seconds)
        if record.outcome != OK:
            self._errors.labels(record.outcome).inc()
        if record.deadline_missed:
            self._late.inc()
        if record.achieved_bits_per_second:
            self._rate.observe(record.achieved_bits_per_second)
            if record.expected_bits_per_second:
                self._foretold.observe(record.achieved_bits_per_second / record.expected_bits_per_second)
        if record.answered:
            self._tokens.labels(mode).inc(record.tokens)
            for stage in STAGES:
                self._stage.labels(mode, stage).observe(getattr(record, f"{stage}_seconds"))
            if record.ratio:
                self._ratio.labels(mode).observe(record.ratio)

    @contextmanager
    def served(self, listen: str) -> Iterator[str]:
        """Serve the metrics over HTTP, in a thread; yields the address, with the port that was taken.

        Raises
        ------
        LinkError
            The port is taken or the host is not this machine.
        """
        from prometheus_client import start_http_server

        host, port = parse_address(listen)
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise LinkError(f"cannot serve metrics on {listen} ({error.strerror or error}); choose another") from None
        try:
            yield f"{listen.rpartition(':')[0]}:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
