"""How the door is opened: on an address, for whoever may ask, with the keys that the cloud shows edges."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from kvferry.cloud.admission import Admission
from kvferry.cloud.door.door import Door
from kvferry.cloud.limits import Limits
from kvferry.errors import InputError
from kvferry.security import ServerKeys
from kvferry.security.access import Access
from kvferry.security.tls import check_listen

if TYPE_CHECKING:
    from kvferry.cloud.costs import Budget
    from kvferry.cloud.engine import Engine
    from kvferry.cloud.monitor import Monitor
    from kvferry.cloud.sessions import Sessions
    from kvferry.models import VLM


async def open_door(
    listen: str,
    vlm: VLM,
    engine: Engine,
    limits: Limits,
    sessions: Sessions,
    budget: Budget,
    access: Access,
    admission: Admission,
    keys: ServerKeys | None,
    insecure: bool,
    monitor: Monitor,
) -> tuple[Door, str]:
    """A door that listens, and its address.

    Raises
    ------
    DependencyError
        aiohttp is not installed.
    InputError
        In the clear on an address that other machines reach, without ``insecure``.
    LinkError
        The port is taken or the host is not ours.
    """
    check_listen(listen, keys, insecure)
    door = Door(vlm, engine, limits, sessions, budget, access, admission, monitor)
    return door, await door.open(listen, None if keys is None else _context(keys))


def _context(keys: ServerKeys) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(keys.certificate, keys.key)
        if keys.client_ca is not None:
            context.load_verify_locations(keys.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"the keys cannot be used for HTTPS ({error}); `kvferry keys server` makes them") from None
    return context
