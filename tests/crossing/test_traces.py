"""Spans of an edge (by the SDK's in-memory exporter) and of a real cloud process join into one trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvferry import VLM, Answer, Edge, FingerprintError, InputError
from kvferry.telemetry import traces
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.process import CloudProcess

QUESTION = "where is the heliotrope canary?"


@pytest.fixture(scope="module")
def memory() -> Iterator[InMemorySpanExporter]:
    """The edge's spans: OpenTelemetry lets a process choose once."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "cloud.log"


@pytest.fixture(scope="module")
def traced(model_folder: Path, log: Path) -> Iterator[CloudProcess]:
    with CloudProcess(model_folder, "--traces", "console", "--log-format", "json", log=log) as process:
        yield process
        assert process.stop() == 0


@pytest.fixture(scope="module")
def answer(traced: CloudProcess, memory: InMemorySpanExporter, vlm: VLM, picture: Path) -> Answer:
    with Edge(vlm, traced.address, deadline=100) as edge:
        return edge.ask([picture], QUESTION, mode="kv:knorm@0.5|int8")


def said(log: Path, request_id: str) -> list[dict[str, Any]]:
    """The cloud's spans of the trace in which a request is."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    spans = [line for line in lines if "context" in line]
    (named,) = {x["context"]["trace_id"] for x in spans if x["attributes"].get("kvferry.request_id") == request_id}
    return [x for x in spans if x["context"]["trace_id"] == named]


def test_one_trace_from_edge_to_cloud(answer: Answer, memory: InMemorySpanExporter, log: Path) -> None:
    edge = {span.name: span for span in memory.get_finished_spans()}
    asked = edge["kvferry.ask"]
    assert asked.context is not None
    assert asked.attributes is not None
    assert asked.kind == trace.SpanKind.CLIENT
    assert asked.attributes["kvferry.request_id"] == answer.request_id
    assert asked.attributes["kvferry.bytes"] == answer.bitstream_bytes
    for name in ("kvferry.prepare", "kvferry.send"):
        assert edge[name].parent is not None
        assert edge[name].parent.span_id == asked.context.span_id  # type: ignore[union-attr]
    cloud = {span["name"]: span for span in said(log, answer.request_id)}
    request = cloud["kvferry.request"]
    assert int(request["context"]["trace_id"], 16) == asked.context.trace_id
    assert int(request["parent_id"], 16) == asked.context.span_id
    assert request["kind"] == "SpanKind.SERVER"
    assert request["attributes"]["kvferry.outcome"] == "ok"
    for name in ("kvferry.receive", "kvferry.answer"):
        assert cloud[name]["parent_id"] == request["context"]["span_id"]


def test_spans_lie_within_each_other(answer: Answer, memory: InMemorySpanExporter) -> None:
    """The one of what is over is put where it was."""
    edge = {span.name: span for span in memory.get_finished_spans()}
    ask, prepare, send = (edge[f"kvferry.{name}"] for name in ("ask", "prepare", "send"))
    slack = 50_000_000  # two clocks: ns
    assert ask.start_time is not None
    assert ask.end_time is not None
    for inner in (prepare, send):
        assert inner.start_time is not None
        assert inner.end_time is not None
        assert ask.start_time - slack <= inner.start_time <= inner.end_time <= ask.end_time + slack
    assert (send.end_time - send.start_time) / 1e9 == pytest.approx(answer.seconds.send, abs=0.05)  # type: ignore[operator]


def test_errors_and_words(answer: Answer, traced: CloudProcess, memory: InMemorySpanExporter, log: Path) -> None:
    """A span names the kind of an error; no span has its message, a question or an answer."""
    start = pb.AskRequest.Start(request_id="foreign", mode=pb.MODE_KV, max_new_tokens=1, fingerprint="another")
    start.question = QUESTION
    header = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
    with grpc.insecure_channel(traced.address) as channel:
        call = service_pb2_grpc.FerryStub(channel).Ask(iter([pb.AskRequest(start=start)]), timeout=60, metadata=header)
        assert [reply.error.kind for reply in call] == [pb.ERROR_KIND_FINGERPRINT]
    (request,) = [span for span in said(log, "foreign") if span["name"] == "kvferry.request"]
    assert request["context"]["trace_id"] == "0x0af7651916cd43dd8448eb211c80319c"
    assert request["status"] == {"status_code": "ERROR", "description": "fingerprint"}
    with pytest.raises(FingerprintError), traces.span("around"):
        raise FingerprintError("of the canary")
    mine = memory.get_finished_spans()
    assert mine[-1].status.description == "FingerprintError"
    told = log.read_text() + "".join(span.to_json() for span in mine)
    assert "canary" not in told
    assert answer.text not in told or len(answer.text) < 8


def test_without_opentelemetry_nothing_changes() -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
from kvferry.telemetry import traces
with traces.span("ask", "client") as span:
    span.note({"bytes": 1}); span.failed("busy")
traces.past("send", 1.0, 2.0)
try:
    traces.set_up_traces("otlp", "x")
except Exception as error:
    print(type(error).__name__, error, traces.metadata())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "DependencyError traces need OpenTelemetry: pip install 'kvferry[otel]'" in done.stdout


def test_a_collector_gets_them() -> None:
    """Over OTLP, to where the usual variable says."""
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    code = """
from kvferry.telemetry import traces
traces.set_up_traces("otlp", "kvferry-edge")
with traces.span("ask", "client"): pass
"""
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | where)
        server.shutdown()
    ((path, body),) = got
    assert path == "/v1/traces"
    assert b"kvferry.ask" in body
    assert b"kvferry-edge" in body


def test_no_such_place() -> None:
    with pytest.raises(InputError, match="otlp or console, not to 'jaeger'"):
        traces.set_up_traces("jaeger", "x")
