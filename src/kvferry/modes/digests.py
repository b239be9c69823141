"""Full SHA-256 digests of what a session may hold, over what it is, its shape and its content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image


def file_digest(data: bytes, picture: Image.Image) -> bytes:
    """Of a picture file; ``picture`` is the same file opened, of which no pixel is read."""
    shape = f"{picture.format} {picture.mode} {picture.width}x{picture.height}"
    return _digest("picture file", shape, [data])


def pixel_digest(picture: Image.Image) -> bytes:
    """Of a decoded picture."""
    return _digest("pixels", f"{picture.mode} {picture.width}x{picture.height}", [picture.tobytes()])


def made_digest(what: str, how: str, pictures: Iterable[bytes]) -> bytes:
    """Of ``what`` was made of pictures with these digests, ``how`` naming the model and its options."""
    return _digest(what, how, pictures)


def set_digest(mask: npt.NDArray[np.bool_], pictures: Iterable[bytes]) -> bytes:
    """Of a set of the visual tokens of pictures with these digests."""
    return _digest("set", str(len(mask)), [np.packbits(mask).tobytes(), *pictures])


def _digest(what: str, shape: str, parts: Iterable[bytes]) -> bytes:
    """Every part is preceded by its length, so that no two different inputs read the same."""
    digest = hashlib.sha256()
    for part in (what.encode(), shape.encode(), *parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
