"""What a mode is: an edge's half that makes bytes and a cloud's half that turns them into an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from kvferry.modes.holdings import Holdings
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from kvferry.evidence import Prefilled
    from kvferry.messages import Messages
    from kvferry.models import VLM, Continuation
    from kvferry.pictures.apart import Reduce
    from kvferry.summary import Summary

T = TypeVar("T")
CHUNK_BYTES = 16 * 1024
"""Largest piece that is sent at once: 13 ms at 10 Mbit/s. The cloud acknowledges whole pieces."""
MAX_ITEMS = 16
"""Pictures of one question."""

OnToken = Callable[[int, str], None]


@dataclass(frozen=True)
class Question:
    """One question as an edge's half gets it.

    Parameters
    ----------
    images : sequence of paths, PIL images or arrays
    ship_first : bool
        Protocol B: look at the pictures without the question, which the cloud then asks. Only for mode kv.
    tiers : int
        In how many parts a cache travels, the most important tokens first. Only for mode kv.
    keep_metadata : bool
        Picture files keep what they say of place, time and camera. Only where files travel.
    messages : Messages, optional
        The conversation that ends with this question, where it is more than pictures and words behind them.
    """

    images: Sequence[Any]
    text: str
    ship_first: bool = False
    tiers: int = 1
    keep_metadata: bool = False
    messages: Messages | None = None

    def prefilled(self, vlm: VLM, **options: Any) -> Prefilled:
        """The prompt's cache by the edge's own model; without the question where that is shipped first."""
        if self.messages is not None:
            return vlm.prefill(messages=self.messages, **options)
        return vlm.prefill(self.images, None if self.ship_first else self.text, **options)


class Mode(Protocol):
    """What crosses the wire, with its options: a frozen dataclass that prints as the text it is parsed from."""

    NAME: ClassVar[str]
    LEAVES: ClassVar[tuple[str, ...]]
    """What leaves the device in the clear: ``pixels``, ``embeds``; see :data:`kvferry.policy.situation.PRIVACY`.

    The mode of a plug-in also has ``WIRE``, its number on the wire (1000 or more, the same on both ends), and
    ``receiver``, which makes the cloud's half from ``(vlm, start, store, max_bytes)``; see :class:`Receiver`.
    """

    @classmethod
    def parse(cls, options: str) -> Mode:
        """The mode of ``name:options``. Raises InputError for what does not exist."""
        ...

    @property
    def needs_model(self) -> bool:
        """Whether the edge must hold a model."""
        ...

    def sender(self, vlm: VLM | None, question: Question, holdings: Holdings) -> Sender:
        """The edge's half for one question. Raises InputError without the model that it needs."""
        ...


class Sender(Protocol):
    """The edge's half, made for one question. When state was lost in the cloud, it is asked for all of it again."""

    @property
    def bf16_bytes(self) -> int | None:
        """What the uncompressed cache (every prompt token, BF16) would take, where a cache is sent."""

    @property
    def kept(self) -> Summary | None:
        """What the compressed cache holds, once it has been selected."""

    @property
    def prefill_seconds(self) -> float:
        """Spent on reading the prompt so far."""

    @property
    def encode_seconds(self) -> float:
        """Spent on making bytes so far."""

    def start(self) -> pb.AskRequest.Start:
        """What the cloud must know before the first byte. Raises InputError for what can be seen to be wrong."""

    def prepare(self) -> None:
        """The work before the first byte; runs while the cloud looks at the start. Nothing is done twice."""

    def chunks(self) -> Iterator[bytes]:
        """The bytes, at most ``CHUNK_BYTES`` at a time, made as they are asked for."""


class Receiver(Protocol):
    """The cloud's half, made for one request from its start. Its methods run in worker threads, one at a time."""

    @property
    def prefill_seconds(self) -> float:
        """Spent on reading the prompt, once there is an answer."""

    @property
    def bf16_bytes(self) -> int:
        """What the uncompressed cache would take, once a cache has arrived; 0 in modes that bring none."""

    @property
    def reads(self) -> int:
        """Tokens that the model will have to read before it answers, as far as is known: at least so many."""

    @property
    def note(self) -> str:
        """What an answer should be read with, once everything has arrived; empty where there is nothing."""

    def feed(self, data: bytes) -> None:
        """Take in the next bytes. Raises a KVFerryError as soon as they can be seen to be wrong."""

    def finish(self) -> None:
        """Everything has arrived. Raises TruncatedError if it has not."""

    def settle(self) -> float:
        """Nothing more will be read: the share that :meth:`answer` can be given from, above 0.

        Raises DeadlineError where what has arrived is of no use.
        """

    def answer(self, max_new_tokens: int, on_token: OnToken) -> Continuation:
        """Run the model. What ``on_token`` raises ends it."""


class SessionStore(Protocol):
    """What one session of a cloud holds, as a receiver sees it."""

    def take(self, handle: int, kind: type[T]) -> T:
        """What ``handle`` names. Raises NotHeldError if it is not there, ProtocolError if it is something else."""
        ...

    def put(self, digest: bytes, item: object, nbytes: int) -> None:
        """Keep ``item`` for later requests, if the edge wants that and there is room."""
        ...

    def drop(self, handle: int) -> None:
        """Forget what ``handle`` names, if it is there: something else has taken its place."""
        ...

    def reserve(self, nbytes: int) -> None:
        """Before so many bytes are taken for this request, and between the steps of its decoding.

        Raises InputError where that is more than any request may take, BusyError where others have it now, and
        CancelledError where nobody waits for it any more.
        """
        ...

    def open_picture(self, file: bytes, reduce: Reduce) -> Image.Image:
        """A picture file that came over the wire, decoded; where it is large, in the size that it will be read in.

        Raises what ``reserve`` raises, and InputError where it cannot be decoded.
        """
        ...
