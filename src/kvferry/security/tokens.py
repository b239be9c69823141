"""Bearer tokens: who an edge is, what it may ask, and how much of it. The file holds hashes only.

.. code-block:: toml

    [[token]]
    name = "camera-1"
    sha256 = "9f86d0..."                 # of the token
    scopes = ["ask:image", "describe"]   # ask is every mode; share is for a coordinator
    calls = 4                            # open at a time
    bytes_per_minute = 50_000_000
    model_seconds_per_minute = 20.0
    expires = 2027-01-01T00:00:00Z       # by the cloud's own clock
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvferry.errors import AccessError, InputError
from kvferry.files import write_whole

log = logging.getLogger(__name__)
PREFIX = "kvf_"
TOKEN_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SCOPE = re.compile(r"describe|share|ask(:[a-z][a-z0-9_-]*)?")
DEFAULT_SCOPES = ("ask", "describe")


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Parameters
    ----------
    name : str
        What its token or its certificate says it is; empty where neither is asked for.
    scopes : tuple of str
    calls, bytes_per_minute, model_seconds_per_minute
        Its quotas; None sets none.
    certificate : str
        The name in the certificate it showed, if any.
    """

    name: str = ""
    scopes: tuple[str, ...] = ("ask", "describe", "share")
    calls: int | None = None
    bytes_per_minute: int | None = None
    model_seconds_per_minute: float | None = None
    certificate: str = ""

    @property
    def owner(self) -> str:
        """Whose its sessions are: nobody's in particular where the cloud asks for neither token nor certificate."""
        return f"{self.name}/{self.certificate}" if self.name or self.certificate else ""

    def may(self, what: str) -> bool:
        """Whether it may do this: ``describe``, ``share``, or ``ask:MODE``."""
        return what in self.scopes or what.partition(":")[0] in self.scopes


ANYBODY = Caller()


@dataclass(frozen=True)
class Token(Caller):
    """One entry of a tokens file.

    Parameters
    ----------
    sha256 : str
        Of the token, lowercase hexadecimal. It has 256 random bits, so that no slower hash is needed.
    expires : datetime or None
        With a time zone.
    """

    sha256: str = field(default="", repr=False)
    expires: datetime | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InputError(f"{self.name!r} is no name for a token; use letters, digits, dots, _ and -")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise InputError(f"the sha256 of token {self.name} is not 64 hexadecimal digits; `kvferry keys token`")
        for scope in self.scopes:
            if not SCOPE.fullmatch(scope):
                raise InputError(f"token {self.name}: there is no scope {scope!r}; use ask, ask:MODE, describe, share")
        for quota in ("calls", "bytes_per_minute", "model_seconds_per_minute"):
            value = getattr(self, quota)
            kinds = int if quota != "model_seconds_per_minute" else (int, float)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or not value > 0):
                raise InputError(f"token {self.name}: {quota} is a number above 0, not {value!r}; or leave it out")
        if self.expires is not None and (not isinstance(self.expires, datetime) or self.expires.tzinfo is None):
            raise InputError(f"token {self.name}: expires is a date, time and zone, such as 2027-01-01T00:00:00Z")

    def entry(self) -> str:
        """As it stands in a file."""
        lines = ["[[token]]", f'name = "{self.name}"', f'sha256 = "{self.sha256}"']
        lines.append("scopes = [" + ", ".join(f'"{scope}"' for scope in self.scopes) + "]")
        for quota in ("calls", "bytes_per_minute", "model_seconds_per_minute"):
            if (value := getattr(self, quota)) is not None:
                lines.append(f"{quota} = {value}")
        if self.expires is not None:
            lines.append(f"expires = {self.expires.astimezone(UTC).isoformat(timespec='seconds')}")
        return "\n".join(lines) + "\n"


class Tokens:
    """A tokens file, and who shows one of its tokens.

    Parameters
    ----------
    path : path
    clock : callable
        Seconds since the epoch.

    Raises
    ------
    InputError
        The file cannot be read, or says what it must not.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(path)
        self._clock = clock
        self._tokens = _read(self._path)

    def __len__(self) -> int:
        return len(self._tokens)

    def reload(self) -> None:
        """Read the file again. Where it cannot be used, what was read before stays, and the log says so."""
        try:
            self._tokens = _read(self._path)
        except InputError as error:
            log.error("the tokens stay as they were: %s", error)
        else:
            log.warning("%d tokens read from %s", len(self._tokens), self._path)

    def caller(self, authorization: str) -> Token:
        """Who shows this ``authorization``. Takes the same time for all wrong ones.

        Raises
        ------
        AccessError
            It is none of them, or has expired.
        """
        scheme, _, shown = authorization.partition(" ")
        if scheme.lower() != "bearer" or not shown:
            raise AccessError("this cloud asks for a token; pass KVFERRY_TOKEN or --token-file")
        digest = hash_of(shown.strip())
        found: Token | None = None
        for token in self._tokens:
            if hmac.compare_digest(token.sha256, digest):
                found = token
        if found is None:
            raise AccessError("this cloud does not know that token; ask its operator for one")
        if found.expires is not None and found.expires.timestamp() <= self._clock():
            raise AccessError("that token has expired; ask the cloud's operator for another")
        return found


def hash_of(token: str) -> str:
    """What the file holds of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def new_token(path: str | Path, name: str, scopes: Sequence[str] = DEFAULT_SCOPES, **quotas: Any) -> str:
    """Make a token and add its hash to a file, which is made where it is not there. The token is in no file.

    Raises
    ------
    InputError
        The name is taken, or a scope or quota is none.
    """
    path, token = Path(path), PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    known = _read(path) if path.exists() else ()
    if any(each.name == name for each in known):
        raise InputError(f"{path} has a token {name} already; choose another name, or remove its entry")
    added = Token(name, tuple(scopes), sha256=hash_of(token), **quotas)
    before = path.read_text("utf-8").rstrip() + "\n\n" if known else ""
    write_whole(path, before + added.entry(), secret=True)
    return token


def _read(path: Path) -> tuple[Token, ...]:
    from kvferry.security.tls import read_secret

    try:
        data = tomllib.loads(read_secret(path, "tokens").decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no tokens file ({error}); `kvferry keys token` makes one") from None
    entries = data.get("token")
    if set(data) != {"token"} or not isinstance(entries, list):
        raise InputError(f"{path} is no tokens file (it holds [[token]] entries only); `kvferry keys token` makes one")
    tokens = tuple(_token(path, entry) for entry in entries)
    if (name := _twice(token.name for token in tokens)) is not None:
        raise InputError(f"{path} has two tokens {name}; give each a name of its own")
    return tokens


def _token(path: Path, entry: object) -> Token:
    known = {each.name for each in fields(Token)} - {"certificate"}
    if not isinstance(entry, dict) or not {"name", "sha256"} <= set(entry) <= known:
        wrong = sorted(set(entry) - known) if isinstance(entry, dict) else entry
        raise InputError(f"{path}: a token has a name, a sha256, and may have {', '.join(sorted(known))}; not {wrong}")
    scopes = entry.get("scopes", list(DEFAULT_SCOPES))
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise InputError(f"{path}: scopes are a list of words")
    if not isinstance(entry["name"], str) or not isinstance(entry["sha256"], str):
        raise InputError(f"{path}: a token's name and sha256 are words")
    return Token(**{**entry, "scopes": tuple(scopes)})


def _twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
