"""Edges that share one emulated uplink by what a coordinator grants them: three kinds of process, real bytes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvferry import VLM, Answer, DeadlineError, Edge, InputError
from kvferry.link import Rate, ShapedLink, TokenBucket
from kvferry.policy import PointTable
from tests.coordinator.process import CoordinatorProcess, within
from tests.crossing.process import CloudProcess
from tests.crossing.test_auto import CACHES, LARGE, LOCAL, MIDDLE, QUESTION
from tests.crossing.test_faults import unused_address

DEADLINE = 10.0


def granted(answer: Answer) -> float:
    """Mbit/s, as the answer's reasons have it."""
    return float(answer.why.rpartition("grants ")[2].split()[0])


def test_two_edges_share_a_link(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    """In 10 s the large cache takes 88 kbit/s and the middle one 24; of 180, 144 are counted on."""
    with (
        CoordinatorProcess("180kbit") as coordinator,
        ShapedLink(cloud.address, uplink="180kbit") as link,
        Edge(vlm, link.address, points=CACHES, deadline=DEADLINE, coordinator=coordinator.address) as one,
    ):
        alone = one.ask([picture], QUESTION, mode="auto")
        assert f"{alone.mode}:{alone.recipe}" == LARGE.mode
        assert granted(alone) == pytest.approx(0.18, rel=0.03)
        with (
            Edge(vlm, link.address, points=CACHES, deadline=DEADLINE, coordinator=coordinator.address) as two,
            ThreadPoolExecutor() as threads,
        ):
            two.ask([picture], QUESTION, mode="kv:knorm@0.05|int4")  # by then both know that they are two
            answers = [
                x.result() for x in [threads.submit(e.ask, [picture], QUESTION, mode="auto") for e in (one, two)]
            ]
    assert sorted(f"{x.mode}:{x.recipe}" for x in answers) == sorted([LARGE.mode, MIDDLE.mode])
    assert sum(granted(x) for x in answers) < 0.18 * 1.03
    for answer in answers:
        assert "2 agents on the uplink" in answer.why
        assert 8e-6 * answer.bitstream_bytes / answer.seconds.send < 1.1 * granted(answer)
        assert answer.seconds.total < DEADLINE


def test_an_edge_that_rested_asks_at_once(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    """None of its points is a fallback, so that nothing is kept for it: its next question has all of the link."""
    with (
        CoordinatorProcess("180kbit", "127.0.0.1:0", "--idle", "1") as coordinator,
        Edge(vlm, cloud.address, points=CACHES, deadline=DEADLINE, coordinator=coordinator.address) as edge,
    ):
        first = edge.ask([picture], QUESTION, mode="auto", max_new_tokens=1)
        time.sleep(2.5)
        again = edge.ask([picture], QUESTION, mode="auto", max_new_tokens=1)
        time.sleep(2.5)
        plain = edge.ask([picture], QUESTION, mode=LARGE.mode, max_new_tokens=1)
    assert granted(again) == granted(first) == 0.18
    assert again.recipe == first.recipe == plain.recipe
    for answer in (again, plain):
        assert answer.seconds.send < 1.5 * 8 * answer.bitstream_bytes / 180e3


def test_without_a_coordinator_it_knows_itself(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    address = unused_address()
    with Edge(vlm, cloud.address, points=CACHES, policy="greedy", coordinator=address) as edge:
        answer = edge.ask([picture], QUESTION, mode="auto")
        assert f"{answer.mode}:{answer.recipe}" == LARGE.mode
        assert "Greedy" in answer.why
        assert f"the coordinator at {address} is away" in answer.why
        with CoordinatorProcess("1mbit", address):
            within(20, lambda: "agents on the uplink" in edge.ask([picture], QUESTION, mode="auto").why)
        within(20, lambda: "is away" in edge.ask([picture], QUESTION, mode="auto").why)


def test_where_nothing_fits_nothing_is_sent(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    here = PointTable("here", (MIDDLE, LOCAL))
    with CoordinatorProcess("2kbit") as coordinator, ShapedLink(cloud.address) as link:
        with Edge(vlm, link.address, points=CACHES, deadline=5, coordinator=coordinator.address) as edge:
            with pytest.raises(DeadlineError, match="coordinator grants"):
                edge.ask([picture], QUESTION, mode="auto")
            assert link.uplink_bytes < 2_000
        with Edge(vlm, link.address, points=here, deadline=5, coordinator=coordinator.address) as edge:
            assert edge.ask([picture], QUESTION, mode="auto").mode == "local"
    with pytest.raises(InputError, match="points"):
        Edge(vlm, coordinator="127.0.0.1:7422")
    with pytest.raises(InputError, match="may be used here"):
        Edge(None, points=CACHES, coordinator="127.0.0.1:7422")


def test_a_link_below_its_bound_is_found_out(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    """Configured are 2 Mbit/s, there are 0.1: the large cache takes 9 s of 6, the middle one 2.4."""
    shaper = TokenBucket(Rate.parse("100kbit"))
    with (
        CoordinatorProcess("2mbit") as coordinator,
        ShapedLink(cloud.address, uplink=shaper) as link,
        Edge(vlm, link.address, points=CACHES, deadline=6, coordinator=coordinator.address) as edge,
    ):
        with pytest.raises(DeadlineError):
            edge.ask([picture], QUESTION, mode="auto")
        shaper.rate = Rate.parse("1gbit")  # what still lies in the socket passes
        time.sleep(0.5)
        shaper.rate = Rate.parse("100kbit")
        answer = edge.ask([picture], QUESTION, mode="auto")
    assert f"{answer.mode}:{answer.recipe}" == MIDDLE.mode
    assert granted(answer) < 0.15
