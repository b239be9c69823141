"""What killing a replica, and replacing all of them, costs those who ask meanwhile (extra ``ray``).

``python benchmarks/fleet.py [--model testbed/cloud] [--edges 4] [--seconds 20]``: questions answered and lost, and the
median and 99th percentile of their seconds, in three stretches of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from kvferry import Edge
from kvferry.testbed import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="testbed/cloud")
    parser.add_argument("--edges", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "kvferry.cli", "serve", "--model", options.model, "--ray", "local", "--replicas"]
    command += ["2", "--listen", "127.0.0.1:0", "--json"]
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert gateway.stdout is not None
        ready = json.loads(gateway.stdout.readline())
        print(f"{'':<24}{'answered':>9}{'lost':>6}{'median s':>10}{'p99 s':>8}")
        stretch("undisturbed", options, ready["address"], lambda: None)
        stretch("one of two killed", options, ready["address"], lambda: os.kill(ready["replicas"][0], signal.SIGKILL))
        stretch("both replaced", options, ready["address"], lambda: gateway.send_signal(signal.SIGUSR1))
    finally:
        gateway.terminate()
        gateway.wait()


def stretch(name: str, options: argparse.Namespace, address: str, disturb: object) -> None:
    """Ask for so long, disturb after a fifth of it, and print a row."""
    scene = sample("validation", 0)
    took: list[float] = []
    texts: list[str] = []
    lost: list[str] = []
    until = time.perf_counter() + options.seconds

    def ask() -> None:
        with Edge(None, address, deadline=60) as edge:
            while time.perf_counter() < until:
                began = time.perf_counter()
                try:
                    texts.append(edge.ask(scene.images, scene.question, mode="image", max_new_tokens=16).text)
                except Exception as error:
                    lost.append(repr(error))
                took.append(time.perf_counter() - began)

    threads = [threading.Thread(target=ask) for _ in range(options.edges)]
    for thread in threads:
        thread.start()
    time.sleep(options.seconds / 5)
    assert callable(disturb)
    disturb()
    for thread in threads:
        thread.join()
    if len(set(texts)) > 1:
        raise SystemExit(f"different answers to one question: {sorted(set(texts))}")
    median, late = np.percentile(took, [50, 99])
    print(f"{name:<24}{len(texts):>9}{len(lost):>6}{median:>10.3f}{late:>8.3f}", *lost[:1], flush=True)


if __name__ == "__main__":
    main()
