"""The process around the conversation: listening, health, reflection and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvferry.bitstream.contexts import kernels
from kvferry.cloud.admission import Admission
from kvferry.cloud.costs import trim
from kvferry.cloud.engine import Engine
from kvferry.cloud.gate import Gate, Service
from kvferry.cloud.limits import Limits
from kvferry.cloud.monitor import Monitor
from kvferry.cloud.service import FerryService
from kvferry.cloud.sessions import Sessions
from kvferry.security import ServerKeys, Tokens
from kvferry.security.access import Access, on_hangup
from kvferry.security.tls import bind
from kvferry.wire import sealed, service_pb2

if TYPE_CHECKING:
    from kvferry.cloud.metrics import Metrics
    from kvferry.cloud.store import Backing
    from kvferry.models import VLM

SERVICE = service_pb2.DESCRIPTOR.services_by_name["Ferry"].full_name
log = logging.getLogger(__name__)
GRACE_SECONDS = 3.0
"""From SIGTERM to the end of the process, whatever runs."""
RESERVE_SECONDS = 0.7
"""Of that for last words and for closing."""
TIDY_SECONDS = 5.0
LOOK_SECONDS = 0.5
MESSAGE_BYTES = 1024 * 1024
OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server on the same port would silently take half of the calls
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


def serve(
    vlm: VLM,
    listen: str = "127.0.0.1:7421",
    *,
    limits: Limits | None = None,
    metrics: Metrics | None = None,
    on_ready: Callable[[str], None] | None = None,
    keys: ServerKeys | None = None,
    tokens: str | Path | None = None,
    insecure: bool = False,
    backing: Backing | None = None,
    http: str = "",
    on_http: Callable[[str], None] | None = None,
    access: Access | None = None,
) -> None:
    """Serve ``vlm`` until SIGINT or SIGTERM; running answers then get a few seconds to finish.

    Parameters
    ----------
    listen : str
        ``host:port``; port 0 takes a free one.
    metrics : Metrics, optional
        Counts requests; see :class:`kvferry.cloud.metrics.Metrics`.
    on_ready : callable
        Called with the address listened on, as soon as questions can be asked.
    keys : ServerKeys, optional
        Speak TLS; new files under the same names are taken up by the next connection.
    tokens : path, optional
        Ask edges for a token of this file (:mod:`kvferry.security.tokens`); read again on SIGHUP.
    insecure : bool
        Listen without TLS where other machines can reach it.
    backing : Backing, optional
        Where what sessions hold outlives this process; closed at the end.

    http : str
        Also answer chat requests of OpenAI's form at this ``host:port``; see :mod:`kvferry.cloud.door`.
    on_http : callable
        Called with that address before ``on_ready``.
    access : Access, optional
        Who is let in, instead of those with ``tokens``.

    Raises
    ------
    InputError
        Without TLS on an address that other machines can reach; or a file of keys or tokens cannot be used.
    LinkError
        The port is taken or the host is not ours.
    """
    limits = limits or Limits()
    access = access or Access(None if tokens is None else Tokens(tokens))
    asyncio.run(_serve(vlm, listen, limits, metrics, on_ready, keys, access, insecure, backing, http, on_http))


async def _serve(
    vlm: VLM,
    listen: str,
    limits: Limits,
    metrics: Metrics | None,
    on_ready: Callable[[str], None] | None,
    keys: ServerKeys | None,
    access: Access,
    insecure: bool,
    backing: Backing | None,
    http: str,
    on_http: Callable[[str], None] | None,
) -> None:
    engine = Engine(limits.waiting, limits.together)
    service = FerryService(vlm, engine, limits, Monitor() if metrics is None else Monitor(metrics), backing)
    if metrics is not None:
        metrics.watch(
            vlm,
            {
                "queue_length": ("Questions that wait for the model or are being answered.", lambda: engine.present),
                "queue_expected_seconds": (
                    "How long a question that came now would wait for the model.",
                    lambda: engine.queue_seconds,
                ),
                "held_bytes": ("Kept for further questions.", lambda: service.sessions.nbytes),
                "held_sessions": ("Sessions that something is kept for.", lambda: len(service.sessions)),
            },
        )
    admission = Admission(limits)
    async with contextlib.AsyncExitStack() as stack:

        async def begin() -> None:
            if http:
                from kvferry.cloud.door.ways import open_door

                shared = limits, service.sessions, service.budget, access, admission
                door, at = await open_door(http, vlm, engine, *shared, keys, insecure, service.monitor)
                stack.push_async_callback(door.close)
                if on_http is not None:
                    on_http(at)
            threading.Thread(target=kernels, daemon=True, name="kvferry-load").start()
            stack.callback(asyncio.create_task(_tidy(service.sessions, engine)).cancel)

        async def close() -> None:
            await stack.aclose()
            await asyncio.to_thread(engine.close)
            if backing is not None:
                await asyncio.to_thread(backing.close)

        def well() -> bool:
            return engine.stuck_seconds < limits.stuck_seconds

        await host(service, access, limits, listen, keys, insecure, on_ready, well, begin, close, admission)


async def host(
    service: Service,
    access: Access,
    limits: Limits,
    listen: str,
    keys: ServerKeys | None,
    insecure: bool,
    on_ready: Callable[[str], None] | None,
    well: Callable[[], bool],
    begin: Callable[[], Awaitable[None]],
    close: Callable[[], Awaitable[None]],
    admission: Admission | None = None,
) -> None:
    """Let callers through a gate to a service, until SIGINT or SIGTERM. Health tells whether it is ``well``; ``begin``
    and ``close`` start and end what stands beside it, once the address is listened on and when nobody is inside. Who
    comes by another way and counts in the same ``admission`` is ended as they are."""
    if access.tokens is not None:
        on_hangup(access.tokens.reload)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not on this system or in this thread
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = grpc.aio.server(options=OPTIONS)  # the gate counts; health and Describe are never turned away
    gate = Gate(service, access, limits, admission)
    sealed.add_to_server(gate, server)
    status = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = bind(server, listen, keys, insecure)
    await server.start()
    watching = asyncio.create_task(_tell(status, well))
    await asyncio.sleep(0)  # it says that all is well
    await begin()
    try:
        if on_ready is not None:
            on_ready(address)
        await stop.wait()
    finally:
        leaving = _leave_in(GRACE_SECONDS)
        watching.cancel()
        await status.enter_graceful_shutdown()
        await gate.drain(GRACE_SECONDS - RESERVE_SECONDS)
        await server.stop(0)
        await close()
        leaving.cancel()


def _leave_in(seconds: float) -> threading.Timer:
    """End the process then, if work that nobody can stop still holds it up: a model's step, a decoder."""

    def leave() -> None:
        try:
            log.warning("work that cannot be stopped holds up the end; leaving it")
            sys.stdout.flush()
        finally:
            os._exit(0)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    return timer


async def _tell(status: Any, well: Callable[[], bool]) -> None:
    """Let the health service say how what answers is."""
    said: bool | None = None
    while True:
        if (now := well()) != said:
            if said is not None:
                log.warning("what answers %s", "goes on" if now else "is stuck in one step, or away")
            said, serving = now, health_pb2.HealthCheckResponse.SERVING
            for name in ("", SERVICE):
                await status.set(name, serving if now else health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(LOOK_SECONDS)


async def _tidy(sessions: Sessions, engine: Engine) -> None:
    """Forget idle sessions even while nobody asks anything, and give memory back to the system then."""
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        sessions.expire()
        if not engine.present:
            engine.workshop.rest()
            await asyncio.to_thread(trim)
