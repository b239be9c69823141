"""Mode ``auto`` between two processes: it follows the link, keeps privacy and deadlines, and says why."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry import VLM, DeadlineError, Edge, InputError, LinkError
from kvferry.link import Rate, ShapedLink, TokenBucket
from kvferry.policy import OperatingPoint, PointTable
from tests.crossing.process import CloudProcess
from tests.crossing.test_faults import talking

QUESTION = "what colour is the circle?"
SMALL = OperatingPoint("kv:knorm@0.05|int4", 0.7, 1_500, cloud_seconds=0.02)
MIDDLE = OperatingPoint("kv:full|int4", 0.8, 30_000, cloud_seconds=0.02)
LARGE = OperatingPoint("kv:full|bf16", 0.9, 110_000, cloud_seconds=0.02)
IMAGE = OperatingPoint("image", 0.95, 20_000, cloud_seconds=0.05, needs=("pixels",))
EMBEDS = OperatingPoint("embeds:int8", 0.94, 30_000, needs=("embeds",))
LOCAL = OperatingPoint("local", 0.5, 0, edge_seconds=0.1)
CACHES = PointTable("caches", (SMALL, MIDDLE, LARGE))
ALL = PointTable("all", (SMALL, MIDDLE, LARGE, IMAGE, EMBEDS, LOCAL))


@pytest.fixture
def shaper() -> TokenBucket:
    """Its rate can be changed while bytes pass."""
    return TokenBucket(Rate.parse("20mbit"))


@pytest.fixture
def link(cloud: CloudProcess, shaper: TokenBucket) -> Iterator[ShapedLink]:
    with ShapedLink(cloud.address, uplink=shaper) as link:
        yield link


def test_the_mode_follows_the_link(link: ShapedLink, shaper: TokenBucket, vlm: VLM, picture: Path) -> None:
    """In 10 s the largest cache needs 88 kbit/s, the middle one 24."""
    with Edge(vlm, link.address, points=CACHES, policy="greedy@ewma:1", deadline=10) as edge:
        first = edge.ask([picture], QUESTION, mode="auto")
        assert f"{first.mode}:{first.recipe}" == LARGE.mode
        assert first.why.startswith(f"{LARGE.mode} by Greedy(safety=0.8), within ")
        assert "nothing known" not in first.why
        shaper.rate = Rate.parse("60kbit")
        with pytest.raises(DeadlineError):
            edge.ask([picture], QUESTION, mode="auto")
        shaper.rate = Rate.parse("1gbit")  # what still lies in the socket passes
        time.sleep(1)
        shaper.rate = Rate.parse("60kbit")
        second = edge.ask([picture], QUESTION, mode="auto")
        assert f"{second.mode}:{second.recipe}" == MIDDLE.mode
        shaper.rate = Rate.parse("20mbit")
        edge.ask([picture], QUESTION, mode="kv:full|int4")  # what is sent by hand teaches too
        last = edge.ask([picture], QUESTION, mode="auto")
        assert f"{last.mode}:{last.recipe}" == LARGE.mode


def test_risk_aware_starts_from_probes(link: ShapedLink, shaper: TokenBucket, vlm: VLM, picture: Path) -> None:
    """Ten of them let it bound a chance of 0.1 at once, so that it does not stay with what sends nothing."""
    with Edge(vlm, link.address, points=ALL, deadline=25) as edge:
        before = link.uplink_bytes
        answer = edge.ask([picture], QUESTION, mode="auto")
        assert answer.mode == "image"
        assert link.uplink_bytes - before > 10 * 2048 + answer.bitstream_bytes
    shaper.rate = Rate.parse("8kbit")
    with Edge(vlm, link.address, points=ALL, deadline=4) as edge:
        began = time.monotonic()
        assert edge.ask([picture], QUESTION, mode="auto", deadline=6).mode == "local"
        assert time.monotonic() - began < 6


def test_a_cache_in_tiers_is_answered_from_its_part(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    """Of 110,000 bytes, 6 s at 60 kbit/s bring some 40 %."""
    tiers = replace(LARGE, tiers=8, anytime=((0.2, 0.5),), cloud_seconds=2.0)
    table, policy = PointTable("tiers", (tiers,)), f"static:{LARGE.mode}"
    with Edge(vlm, cloud.address, points=table, policy=policy, uplink="60kbit", deadline=8) as edge:
        answer = edge.ask([picture], QUESTION, mode="auto")
    assert answer.partial
    assert 0.1 < answer.share < 0.7
    assert 6 < answer.seconds.total < 8
    assert "of use from 20% of them on" in answer.why


def test_no_pixels_cross(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    """A table that lies about what its points need changes nothing, nor does a mode by name."""
    lying = PointTable("lying", (OperatingPoint("image", 1.0, 10), OperatingPoint("scout:knorm@0.5", 0.99, 10), MIDDLE))
    file = picture.read_bytes()
    for table in (ALL, lying):
        with (
            tapped(cloud.address) as (address, passed),
            Edge(vlm, address, points=table, policy="greedy", privacy=["no-pixels", "no-embeds"]) as edge,
        ):
            answer = edge.ask([picture], QUESTION, mode="auto")
            assert answer.mode in ("kv", "local")
            assert "not allowed (no-pixels" in answer.why
            for mode in ("image", "image:30", "scout", "image:60,mask=0.5", "embeds:int8"):
                with pytest.raises(InputError, match="would leave the device"):
                    edge.ask([picture], QUESTION, mode=mode)
            assert not any(file[i : i + 64] in passed for i in range(0, len(file) - 64, 64))
            edge.ask([picture], QUESTION, mode="image", privacy=())
            assert file[-64:] in passed, "the tap would have seen it"


class tapped:  # noqa: N801
    """A relay that keeps a copy of what goes up."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.passed = bytearray()

    def __enter__(self) -> tuple[str, bytearray]:
        threading.Thread(target=self._accept, daemon=True).start()
        return f"127.0.0.1:{self._listener.getsockname()[1]}", self.passed

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                for source, sink, copy in ((client, server, self.passed), (server, client, None)):
                    threading.Thread(target=self._carry, args=(source, sink, copy), daemon=True).start()
        except OSError:
            return

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket, copy: bytearray | None) -> None:
        try:
            while data := source.recv(1 << 16):
                if copy is not None:
                    copy += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


def test_what_the_session_holds(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    again = OperatingPoint("scout:knorm@0.5", 0.97, 60, needs=("held_picture",))
    table = PointTable("held", (again, OperatingPoint("image:30", 0.96, 4_000)))
    with Edge(vlm, cloud.address, points=table, policy="greedy") as edge:
        first = edge.ask([picture], QUESTION, mode="auto")
        assert first.mode == "image"
        assert "does not hold the picture yet" in first.why
        edge.ask([picture], QUESTION, mode="scout:knorm@0.5")
        later = edge.ask([picture], QUESTION, mode="auto")
        assert later.mode == "scout"
        assert later.bitstream_bytes < 60


def test_deadlines_and_clouds_that_are_away(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    slow = PointTable("slow", (OperatingPoint("kv:full|int4", 0.8, 30_000, edge_seconds=50),))
    with Edge(vlm, cloud.address, points=slow, deadline=20) as edge:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="nothing can answer within"):
            edge.ask([picture], QUESTION, mode="auto")
        assert time.monotonic() - began < 10
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    with Edge(vlm, nobody, points=ALL, policy="greedy") as edge:
        answer = edge.ask([picture], QUESTION, mode="auto")
        assert answer.mode == "local"
        assert "cannot be reached" in answer.why_local
    with Edge(vlm, nobody, points=CACHES, policy="greedy") as edge, pytest.raises(LinkError, match="kvferry serve"):
        edge.ask([picture], QUESTION, mode="auto")


def test_what_can_be_asked_for(edge: Edge, vlm: VLM, picture: Path) -> None:
    with pytest.raises(InputError, match="kvferry profile"):
        edge.ask([picture], QUESTION, mode="auto")
    with pytest.raises(InputError, match="no privacy rule"):
        edge.ask([picture], QUESTION, privacy=["no-secrets"])
    with pytest.raises(InputError, match="no-pixels"):
        Edge(vlm, privacy=["nothing"])
    assert edge.describe()["queue_seconds"] == 0


def test_a_busy_cloud_says_so(model_folder: Path, vlm: VLM, picture: Path) -> None:
    """Where one answer is decoded at a time, the next has to wait; where several are, it has not."""
    for together, waits in (("1", True), ("2", False)):
        with CloudProcess(model_folder, "--together", together) as one, Edge(vlm, one.address) as edge:
            edge.ask([picture], QUESTION)
            with Edge(vlm, one.address) as talker, talking(talker, None):
                assert (edge.describe()["queue_seconds"] > 0) == waits
