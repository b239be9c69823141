"""Spans of OpenTelemetry, joined from edge to cloud by the W3C ``traceparent`` in gRPC's metadata. Where OpenTelemetry
is not installed, or nobody has set it up, they cost next to nothing.

Attributes are numbers and names of our own; no span holds what was asked, shown or answered, nor an error's message.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kvferry.errors import DependencyError, InputError

EXPORTERS = ("otlp", "console")
Value = str | bool | int | float
Metadata = tuple[tuple[str, str], ...]


class Span:
    """One stretch of work. ``inner`` is OpenTelemetry's, or None."""

    def __init__(self, inner: Any = None) -> None:
        self._inner = inner

    def note(self, attributes: Mapping[str, Value]) -> None:
        """Attributes, each under ``kvferry.``."""
        if self._inner is not None:
            self._inner.set_attributes({f"kvferry.{name}": value for name, value in attributes.items()})

    def failed(self, kind: str) -> None:
        """It ended with an error of this kind."""
        if self._inner is not None:
            from opentelemetry.trace import Status, StatusCode

            self._inner.set_status(Status(StatusCode.ERROR, kind))


@contextmanager
def span(name: str, kind: str = "internal", metadata: Iterable[tuple[str, Any]] | None = None) -> Iterator[Span]:
    """A span ``kvferry.NAME`` around a block, child of the one around it.

    Parameters
    ----------
    kind : str
        ``internal``, ``client`` or ``server``.
    metadata : pairs, optional
        A call's metadata: the parent is the span that made the call.
    """
    try:
        from opentelemetry import trace
    except ImportError:
        yield Span()
        return
    parent = None
    if metadata is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        parent = TraceContextTextMapPropagator().extract(carrier)
    with trace.get_tracer("kvferry").start_as_current_span(
        f"kvferry.{name}",
        context=parent,
        kind=trace.SpanKind[kind.upper()],
        record_exception=False,
        set_status_on_exception=False,
    ) as inner:
        ours = Span(inner)
        try:
            yield ours
        except BaseException as error:
            ours.failed(type(error).__name__)
            raise


def past(name: str, began: float, ended: float) -> None:
    """A span ``kvferry.NAME`` of work that is over, by :func:`time.perf_counter`; no more is said if it never began."""
    if not (0 < began <= ended and sys.modules.get("opentelemetry")):
        return
    from opentelemetry import trace

    offset = time.time_ns() - time.perf_counter_ns()
    inner = trace.get_tracer("kvferry").start_span(f"kvferry.{name}", start_time=offset + int(began * 1e9))
    inner.end(offset + int(ended * 1e9))


def metadata() -> Metadata:
    """What a call carries so that the other end's spans join this one's; empty where there are none."""
    if not sys.modules.get("opentelemetry"):
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())


def set_up_traces(where: str, service: str) -> None:
    """Send this process's spans somewhere.

    Parameters
    ----------
    where : str
        ``otlp``: the collector that ``OTEL_EXPORTER_OTLP_ENDPOINT`` names (http://localhost:4318 by default);
        ``console``: stderr, one JSON object a line.
    service : str
        What collectors call this process, unless ``OTEL_SERVICE_NAME`` does.

    Raises
    ------
    InputError
        There is no such place.
    DependencyError
        The extra ``otel`` is not installed.
    """
    if where not in EXPORTERS:
        raise InputError(f"traces go to {' or '.join(EXPORTERS)}, not to {where!r}")
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
    except ImportError:
        raise DependencyError("traces need OpenTelemetry: pip install 'kvferry[otel]'") from None
    resource = Resource.create({SERVICE_NAME: service}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    console = ConsoleSpanExporter(out=sys.stderr, formatter=lambda each: each.to_json(indent=None) + "\n")
    processor: SpanProcessor = (
        SimpleSpanProcessor(console) if where == "console" else BatchSpanProcessor(OTLPSpanExporter())
    )
    provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)
