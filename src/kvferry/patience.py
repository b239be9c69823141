"""Long work that somebody may call off: it says where that can be, and whoever runs it looks there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_local = threading.local()


@contextmanager
def looking(look: Callable[[], None]) -> Iterator[None]:
    """Have ``look`` called between the steps of what this thread does within; what it raises ends the work."""
    before = getattr(_local, "look", None)
    _local.look = look
    try:
        yield
    finally:
        _local.look = before


def step() -> None:
    """Between two steps of work on what came from elsewhere; they take less than 50 ms each."""
    if (look := getattr(_local, "look", None)) is not None:
        look()
