"""Files that Pillow does not write: PNGs chunk by chunk, and colour profiles number by number."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

Chunk = tuple[bytes, bytes]


def png(
    picture: Image.Image | np.ndarray[Any, Any],
    *,
    depth: int = 8,
    kind: int = 2,
    clear: tuple[int, ...] = (),
    before: Sequence[Chunk] = (),
    after: Sequence[Chunk] = (),
    says: tuple[int, int] | None = None,
) -> bytes:
    """A PNG of numbers as they are; ``kind`` is its colour type, ``clear`` its transparent colour, ``before`` and
    ``after`` chunks around the pixels, ``says`` a size that is not true."""
    numbers = np.asarray(picture)
    height, width = numbers.shape[:2]
    if depth == 16:
        numbers = numbers.astype(">u2")
    if depth < 8:
        bits = np.unpackbits(numbers[..., None].astype(np.uint8), axis=-1)[..., 8 - depth :].reshape(height, -1)
        rows = [np.packbits(row).tobytes() for row in bits]
    else:
        rows = [row.tobytes() for row in numbers]
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    size = says or (width, height)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)), *before]
    if clear:
        chunks.append((b"tRNS", struct.pack(f">{len(clear)}H", *clear)))
    chunks += [(b"IDAT", body), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _fixed(*numbers: float) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(x * 65536) for x in numbers))


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """ICC version 2.4, with words in it that tell who made it and when."""
    words = b"desc" + bytes(4) + struct.pack(">I", 18) + b"a screen's serial\0" + bytes(78)
    tags = {**tags, b"desc": words, b"cprt": b"text" + bytes(4) + b"a maker's words\0"}
    table, bodies, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        padded = body + bytes(-len(body) % 4)
        table += struct.pack(">4sII", name, at + len(bodies), len(body))
        bodies += padded
    header = struct.pack(">I4sI4s4s4s", at + len(bodies), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2026, 11, 29, 9, 30, 0) + b"acsp" + b"APPL" + bytes(4) + b"MAKR" + b"MODL" + bytes(8)
    header += bytes(4) + _fixed(0.9642, 1.0, 0.8249) + b"CREA"
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + bodies


def _xyz(*numbers: float) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(*numbers)


def display_p3() -> bytes:
    """Apple's Display P3: its primaries adapted to D50, and sRGB's curve."""
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return _profile(
        b"RGB ",
        {
            b"wtpt": _xyz(0.9505, 1.0, 1.0891),
            b"rXYZ": _xyz(0.5151, 0.2412, -0.0011),
            b"gXYZ": _xyz(0.2919, 0.6922, 0.0419),
            b"bXYZ": _xyz(0.1572, 0.0666, 0.7841),
            b"rTRC": curve,
            b"gTRC": curve,
            b"bTRC": curve,
        },
    )


def grey_profile(gamma: float) -> bytes:
    """Grey whose light is the number to this power."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return _profile(b"GRAY", {b"wtpt": _xyz(0.9642, 1.0, 0.8249), b"kTRC": curve})
