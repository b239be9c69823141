"""A certificate authority of one's own, and certificates of clouds and edges (extra ``tls``)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.errors import DependencyError, InputError
from kvferry.files import write_whole
from kvferry.security.tls import read_secret
from kvferry.security.tokens import NAME

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

CA_DAYS = 3650
DAYS = 397
EARLY = timedelta(days=1)
"""Certificates hold from yesterday on: clocks of small devices are slow."""
CA_NAME, SERVER_NAME = "ca", "server"


def make_ca(folder: str | Path, name: str = "kvferry CA", days: int = CA_DAYS) -> list[Path]:
    """``ca.pem``, which everybody may have, and ``ca.key``, which nobody but the one who signs needs."""
    x509, key = _x509(), _new_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    usage = _usage(key_cert_sign=True, crl_sign=True, digital_signature=True)
    builder = (
        _builder(subject, subject, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return _write(Path(folder), CA_NAME, key, builder, key)


def make_server(folder: str | Path, hosts: Sequence[str] = (), days: int = DAYS) -> list[Path]:
    """``server.pem`` and ``server.key`` for a cloud that is called by ``hosts`` (names or addresses), this machine's
    name, or loopback."""
    x509 = _x509()
    names: list[Any] = []
    for host in dict.fromkeys([*hosts, socket.gethostname(), "localhost", "127.0.0.1", "::1"]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            try:
                names.append(x509.DNSName(host))
            except ValueError:
                raise InputError(f"{host!r} is no name of a machine; use ASCII (punycode), or an address") from None
    shown = (hosts or [socket.gethostname()])[0][:64]
    return _signed(Path(folder), SERVER_NAME, shown, x509.ExtendedKeyUsageOID.SERVER_AUTH, names, days)


def make_edge(folder: str | Path, name: str, days: int = DAYS) -> list[Path]:
    """``NAME.pem`` and ``NAME.key``; a cloud knows the edge by that name."""
    if not NAME.fullmatch(name) or name in (CA_NAME, SERVER_NAME):
        raise InputError(f"{name!r} is no name for an edge; use letters, digits, dots, _ and -, not ca or server")
    x509 = _x509()
    return _signed(Path(folder), name, name, x509.ExtendedKeyUsageOID.CLIENT_AUTH, [], days)


def _signed(folder: Path, stem: str, common: str, purpose: Any, names: list[Any], days: int) -> list[Path]:
    from cryptography.hazmat.primitives import serialization

    x509, key = _x509(), _new_key()
    try:
        ca = x509.load_pem_x509_certificate(read_secret(folder / f"{CA_NAME}.pem", "certificate"))
        signing: Any = serialization.load_pem_private_key(read_secret(folder / f"{CA_NAME}.key", "key"), None)
    except ValueError as error:
        raise InputError(f"the CA in {folder} cannot be read ({error}); `kvferry keys ca` makes one") from None
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])
    builder = (
        _builder(subject, ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True, key_agreement=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _write(folder, stem, key, builder, signing)


def _builder(subject: Any, issuer: Any, key: EllipticCurvePrivateKey, days: int) -> Any:
    if not 1 <= days <= CA_DAYS:
        raise InputError(f"a certificate holds 1 to {CA_DAYS} days, not {days}")
    x509, now = _x509(), datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(**wanted: bool) -> Any:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return _x509().KeyUsage(**{name: wanted.get(name, False) for name in names})


def _write(folder: Path, stem: str, key: EllipticCurvePrivateKey, builder: Any, signing: Any) -> list[Path]:
    from cryptography.hazmat.primitives import hashes, serialization

    certificate, secret = folder / f"{stem}.pem", folder / f"{stem}.key"
    for path in (certificate, secret):
        if path.exists():
            raise InputError(f"{path} is there already and is left as it is; choose another place, or remove it")
    signed = builder.sign(signing, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(secret, private, secret=True, new=True)
    write_whole(certificate, signed.public_bytes(serialization.Encoding.PEM), new=True)
    return [certificate, secret]


def _new_key() -> EllipticCurvePrivateKey:
    _x509()
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _x509() -> Any:
    try:
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # noqa: F401
    except ImportError:
        raise DependencyError("making keys takes the package cryptography; pip install 'kvferry[tls]'") from None
    return x509
