"""Where an edge that stays gets its questions from: lines, a folder, a video, a camera."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.errors import DependencyError, InputError
from kvferry.messages import Messages
from kvferry.pictures import check_picture

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".ppm", ".jp2",
}  # fmt: skip
"""Files that are taken for pictures by their names."""
POLL_SECONDS, SETTLED_SECONDS = 0.1, 0.5
"""How often a folder is looked at, and how long a file in it must not have changed."""
_FIELDS = ("image", "images", "question", "messages")


@dataclass(frozen=True)
class Item:
    """One thing to ask, or what is wrong with it; ``shown`` is what to say of it beside the answer."""

    shown: dict[str, Any]
    images: tuple[Any, ...] = ()
    question: str = ""
    messages: Messages | None = None
    error: InputError | None = field(default=None, compare=False)


def from_lines(lines: Iterable[str], pictures: Sequence[str] = ()) -> Iterator[Item]:
    """Questions in lines.

    A line is ``PICTURE<TAB>QUESTION`` (or several pictures, each with a tab behind it), a JSON object with ``image`` or
    ``images`` and ``question``, or with ``messages``; a picture's name alone, which the questions in the lines behind
    it are about; or such a question. What is wrong with a line is its item's ``error``.

    Parameters
    ----------
    pictures : sequence of str
        What the first questions are about.
    """
    current = tuple(pictures)
    for line in lines:
        line = line.strip("\r\n")
        if not line.strip():
            continue
        try:
            if line.lstrip().startswith("{"):
                yield _object(line, current)
            elif "\t" not in line and names_picture(line.strip()):
                check_picture(line.strip())
                current = (line.strip(),)
            else:
                *shown, question = (part.strip() for part in line.split("\t"))
                yield _item(tuple(shown) or current, question)
        except InputError as error:
            yield Item({"line": line}, error=error)


def watched(folder: Path, question: str) -> Iterator[Item]:
    """Every picture that comes to lie in a folder from now on, once it grows no more. It ends when nobody asks on.

    Raises
    ------
    InputError
        There is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} to watch; make it first")
    return _watched(folder, question, _sizes(folder))


def _watched(folder: Path, question: str, known: dict[Path, tuple[int, int]]) -> Iterator[Item]:
    growing: dict[Path, tuple[tuple[int, int], float]] = {}
    while True:
        now, at = _sizes(folder), time.monotonic()
        for path in sorted(set(now) - {path for path, about in known.items() if now.get(path) == about}):
            about, since = growing.get(path, (None, at))
            if about != now[path]:
                growing[path] = now[path], at
            elif at - since >= SETTLED_SECONDS:
                known[path] = now[path]
                yield _checked((str(path),), question)
        known = {path: about for path, about in known.items() if path in now}
        time.sleep(POLL_SECONDS)


def filmed(source: str, question: str, fps: float, *, live: bool = False, format: str | None = None) -> Iterator[Item]:
    """Frames of a video file, ``fps`` for each of its seconds; or of a camera (``live``), the newest at each moment.

    Parameters
    ----------
    source : str
        A file, or a device such as ``/dev/video0``.
    format : str, optional
        What FFmpeg calls the kind of device: ``v4l2``, ``avfoundation``, ``dshow``.

    Raises
    ------
    DependencyError
        PyAV is not installed.
    InputError
        It cannot be opened or decoded.
    """
    if not 0 < fps <= 1000:
        raise InputError(f"a frame rate is a number of frames a second, such as 0.5, not {fps:g}")
    frames = _newest(source, format, fps) if live else _sampled(source, format, fps)
    for seconds, image in frames:
        yield Item({"video": source, "seconds": round(seconds, 3), "question": question}, (image,), question)


def names_picture(text: str) -> bool:
    """Whether a text is a picture file's name rather than words."""
    try:
        there = Path(text).is_file()
    except (OSError, ValueError):  # too long for a name
        return False
    return there or (len(text.split()) == 1 and Path(text).suffix.lower() in SUFFIXES)


def _object(line: str, current: tuple[str, ...]) -> Item:
    try:
        said = json.loads(line)
    except ValueError as error:
        raise InputError(f"the line is no JSON ({error})") from None
    if unknown := set(said) - set(_FIELDS):
        raise InputError(f"a line has no {', '.join(sorted(unknown))}; there are {', '.join(_FIELDS)}")
    if "messages" in said:
        if len(said) > 1:
            raise InputError("messages hold pictures and question; leave the other fields out")
        messages = Messages.parse(said["messages"])
        for image in messages.images:
            check_picture(image)
        return Item({"messages": said["messages"]}, messages=messages)
    if "image" in said and "images" in said:
        raise InputError("image or images, not both")
    images = said.get("images", [said["image"]] if "image" in said else current)
    if not isinstance(images, list | tuple) or not all(isinstance(x, str) for x in images):
        raise InputError('images are paths, as in {"images": ["a.png", "b.png"], "question": "..."}')
    return _item(tuple(images), said.get("question"))


def _item(images: tuple[str, ...], question: Any) -> Item:
    if not isinstance(question, str) or not question.strip():
        raise InputError("the question is empty; write PICTURE<TAB>QUESTION, or a question about the picture before")
    for image in images:
        check_picture(image)
    return Item({"images": list(images), "question": question}, images, question)


def _checked(images: tuple[str, ...], question: str) -> Item:
    try:
        return _item(images, question)
    except InputError as error:
        return Item({"images": list(images), "question": question}, error=error)


def _sizes(folder: Path) -> dict[Path, tuple[int, int]]:
    found = {}
    for path in folder.iterdir():
        if path.suffix.lower() in SUFFIXES and path.is_file():
            about = path.stat()
            found[path] = (about.st_size, about.st_mtime_ns)
    return found


def _sampled(source: str, format: str | None, fps: float) -> Iterator[tuple[float, Image.Image]]:
    due, begin = 0.0, None
    for seconds, frame, aspect in _decoded(source, format):
        begin = seconds if begin is None else begin
        if seconds - begin >= due - 1e-6:
            yield seconds - begin, _shown(frame, aspect)
            due = (int((seconds - begin) * fps + 1e-6) + 1) / fps


def _newest(source: str, format: str | None, fps: float) -> Iterator[tuple[float, Image.Image]]:
    """A thread reads on while a question is answered, so that no frame is older than it must be."""
    latest: list[Any] = [None]
    failed: list[BaseException] = []
    came, ended = threading.Event(), threading.Event()

    def read() -> None:
        try:
            for found in _decoded(source, format):
                latest[0] = found
                came.set()
                if ended.is_set():
                    return
        except InputError as error:
            failed.append(error)
        finally:
            latest.append(None)  # the end
            came.set()

    threading.Thread(target=read, daemon=True).start()
    begin = None
    try:
        while True:
            asked = time.monotonic()
            came.wait()
            came.clear()
            found, latest[0] = latest[0], None
            if found is None:
                if failed:
                    raise failed[0]
                return
            begin = found[0] if begin is None else begin
            yield found[0] - begin, _shown(*found[1:])
            if len(latest) > 1 and latest[0] is not None:
                came.set()
            time.sleep(max(0.0, 1 / fps - (time.monotonic() - asked)))
    finally:
        ended.set()


def _decoded(source: str, format: str | None) -> Iterator[tuple[float, Any, float]]:
    """Seconds, the frame, and how much wider than high its pixels are."""
    try:
        import av
    except ImportError:
        raise DependencyError("videos and cameras take PyAV; run: pip install 'kvferry[video]'") from None
    try:
        with av.open(source, format=format) as container:
            if not container.streams.video:
                raise InputError(f"{source} has no video in it; give another file")
            aspect = float(container.streams.video[0].sample_aspect_ratio or 1)
            for frame in container.decode(video=0):
                yield float(frame.time or 0.0), frame, aspect
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{source} cannot be read ({reason}); give a video file or a camera's device") from None


def _shown(frame: Any, aspect: float) -> Image.Image:
    """The frame as a player shows it: upright, its pixels square."""
    image: Image.Image = frame.to_image()
    if aspect != 1:
        image = image.resize((max(1, round(image.width * aspect)), image.height))
    turn = getattr(frame, "rotation", 0)  # counter-clockwise, as Pillow turns
    return image.rotate(turn, expand=True) if turn else image
