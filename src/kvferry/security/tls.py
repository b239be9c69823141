"""TLS on both ends of a connection, and where none is needed: on loopback, or where a person says so."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from kvferry.errors import InputError, LinkError
from kvferry.link.address import parse_address

SYSTEM = "system"
"""What stands for the certificate authorities that this machine trusts anyway, in place of a file."""
MAX_BYTES = 1024 * 1024
"""Of a file with certificates, a key, or a token."""


def is_loopback(host: str) -> bool:
    """Whether what is said to ``host`` stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_secret(path: str | Path, what: str) -> bytes:
    """The bytes of a file with a key, certificates or a token.

    Raises
    ------
    InputError
        It cannot be read, or is empty or far too large; says which file.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {what} in {path} ({error.strerror}); `kvferry keys` makes such files") from None
    if not data.strip() or len(data) > MAX_BYTES:
        raise InputError(f"there is no {what} in {path}; `kvferry keys` makes such files")
    return data


def _read_pem(path: str | Path, what: str, word: bytes) -> bytes:
    data = read_secret(path, what)
    if b"-----BEGIN " not in data or word not in data:
        raise InputError(f"there is no {what} in {path} (PEM); `kvferry keys` makes such files")
    return data


@dataclass(frozen=True)
class Credentials:
    """What an edge shows, and what it wants to be shown.

    Parameters
    ----------
    ca : path or "system", optional
        Whose certificates of clouds are believed. With one of these three, all is said over TLS.
    certificate, key : path, optional
        The edge's own, for a cloud that asks for it (mutual TLS).
    token : str
        Sent with every call, over TLS or on loopback only.
    insecure : bool
        Speak without TLS to other machines too; a token is not sent to them even so.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    token: str = field(default="", repr=False)
    insecure: bool = False

    @classmethod
    def found(
        cls,
        ca: str | Path | None = None,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        token_file: str | Path | None = None,
        insecure: bool = False,
        environment: Mapping[str, str] = os.environ,
    ) -> Credentials:
        """These; what is not given is looked for in the environment: ``KVFERRY_CA``, ``KVFERRY_CERT``,
        ``KVFERRY_KEY``, ``KVFERRY_TOKEN`` or ``KVFERRY_TOKEN_FILE``, ``KVFERRY_INSECURE=1``.

        Raises
        ------
        InputError
            A file cannot be read, or only one of certificate and key is there.
        """
        found = environment.get
        token_file = token_file or (None if found("KVFERRY_TOKEN") else found("KVFERRY_TOKEN_FILE"))
        token = found("KVFERRY_TOKEN", "") if token_file is None else read_secret(token_file, "token").decode("latin-1")
        whole = cls(
            ca or found("KVFERRY_CA"),
            certificate or found("KVFERRY_CERT"),
            key or found("KVFERRY_KEY"),
            token.strip(),
            insecure or found("KVFERRY_INSECURE", "") == "1",
        )
        whole.check()
        return whole

    @property
    def tls(self) -> bool:
        """Whether all is said over TLS."""
        return self.ca is not None or self.certificate is not None

    def check(self) -> None:
        """InputError for what cannot be used, whoever is spoken to."""
        if (self.certificate is None) != (self.key is None):
            raise InputError("a certificate and its key go together; pass both, or neither")
        if self.token and not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise InputError("a token is printable ASCII without spaces; `kvferry keys token` makes one")

    def check_for(self, address: str) -> None:
        """InputError where nothing, or not the token, may be said to ``address``."""
        self.check()
        host, _ = parse_address(address)
        if self.tls or is_loopback(host):
            return
        if not self.insecure:
            raise InputError(
                f"{address} is another machine, and nothing is said to it in the clear; pass --ca FILE for TLS "
                "(`kvferry keys`), or --insecure where the network itself can be trusted"
            )
        if self.token:
            raise InputError(f"a token is not sent to {address} in the clear; pass --ca FILE for TLS, or leave it out")

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is said with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self, address: str, options: Sequence[tuple[str, Any]], through: str | None = None) -> grpc.Channel:
        """A connection to ``address``, or ``through`` a relay to it.

        Raises
        ------
        InputError
            It would be in the clear where it must not, or a file cannot be used.
        """
        self.check_for(address)
        if not self.tls:
            return grpc.insecure_channel(through or address, options=options)
        roots = None
        if self.ca is not None and str(self.ca) != SYSTEM:
            roots = _read_pem(self.ca, "certificate", b"CERTIFICATE")
        key, chain = None, None
        if self.certificate is not None and self.key is not None:
            key = _read_pem(self.key, "key", b"PRIVATE KEY")
            chain = _read_pem(self.certificate, "certificate", b"CERTIFICATE")
        if through is not None:
            host = parse_address(address)[0]
            options = (*options, ("grpc.ssl_target_name_override", host), ("grpc.default_authority", host))
        return grpc.secure_channel(through or address, grpc.ssl_channel_credentials(roots, key, chain), options=options)


@dataclass(frozen=True)
class ServerKeys:
    """What a cloud or a coordinator shows.

    Parameters
    ----------
    certificate, key : path
        PEM files.
    client_ca : path, optional
        Whose certificates of edges are believed; with it, an edge without one is not let in (mutual TLS).
    """

    certificate: str | Path
    key: str | Path
    client_ca: str | Path | None = None

    @classmethod
    def found(
        cls, certificate: str | Path | None, key: str | Path | None, client_ca: str | Path | None
    ) -> ServerKeys | None:
        """These, or None where there are none.

        Raises
        ------
        InputError
            Only some of them are given.
        """
        if certificate is None and key is None and client_ca is None:
            return None
        if certificate is None or key is None:
            raise InputError("TLS takes --cert and --key together; `kvferry keys server` makes both")
        return cls(certificate, key, client_ca)

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC; the files are read again with every connection whose certificate was replaced.

        Raises
        ------
        InputError
            A file cannot be used.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self._newest,  # type: ignore[arg-type]  # None keeps what there was
            require_client_authentication=self.client_ca is not None,
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        key, chain = _read_pem(self.key, "key", b"PRIVATE KEY"), _read_pem(self.certificate, "certificate", b"CERTIF")
        roots = None if self.client_ca is None else _read_pem(self.client_ca, "certificate", b"CERTIFICATE")
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=roots)

    def _newest(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            return self._configuration()
        except InputError:  # in the middle of being replaced: the ones from before still do
            return None


def check_listen(listen: str, keys: ServerKeys | None, insecure: bool) -> None:
    """InputError where listening would be in the clear, where other machines can reach it, without ``insecure``."""
    host, _ = parse_address(listen)
    if keys is None and not insecure and not is_loopback(host):
        raise InputError(
            f"{listen} can be reached from other machines; pass --cert and --key for TLS (`kvferry keys` makes them), "
            "or --insecure where the network itself can be trusted"
        )


def bind(server: grpc.aio.Server, listen: str, keys: ServerKeys | None, insecure: bool) -> str:
    """Listen; returns the address with the port that was taken.

    Raises
    ------
    InputError
        In the clear on an address that other machines reach, without ``insecure``; or a key cannot be used.
    LinkError
        The port is taken or the host is not ours.
    """
    check_listen(listen, keys, insecure)
    try:
        port = server.add_insecure_port(listen) if keys is None else server.add_secure_port(listen, keys.credentials())
    except RuntimeError:
        port = 0
    if not port:
        why = "the port is taken or the host is not this machine"
        raise LinkError(f"cannot listen on {listen}: {why}; choose another")
    return f"{listen.rpartition(':')[0]}:{port}"
