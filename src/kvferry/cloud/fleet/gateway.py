"""``kvferry serve --ray``: the gateway's process, and what it has Ray do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.cloud.fleet.actor import LOOPBACK, ReplicaProcess
from kvferry.cloud.fleet.relay import Relay
from kvferry.cloud.fleet.replicas import Replicas
from kvferry.cloud.limits import Limits
from kvferry.cloud.monitor import Monitor
from kvferry.errors import DependencyError, InputError, LinkError
from kvferry.security import ServerKeys, Tokens
from kvferry.security.access import Access

if TYPE_CHECKING:
    from kvferry.cloud.metrics import Metrics

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
"""How often a replica is asked where it is; after it died, Ray starts it elsewhere."""
START_SECONDS = 600.0
LOCAL = "local"
RAY_SETTINGS = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_worker_register_timeout_seconds": "600"}
"""A busy machine may take longer than Ray's minute to start a process."""


@dataclass(frozen=True)
class Fleet:
    """What to run.

    Parameters
    ----------
    model, device, dtype
        As in ``kvferry serve``; every machine of the cluster finds the model by the same name.
    replicas : int
    cluster : str
        ``local`` for Ray on this machine alone, ``auto`` or a head node's ``HOST:PORT`` for a cluster.
    cpus : float
        Of each replica, by which Ray places them; on a GPU one each as well.
    store, store_key : str
        Shared by all replicas: a Redis.
    """

    model: str
    replicas: int = 2
    cluster: str = LOCAL
    device: str = ""
    dtype: str = "auto"
    cpus: float = 1.0
    store: str = ""
    store_key: str = ""
    limits: Limits = field(default_factory=Limits)


def serve_fleet(
    fleet: Fleet,
    listen: str,
    *,
    metrics: Metrics | None = None,
    on_ready: Callable[[str, list[int]], None] | None = None,
    keys: ServerKeys | None = None,
    tokens: str | Path | None = None,
    insecure: bool = False,
) -> None:
    """Answer by replicas until SIGINT or SIGTERM. SIGUSR1 replaces them by new ones, one after the other.

    Parameters
    ----------
    on_ready : callable
        Called with the address and the replicas' process ids, once all are up.

    Raises
    ------
    DependencyError
        The extra ``ray`` is not installed.
    InputError, LinkError
        There is no such cluster, a replica does not start, or the address cannot be listened on.
    """
    try:
        import ray
    except ImportError:
        raise DependencyError("--ray needs Ray: pip install 'kvferry[ray]'") from None
    if fleet.replicas < 1:
        raise InputError(f"a fleet has at least one replica, not {fleet.replicas}")
    options: dict[str, Any] = {}
    if fleet.cluster == LOCAL:  # room for one more, which takes the place of another when they are replaced
        options = {"include_dashboard": False, "num_cpus": int(fleet.cpus * (fleet.replicas + 1)) + 1}
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        ray.init(address=fleet.cluster, log_to_driver=False, logging_level=logging.WARNING, **options)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"no Ray cluster at {fleet.cluster!r} ({error}); start one with `ray start --head`") from None
    try:
        access = Access(None if tokens is None else Tokens(tokens))
        asyncio.run(_serve(fleet, listen, access, metrics, on_ready, keys, insecure))
    finally:
        ray.shutdown()


async def _serve(
    fleet: Fleet,
    listen: str,
    access: Access,
    metrics: Metrics | None,
    on_ready: Callable[[str, list[int]], None] | None,
    keys: ServerKeys | None,
    insecure: bool,
) -> None:
    from kvferry.cloud.server import host

    replicas, crew_secret = Replicas(), secrets.token_urlsafe(32)
    crew = Crew(fleet, replicas, crew_secret)
    await crew.start()
    relay = Relay(replicas, fleet.limits, crew_secret, Monitor() if metrics is None else Monitor(metrics))
    if metrics is not None:
        metrics.watch_fleet(lambda: replicas.ready)
    rolling: set[asyncio.Task[None]] = set()

    def roll() -> None:
        if not rolling:
            task = asyncio.create_task(crew.roll())
            rolling.add(task)
            task.add_done_callback(rolling.discard)

    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, roll)

    async def nothing() -> None:
        """Replicas are up already."""

    async def close() -> None:
        await crew.close()
        await replicas.close()

    def ready(address: str) -> None:
        if on_ready is not None:
            on_ready(address, crew.pids)

    await host(relay, access, fleet.limits, listen, keys, insecure, ready, lambda: replicas.ready > 0, nothing, close)


class Crew:
    """The replicas as Ray's actors; looks after each of them."""

    def __init__(self, fleet: Fleet, replicas: Replicas, secret: str) -> None:
        self._fleet, self._replicas, self._secret = fleet, replicas, secret
        self._actors: dict[str, Any] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pids: dict[str, int] = {}
        self._count = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the replicas, as they were last heard of."""
        return [self._pids[name] for name in self._actors if name in self._pids]

    async def start(self) -> None:
        """Start all, at the same time, and wait for them.

        Raises
        ------
        LinkError
            One of them does not come up.
        """
        await asyncio.gather(*(self._add() for _ in range(self._fleet.replicas)))

    async def roll(self) -> None:
        """Replace every replica by a new one: the new one is up before the old one is asked nothing more, and the old
        one ends when it is idle. Where a new one does not come up, the old ones stay."""
        for old in list(self._actors):
            try:
                new = await self._add()
            except LinkError as error:
                log.error("replicas are not replaced any further: %s", error)
                return
            await self._replicas.leave(old, self._fleet.limits.request_seconds)
            self._end(old)
            log.warning("replica %s has taken the place of %s", new, old)

    async def close(self) -> None:
        """End all."""
        for name in list(self._actors):
            self._end(name)

    async def _add(self) -> str:
        import ray

        self._count += 1
        name, fleet = f"replica-{self._count}", self._fleet
        kind = ray.remote(ReplicaProcess).options(
            num_cpus=fleet.cpus, num_gpus=int(fleet.device.startswith("cuda")), max_restarts=-1,
            scheduling_strategy="SPREAD",
        )  # fmt: skip
        at = LOOPBACK if fleet.cluster == LOCAL else ""
        self._actors[name] = kind.remote(
            fleet.model, fleet.device, fleet.dtype, fleet.limits, self._secret, at, fleet.store, fleet.store_key
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._look(name)
        except (TimeoutError, ray.exceptions.RayError) as error:
            self._end(name)
            why = str(error).strip().splitlines()[-1:] or ["it takes too long"]
            raise LinkError(f"a replica does not come up ({why[0]}); see Ray's logs") from None
        self._tasks[name] = asyncio.create_task(self._watch(name))
        return name

    async def _look(self, name: str) -> None:
        address, pid = await self._actors[name].where.remote()
        if self._pids.get(name) not in (None, pid):
            log.warning("replica %s is back, as process %d", name, pid)
        self._pids[name] = pid
        await self._replicas.put(name, address)

    async def _watch(self, name: str) -> None:
        """Follow a replica to where Ray starts it again."""
        import ray

        while True:
            await asyncio.sleep(LOOK_SECONDS)
            with contextlib.suppress(ray.exceptions.RayError):
                await self._look(name)

    def _end(self, name: str) -> None:
        import ray

        if (task := self._tasks.pop(name, None)) is not None:
            task.cancel()
        ray.kill(self._actors.pop(name))
        self._pids.pop(name, None)


def as_ready_line(address: str, pids: list[int], model: str, metrics: str) -> str:
    """What is printed with ``--json``."""
    host, _, port = address.rpartition(":")
    told = {"address": address, "host": host, "port": int(port), "model": model, "replicas": pids, "metrics": metrics}
    return json.dumps(told)
