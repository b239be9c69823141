"""Where session caches outlive a cloud's memory: a folder, or Redis and Valkey. What is not there any more, is broken,
or was made by another model is simply not held: the edge sends it again."""

from __future__ import annotations

from pathlib import Path

from kvferry.cloud.store.backing import Backing
from kvferry.cloud.store.base import Store
from kvferry.cloud.store.files import Files
from kvferry.cloud.store.seal import Keyed, Seal, Summed
from kvferry.errors import InputError

SCHEMES = ("redis://", "rediss://", "unix://")


def open_store(where: str, key: str | Path | None, seconds: float, max_bytes: int) -> tuple[Store, Seal]:
    """The store at a folder or a URL, and what its blobs are sealed with.

    Parameters
    ----------
    key : path, optional
        A file with 32 bytes in hexadecimal: blobs are encrypted and authenticated (AES-256-GCM). A store that others
        can reach does not go without.
    seconds : float
        What is unused for so long is forgotten.
    max_bytes : int
        Of a folder; the session unused for longest goes first. Redis has its own ``maxmemory``.

    Raises
    ------
    InputError
        The folder or the key cannot be used, or there is no key for a server.
    LinkError
        The server does not answer.
    DependencyError
        An extra is missing.
    """
    seal: Seal = Summed() if key is None else Keyed.read(key)
    if where.startswith(SCHEMES):
        from kvferry.cloud.store.server import Server

        if key is None:
            raise InputError("whoever reaches a Redis can change what is in it; pass --store-key FILE with a key")
        return Server(where, seconds), seal
    if "://" in where:
        raise InputError(f"a store is a folder, or a URL of {', '.join(SCHEMES)}, not {where.partition('@')[0]!r}")
    return Files(Path(where), seconds, max_bytes), seal


__all__ = ["Backing", "Store", "open_store"]
