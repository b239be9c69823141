"""What a cloud tells its operator of real requests: metrics, and one access line for each."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvferry import VLM, Answer, Edge, LinkError
from kvferry.cloud.metrics import Metrics
from kvferry.security.tokens import new_token
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.crossing.process import CloudProcess
from tests.docs.blocks import ROOT

QUESTION = "where is the heliotrope canary?"
RECIPE = "kv:knorm@0.5|int8"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Watched:
    """A cloud whose log and metrics can be read."""

    def __init__(self, process: CloudProcess, log: Path) -> None:
        self.process, self.log = process, log

    @property
    def page(self) -> str:
        """What Prometheus reads."""
        with urllib.request.urlopen(f"http://{self.process.ready['metrics']}/metrics", timeout=10) as page:
            text: str = page.read().decode()
        return text

    def samples(self) -> Samples:
        found = {}
        for family in text_string_to_metric_families(self.page):
            for sample in family.samples:
                found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        return found

    def value(self, name: str, **labels: str) -> float:
        return self.samples().get((f"kvferry_{name}", tuple(sorted(labels.items()))), 0.0)

    def lines(self, request_id: str = "", least: int = 0) -> list[dict[str, object]]:
        """The access lines, of one request or all; waits for the ``least`` that will come."""
        until = time.monotonic() + 20
        while True:
            lines = [json.loads(line) for line in self.log.read_text().splitlines()]
            found = [line for line in lines if line["logger"] == "kvferry.access"]
            found = [line for line in found if request_id in ("", line["request_id"])]
            if len(found) >= least or time.monotonic() > until:
                return found
            time.sleep(0.02)


@pytest.fixture(scope="module")
def watched(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    log = tmp_path_factory.mktemp("log") / "cloud.log"
    with CloudProcess(model_folder, "--metrics", "0", "--log-format", "json", log=log) as process:
        yield Watched(process, log)
        assert process.stop() == 0


@pytest.fixture(scope="module")
def answers(watched: Watched, vlm: VLM, picture: Path) -> dict[str, Answer]:
    """One question in each of three modes."""
    with Edge(vlm, watched.process.address, deadline=100) as edge:
        return {
            mode.partition(":")[0]: edge.ask([picture], QUESTION, mode=mode)
            for mode in (RECIPE, "image", "embeds:int8")
        }


def raw(watched: Watched, *requests: pb.AskRequest, timeout: float = 60) -> list[pb.AskReply]:
    with grpc.insecure_channel(watched.process.address) as channel:
        call = service_pb2_grpc.FerryStub(channel).Ask(iter(requests), timeout=timeout)
        return list(call)


def test_every_answer_is_counted_by_its_mode(watched: Watched, answers: dict[str, Answer]) -> None:
    for mode, answer in answers.items():
        assert watched.value("requests_total", mode=mode, outcome="ok") >= 1
        assert watched.value("received_bytes_total", mode=mode) >= answer.bitstream_bytes
        assert watched.value("answer_tokens_total", mode=mode) >= answer.tokens
        assert watched.value("request_seconds_count", mode=mode) >= 1
        for stage in ("decode", "queue", "prefill", "first_token"):
            assert watched.value("stage_seconds_count", mode=mode, stage=stage) >= 1
    cache = answers["kv"]
    assert cache.bf16_bytes is not None
    total = watched.value("compression_ratio_sum", mode="kv") / watched.value("compression_ratio_count", mode="kv")
    assert total == pytest.approx(cache.bf16_bytes / cache.bitstream_bytes)
    assert watched.value("compression_ratio_count", mode="image") == 0
    assert watched.value("uplink_bits_per_second_count") >= 1


def test_what_is_there_now(watched: Watched, answers: dict[str, Answer]) -> None:
    assert answers
    ready = watched.process.ready
    named = [labels for (name, labels), _ in watched.samples().items() if name == "kvferry_build_info"]
    assert dict(named[0])["fingerprint"] == ready["fingerprint"]
    assert dict(named[0])["model"] == "cloud"
    assert watched.value("open_requests") == watched.value("queue_length") == 0
    assert watched.value("held_sessions") >= 1
    assert watched.value("held_bytes") > answers["image"].bitstream_bytes
    assert watched.samples()["process_resident_memory_bytes", ()] > 50e6


def test_one_access_line_for_a_request(watched: Watched, answers: dict[str, Answer]) -> None:
    for mode, answer in answers.items():
        assert re.fullmatch("[0-9a-f]{32}", answer.request_id)
        (line,) = watched.lines(answer.request_id)
        assert (line["mode"], line["outcome"], line["level"]) == (mode, "ok", "info")
        assert (line["bytes"], line["tokens"]) == (answer.bitstream_bytes, answer.tokens)
        assert line["first_token_seconds"] == pytest.approx(answer.cloud.first_token, abs=1e-4)
    assert len(watched.lines()) == sum(v for (n, _), v in watched.samples().items() if n == "kvferry_requests_total")


def test_a_late_and_a_refused_request(watched: Watched, vlm: VLM) -> None:
    start = pb.AskRequest.Start(request_id="late", mode=pb.MODE_KV, max_new_tokens=1, recipe="full|bf16")
    start.fingerprint = vlm.fingerprint
    late, missed = (
        watched.value("requests_total", mode="kv", outcome="deadline"),
        watched.value("deadline_misses_total"),
    )

    def silent() -> Iterator[pb.AskRequest]:
        yield pb.AskRequest(start=start)
        with pytest.raises(grpc.RpcError):
            call.result()

    with grpc.insecure_channel(watched.process.address) as channel:
        call = service_pb2_grpc.FerryStub(channel).Ask(silent(), timeout=0.5)
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
    assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    watched.lines("late", least=1)  # the cloud's own clock tells it
    start.request_id, start.fingerprint = "refused", "another"
    (reply,) = raw(watched, pb.AskRequest(start=start))
    assert reply.error.kind == pb.ERROR_KIND_FINGERPRINT
    assert watched.value("errors_total", kind="fingerprint") == 1
    assert [line["outcome"] for line in watched.lines("refused")] == ["fingerprint"]
    assert watched.value("requests_total", mode="kv", outcome="deadline") == late + 1
    assert watched.value("deadline_misses_total") == missed + 1
    assert [line["outcome"] for line in watched.lines("late")] == ["deadline"]


def test_an_id_cannot_forge_lines(watched: Watched) -> None:
    before = len(watched.lines())
    start = pb.AskRequest.Start(request_id='x"}\n{"logger": "kvferry.access"', mode=pb.MODE_PROMPT, max_new_tokens=1)
    raw(watched, pb.AskRequest(start=start), pb.AskRequest(end=pb.AskRequest.End()))
    assert len(watched.lines()) == before + 1
    assert len(watched.lines("unprintable")) == 1
    raw(watched, pb.AskRequest(end=pb.AskRequest.End()))
    assert [(line["mode"], line["outcome"]) for line in watched.lines("unnamed")] == [("none", "protocol")]


def test_nothing_of_what_was_said_is_told(
    watched: Watched, answers: dict[str, Answer], vlm: VLM, picture: Path
) -> None:
    """Neither a question, a picture, an answer nor a session's name, whatever became of the request."""
    with Edge(vlm, watched.process.address, deadline=100) as edge:
        edge.ask([picture], QUESTION, mode="image")
        session = edge._line.holdings.session
    bad = pb.AskRequest.Start(request_id="bad", mode=pb.MODE_IMAGE, max_new_tokens=1, question=QUESTION)
    bad.items.add(digest=bytes(32), size=9)
    bad.session = session
    chunk = pb.AskRequest(chunk=pb.AskRequest.Chunk(data=b"heliotrop"))
    raw(watched, pb.AskRequest(start=bad), chunk, pb.AskRequest(end=pb.AskRequest.End(bytes=9)))
    told = watched.log.read_text() + watched.page
    assert len(session) == 16
    secrets = ["heliotrop", "canary", str(picture), session.hex(), repr(session)[2:-1]]
    secrets += [answer.text for answer in answers.values() if len(answer.text) > 8]
    assert [secret for secret in secrets if secret in told] == []


def test_a_taken_port_is_said(watched: Watched) -> None:
    with pytest.raises(LinkError, match=r"cannot serve metrics on .*; choose another"):
        Metrics().served(str(watched.process.ready["metrics"])).__enter__()


def test_estimate_against_achieved() -> None:
    """A record that expects 1 Mbit/s and gets half of it."""
    from kvferry.cloud.monitor import Record

    metrics, record = Metrics(), Record(mode="kv", expected_bits_per_second=1e6)
    record.arrived(1000)
    began = record._last
    record.arrived(62_500)
    record._last = began + 1.0
    assert record.achieved_bits_per_second == 500_000
    metrics.began()
    metrics.ended(record)
    value = metrics.registry.get_sample_value
    assert value("kvferry_uplink_achieved_ratio_sum") == 0.5
    assert value("kvferry_uplink_bits_per_second_sum") == 500_000


def test_the_page_lists_the_metrics_that_there_are(watched: Watched, answers: dict[str, Answer]) -> None:
    assert answers
    text = (ROOT / "docs" / "operations.md").read_text().partition("## Metrics")[2].partition("## Logs")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    told = {
        (name.strip(" `"), label.strip()) for names, labels in rows for name in names.split(",")
        for label in labels.split(",")
    }  # fmt: skip
    here = set()
    for (name, labels), _ in watched.samples().items():
        if name.startswith("kvferry_") and not name.endswith(("_created", "_sum", "_count")):
            plain = name.removeprefix("kvferry_").removesuffix("_bucket")
            here |= {(plain, label) for label, _ in labels if label != "le"} or {(plain, "")}
    assert told == here


def test_who_may_not_ask_is_counted_too(model_folder: Path, tmp_path: Path) -> None:
    new_token(tmp_path / "tokens.toml", "camera")
    log, words = tmp_path / "cloud.log", ("--metrics", "0", "--log-format", "json")
    with CloudProcess(model_folder, *words, "--tokens", str(tmp_path / "tokens.toml"), log=log) as process:
        watched = Watched(process, log)
        with pytest.raises(grpc.RpcError) as ended:
            raw(watched, pb.AskRequest(start=pb.AskRequest.Start(mode=pb.MODE_PROMPT, max_new_tokens=1)))
        assert ended.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert [line["outcome"] for line in watched.lines(least=1)] == ["denied"]
        assert watched.value("errors_total", kind="denied") == 1
        assert process.stop() == 0
