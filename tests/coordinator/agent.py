"""An agent in a process of its own: ``python -m tests.coordinator.agent ADDRESS`` prints its shares as they change."""

from __future__ import annotations

import json
import sys
import time

from kvferry.edge.membership import Membership
from kvferry.edge.pacing import Meter
from kvferry.policy import OperatingPoint

POINTS = (OperatingPoint("kv:full|int4", 0.9, 100_000), OperatingPoint("kv:full|int2", 0.5, 10_000))

if __name__ == "__main__":
    membership, said = Membership(sys.argv[1], POINTS, 1.0, Meter(), "process"), None
    while True:
        share = membership.share(5.0)
        if share != said:
            said = share
            print(json.dumps(None if share is None else [share.bits_per_second, share.members]), flush=True)
        time.sleep(0.02)
