"""Pictures as callers hand them in, read in one place: a header's check, the pixels that a viewer shows, and files
without what is private in them.

Neither torch nor transformers is imported here, and numpy only for pixels: :func:`check_picture` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvferry.pictures.header import (
    FILE_FORMATS,
    MAX_ASPECT,
    MAX_PIXELS,
    WIRE_FORMATS,
    Header,
    check_picture,
    check_size,
    identify,
)

if TYPE_CHECKING:
    from kvferry.pictures.files import file_of, jpeg_of
    from kvferry.pictures.read import open_picture

_HOMES = {"file_of": "files", "jpeg_of": "files", "open_picture": "read"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "FILE_FORMATS",
    "MAX_ASPECT",
    "MAX_PIXELS",
    "WIRE_FORMATS",
    "Header",
    "check_picture",
    "check_size",
    "file_of",
    "identify",
    "jpeg_of",
    "open_picture",
]
