"""Whose questions are open: machines and identities are counted apart."""

from __future__ import annotations

import asyncio

import pytest

from kvferry.cloud import Limits
from kvferry.cloud.admission import Admission
from kvferry.cloud.passage import Passage
from kvferry.security.tokens import ANYBODY, Caller
from kvferry.wire.faults import BusyError

NEAR, NEARER = "ipv4:127.0.0.1", "ipv6:%5B::1%5D"
ONE, OTHER = "ipv4:10.0.0.1", "ipv6:%5B2001:db8::1%5D"


def test_a_machine_or_an_edge_takes_so_many_places_and_no_more() -> None:
    async def run() -> None:
        admission = Admission(Limits(calls=100, peer_calls=2))

        def enter(caller: Caller, peer: str) -> None:
            admission.admit(caller, peer)
            admission.add(Passage(caller, peer, b"", 30.0, lambda _: None))

        named = Caller("camera", calls=3)
        for caller, peer, most in ((ANYBODY, ONE, 2), (ANYBODY, OTHER, 2), (named, ONE, 3), (Caller("lens"), NEAR, 2)):
            for _ in range(most):
                enter(caller, peer)
            with pytest.raises(BusyError, match=f"{most} questions of this edge are open"):
                enter(caller, peer)
        with pytest.raises(BusyError):
            enter(named, OTHER)  # an identity is one edge, wherever it is
        for peer in (NEAR, NEARER):  # behind a tunnel or a proxy on this machine may be anybody
            for _ in range(5):
                enter(ANYBODY, peer)

    asyncio.run(run())
