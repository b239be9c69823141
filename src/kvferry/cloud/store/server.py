"""A store in Redis or Valkey (extra ``redis``): a hash for every session, gone as one when it is unused."""

from __future__ import annotations

from typing import Any

from kvferry.errors import DependencyError, InputError, LinkError

PREFIX = "kvferry:"
COUNT = "next"
TIMEOUT_SECONDS = 2.0
"""A server that is silent for longer is as good as away: what it holds is not held."""


class Server:
    """See :class:`kvferry.cloud.store.base.Store`. Several clouds of one model may share it.

    Parameters
    ----------
    url : str
        ``redis://[user:password@]host:port/database``; ``rediss://`` speaks TLS, ``unix://`` a socket.
    seconds : float
        A session that is unused for so long is forgotten, by the server's clock.

    Raises
    ------
    DependencyError
        The extra ``redis`` is not installed.
    InputError, LinkError
        This is no such URL, or nobody answers there.
    """

    def __init__(self, url: str, seconds: float) -> None:
        try:
            import redis
        except ImportError:
            raise DependencyError("this store needs redis: pip install 'kvferry[redis]'") from None
        self._errors = redis.RedisError
        self._life = max(int(seconds * 1000), 1)
        place = url.rpartition("@")[2]  # without a password
        try:
            self._client: Any = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS
            )
            self._client.ping()
        except ValueError:
            raise InputError(f"{place!r} is no address of a Redis; write redis://host:port/0") from None
        except redis.RedisError as error:
            raise LinkError(f"the store at {place} does not answer ({type(error).__name__}); start it") from None

    def reserve(self, session: str, count: int) -> int:
        """See :class:`~kvferry.cloud.store.base.Store`."""
        name = PREFIX + session
        last, _ = self._do(lambda pipe: pipe.hincrby(name, COUNT, count).pexpire(name, self._life))
        return int(last) - count + 1

    def get(self, session: str, number: int) -> bytes | None:
        """See :class:`~kvferry.cloud.store.base.Store`."""
        name = PREFIX + session
        blob, _ = self._do(lambda pipe: pipe.hget(name, str(number)).pexpire(name, self._life))
        return None if blob is None else bytes(blob)

    def put(self, session: str, number: int, blob: bytes) -> None:
        """See :class:`~kvferry.cloud.store.base.Store`; a hash without a count is one that has been forgotten."""
        name = PREFIX + session
        (there,) = self._do(lambda pipe: pipe.hexists(name, COUNT))
        if not there:
            return
        self._do(lambda pipe: pipe.hset(name, str(number), blob).pexpire(name, self._life))
        (there,) = self._do(lambda pipe: pipe.hexists(name, COUNT))
        if not there:  # it was forgotten in between
            self._do(lambda pipe: pipe.delete(name))

    def drop(self, session: str, number: int) -> None:
        """See :class:`~kvferry.cloud.store.base.Store`."""
        self._do(lambda pipe: pipe.hdel(PREFIX + session, str(number)))

    def close(self) -> None:
        """See :class:`~kvferry.cloud.store.base.Store`."""
        self._client.close()

    def _do(self, commands: Any) -> list[Any]:
        """Commands in one transaction; what goes wrong is an OSError."""
        try:
            with self._client.pipeline(transaction=True) as pipe:
                commands(pipe)
                found: list[Any] = pipe.execute()
                return found
        except self._errors as error:
            raise OSError(f"the store's server failed ({type(error).__name__})") from None
