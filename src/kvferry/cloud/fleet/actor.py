"""A replica, as Ray runs it: a process with the model in it, that serves on a port of its machine."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

from kvferry.cloud.limits import Limits

START_SECONDS = 600.0
LOOPBACK = "127.0.0.1"


class ReplicaProcess:
    """Loads the model and listens; Ray starts it again, from here, when its process dies.

    Parameters
    ----------
    secret : str
        What only the gateway knows, and shows.
    host : str
        Where to listen; empty for the address by which the cluster knows this machine.
    store, store_key
        As in ``kvferry serve``; a store that replicas share.
    """

    def __init__(
        self, model: str, device: str, dtype: str, limits: Limits, secret: str, host: str, store: str, store_key: str
    ) -> None:
        import ray

        from kvferry.models import load

        self._host = host or ray.util.get_node_ip_address()
        self._address = ""
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        vlm = load(model, device=device or None, dtype=dtype)

        def serve() -> None:
            from kvferry.cloud.fleet.trust import GatewayOnly
            from kvferry.cloud.server import serve
            from kvferry.cloud.store import Backing, open_store

            try:
                backing = None
                if store:
                    backing = Backing(*open_store(store, store_key, limits.session_seconds, 0), vlm.fingerprint)
                within = replace(limits, peer_calls=limits.calls)
                serve(
                    vlm, f"{self._host}:0", limits=within, on_ready=self._listening, access=GatewayOnly(secret),
                    insecure=True, backing=backing,
                )  # fmt: skip
            except BaseException as error:
                self._failure = error
                self._ready.set()

        threading.Thread(target=serve, name="kvferry-replica", daemon=True).start()

    def where(self) -> tuple[str, int]:
        """Address, and process id."""
        if not self._ready.wait(START_SECONDS) or self._failure is not None:
            raise RuntimeError(f"the replica does not listen: {self._failure}")
        return self._address, os.getpid()

    def _listening(self, address: str) -> None:
        self._address = address
        self._ready.set()
