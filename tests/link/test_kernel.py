"""The same traces by the kernel's own shaper (``tc`` in a network namespace) as by the relay: both take as long."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvferry.link import ShapedLink, read_trace, shipped_traces
from tests.link.test_relay import count_then_tell, seconds_to_upload, server

ENVIRONMENT = os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])}
NAMESPACE = ["unshare", "-n"] if hasattr(os, "geteuid") and os.geteuid() == 0 else ["unshare", "-rn"]
PROBE = "ip link set lo mtu 576 up && tc qdisc add dev lo root tbf rate 1mbit burst 600 limit 100000"
STEP = 0.5
NEAR = 0.05
NBYTES = {"narrow": 120_000}
"""About five seconds of the link, two megabytes on the others; an outage is among them."""
USUAL_NBYTES = 2_000_000


def why_not() -> str:
    """What this machine lacks to shape a link by its kernel."""
    if missing := [name for name in ("unshare", "ip", "tc") if shutil.which(name, path=ENVIRONMENT["PATH"]) is None]:
        return f"there is no {', '.join(missing)} here; install iproute2 and util-linux"
    done = subprocess.run([*NAMESPACE, "sh", "-c", PROBE], capture_output=True, text=True, env=ENVIRONMENT)
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"the kernel shapes no link for us ({reason}); be root, or allow user namespaces" if done.returncode else ""


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    if reason := why_not():
        pytest.skip(reason)


def by_kernel(trace: str, nbytes: int) -> tuple[float, int]:
    """Seconds, and bytes on the wire."""
    words = [*NAMESPACE, sys.executable, "-m", "tests.link.kernel", trace, str(nbytes), str(STEP)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], env=ENVIRONMENT
    )
    record = json.loads(done.stdout)
    assert record["drops"] == 0
    return record["seconds"], record["wire_bytes"]


@pytest.mark.parametrize("trace", shipped_traces())
def test_as_long_as_by_the_kernel(trace: str) -> None:
    """Within 5 % in the best of three, for as many bytes; both within 5 % of what the trace itself says."""
    nbytes, apart = NBYTES.get(trace, USUAL_NBYTES), []
    while len(apart) < 3 and min(apart, default=1.0) > NEAR:
        kernel, on_wire = by_kernel(trace, nbytes)
        with server(count_then_tell) as address, ShapedLink(address, uplink=f"trace:{trace}") as link:
            relay = seconds_to_upload(on_wire, link)
        expected = float(read_trace(trace).time_of(on_wire))
        print(f"{trace}: {on_wire:,} bytes: kernel {kernel:.3f} s, relay {relay:.3f} s, trace {expected:.3f} s")
        apart.append(max(abs(kernel / relay - 1), abs(kernel / expected - 1), abs(relay / expected - 1)))
    assert min(apart) <= NEAR
