"""What a request may cost: reserved before it is taken, given back however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvferry.bitstream.records import compress, decompress
from kvferry.cloud import Limits
from kvferry.cloud.costs import HEAVY_BYTES, Account, Budget
from kvferry.codecs.densities import laplace
from kvferry.codecs.entropy import Decoder, encode
from kvferry.errors import CancelledError, CorruptError, InputError
from kvferry.modes import BusyError
from kvferry.patience import looking

MIB = 1024 * 1024


@pytest.fixture
def budget() -> Iterator[Budget]:
    budget = Budget(Limits(memory_bytes=1000 * MIB, decode_seconds=0.2))
    yield budget
    assert budget.taken == 0


def test_open_requests_share_one_total(budget: Budget) -> None:
    with budget.account() as first, budget.account() as second:
        first.reserve(400 * MIB)
        first.reserve(100 * MIB)
        assert budget.taken == 500 * MIB
        with pytest.raises(InputError, match="at most 524,288,000"):
            first.reserve(1)
        second.reserve(450 * MIB)
        with budget.account() as third:
            with pytest.raises(BusyError, match="try again"):
                third.reserve(60 * MIB)
            third.reserve(50 * MIB)
    with budget.account() as later:
        later.reserve(500 * MIB)


def test_it_is_given_back_when_a_request_fails(budget: Budget) -> None:
    with budget.account() as other:
        other.reserve(500 * MIB)
        with pytest.raises(InputError), budget.account() as account:
            account.reserve(501 * MIB)
    with pytest.raises(CancelledError):
        account.reserve(1)  # a thread that still decodes for it ends here


def test_decoding_has_its_time(budget: Budget) -> None:
    """Steps are counted while they run, and between requests' pieces."""
    with budget.account() as account:
        assert not account.heavy
        with pytest.raises(InputError, match=r"0\.2 s to decode"), account.working():
            _decode_for_ever(account)
        assert 0.15 < account.seconds < 1
        assert account.heavy
        with pytest.raises(InputError, match="to decode"), account.working():
            pass


def test_what_takes_much_memory_is_heavy(budget: Budget) -> None:
    with budget.account() as account:
        account.reserve(HEAVY_BYTES)
        assert not account.heavy
        account.reserve(1)
        assert account.heavy


def _decode_for_ever(account: Account) -> None:
    """In steps of 10 ms."""
    while True:
        until = time.thread_time() + 0.01
        while time.thread_time() < until:
            pass
        account.reserve(0)


def test_decoding_looks_whether_anybody_waits(budget: Budget) -> None:
    """In a large frame of zstd, between its parts; it unfolds to the same, and nothing may follow it."""
    data = os.urandom(1000) * 20_000
    squeezed = compress(data)
    assert decompress(squeezed, len(data)) == data
    with pytest.raises(CorruptError, match="decompress"):
        decompress(squeezed + b"\1", len(data))
    with budget.account() as account, account.working():
        account.close()
        with pytest.raises(CancelledError):
            decompress(squeezed, len(data))
    looks: list[int] = []
    with looking(lambda: looks.append(1)):
        decompress(squeezed, len(data))
        decoder = Decoder(encode(np.arange(9, dtype=np.int32), np.array([9]), np.array([0]), laplace()))
        decoder.groups(np.array([9]), np.array([0]), laplace())
    assert len(looks) >= 4
    decompress(squeezed, len(data))
    assert len(looks) < 10
