"""Addresses as people write them."""

from __future__ import annotations

from kvferry.errors import InputError


def parse_address(text: str) -> tuple[str, int]:
    """Split ``host:port`` (IPv6 hosts in brackets) into host and port.

    Raises
    ------
    InputError
        If there is no host, no port, or a port outside 0..65535.
    """
    host, colon, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    number = int(port) if port.isascii() and port.isdigit() else -1
    if not colon or not host or "/" in host or not 0 <= number <= 65535:
        raise InputError(f"{text!r} is not an address; write it as host:port, like 127.0.0.1:7421")
    return host, number
