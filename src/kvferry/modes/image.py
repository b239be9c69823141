"""``image``: the picture's file is sent, and the cloud does all the work. What everything else is held against."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from kvferry.errors import InputError, TruncatedError
from kvferry.modes.base import OnToken, cut
from kvferry.modes.faults import ProtocolError
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.models import VLM, Continuation
    from kvferry.summary import Summary

JPEG_QUALITY = 90
FORMATS = ("JPEG", "PNG")
MAX_PICTURES = 16
MAX_PIXELS = 64 * 1024 * 1024


class ImageSender:
    """The edge's half. JPEG and PNG files travel as they are; anything else as JPEG of quality 90."""

    bf16_bytes: int | None = None
    kept: Summary | None = None
    prefill_seconds = 0.0

    def __init__(self, images: Sequence[Any], question: str) -> None:
        began = time.perf_counter()
        self._files = [file_bytes(image) for image in images]
        self._question = question
        self.encode_seconds = time.perf_counter() - began

    def start(self) -> pb.AskRequest.Start:
        if not self._question.strip():
            raise InputError("the question is empty; ask something")
        if len(self._files) > MAX_PICTURES:
            raise InputError(f"{len(self._files)} pictures at once; at most {MAX_PICTURES} are taken")
        sizes = [len(file) for file in self._files]
        return pb.AskRequest.Start(mode=pb.MODE_IMAGE, question=self._question, pictures=sizes)

    def prepare(self) -> None:
        """Nothing is left to do."""

    def chunks(self) -> Iterator[bytes]:
        return cut(self._files)


class ImageReceiver:
    """The cloud's half. Sizes are announced, and bounded, before the first byte."""

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, max_bytes: int) -> None:
        if not start.question.strip():
            raise InputError("the question is empty; ask something")
        if len(start.pictures) > MAX_PICTURES or sum(start.pictures) > max_bytes:
            raise InputError(
                f"{len(start.pictures)} pictures of {sum(start.pictures)} bytes are too much; "
                f"at most {MAX_PICTURES} and {max_bytes} bytes are taken"
            )
        if start.pictures and not vlm.has_vision:
            raise InputError(f"{vlm.name} reads text only; ask without a picture")
        self.prefill_seconds = 0.0
        self._vlm = vlm
        self._question = start.question
        self._sizes = tuple(start.pictures)
        self._data = bytearray()
        self._images: list[Image.Image] = []

    def feed(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > sum(self._sizes):
            raise ProtocolError("more picture bytes than were announced")

    def finish(self) -> None:
        if len(self._data) < sum(self._sizes):
            raise TruncatedError(f"{len(self._data)} of {sum(self._sizes)} picture bytes arrived; send them again")
        begin = 0
        for size in self._sizes:
            self._images.append(open_picture(bytes(self._data[begin : begin + size])))
            begin += size

    def answer(self, max_new_tokens: int, on_token: OnToken) -> Continuation:
        began = time.perf_counter()
        prefilled = self._vlm.prefill(self._images, self._question)
        self.prefill_seconds = time.perf_counter() - began
        return self._vlm.resume(prefilled.cache, max_new_tokens=max_new_tokens, on_token=on_token)


def file_bytes(image: Image.Image | str | PathLike[str]) -> bytes:
    """What travels: a JPEG or PNG file as it is, any other picture as JPEG of quality 90.

    Raises
    ------
    InputError
        If it is not a picture, or there is none.
    """
    if isinstance(image, Image.Image):
        return _as_jpeg(image)
    if not isinstance(image, str | PathLike):
        raise InputError(f"a {type(image).__name__} is not a picture; pass a path or a PIL image")
    try:
        data = Path(image).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the picture {image} ({error.strerror}); check the path") from None
    picture = _identify(data, str(image))
    return data if picture.format in FORMATS else _as_jpeg(open_picture(data, str(image)))


def open_picture(data: bytes, name: str = "the picture") -> Image.Image:
    """Decode a picture file, refusing what is not one and what would unfold to too many pixels."""
    picture = _identify(data, name)
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError):
        raise InputError(f"{name} cannot be decoded; it may be cut off, send a whole JPEG or PNG file") from None
    return picture


def _identify(data: bytes, name: str) -> Image.Image:
    """Read a picture's format and size, no pixel yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise InputError(f"{name} is not a picture that can be read; send a JPEG or PNG file") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise InputError(f"{name} has {picture.width} x {picture.height} pixels; make it smaller")
    return picture


def _as_jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()
