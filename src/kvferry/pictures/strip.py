"""JPEG, PNG and WebP files without metadata; the compressed pixels are copied, not decoded.

Lists say what stays, so that what nobody thought of goes: EXIF, XMP, IPTC, comments, thumbnails, makers' blocks, the
further pictures of a motion photo, text, times, and whatever stands behind the end.
"""

from __future__ import annotations

import struct
import zlib

from PIL import ImageCms

from kvferry.pictures.colour import is_srgb
from kvferry.pictures.header import UNREADABLE
from kvferry.pictures.profile import plain_profile

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"iCCP", b"sRGB", b"cICP", b"gAMA", b"cHRM", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""In the order in which they are written."""
_LARGEST_PROFILE = 16 * 1024 * 1024
_WEBP_CHUNKS = (b"VP8 ", b"VP8L", b"ALPH")
_ICC = b"ICC_PROFILE\x00"
_ICC_PIECE = 65_519


def stripped(data: bytes, form: str) -> bytes | None:
    """A picture file of one frame with the same pixels and no metadata; None where it is not built as it should be.

    Parameters
    ----------
    form : {"JPEG", "PNG", "WEBP"}
    """
    try:
        return {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp}[form](data)
    except (IndexError, ValueError, struct.error, zlib.error):
        return None


def _jpeg(data: bytes) -> bytes:
    """Segments up to the end of the first picture: tables, frames, scans, and what decoding their colours needs."""
    start, out, profile, at = b"", [], [], 2
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG")
    while True:
        if data[at] != 0xFF:
            raise ValueError("no marker")
        while data[at] == 0xFF:  # fill bytes
            at += 1
        marker = data[at]
        at += 1
        if marker == 0xD9:
            break
        (size,) = struct.unpack_from(">H", data, at)
        body = data[at + 2 : at + size]
        if len(body) != size - 2:
            raise ValueError("cut off")
        at += size
        if marker == 0xE2 and body.startswith(_ICC):
            profile.append(body)
        elif marker == 0xE0 and body.startswith(b"JFIF\0"):
            start = _segment(marker, body[:12] + b"\0\0")  # no thumbnail
        elif marker == 0xEE and body.startswith(b"Adobe"):
            out.append(_segment(marker, body[:12]))
        elif marker == 0xDA:
            end = _scan_end(data, at)
            out.append(_segment(marker, body) + data[at:end])
            at = end
        elif 0xC0 <= marker <= 0xDF:
            out.append(_segment(marker, body))
    icc = b"".join(body[14:] for body in sorted(profile, key=lambda body: body[12]))
    return b"\xff\xd8" + start + _profile_segments(_needed(icc)) + b"".join(out) + b"\xff\xd9"


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def _scan_end(data: bytes, at: int) -> int:
    """Where coded pixels end: at a marker that is neither a stuffed byte nor a restart."""
    while True:
        at = data.index(b"\xff", at)
        follows = data[at + 1]
        if follows not in (0x00, 0xFF) and not 0xD0 <= follows <= 0xD7:
            return at
        at += 1 if follows == 0xFF else 2


def _profile_segments(icc: bytes) -> bytes:
    pieces = [icc[begin : begin + _ICC_PIECE] for begin in range(0, len(icc), _ICC_PIECE)]
    return b"".join(
        _segment(0xE2, _ICC + bytes([number, len(pieces)]) + piece) for number, piece in enumerate(pieces, 1)
    )


def _png(data: bytes) -> bytes:
    """Chunks that pixels and their colours need; of an animation the first frame, which is the picture itself."""
    if not data.startswith(_PNG_START):
        raise ValueError("no PNG")
    out, at, kind = dict[bytes, bytes](), len(_PNG_START), b""
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        if len(data) < at + 12 + size:
            raise ValueError("cut off")
        if kind == b"sRGB" and b"iCCP" in out:
            pass
        elif kind in _PNG_CHUNKS and kind != b"iCCP":
            out[kind] = out.get(kind, b"") + data[at : at + 12 + size]
        elif kind == b"iCCP":
            unfolded = zlib.decompressobj().decompress(body[body.index(b"\0") + 2 :], _LARGEST_PROFILE)
            icc = _needed(unfolded)
            out[kind] = _chunk(kind, b"icc\0\0" + zlib.compress(icc, 9)) if icc else _chunk(b"sRGB", b"\0")
            out.pop(b"sRGB", None)  # a profile goes before it, and where it goes, so do gAMA and cHRM
        at += 12 + size
    return _PNG_START + b"".join(out[kind] for kind in _PNG_CHUNKS if kind in out)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _webp(data: bytes) -> bytes:
    """The pixels, their opacity and their colours."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("no WebP")
    (length,) = struct.unpack_from("<I", data, 4)
    end, at = 8 + length, 12
    if len(data) < end:
        raise ValueError("cut off")
    pixels, icc, extended = [], b"", b""
    while at + 8 <= end:
        kind, size = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + size]
        if kind == b"VP8X":
            extended = body
        elif kind == b"ICCP":
            icc = _needed(body)
        elif kind in _WEBP_CHUNKS:
            pixels.append(_riff(kind, body))
        at += 8 + size + size % 2
    if not pixels:
        raise ValueError("no pixels")
    if extended:
        flags = extended[0] & 0x10 | (0x20 if icc else 0)  # opacity as it was; no EXIF, no XMP, no animation
        pixels = [_riff(b"VP8X", bytes([flags]) + extended[1:]), *([_riff(b"ICCP", icc)] if icc else []), *pixels]
    inside = b"WEBP" + b"".join(pixels)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def _riff(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _needed(icc: bytes) -> bytes:
    """A colour profile without words and dates, or nothing where it is sRGB or broken, and viewers do without it."""
    try:
        return b"" if not icc or is_srgb(icc) else plain_profile(icc)
    except (ImageCms.PyCMSError, *UNREADABLE):
        return b""
