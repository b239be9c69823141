"""Model folders that are made once from something smaller, and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from kvferry.errors import ModelError

HOME = "KVFERRY_HOME"
"""Environment variable: the folder for what is made once; by default ``kvferry`` in the user's cache folder."""


def made_once(name: str, files: Iterable[Path], layout: int, make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` fills, from its first call on.

    It lies in ``$KVFERRY_HOME`` (by default ``kvferry`` in ``$XDG_CACHE_HOME`` or ``~/.cache``) under the name and a
    digest of the files. Processes that want it at once wait for the first of them; a killed one leaves nothing that
    counts.

    Parameters
    ----------
    name : str
        For people.
    files : paths
        What the folder is made from, all of it.
    layout : int
        Of what is written; with another, old folders go unused.
    make : callable
        Creates and fills the folder it is given.

    Raises
    ------
    ModelError
        The cache folder cannot be written.
    """
    folder = home() / f"{name}-{_digest(files, layout)}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                partial = folder.with_name(folder.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                print(f"kvferry: unpacking {name}, once, into {folder}", file=sys.stderr, flush=True)
                make(partial)
                partial.rename(folder)
    except OSError as error:
        reason = f"{name} cannot be unpacked into {folder} ({error})"
        raise ModelError(f"{reason}; set {HOME} to a writable folder") from error
    return folder


def home() -> Path:
    """The folder for what is made once on a machine; it need not exist yet."""
    if own := os.environ.get(HOME):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvferry"


def _digest(files: Iterable[Path], layout: int) -> str:
    digest = hashlib.sha256(f"{layout}\n".encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
