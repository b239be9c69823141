"""Blobs that are what they were, or are not read: by a checksum where only accidents happen, by a key elsewhere."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

from kvferry.errors import CorruptError, DependencyError, InputError
from kvferry.security.tls import read_secret

KEY_BYTES, NONCE_BYTES, SUM_BYTES = 32, 12, 32


class Seal(Protocol):
    """Closes and opens blobs. ``context`` is where a blob belongs; it opens nowhere else."""

    def close(self, data: bytes, context: bytes) -> bytes:
        """Sealed."""
        ...

    def open(self, blob: bytes, context: bytes) -> bytes:
        """What was sealed. Raises CorruptError."""
        ...


class Summed:
    """SHA-256 before the data: against accidents, not against people."""

    _MAGIC = b"KVFS1"

    def close(self, data: bytes, context: bytes) -> bytes:
        """See :class:`Seal`."""
        return b"".join((self._MAGIC, _digest(data, context), data))

    def open(self, blob: bytes, context: bytes) -> bytes:
        """See :class:`Seal`."""
        head = len(self._MAGIC) + SUM_BYTES
        data = blob[head:]
        if blob[:head] != self._MAGIC + _digest(data, context):
            raise CorruptError("a checksum is wrong; the entry is left out")
        return data


class Keyed:
    """AES-256-GCM with a random nonce before the data."""

    _MAGIC = b"KVFK1"

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise DependencyError("a store's key needs cryptography: pip install 'kvferry[redis]'") from None
        if len(key) != KEY_BYTES:
            raise InputError(f"a store's key has {KEY_BYTES} bytes, not {len(key)}; openssl rand -hex 32 makes one")
        self._cipher: Any = AESGCM(key)

    @classmethod
    def read(cls, path: str | Path) -> Keyed:
        """With the key in a file, in hexadecimal.

        Raises
        ------
        InputError
            It cannot be read, or is no such key.
        """
        try:
            key = bytes.fromhex(read_secret(path, "key").decode("ascii").strip())
        except ValueError:
            raise InputError(f"{path} holds no key in hexadecimal; openssl rand -hex 32 makes one") from None
        return cls(key)

    def close(self, data: bytes, context: bytes) -> bytes:
        """See :class:`Seal`."""
        nonce = os.urandom(NONCE_BYTES)
        sealed: bytes = self._cipher.encrypt(nonce, data, context)
        return b"".join((self._MAGIC, nonce, sealed))

    def open(self, blob: bytes, context: bytes) -> bytes:
        """See :class:`Seal`."""
        from cryptography.exceptions import InvalidTag

        head = len(self._MAGIC)
        nonce, sealed = blob[head : head + NONCE_BYTES], blob[head + NONCE_BYTES :]
        try:
            if not blob.startswith(self._MAGIC) or len(nonce) != NONCE_BYTES:
                raise InvalidTag
            data: bytes = self._cipher.decrypt(nonce, sealed, context)
        except InvalidTag:
            raise CorruptError("an entry was changed, or sealed with another key; it is left out") from None
        return data


def _digest(data: bytes, context: bytes) -> bytes:
    return hashlib.sha256(len(context).to_bytes(8, "little") + context + data).digest()
