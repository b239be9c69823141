"""The same question sent for real: to a cloud in a second process, over an emulated link."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from kvferry.cloud.child import cloud_process
from kvferry.edge import Answer, Edge
from kvferry.errors import InputError
from kvferry.link import shipped_traces
from kvferry.models import VLM, load

RATES = ("1mbit", "2mbit", "5mbit", "10mbit", "50mbit", "100mbit")
DEADLINE = 120.0

OnSent = Callable[[int, int | None], None]


def links() -> tuple[str, ...]:
    """Rates and shipped traces to choose among; any other that :class:`kvferry.link.ShapedLink` reads will do."""
    return (*RATES, *(f"trace:{name}" for name in shipped_traces()))


@dataclass(frozen=True)
class Phase:
    """A stretch of time, in seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Crossed:
    """What one way of asking took."""

    way: str
    answer: Answer
    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.answer.seconds.total


def phases_of(answer: Answer) -> tuple[Phase, ...]:
    """Where an answer's time went, one after the other; the sum is the total."""
    seconds = answer.seconds
    read = min(seconds.prefill, seconds.first_token)
    send = min(seconds.send, seconds.first_token - read)
    first = seconds.first_token - read - send
    return (
        Phase("read the picture here", read),
        Phase("send", send),
        Phase("until the first token", first),
        Phase("the rest of the answer", max(0.0, seconds.total - seconds.first_token)),
    )


class Shelf:
    """The models that the page offers, loaded when they are first wanted, and a cloud for each, started likewise.

    Parameters
    ----------
    names : sequence of str
        As :func:`kvferry.load` takes them.
    device, dtype : str
        Of the models, and of those in the clouds; by default the CPU, and the checkpoint's own.
    clouds : mapping of str to str, optional
        ``host:port`` of clouds that run already, by the model that they serve.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: str = "",
        dtype: str = "auto",
        clouds: Mapping[str, str] | None = None,
    ) -> None:
        if not names:
            raise InputError("the studio needs a model; pass --model testbed/cloud")
        self.names = tuple(dict.fromkeys(names))
        self._device = device
        self._dtype = dtype
        self._models: dict[str, VLM] = {}
        self._clouds = dict(clouds or {})
        self._ran: set[tuple[str, str]] = set()
        self._processes = ExitStack()
        self._lock = threading.Lock()

    def model(self, name: str) -> VLM:
        """The model of that name; raises :class:`~kvferry.errors.ModelError` where it cannot be loaded."""
        with self._lock:
            if name not in self.names:
                raise InputError(f"the studio was not started with {name}; it has {', '.join(self.names)}")
            if name not in self._models:
                self._models[name] = load(name, device=self._device or None, dtype=self._dtype)
            return self._models[name]

    def put(self, name: str, vlm: VLM) -> None:
        """A model that is loaded already."""
        self._models[name] = vlm

    def cloud(self, name: str) -> str:
        """The address of a second process that serves the model."""
        with self._lock:
            if name not in self._clouds:
                self._clouds[name] = self._processes.enter_context(cloud_process(name, self._device, self._dtype))
            return self._clouds[name]

    def runs_first(self, cloud: str, way: str) -> bool:
        """Whether something runs there for the first time, so that what is loaded and compiled once would count."""
        first = (cloud, way) not in self._ran
        self._ran.add((cloud, way))
        return first

    def close(self) -> None:
        """End the clouds."""
        self._processes.close()


def cross(
    vlm: VLM,
    cloud: str,
    pictures: Sequence[Any],
    question: str,
    recipe: str | None,
    *,
    link: str | None,
    rtt_ms: float,
    ship_first: bool = False,
    on_sent: OnSent | None = None,
) -> Crossed:
    """Send a cache compressed by ``recipe``, or without one the pictures as JPEG, and wait for the answer.

    ``link`` is a rate or a trace, the same in both directions; None leaves the loopback as it is.

    The connection is set up before, and the cloud holds nothing from earlier questions, so that every crossing can be
    compared with every other.

    Raises
    ------
    InputError
        No such rate, trace or round-trip time.
    LinkError
        The cloud is away, or the link is too slow for :data:`DEADLINE`.
    """
    with Edge(vlm, cloud, uplink=link, downlink=link, delay_ms=rtt_ms / 2, deadline=DEADLINE, hold=False) as edge:
        edge.describe()
        mode = f"kv:{recipe}" if recipe else "image"
        answer = edge.ask(
            pictures, question, mode=mode, ship_first=ship_first and recipe is not None,
            on_sent=on_sent,
        )  # fmt: skip
    return Crossed(recipe or "the JPEG", answer, phases_of(answer))
