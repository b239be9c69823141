"""Three range coders that write the same bytes, measured in turn in one run.

``python benchmarks/range_coder.py [--rounds 15] [--model testbed/cloud]``. One thread. Speeds of the library
constriction in million symbols a second of processor time; of this package's own loops, compiled by numba and as Python
runs them, as a ratio to it. Then recipes on a cache of the model, their other loops compiled with the coder's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from codec import in_turn
from rich.console import Console
from rich.table import Table

from kvferry.codecs import activity_kernels, entropy, range_kernels, range_library, transform
from kvferry.codecs.activity import Activity
from kvferry.codecs.densities import laplace, nearest
from kvferry.codecs.entropy import Decoder, Encoder
from kvferry.models import load
from kvferry.recipe import compress, decompress

CODERS = {
    "constriction": entropy.Coders(range_library.Writer, range_library.Reader),
    "numba": entropy.Coders(range_kernels.writer, range_kernels.reader, range_kernels.Adaptive),
    "Python": entropy.Coders(),
}
RECIPES = "full|transform:24", "full|transform:64", "full|int3,coder=range", "full|delta:10"
Task = tuple[int, Callable[[Encoder], object], Callable[[Decoder], object]]


def groups(number: int, size: int) -> Task:
    """``number`` groups of ``size`` symbols by Laplace models of a third of a step to eleven."""
    generator = np.random.default_rng(0)
    deviations = 2 ** generator.uniform(-1.6, 3.5, number)
    symbols = np.rint(generator.laplace(0, deviations[:, None] / 2**0.5, (number, size))).astype(np.int32).reshape(-1)
    counts, which = np.full(number, size), nearest(deviations)
    return (
        len(symbols),
        lambda encoder: encoder.groups(symbols, counts, which, laplace()),
        lambda decoder: decoder.groups(counts, which, laplace()),
    )


def adaptive(rows: int, tokens: int, alphabet: int) -> Task:
    """Channels by tokens, each channel's model learning."""
    normal = np.random.default_rng(0).standard_normal((rows, tokens))
    symbols = np.clip(np.rint(1.2 * normal) + alphabet // 2, 0, alphabet - 1).astype(np.int32)
    return (
        symbols.size,
        lambda encoder: encoder.adaptive(symbols, alphabet),
        lambda decoder: decoder.adaptive(rows, tokens, alphabet),
    )


TASKS = {
    "12 groups of 20 symbols": groups(12, 20),
    "12 groups of 200": groups(12, 200),
    "512 groups of 200": groups(512, 200),
    "64 groups of 4,000": groups(64, 4000),
    "adaptive, 256 x 128, 8 symbols": adaptive(256, 128, 8),
    "adaptive, 256 x 128, 31 symbols": adaptive(256, 128, 31),
}


@contextmanager
def by(coder: str) -> Iterator[None]:
    """Everything by this coder."""
    activity = activity_kernels.Activity if coder == "numba" else Activity
    by_coder = patch.object(entropy, "coders", lambda: CODERS[coder])
    with by_coder, patch.object(transform, "fastest_activity", lambda: activity):
        yield


def each(
    write: Callable[[], bytes], read: Callable[[bytes], object], rounds: int, repeat: int = 1
) -> list[list[float]]:
    """Seconds of every coder to write, then to read."""

    def encode(coder: str) -> bytes:
        with by(coder):
            *_, payload = (write() for _ in range(repeat))
        return payload

    def decode(coder: str) -> None:
        with by(coder):
            for _ in range(repeat):
                read(payload)

    (payload,) = {encode(coder) for coder in CODERS}
    actions: list[Callable[[], object]] = [lambda coder=x: encode(coder) for x in CODERS]
    actions += [lambda coder=x: decode(coder) for x in CODERS]
    seconds = [x / repeat for x in in_turn(actions, rounds)]
    return [seconds[: len(CODERS)], seconds[len(CODERS) :]]


def symbols(rounds: int) -> Table:
    """Symbols a second."""
    table = Table("symbols", "", "constriction, million/s", "numba / constriction", "Python / constriction")
    for name, (count, write, read) in TASKS.items():

        def encode(write: Callable[[Encoder], object] = write) -> bytes:
            encoder = Encoder()
            write(encoder)
            return encoder.finish()

        def decode(payload: bytes, read: Callable[[Decoder], object] = read) -> None:
            decoder = Decoder(payload)
            read(decoder)
            decoder.finish()

        rows = each(encode, decode, rounds, max(1, 2000 // count))
        for way, (library, compiled, plain) in zip(("write", "read"), rows, strict=True):
            speed = count / library / 1e6
            table.add_row(name, way, f"{speed:.1f}", f"{library / compiled:.1f}", f"{library / plain:.3f}")
    return table


def recipes(model: str, rounds: int) -> Table:
    """Seconds for a whole cache, as ratios."""
    picture = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    prefilled = load(model).prefill([picture], "what colour is the circle ?", recipe=RECIPES[0])
    table = Table("time", "", "numba / constriction", "Python / constriction")
    for recipe in RECIPES:
        rows = each(lambda recipe=recipe: compress(prefilled, recipe), decompress, rounds)
        for way, (library, compiled, plain) in zip(("compress", "decompress"), rows, strict=True):
            table.add_row(recipe, way, f"{compiled / library:.2f}", f"{plain / library:.1f}")
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Three range coders in one run.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="testbed/cloud")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for table in (symbols(arguments.rounds), recipes(arguments.model, min(arguments.rounds, 8))):
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
