"""Hostile bytes for as long as one likes: ``python -m tests.bitstream.fuzz --seconds 180``.

Valid streams are changed in bytes, in records and in the fields of their messages; most changes get checksums that are
right again, so that they reach what lies behind. Whatever comes out must be a cache or a :class:`BitstreamError`, with
bounded memory. What does anything else is written to ``out/fuzz``, and the run ends with status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvferry.bitstream import Reader, inspect
from kvferry.bitstream import header as headers
from kvferry.bitstream.bounds import Bounds
from kvferry.bitstream.positions import Places, write_sparse
from kvferry.bitstream.records import START, Chain, Kind, compress, decompress, parse, read_prefix
from kvferry.bitstream.varints import Numbers, write_varints
from kvferry.bounds import ModelBounds
from kvferry.errors import BitstreamError, FingerprintError
from kvferry.recipe import compress as compress_cache
from kvferry.wire import bitstream_pb2 as pb
from tests.helpers import cache, layout

SMALL = cache(layout(text_before=2, rows=2, columns=2, question=2, tail=2), layers=2, heads=2, dim=3)
STREAMS = [
    ("full|bf16|zstd", 1), ("knorm@0.5|int4", 1), ("random@0.5|int3|zstd", 1), ("knorm@0.8,budget=head|int4", 1),
    ("knorm@0.8|int8", 3), ("knorm@0.9,budget=head|bf16|zstd", 2), ("none|int1", 2),
    ("knorm@0.8,budget=head|kivi:2,residual=1", 1), ("full|turbo:2.5", 1), ("full|apart,visual=fp8/int2", 1),
]  # fmt: skip
"""Recipe and tiers."""

FITTING = ModelBounds(SMALL.fingerprint, ((2, 3),) * 2, 1 << 10, 64, 3, visual_ids=(7,))
"""Of a model that could have made it."""
MOST_CACHE = 1 << 24
MOST_MEMORY = 1 << 29
NUMBERS = (0, 1, 2, 3, 7, 63, 64, 65, 127, 128, 4096, 4097, 65535, 65536, 1 << 22, 2**31 - 1, 2**31, 2**32 - 1)
BOMBS = [compress(bytes(size)) for size in (1 << 10, 1 << 16, 1 << 24)]
"""A few bytes that unfold to many."""
TYPES = {Kind.HEADER: pb.Header, Kind.FRAME: pb.Frame, Kind.TRAILER: pb.Trailer}

Records = list[tuple[int, bytes]]


def bodies(recipe: str, tiers: int = 1) -> Records:
    """The records of a stream, the header not compressed."""
    return opened(compress_cache(SMALL, recipe, tiers))


def opened(blob: bytes) -> Records:
    """The same of any valid stream."""
    records: Records = []
    start = len(START)
    while (prefix := read_prefix(blob, start)) is not None:
        start = prefix.body + prefix.size + 4
        kind, body = prefix.kind, blob[prefix.body : prefix.body + prefix.size]
        if kind == Kind.HEADER_ZSTD:
            kind, body = Kind.HEADER, decompress(body, 1 << 20)
        records.append((kind, body))
        if start >= len(blob):
            break
    return records


def closed(records: Records) -> bytes:
    """A stream of these records, with the checksums that belong to it."""
    chain = Chain()
    return START + b"".join(chain.record(kind, body) for kind, body in records)  # type: ignore[arg-type]


def edit(blob: bytes, rng: random.Random) -> bytes:
    """One to four flips, insertions, deletions or copied pieces."""
    out = bytearray(blob)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(out) + 1)
        action = rng.randrange(4)
        if action == 0 and place < len(out):
            out[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif action == 1:
            out[place:place] = rng.randbytes(rng.randint(1, 6))
        elif action == 2:
            del out[place : place + rng.randint(1, 6)]
        elif blob:
            start = rng.randrange(len(blob))
            out[place : place + 8] = blob[start : start + 8]
    return bytes(out)


def in_bytes(records: Records, others: list[Records], rng: random.Random) -> bytes:
    """Flips, cuts and pieces of another stream, checksums as they were."""
    blob = closed(records)
    if rng.random() < 0.3:
        other = closed(rng.choice(others))
        return blob[: rng.randrange(len(blob))] + other[rng.randrange(len(other)) :]
    return edit(blob, rng)


def in_a_body(records: Records, others: list[Records], rng: random.Random) -> bytes:
    """Flips in one record's body."""
    index = rng.randrange(len(records))
    kind, body = records[index]
    records[index] = (kind, edit(body, rng))
    return closed(records)


def in_records(records: Records, others: list[Records], rng: random.Random) -> bytes:
    """Records lost, repeated, exchanged, renamed, cut off, or taken from another stream."""
    index, other = rng.randrange(len(records)), rng.randrange(len(records))
    action = rng.randrange(6)
    if action == 0:
        del records[index]
    elif action == 1:
        records.insert(other, records[index])
    elif action == 2:
        records[index], records[other] = records[other], records[index]
    elif action == 3:
        records[index] = (rng.choice([1, 2, 3, 4, 5, 127, 128, 255]), records[index][1])
    elif action == 4:
        records.insert(index, rng.choice(rng.choice(others)))
    else:
        del records[index:]
    return closed(records)


def in_fields(records: Records, others: list[Records], rng: random.Random) -> bytes:
    """Fields of messages changed, cleared, or taken from another stream."""
    for _ in range(rng.randint(1, 3)):
        index = rng.randrange(len(records))
        kind, body = records[index]
        message = parse(TYPES[Kind(kind)], body)
        donor = rng.choice([other for k, other in rng.choice(others) if k == kind])
        change(message, parse(TYPES[Kind(kind)], donor), rng)
        body = message.SerializeToString()
        records[index] = (kind, body)
    if rng.random() < 0.1:
        records[0] = (Kind.HEADER_ZSTD, compress(records[0][1]))
    return closed(records)


def in_positions(records: Records, others: list[Records], rng: random.Random) -> bytes:
    """Positions written in other forms, some of them one token off, repeated, or outside the prompt."""
    header = headers.decode(parse(pb.Header, records[0][1]), Bounds(MOST_CACHE))
    places, layer = Places(header.layout.visual[: header.length]), 0
    for index, (kind, body) in enumerate(records[1:-1], 1):
        frame = parse(pb.Frame, body)
        layer = frame.layer if frame.HasField("layer") else layer
        kept = places.read(frame, layer, header.shapes[layer].kv_heads)
        numbers, limit = kept.numbers(header.length), kept.heads * header.length
        if len(numbers) and rng.random() < 0.3:
            numbers[rng.randrange(len(numbers))] = rng.randrange(limit + 2)
            numbers.sort()
        frame.shared = kept.heads < header.shapes[layer].kv_heads
        form = rng.choice(["runs", "sparse", "bitmap"])
        setattr(frame, form, _written(numbers, limit, form))
        records[index] = (kind, frame.SerializeToString())
        layer = (layer + 1) % len(header.shapes)
    return closed(records)


def _written(numbers: Numbers, limit: int, form: str) -> bytes:
    """Ascending numbers, whatever they are, in a form of positions."""
    if form == "sparse":
        return write_sparse(numbers, limit)
    if form == "runs":
        starts = np.concatenate([[0], numbers + 1])[:-1]
        gaps = np.stack([np.maximum(numbers - starts, 0), np.ones_like(numbers)], 1)
        return write_varints(gaps.reshape(-1))
    mask = np.zeros(limit + 8, bool)
    mask[numbers] = True
    return np.packbits(mask, bitorder="little").tobytes()[: -(-limit // 8)]


def change(message: Any, donor: Any, rng: random.Random) -> None:
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = rng.choice(fields)
    value = getattr(message, field.name)
    if field.message_type is not None:
        inner = rng.choice(value) if field.is_repeated and len(value) else None if field.is_repeated else value
        if inner is not None:
            change(inner, inner, rng)
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    elif field.is_repeated:
        _change_list(value, field.type == field.TYPE_SINT32, rng)
    elif field.type == field.TYPE_BYTES:
        choices = [edit(value, rng), getattr(donor, field.name), rng.randbytes(rng.randint(0, 40)), rng.choice(BOMBS)]
        setattr(message, field.name, rng.choice(choices))
    elif field.type == field.TYPE_STRING:
        choices = [value, "full|bf16", "full|int8", "x|int2|zstd", "x|int9", "x|bf16|y", "|", value[::-1]]
        setattr(message, field.name, rng.choice(choices))
    elif field.type == field.TYPE_BOOL:
        setattr(message, field.name, not value)
    elif field.type == field.TYPE_SINT32:
        setattr(message, field.name, rng.choice([-(2**31), -1, *(x for x in NUMBERS if x < 2**31)]))
    else:
        most = 2**31 if field.type == field.TYPE_ENUM else 2**32
        setattr(message, field.name, rng.choice([x for x in (*NUMBERS, value + 1) if x < most]))


def _change_list(numbers: Any, signed: bool, rng: random.Random) -> None:
    possible = [x for x in NUMBERS if x < 2**31] if signed else list(NUMBERS)
    if len(numbers) and rng.random() < 0.6:
        numbers[rng.randrange(len(numbers))] = rng.choice(possible)
    elif len(numbers) and rng.random() < 0.5:
        del numbers[rng.randrange(len(numbers)) :]
    else:
        numbers.extend(rng.choice(possible) for _ in range(rng.randint(1, 4)))


MUTATIONS: list[Callable[[Records, list[Records], random.Random], bytes]] = [
    in_bytes, in_a_body, in_records, in_fields, in_fields, in_positions,
]  # fmt: skip


def read(blob: bytes, rng: random.Random) -> str:
    """How reading ``blob`` in some way ends: the name of the error, or ``decoded``. Anything else is raised."""
    try:
        way = rng.randrange(5)
        if way == 0:
            inspect(blob, decode=rng.random() < 0.5)
            return "decoded"
        bounds = Bounds(MOST_CACHE, FITTING.tokens, FITTING) if way == 4 else Bounds(MOST_CACHE)
        reader = Reader(layers=[0] if way == 1 else None, bounds=bounds)
        start = 0
        while start < len(blob):
            size = len(blob) if way == 2 else rng.randint(1, 400)
            reader.feed(blob[start : start + size])
            start += size
        if way == 1:
            return "decoded" if reader.complete else "partly"
        _check(reader.partial().cache if way == 2 else reader.cache())
    except (BitstreamError, FingerprintError) as error:
        return type(error).__name__
    return "decoded"


def _check(restored: Any) -> None:
    """What every cache is, however hostile its bytes were."""
    for layer in restored:
        for head in layer.split():
            positions = head.positions[0]
            inside = bool(((positions >= 0) & (positions < restored.length)).all())
            if not inside or not bool((positions.diff() > 0).all()):
                raise AssertionError(f"positions {positions.tolist()} of {restored.length}")
        if not bool(layer.keys.isfinite().all() and layer.values.isfinite().all()):
            raise AssertionError("NaN or infinity")


def hostile(seed: int) -> Iterator[tuple[str, bytes, random.Random]]:
    """Without end: what was done, a hostile stream, and the source of chance to read it with."""
    rng = random.Random(seed)
    streams = [bodies(recipe, tiers) for recipe, tiers in STREAMS]
    while True:
        mutate = rng.choice(MUTATIONS)
        blob = mutate(list(rng.choice(streams)), streams, rng)
        if mutate is in_positions and rng.random() < 0.5:
            blob = in_a_body(opened(blob), streams, rng)
        yield mutate.__name__, blob, rng


def main() -> int:
    """Run for the given time; 1 where anything was found."""
    parser = argparse.ArgumentParser(description="Read hostile bitstreams.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    ends: Counter[str] = Counter()
    found: Counter[str] = Counter()
    sources = hostile(given.seed)
    for _ in range(200):  # what torch and zstd load when first used is no stream's fault
        _, blob, rng = next(sources)
        read(blob, rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MOST_MEMORY, resource.RLIM_INFINITY))
    slowest, end = 0.0, time.monotonic() + given.seconds
    while time.monotonic() < end:
        what, blob, rng = next(sources)
        began = time.perf_counter()
        try:
            ends[f"{what}: {read(blob, rng)}"] += 1
        except Exception as error:
            name = f"{type(error).__name__}: {error}"[:100]
            if not found[name]:
                folder = Path("out/fuzz")
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{hashlib.sha256(blob).hexdigest()[:16]}.kvf"
                path.write_bytes(blob)
                print(f"found {name} in {path}", file=sys.stderr)
            found[name] += 1
        slowest = max(slowest, time.perf_counter() - began)
    for name, count in sorted(ends.items()):
        print(f"{count:9,}  {name}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{ends.total() + found.total():,} executions in {given.seconds:g} s, slowest {slowest:.3f} s, "
        f"{grown:.0f} MiB more memory at most, {len(found)} kinds of other errors"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
