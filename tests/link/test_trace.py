"""Traces: the files, the arithmetic against a packet-by-packet replay, and what the relay makes of them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import InputError
from kvferry.link import PacketTrace, RateTrace, Replay, ShapedLink, parse_address, read_trace, write_trace
from kvferry.link.channels import SHIPPED, GilbertElliott, Markov, walk
from kvferry.link.shaper import shaper_for
from kvferry.link.trace import PACKET_BYTES, TRACES, mean_rate, shipped_traces, transfer_end
from tests.link.test_relay import Hiccups, count_then_tell, seconds_to_upload, server

OPPORTUNITIES = st.lists(st.integers(0, 40), min_size=1, max_size=20).map(sorted).filter(lambda ms: ms[-1] > 0)
RATES = st.lists(st.sampled_from([0.0, 1e5, 1e6, 7.5e6]), min_size=1, max_size=8).filter(any)


def packets(*ms: int) -> PacketTrace:
    return PacketTrace(np.array(ms, np.int64))


def replayed(ms: list[int], start_ms: int, nbytes: int) -> float:
    """Mahimahi's own loop: walk the opportunities, each takes what it can."""
    base = 0
    while True:
        for at in ms:
            if base + at >= start_ms:
                nbytes -= PACKET_BYTES
                if nbytes <= 0:
                    return (base + at) / 1000
        base += ms[-1]


@given(OPPORTUNITIES, st.integers(0, 200), st.integers(1, 60_000))
def test_a_transfer_ends_where_a_packet_by_packet_replay_ends(ms: list[int], start: int, nbytes: int) -> None:
    assert float(transfer_end(packets(*ms), start / 1000, nbytes)) == replayed(ms, start, nbytes)


@given(st.one_of(OPPORTUNITIES.map(lambda ms: packets(*ms)), RATES.map(lambda r: RateTrace(np.array(r), 0.25))))
def test_offers_and_times_are_each_other_s_inverse(trace: PacketTrace | RateTrace) -> None:
    times = np.linspace(0, 3.3 * trace.period, 50)
    offered = trace.offered(times)
    assert (np.diff(offered) >= -1e-6).all()
    more = trace.time_of(offered + 1)
    assert (more >= times - 1e-9).all()
    assert (trace.offered(more + 2e-3) >= offered + 1 - 1e-6).all() or isinstance(trace, RateTrace)
    assert trace.offered(2.5 * trace.period) == pytest.approx(
        trace.period_bytes + trace.offered(1.5 * trace.period), rel=1e-9
    )


def test_one_line_of_1_is_twelve_megabits(tmp_path: Path) -> None:
    (tmp_path / "12").write_text("1\n")
    trace = read_trace(tmp_path / "12")
    assert mean_rate(trace) == 12e6
    assert transfer_end(trace, 0.0, 1_500_000) == pytest.approx(1.0)


def test_an_outage_in_the_middle_of_a_transfer() -> None:
    trace = RateTrace(np.array([8e6, 0.0, 0.0, 8e6]), 1.0)
    assert transfer_end(trace, 0.5, 1_000_000) == pytest.approx(3.5)
    assert transfer_end(trace, 1.2, 1_000_000) == pytest.approx(4.0)
    assert transfer_end(trace, 0.5, 250_000, share=0.5) == pytest.approx(1.0)
    assert transfer_end(trace, 1.7, 0) == pytest.approx(1.7)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("0\n0\n", 2),
        ("1\n\n2\n", 2),
        ("5\n4\n", 2),
        ("1\n2 3\n", 2),
        ("1\n-2\n", 2),
        ("1.5\n", 1),
        ("1\n2\nx\n", 3),
        ("9" * 30 + "\n", 1),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, line: int) -> None:
    file = tmp_path / "bad.up"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"bad\.up: line {line}: "):
        read_trace(file)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1\t5\n", 1),
        ("1\t0\n2\t0\n", 2),
        ("1\t5\n2\t-1\n", 2),
        ("1\t5\n2\t5\n4\t5\n", 3),
        ("1 5\n", 1),
        ("1\tnan\n", 1),
    ],
)
def test_a_wrong_line_of_rates_is_named(tmp_path: Path, text: str, line: int) -> None:
    file = tmp_path / "bad.tsv"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"bad\.tsv: line {line}: "):
        read_trace(file)


def test_rates_are_read_and_scaled(tmp_path: Path) -> None:
    file = tmp_path / "walk.tsv"
    file.write_text("1.0\t100\n2.0\t0\n3.0\t50\n")
    trace = read_trace(file, scale=0.1)
    assert (trace.period, mean_rate(trace)) == (3.0, pytest.approx(5e6))
    with pytest.raises(InputError, match="scale"):
        read_trace("steady", scale=0.5)


def test_no_such_trace(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steady"):
        read_trace("nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="binary"):
        read_trace(tmp_path / "binary")


def test_the_shipped_traces_can_be_drawn_again(tmp_path: Path) -> None:
    assert set(shipped_traces()) == set(SHIPPED)
    for name, (channel, seconds, seed) in SHIPPED.items():
        write_trace(channel.trace(seconds, seed), tmp_path / name)
        assert (tmp_path / name).read_text() == (TRACES / f"{name}.txt").read_text()


@given(RATES)
def test_a_written_trace_loses_less_than_a_packet_and_a_millisecond(tmp_path_factory, rates: list[float]) -> None:
    trace = RateTrace(np.array(rates), 0.25)
    file = tmp_path_factory.mktemp("traces") / "x"
    write_trace(trace, file)
    again = read_trace(file)
    times = np.linspace(0, again.period, 40)
    lost = trace.offered(times) - again.offered(times)
    assert (lost >= -1e-6).all()
    assert (lost <= PACKET_BYTES + 7.5e6 / 8 / 1000 + 1e-6).all()


def test_gilbert_elliott_spends_its_time_as_asked_and_repeats_with_its_seed() -> None:
    channel = GilbertElliott(10.0, 0.0, good_seconds=3.0, bad_seconds=1.0)
    trace = channel.trace(20_000, seed=5)
    bad = trace.bits_per_second == 0
    assert bad.mean() == pytest.approx(0.25, abs=0.02)
    outages = np.flatnonzero(np.diff(np.concatenate([[0], bad, [0]])))
    assert np.diff(outages)[::2].mean() * trace.step == pytest.approx(1.0, rel=0.05)
    assert np.array_equal(channel.trace(20_000, seed=5).bits_per_second, trace.bits_per_second)
    assert not np.array_equal(channel.trace(20_000, seed=6).bits_per_second, trace.bits_per_second)


def test_a_chain_s_long_run_is_what_its_path_shows() -> None:
    chain = Markov((1.0, 4.0, 9.0), ((0.5, 0.5, 0.0), (0.1, 0.6, 0.3), (0.0, 0.4, 0.6)))
    rates = chain.trace(3_000, seed=1).bits_per_second / 1e6
    assert [(rates == mbit).mean() for mbit in chain.mbit] == pytest.approx(chain.long_run().tolist(), abs=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Markov((1.0, 2.0), ((1.0,),)),
        lambda: Markov((1.0,), ((0.9,),)),
        lambda: Markov((1.0, 2.0), ((1.0, 0.0), (0.5,))),
        lambda: GilbertElliott(1.0, bad_seconds=0.01),
        lambda: walk(2.0, 1.0),
        lambda: Markov((0.0,), ((1.0,),)).trace(5, 0),
        lambda: walk(1.0, 2.0).trace(0.1, 0),
    ],
)
def test_channels_that_cannot_be(make) -> None:
    with pytest.raises(InputError):
        make()


def test_replay_loses_what_nobody_used() -> None:
    line = Replay(packets(10, 20, 30, 40))
    assert line.departure(1500, 100.0) == pytest.approx(100.010)
    assert line.departure(700, 100.005) == pytest.approx(100.020)
    assert line.departure(700, 100.012) == pytest.approx(100.020)  # the rest of the same opportunity
    assert line.departure(700, 100.035) == pytest.approx(100.040)
    assert line.departure(1500, 100.045) == pytest.approx(100.050)  # from the start again


def test_replay_does_not_depend_on_how_pieces_are_cut() -> None:
    trace = GilbertElliott(8.0, 1.0, 0.5, 0.5).trace(10, 3)
    whole, cut = Replay(trace), Replay(trace)
    last = 0.0
    for _ in range(1000):
        last = cut.departure(1000, 5.0)
    assert whole.departure(1_000_000, 5.0) == pytest.approx(last)


def test_trace_by_name_is_a_shaper() -> None:
    assert isinstance(shaper_for("trace:outages"), Replay)
    with pytest.raises(InputError, match="trace"):
        shaper_for("trace:absent")


@pytest.mark.parametrize("rate", [0.5, 6.0, 60.0])
def test_one_second_over_a_trace(rate: float, tmp_path: Path) -> None:
    """As in test_relay: within 2 % in the best of three, never faster."""
    write_trace(RateTrace(np.array([1e6 * rate]), 1.0), tmp_path / "constant")
    excess: list[float] = []
    with server(count_then_tell) as address:
        while len(excess) < 3 and min(excess, default=1.0) > 0.02:
            with Hiccups() as hiccups, ShapedLink(address, uplink=f"trace:{tmp_path / 'constant'}") as link:
                taken = seconds_to_upload(int(rate * 1e6 / 8), link)
            assert taken >= 0.98
            excess.append(taken - 1.0 - hiccups.total)
    assert min(excess) <= 0.02


def test_the_link_goes_away_in_the_middle_and_comes_back() -> None:
    """1.6 Mbit/s for 0.3 s, nothing for 0.6 s, and so on: 90 kB take 0.45 s of link and one outage."""
    trace = RateTrace(np.array([1.0, 0.0, 0.0]) * 1.6e6, 0.3)
    with server(count_then_tell) as address, ShapedLink(address, uplink=Replay(trace)) as link:
        begun = time.monotonic()
        with socket.create_connection(parse_address(link.address)) as sock:
            sock.sendall(bytes(90_000))
            sock.shutdown(socket.SHUT_WR)
            time.sleep(max(0.0, begun + 0.6 - time.monotonic()))
            during = link.uplink_bytes
            assert int(sock.recv(100)) == 90_000
            taken = time.monotonic() - begun
    assert during <= 60_000
    assert 1.04 <= taken < 3


TC = """
set -e
ip link set lo up mtu 1500
tc qdisc add dev lo root tbf rate 8mbit burst 8kb latency 200ms
exec "$PYTHON" - <<'END'
import socket, threading, time
listener = socket.create_server(("127.0.0.1", 0))
done = []
def drain():
    sock, _ = listener.accept()
    total = 0
    while data := sock.recv(65536):
        total += len(data)
    done.append(total)
thread = threading.Thread(target=drain)
thread.start()
sock = socket.create_connection(listener.getsockname())
begun = time.monotonic()
sock.sendall(bytes(1_000_000))
sock.close()
thread.join()
print(time.monotonic() - begun)
END
"""


def _run_in_a_namespace(script: str) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--net", "--map-root-user", "sh", "-c", script]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_the_relay_agrees_with_the_kernel_s_shaper() -> None:
    """A megabyte at 8 Mbit/s through ``tc`` (headers count there) and through the relay; the best of three."""
    if not (shutil.which("unshare") and shutil.which("tc") and shutil.which("ip")):
        pytest.skip("needs unshare, ip and tc")
    probe = _run_in_a_namespace("ip link set lo up && tc qdisc add dev lo root tbf rate 8mbit burst 8kb latency 200ms")
    if probe.returncode:
        pytest.skip(f"network namespaces or tc are not permitted here: {probe.stderr.strip()[:80]}")
    apart: list[float] = []
    while len(apart) < 3 and min(apart, default=1.0) > 0.15:
        kernel = _run_in_a_namespace(TC)
        assert kernel.returncode == 0, kernel.stderr
        with server(count_then_tell) as address, ShapedLink(address, uplink="8mbit") as link:
            ours = seconds_to_upload(1_000_000, link)
        apart.append(abs(ours / float(kernel.stdout) - 1))
    assert min(apart) <= 0.15
