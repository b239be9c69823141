"""Measured end-to-end time against the model, between two processes: ``python benchmarks/latency.py``.

``T = T_edge + T_compress + 8 S / B + RTT + queue + T_decompress + T_cloud``, every stage as the same answer measured it
but the transfer, which is the bytes on the wire over the emulated rate. Caches are encoded and decoded while they
cross, so this T is too long by what hides behind the transfer; beside it stands the ratio to a T with the longer of
encoding and transfer only, and without decoding (``pipelined``). Questions of the validation split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import kvferry
from kvferry import Answer
from kvferry.evaluate.sweep import provenance
from kvferry.link import Rate
from kvferry.testbed import samples

MODEL = "testbed/cloud"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default="200kbit,500kbit,1mbit,2mbit")
    parser.add_argument("--recipe", default="full|int8")
    parser.add_argument("--delay", type=float, default=20.0, help="one way, ms")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vlm = kvferry.load(MODEL)
    where = provenance(vlm)
    command = [sys.executable, "-m", "kvferry.cli", "serve", "--model", MODEL, "--listen", "127.0.0.1:0", "--json"]
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cloud:
        assert cloud.stdout is not None
        try:
            address = json.loads(cloud.stdout.readline())["address"]
            (sample,) = samples("validation", 1)
            pictures = [_saved(image, Path(folder) / f"{i}.png") for i, image in enumerate(sample.images)]
            print(f"{MODEL}, {arguments.recipe}, one validation question {arguments.repeats} times, delay", end=" ")
            print(f"{arguments.delay:g} ms; {where['machine']}, commit {where['commit'][:12]}; medians\n")
            print("| rate | wire bytes | 8 S/B s | measured s | measured / T [least, most] | measured / pipelined T |")
            print("|---|---:|---:|---:|---:|---:|")
            for rate in map(Rate.parse, arguments.rates.split(",")):
                with kvferry.Edge(vlm, address, uplink=rate, delay_ms=arguments.delay, deadline=300) as edge:
                    edge.describe()  # connects
                    answers = [
                        edge.ask(pictures, sample.question, recipe=arguments.recipe) for _ in range(arguments.repeats)
                    ]
                print(_row(answers, rate, 2e-3 * arguments.delay), flush=True)
        finally:
            cloud.terminate()


def _saved(image: object, path: Path) -> Path:
    image.save(path)  # type: ignore[attr-defined]
    return path


def _row(answers: list[Answer], rate: Rate, rtt: float) -> str:
    plain = sorted(x.seconds.total / _model(x, rate, rtt, False) for x in answers)
    pipelined = statistics.median(x.seconds.total / _model(x, rate, rtt, True) for x in answers)
    wire = statistics.median(x.wire_bytes_up or 0 for x in answers)
    took = statistics.median(x.seconds.total for x in answers)
    return (
        f"| {rate} | {wire:,.0f} | {rate.seconds(int(wire)):.2f} | {took:.2f} | {statistics.median(plain):.3f} "
        f"[{plain[0]:.3f}, {plain[-1]:.3f}] | {pipelined:.3f} |"
    )


def _model(answer: Answer, rate: Rate, rtt: float, pipelined: bool) -> float:
    """T in seconds. The cloud's part after the last byte is its total less its share before."""
    here, there = answer.seconds, answer.cloud
    transfer = rate.seconds(answer.wire_bytes_up or 0)
    after = there.first_token + _decoding(answer)
    if pipelined:
        return here.prefill + max(here.encode, transfer) + rtt + after
    return here.prefill + here.encode + transfer + rtt + there.decode + after


def _decoding(answer: Answer) -> float:
    """From the first token to the last, as the edge saw it."""
    return answer.seconds.total - answer.seconds.first_token


if __name__ == "__main__":
    main()
