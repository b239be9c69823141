"""Where both ends find the profiles of their model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from kvferry.codecs.profile import AnyProfile, TransformProfile, read
from kvferry.errors import FingerprintError, InputError

FOLDERS = "KVFERRY_PROFILES"
"""Environment variable: folders with profiles, separated like those of ``PATH``."""
SUFFIX = ".profile"
"""Not .safetensors, though it is one: a profile may lie beside the weights, whose digest is the model's fingerprint."""

P = TypeVar("P", bound=AnyProfile)
_known: dict[tuple[str, bytes], AnyProfile] = {}
_seen: dict[Path, tuple[str, bytes]] = {}


def add(path: Path) -> tuple[AnyProfile, bytes]:
    """Read a profile and keep it for whoever encodes or decodes in this process."""
    try:
        about = path.stat()
        profile, digest = _read_once(path.absolute(), about.st_mtime_ns, about.st_size)
    except OSError:
        profile, digest = read(path)
    _known[profile.fingerprint, digest] = profile
    return profile, digest


@lru_cache(maxsize=4)
def _read_once(path: Path, changed: int, size: int) -> tuple[AnyProfile, bytes]:
    """:func:`read`, once for what a file holds."""
    return read(path)


def for_encoding(kind: type[P], path: str, fingerprint: str) -> tuple[P, bytes]:
    """The profile in a file, or without one any of its kind that is here for this model.

    Raises
    ------
    FingerprintError
        The file's profile was made for another model.
    InputError
        None is here, or the file's is for another codec.
    """
    if path:
        profile, digest = add(Path(path))
        if not isinstance(profile, kind):
            raise InputError(
                f"{path} is a profile for {profile.kind}, not for {kind.kind}; "
                f"make one by `kvferry fit {kind.kind} MODEL --out FILE`"
            )
        if profile.fingerprint != fingerprint:
            raise FingerprintError(
                f"{path} was calibrated on another model than the one that made this cache; "
                f"run `kvferry fit {kind.kind}` for this one"
            )
        return profile, digest
    found = _of(kind, fingerprint)
    if found is None:
        _look_around()
        found = _of(kind, fingerprint)
    if found is not None:
        return found
    raise InputError(
        "there is no profile for the model that made this cache; "
        f"run `kvferry fit {kind.kind} MODEL --out FILE` and name the file in the recipe "
        f"({kind.kind}@FILE), or put it into a folder that {FOLDERS} names"
    )


def _of(kind: type[P], fingerprint: str) -> tuple[P, bytes] | None:
    """The first of this kind that is known for this model, and its digest."""
    known = ((found, digest) for (model, digest), found in _known.items() if model == fingerprint)
    return next(((found, digest) for found, digest in known if isinstance(found, kind)), None)


def has_profile(fingerprint: str, kind: type[AnyProfile] = TransformProfile) -> bool:
    """Whether a profile for this model is here."""
    _look_around()
    return any(model == fingerprint and isinstance(found, kind) for (model, _), found in _known.items())


def for_decoding(kind: type[P], fingerprint: str, digest: bytes) -> P:
    """The profile that a stream was encoded with; no path in a stream is ever opened.

    Raises
    ------
    FingerprintError
        It is not here.
    """
    if (fingerprint, digest) not in _known:
        _look_around()
    profile = _known.get((fingerprint, digest))
    if not isinstance(profile, kind):
        raise FingerprintError(
            f"this stream needs the {kind.kind} profile {digest.hex()} of its model, which is not here; put the file "
            f"that the sender used into a folder that {FOLDERS} names"
        )
    return profile


def files(suffix: str) -> Iterator[Path]:
    """Those with this suffix in the folders that the environment names and in the shipped models'."""
    package = Path(__file__).parents[1]
    folders = [Path(x) for x in os.environ.get(FOLDERS, "").split(os.pathsep) if x]
    for shipped in (package.parents[1] / "testbed", package / "shipped" / "testbed"):
        folders += [x for x in shipped.glob("*") if x.is_dir()]
    for folder in folders:
        yield from sorted(folder.glob(f"*{suffix}"))


def _look_around() -> None:
    """Read the profiles that are here."""
    for path in files(SUFFIX):
        if _seen.get(path) not in _known and _is_profile(path):
            profile, digest = add(path)
            _seen[path] = profile.fingerprint, digest


def _is_profile(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "kvferry" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
