"""docs/bitstream.md is enough to write a reader: this one uses nothing of kvferry, and no protobuf library."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "expected.json").read_text())
FORMS = json.loads((DATA / "positions.json").read_text())


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for octet in data:
        crc ^= octet
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def varints(data: bytes) -> list[int]:
    at, out = 0, []
    while at < len(data):
        value, at = varint(data, at)
        out.append(value)
    return out


def records(blob: bytes) -> Iterator[tuple[int, bytes]]:
    assert blob[:4] == b"KVF\x03"
    at = 4
    while at < len(blob):
        size, body = varint(blob, at + 1)
        stop = body + size
        assert struct.unpack_from("<I", blob, stop)[0] == crc32c(blob[at - 4 : stop])
        yield blob[at], blob[body:stop]
        at = stop + 4


def message(body: bytes) -> dict[int, list[Any]]:
    """Protobuf: field numbers to what came under them."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(body):
        key, at = varint(body, at)
        value, at = varint(body, at)
        if key & 7 == 2:
            value, at = body[at : at + value], at + value  # type: ignore[assignment]
        else:
            assert key & 7 == 0
        fields.setdefault(key >> 3, []).append(value)
    return fields


def unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(b"\x28\xb5\x2f\xfd" + data)


def read_layout(body: bytes) -> dict[str, Any]:
    fields = message(body)
    numbers = {number: varints(fields.get(number, [b""])[0]) for number in (1, 2, 3, 5)}
    written, segments = iter(numbers[1]), iter(numbers[2])
    out: dict[str, Any] = {"token_ids": [], "modality": [], "role": []}
    for count in segments:
        kind = next(segments)
        filler = next(segments) if kind & 1 else None
        out["token_ids"] += [next(written) if filler is None else filler for _ in range(count)]
        out["modality"] += [kind >> 1 & 3] * count
        out["role"] += [kind >> 3] * count
    assert next(written, None) is None
    n, axes = len(out["token_ids"]), fields.get(4, [1])[0]
    if numbers[5]:
        positions = []
        for axis in range(axes):
            place, row = 0, []
            for step in numbers[5][axis * n : axis * n + n]:
                place += step >> 1 ^ -(step & 1)
                row.append(place)
            positions.append(row)
    else:
        positions = follow(out["modality"], numbers[3], axes)
    out["rotary_positions"] = positions
    delta = fields[6][0] if 6 in fields else None
    largest = max(max(row) for row in positions)
    out["rope_delta"] = largest + 1 - n if delta is None else delta >> 1 ^ -(delta & 1)
    return out


def follow(modality: list[int], grids: list[int], axes: int) -> list[list[int]]:
    if axes == 1:
        return [list(range(len(modality)))]
    out: list[list[int]] = [[], [], []]
    place = at = 0
    sizes = iter(grids)
    while at < len(modality):
        if modality[at] == 0:
            steps, advance = [(0, 0, 0)], 1
        else:
            frames, rows, columns = (next(sizes) for _ in range(3))
            steps = [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]
            advance = max(frames, rows, columns)
        for axis in range(3):
            out[axis] += [place + step[axis] for step in steps]
        at, place = at + len(steps), place + advance
    return out


def bits_of(data: bytes) -> list[int]:
    return [octet >> bit & 1 for octet in data for bit in range(8)]


def sparse(data: bytes, limit: int) -> list[int]:
    count, at = varint(data, 0)
    bits = iter(bits_of(data[at:]))
    low = (limit // count).bit_length() - 1 if count else 0
    lows = [sum(next(bits) << i for i in range(low)) for _ in range(count)]
    high, out = 0, []
    for value in lows:
        while not next(bits):
            high += 1
        out.append(high << low | value)
    return out


def runs(data: bytes) -> list[int]:
    at, out = 0, []
    lengths = varints(data)
    for dropped, kept in zip(lengths[::2], lengths[1::2], strict=True):
        out += range(at + dropped, at + dropped + kept)
        at += dropped + kept
    return out


class Coded:
    def __init__(self, visual: list[bool]) -> None:
        self.visual = visual
        self.weights = [[1, 1] for _ in range(24)]

    def read(self, data: bytes, rows: int, held: list[set[int]], before: list[set[int]] | None) -> list[set[int]]:
        coming = iter(data)
        code = int.from_bytes(bytes(next(coming, 0) for _ in range(4)), "big")
        width = 1 << 32
        out: list[set[int]] = [set() for _ in range(rows)]
        for row in range(rows):
            for token, visual in enumerate(self.visual):
                if token in held[row]:
                    continue
                g = 2 if before is None else int(token in before[min(row, len(before) - 1)])
                e = any(token in earlier for earlier in out[:row])
                weights = self.weights[8 * g + 4 * e + 2 * (token - 1 in out[row]) + visual]
                part = width // sum(weights) * weights[0]
                if code < part:
                    out[row].add(token)
                    width = part
                    weights[0] += 2
                else:
                    code, width = code - part, width - part
                    weights[1] += 2
                if sum(weights) > 1024:
                    weights[:] = [(weight + 1) // 2 for weight in weights]
                while width < 1 << 24:
                    width, code = width * 256, code * 256 + next(coming, 0)
        assert next(coming, None) is None
        return out


def bfloat16(number: float) -> float:
    """Rounded to nearest, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", number))
    bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def float32(number: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def words(data: bytes) -> list[float]:
    half = len(data) // 2
    joined = zip(data[:half], data[half:], strict=True)
    return [struct.unpack("<f", bytes([0, 0, low, high]))[0] for high, low in joined]


def unpack(data: bytes, bits: int, count: int) -> list[int]:
    string = int.from_bytes(data, "little")
    assert len(data) == -(-count * bits // 8)
    return [string >> bits * i & (1 << bits) - 1 for i in range(count)]


def array(flat: list[float], heads: int, kept: int, dim: int) -> list[list[list[float]]]:
    """``[heads, kept, dim]`` of what was written channel by channel."""
    return [[[flat[(h * dim + d) * kept + k] for d in range(dim)] for k in range(kept)] for h in range(heads)]


def by_token(flat: list[float], heads: int, kept: int, dim: int) -> list[list[list[float]]]:
    """``[heads, kept, dim]`` of what was written in that order."""
    return [[flat[at : at + dim] for at in range(h * kept * dim, (h + 1) * kept * dim, dim)] for h in range(heads)]


def payload(
    data: bytes, codec: str, zstd: bool, heads: int, kept: int, dims: tuple[int, int]
) -> list[list[list[list[float]]]]:
    """Keys and values."""
    vectors = heads * kept
    sizes = [vectors * dim for dim in dims]
    if codec == "bf16":
        assert len(data) == 2 * sum(sizes)
        halves = data[: 2 * sizes[0]], data[2 * sizes[0] :]
        return [array(words(half), heads, kept, dim) for half, dim in zip(halves, dims, strict=True)]
    bits = int(codec.removeprefix("int"))
    scales, at, out = words(data[: 4 * vectors]), 4 * vectors, []
    for which, (size, dim) in enumerate(zip(sizes, dims, strict=True)):
        stop = at + -(-size * bits // 8)
        numbers = [2 * u - 1 if bits == 1 else u - 2 ** (bits - 1) for u in unpack(data[at:stop], bits, size)]
        rows = (array if zstd else by_token)([float(x) for x in numbers], heads, kept, dim)
        for h, k in ((h, k) for h in range(heads) for k in range(kept)):
            scale = scales[which * vectors + h * kept + k]
            rows[h][k] = [bfloat16(float32(x * scale)) for x in rows[h][k]]
        at = stop
        out.append(rows)
    assert at == len(data)
    return out


class Stream:
    """Reads one; ``layers[i][head][position]`` is a pair of key and value."""

    def __init__(self, blob: bytes) -> None:
        self.frames: list[list[set[int]]] = []
        self.at = 0
        self.ended = False
        for kind, body in records(blob):
            assert not self.ended
            if kind in (1, 2):
                self.header(message(unzstd(body) if kind == 2 else body))
            elif kind == 3:
                self.frame(message(body))
            else:
                assert (kind, body) == (4, b"")
                self.ended = True

    def header(self, fields: dict[int, list[Any]]) -> None:
        self.fingerprint = fields[1][0].hex()
        self.recipe = fields[4][0].decode()
        _, self.codec, *lossless = self.recipe.split("|")
        self.zstd = lossless == ["zstd"]
        self.layout = read_layout(fields[6][0])
        self.length = len(self.layout["token_ids"]) - fields.get(5, [0])[0]
        self.tiers = fields.get(8, [1])[0]
        self.entries = fields.get(9, [None])[0]
        self.shapes = []
        for shape in map(message, fields[7]):
            heads, dim = shape[2][0], shape[3][0]
            self.shapes += [(heads, dim, shape.get(4, [dim])[0])] * shape[1][0]
        self.layers: list[list[dict[int, Any]]] = [[{} for _ in range(heads)] for heads, _, _ in self.shapes]
        self.missing = [self.tiers] * len(self.shapes)
        self.coded = Coded([kind != 0 for kind in self.layout["modality"][: self.length]])

    def frame(self, fields: dict[int, list[Any]]) -> None:
        layer = fields[1][0] if 1 in fields else self.at
        self.at = (layer + 1) % len(self.shapes)
        assert self.missing[layer] > 0
        self.missing[layer] = 0 if 2 in fields else self.missing[layer] - 1
        heads, *dims = self.shapes[layer]
        rows = self.positions(fields, 1 if 3 in fields else heads, layer)
        self.frames.append(rows)
        kept = [sorted(rows[min(head, len(rows) - 1)]) for head in range(heads)]
        data = fields.get(10, [b""])[0]
        if self.zstd and 9 not in fields:
            data = unzstd(data)
        ragged = len({len(row) for row in kept}) > 1
        shape = (1, sum(map(len, kept))) if ragged else (heads, len(kept[0]))
        parts = [
            [vector for row in part for vector in row]
            for part in payload(data, self.codec, self.zstd, *shape, (dims[0], dims[1]))
        ]
        vectors = zip(*parts, strict=True)
        for head, row in enumerate(kept):
            for position in row:
                assert position not in self.layers[layer][head]
                self.layers[layer][head][position] = next(vectors)

    def positions(self, fields: dict[int, list[Any]], rows: int, layer: int) -> list[set[int]]:
        if 8 in fields or not fields.keys() & {4, 5, 6, 7}:
            return self.frames[fields[8][0] if 8 in fields else -1]
        if 7 in fields:
            held = [set(head) for head in self.layers[layer]]
            held = [set().union(*held)] if rows == 1 else held
            return self.coded.read(fields[7][0], rows, held, self.frames[-1] if self.frames else None)
        limit = rows * self.length
        if 4 in fields:
            numbers = [i for i, bit in enumerate(bits_of(fields[4][0])) if bit]
        else:
            numbers = sparse(fields[5][0], limit) if 5 in fields else runs(fields[6][0])
        return [{x % self.length for x in numbers if x // self.length == row} for row in range(rows)]

    def describe(self) -> dict[str, Any]:
        sha = hashlib.sha256()
        described = []
        for layer in self.layers:
            rows = [[(p, *head[p]) for p in sorted(head)] for head in layer]
            flat = [entry for row in rows for entry in row]
            for p, _, _ in flat:
                sha.update(struct.pack("<q", p))
            for part in (1, 2):
                for entry in flat:
                    sha.update(b"".join(struct.pack("<f", x)[2:] for x in entry[part]))
            described.append(
                {
                    "counts": [len(row) for row in rows],
                    "positions": [[p for p, _, _ in row] for row in rows],
                    "first_key": flat[0][1],
                    "last_value": flat[-1][2],
                }
            )
        about = {"fingerprint": self.fingerprint, "recipe": self.recipe, "length": self.length}
        return about | self.layout | {"layers": described, "sha256": sha.hexdigest()}


PLAIN = [name for name, one in EXPECTED.items() if re.search(r"\|(bf16|int\d)(\|zstd)?$", one["recipe"])]
"""Streams of the codecs whose payloads the page describes."""


@pytest.mark.parametrize("name", PLAIN)
def test_the_page_reads_every_vector(name: str) -> None:
    stream = Stream((DATA / f"{name}.kvf").read_bytes())
    assert stream.ended
    assert stream.missing == [0] * len(stream.shapes)
    assert stream.describe() == EXPECTED[name]
    entries = sum(len(head) for layer in stream.layers for head in layer)
    assert stream.entries in (None, entries)
    assert (stream.entries is None) == (stream.tiers == 1)


@pytest.mark.parametrize("vector", FORMS, ids=lambda vector: f"{vector['form']}-{vector['rows']}x{vector['length']}")
def test_the_page_reads_every_form_of_positions(vector: dict[str, Any]) -> None:
    data, length, rows = bytes.fromhex(vector["hex"]), vector["length"], vector["rows"]
    if vector["form"] == "coded":
        read = Coded([False] * length).read(data, rows, [set() for _ in range(rows)], None)
        numbers = sorted(row * length + p for row, kept in enumerate(read) for p in kept)
    elif vector["form"] == "sparse":
        numbers = sparse(data, rows * length)
    elif vector["form"] == "runs":
        numbers = runs(data)
    else:
        numbers = [i for i, bit in enumerate(bits_of(data)) if bit]
    assert numbers == vector["numbers"]


def test_a_prefix_in_tiers_holds_a_token_of_every_layer() -> None:
    blob = (DATA / "knorm-int2-tiers.kvf").read_bytes()
    whole = Stream(blob)
    ends, at = [], 4
    while at < len(blob):
        size, body = varint(blob, at + 1)
        at = body + size + 4
        ends.append(at)
    for frames in range(len(whole.shapes), len(ends) - 1):
        part = Stream(blob[: ends[frames]])
        assert all(set(few) <= set(all_) and few for a, b in zip(part.layers, whole.layers, strict=True)
                   for few, all_ in zip(a, b, strict=True))  # fmt: skip
