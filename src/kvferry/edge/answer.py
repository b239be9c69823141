"""What an edge gets back, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.summary import Summary


@dataclass(frozen=True)
class Seconds:
    """Where an answer's time went, by the edge's clock.

    ``send`` runs from the first payload byte to the cloud's acknowledgement of the last, encoding included where
    it overlaps; ``first_token`` and ``total`` run from the call of :meth:`Edge.ask`.
    """

    prefill: float = 0.0
    encode: float = 0.0
    send: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class CloudSeconds:
    """The same by the cloud's clock: ``first_token`` from the last byte's arrival, ``total`` from the first's."""

    decode: float = 0.0
    queue: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What the cloud said and what it cost.

    Parameters
    ----------
    mode : str
        Its name: ``local`` too where the edge answered because the cloud could not.
    recipe : str
        The mode's options in canonical form: in mode ``kv`` the recipe, in others such as ``60,mask=0.25``. Empty where
        there are none; else ``mode:recipe`` is what :meth:`Edge.ask` reads.
    bitstream_bytes : int
        What the mode sent: the bitstream, picture files, embeddings, positions. What the cloud held already does not
        count; what was sent again because the cloud had lost it counts again. Of a stream that was cut short, what the
        cloud took in.
    bf16_bytes : int or None
        The unpruned cache in BF16 (:attr:`kvferry.cache.KVCache.full_bf16_bytes`), where a cache was sent.
    kept : Summary or None
        What was kept where, of a cache that was sent.
    payload_bytes_up, payload_bytes_down : int
        gRPC messages, without gRPC's and HTTP/2's own framing.
    share : float
        Of the cache's tokens that the answer was made from: below 1 where ``answer_by`` cut the stream short.
    why : str
        With mode ``auto``, every point with what spoke for and against it.
    why_local : str
        What kept the cloud from answering, where the edge answered instead.
    request_id : str
        By which the cloud's log names the request that was answered.
    wire_bytes_up, wire_bytes_down : int or None
        Every byte on the connection, counted by the link; None where no link is emulated. The first question of an
        :class:`Edge` includes setting up the connection, mode ``auto`` what it asks and probes before it decides.
    """

    text: str
    mode: str
    recipe: str
    tokens: int
    bitstream_bytes: int = 0
    bf16_bytes: int | None = None
    kept: Summary | None = None
    payload_bytes_up: int = 0
    payload_bytes_down: int = 0
    wire_bytes_up: int | None = None
    wire_bytes_down: int | None = None
    seconds: Seconds = Seconds()
    cloud: CloudSeconds = CloudSeconds()
    share: float = 1.0
    why: str = ""
    why_local: str = ""
    request_id: str = ""

    @property
    def partial(self) -> bool:
        """Whether the answer was made from a part of the cache."""
        return self.share < 1

    @property
    def note(self) -> str:
        """What to know about the selection of a cache that was sent; mostly empty."""
        return self.kept.note if self.kept else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self) | {"partial": self.partial, "note": self.note}


def checked_deadline(seconds: float) -> float:
    """A deadline that can be kept to; InputError for any other."""
    if not 0 < seconds <= 86_400:
        raise InputError(f"a deadline is a positive number of seconds, at most a day, not {seconds}")
    return seconds


def check_answer_by(answer_by: float | None, seconds: float) -> None:
    """InputError for a time to answer by that is none, or later than the deadline."""
    if answer_by is not None and not 0 < answer_by <= seconds:
        raise InputError(f"answer_by is a number of seconds up to the deadline of {seconds:g}, not {answer_by}")
