"""The server behind the page: on this machine only, unless told otherwise, and without a word to anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI
from nicegui import ui

from kvferry.errors import LinkError
from kvferry.link import parse_address
from kvferry.studio.live import Shelf
from kvferry.studio.page import Page
from kvferry.studio.uploads import BoundedUploads

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8" rx="1.6" fill="#14171b"/>'
    '<path d="M1 1h2v2H1zM5 3h2v2H5zM3 5h2v2H3z" fill="#56b4e9"/></svg>'
)

GRACE_SECONDS = 2


def studio_app(shelf: Shelf) -> FastAPI:
    """The page as a FastAPI application. NiceGUI keeps its pages per process: make one in each."""
    app = FastAPI(title="kvferry studio", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(BoundedUploads)
    ui.run_with(
        app, root=lambda: _page(shelf), title="kvferry studio", favicon=ICON, dark=None, tailwind=False,
        show_welcome_message=False,
    )  # fmt: skip
    return app


def _page(shelf: Shelf) -> None:
    Page(shelf)


@contextlib.contextmanager
def listening(listen: str) -> Iterator[socket.socket]:
    """A socket on ``host:port``; port 0 takes a free one.

    Raises
    ------
    LinkError
        The port is taken or the host is not ours.
    """
    host, port = parse_address(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            raise LinkError(
                f"cannot listen on {listen}: the port is taken or the host is not this machine; choose another"
            ) from None
        yield sock


class _Server(uvicorn.Server):
    """Ends at SIGINT and SIGTERM by itself: uvicorn would raise them anew, and the clouds would outlive the page."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, RuntimeError):  # not on this system, or not in this thread
                asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield


def serve_studio(shelf: Shelf, listen: str, on_ready: Callable[[str], None]) -> None:
    """Serve until interrupted; ``on_ready`` gets the page's address."""
    with contextlib.closing(shelf), listening(listen) as sock:
        sock.listen()
        address = "http://{}:{}/".format(*sock.getsockname()[:2])
        config = uvicorn.Config(
            studio_app(shelf), log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
        )
        _Server(config, lambda: on_ready(address)).run(sockets=[sock])
