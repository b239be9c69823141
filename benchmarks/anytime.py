"""Accuracy against the share of a stream that has arrived: ``python benchmarks/anytime.py --into docs/progressive.md``.

Validation questions. A stream in tiers is cut after a share of its bytes, read as far as it goes, and asked; where no
layer-complete prefix is there yet, the question counts as wrong and is counted as unanswered beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import kvferry
from kvferry import Recipe, TruncatedError
from kvferry.bitstream import Reader
from kvferry.cache import KVCache
from kvferry.evaluate.forced import BATCH
from kvferry.evaluate.sweep import provenance
from kvferry.models.resume import stop_ids
from kvferry.testbed import Sample, samples

MODEL = "testbed/cloud"
RECIPES = ("leaveout@0.25|int4", "full|transform:64")
TIERS = (4, 8)
ORDERS: tuple[Literal["importance", "token"], ...] = ("importance", "token")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
MARKS = ("<!-- anytime -->", "<!-- /anytime -->")
Way = tuple[str, int, Literal["importance", "token"]]
Curve = tuple[int, list[bool | None]]
"""Bytes of the whole stream, and for every share whether the answer was right, None where there was none."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--into", type=Path, help="a page whose block between the two marks is replaced")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vlm = kvferry.load(MODEL)
    requests = [request for recipe in RECIPES for request in Recipe.parse(recipe).requests]
    curves: dict[Way, list[Curve]] = {}
    for sample in samples("validation", arguments.n):
        prefilled = vlm.prefill(sample.images, sample.question, requests=requests)
        streams = {way: kvferry.compress(prefilled, *way) for way in product(RECIPES, TIERS, ORDERS)}
        parts = {(way, i): x for way, stream in streams.items() for i, x in enumerate(_parts(stream))}
        right = _right(vlm, {key: cache for key, cache in parts.items() if cache is not None}, sample)
        for way, stream in streams.items():
            curve = [right.get((way, i)) for i in range(len(SHARES))]
            curves.setdefault(way, []).append((len(stream), curve))
    page = "\n".join(_page(curves, arguments.n, vlm))
    print(page)
    if arguments.into is not None:
        before, opened, rest = arguments.into.read_text().partition(MARKS[0])
        _, closed, after = rest.partition(MARKS[1])
        if not (opened and closed):
            raise SystemExit(f"{arguments.into} needs the two lines {MARKS[0]} and {MARKS[1]}")
        arguments.into.write_text(f"{before}{opened}\n{page}\n{closed}{after}")


def _parts(stream: bytes) -> Iterator[KVCache | None]:
    """What has arrived after each share of the bytes."""
    reader, fed = Reader(), 0
    for share in SHARES:
        until = round(share * len(stream))
        reader.feed(stream[fed:until])
        fed = until
        try:
            yield reader.partial().cache
        except TruncatedError:
            yield None


def _right(vlm: kvferry.VLM, caches: dict[tuple[Way, int], KVCache], sample: Sample) -> dict[tuple[Way, int], bool]:
    """Whether greedy decoding says the true answer and ends: all its tokens are the likeliest when it is fed."""
    wanted = vlm.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    keys, found = sorted(caches, key=lambda key: caches[key].nbytes), {}
    for batch in (keys[i : i + BATCH] for i in range(0, len(keys), BATCH)):
        for key, logits in zip(batch, vlm.score_many([caches[key] for key in batch], wanted, None), strict=True):
            best = logits.argmax(-1).tolist()
            found[key] = best[:-1] == wanted and best[-1] in stop_ids(vlm.model)
    return found


def _page(curves: dict[Way, list[Curve]], n: int, vlm: kvferry.VLM) -> Iterator[str]:
    where = provenance(vlm)
    yield f"{MODEL}, {n} validation questions, commit {where['commit'][:12]}; accuracy, and in brackets the questions"
    yield "without an answer, which count as wrong.\n"
    yield "| recipe | tiers | order | whole bytes | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"
    yield "|---|---:|---|---:|" + "---:|" * len(SHARES)
    for (recipe, tiers, order), rows in curves.items():
        whole = np.mean([nbytes for nbytes, _ in rows])
        cells = [_cell([outcomes[i] for _, outcomes in rows]) for i in range(len(SHARES))]
        name = recipe.replace("|", "\\|")
        yield f"| {name} | {tiers} | {order} | {whole:,.0f} | " + " | ".join(cells) + " |"


def _cell(outcomes: Sequence[bool | None]) -> str:
    silent = sum(x is None for x in outcomes)
    return f"{np.mean([bool(x) for x in outcomes]):.3f}" + (f" ({silent})" if silent else "")


if __name__ == "__main__":
    main()
