"""Bytes and accuracy of every operating mode between two real processes: ``python benchmarks/modes.py --n 60``.

Validation questions. First a question per scene, every mode on the same ones; then several questions about each
scene in one session, where pictures and embeddings cross once and positions as changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch

import kvferry
from kvferry import Edge
from kvferry.cli.demo import cloud_process
from kvferry.edge import Answer
from kvferry.testbed import Sample, exact_match, samples
from kvferry.testbed.questions import KINDS, ask

CLOUD, EDGE = "testbed/cloud", "testbed/edge"
SAME = (
    "image", "image:60", "image:30", "image:10", "kv:full|int8|zstd", "kv:leaveout@0.25|int4|zstd",
    "kv:leaveout@0.1|int4|zstd", "embeds:bf16", "embeds:int8", "embeds:int4", "embeds:int3", "embeds:int2",
)  # fmt: skip
SMALLER = (
    "scout:vlcache@1", "scout:vlcache@0.75", "scout:vlcache@0.5", "scout:vlcache@0.25", "scout:vlcache@0.1",
    "scout:random@0.75", "scout:random@0.5", "scout:random@0.25", "scout:random@0.1",
    "image:60,mask=0.5", "image:60,mask=0.25", "image:30,mask=0.5", "image:30,mask=0.25", "local",
)  # fmt: skip
FOLLOWING = ("image", "embeds:int4", "scout:vlcache@0.25")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    questions = list(samples("validation", arguments.n, start=arguments.start))
    cloud, small = kvferry.load(CLOUD), kvferry.load(EDGE)
    tokens = np.mean([_visual_tokens(small, sample) for sample in questions])
    print(
        f"{arguments.n} validation questions; {tokens:.1f} visual tokens each; as 16-bit lists two bytes per kept token"
    )
    print("| edge's model | mode | bytes of the mode | all message bytes up | accuracy |\n|---|---|---:|---:|---:|")
    with cloud_process(CLOUD) as address:
        for name, vlm, modes in ((CLOUD, cloud, SAME), (EDGE, small, SMALLER)):
            for mode in modes:
                with Edge(vlm, address, deadline=100, hold=False) as edge:
                    _print(
                        name,
                        mode,
                        [(sample, edge.ask(sample.images, sample.question, mode=mode)) for sample in questions],
                    )
        print("\nSeveral questions about a scene, the first and the later ones apart\n")
        for mode in FOLLOWING:
            vlm = small if mode.startswith("scout") else cloud
            with Edge(vlm, address, deadline=100) as edge:
                asked = [[(x, edge.ask(x.images, x.question, mode=mode)) for x in _more(s)] for s in questions[::4]]
            name = EDGE if vlm is small else CLOUD
            _print(name, f"{mode}, first", [rows[0] for rows in asked])
            _print(name, f"{mode}, later", [row for rows in asked for row in rows[1:]])


def _print(name: str, mode: str, rows: Sequence[tuple[Sample, Answer]]) -> None:
    sent = np.mean([answer.bitstream_bytes for _, answer in rows])
    up = np.mean([answer.payload_bytes_up for _, answer in rows])
    right = np.mean([exact_match(answer.text, sample.answer) for sample, answer in rows])
    print(f"| {name} | {mode.replace('|', chr(92) + '|')} | {sent:,.1f} | {up:,.1f} | {right:.3f} |", flush=True)


def _more(first: Sample) -> Iterator[Sample]:
    """The question itself, then one of each other kind that its scene allows, about the same picture."""
    yield first
    if len(first.scenes) == 1:
        rng = np.random.default_rng((7, first.index))
        for kind in [kind for kind in KINDS if kind not in (first.kind, "pair")][:4]:
            more = ask(rng, first.scenes[0], kind)
            if more is not None:
                yield Sample(first.images, more.text, more.answer, kind, first.split, first.index, [], first.scenes)


def _visual_tokens(vlm: kvferry.VLM, sample: Sample) -> int:
    return sum(frames * rows * columns for frames, rows, columns in vlm.prefill(sample.images).cache.layout.grids)


if __name__ == "__main__":
    main()
