"""Errors on the wire: a kind and a sentence, which the edge turns back into the exception that the cloud raised."""

from __future__ import annotations

from kvferry.errors import (
    BitstreamError,
    CorruptError,
    DeadlineError,
    FingerprintError,
    InputError,
    KVFerryError,
    LinkError,
    ModelError,
    RecipeError,
    TruncatedError,
    UnsupportedModelError,
    VersionError,
)
from kvferry.wire import service_pb2 as pb


class ProtocolError(LinkError):
    """The two ends do not agree on whose turn it is to say what."""


class BusyError(LinkError):
    """The cloud has as much to do as it is willing to queue; ask again after ``retry_seconds``, if there are any."""

    def __init__(self, message: str, retry_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class QuotaError(BusyError):
    """This caller has asked for as much as it may, for ``wait_seconds`` from now, where they are known."""

    def __init__(self, message: str, retry_seconds: float = 0.0, wait_seconds: float = 0.0) -> None:
        super().__init__(message, retry_seconds)
        self.wait_seconds = wait_seconds


class EndingError(LinkError):
    """The cloud is shutting down."""


class LostError(LinkError):
    """The cloud knows nothing of the question that was to be resumed; :class:`kvferry.Edge` then asks it again."""


class NotHeldError(LinkError):
    """The cloud no longer holds what a session's handle stands for; :class:`kvferry.Edge` then sends it again."""


KINDS: dict[type[KVFerryError], pb.ErrorKind] = {
    KVFerryError: pb.ERROR_KIND_INTERNAL,
    ProtocolError: pb.ERROR_KIND_PROTOCOL,
    BusyError: pb.ERROR_KIND_BUSY,
    DeadlineError: pb.ERROR_KIND_DEADLINE,
    InputError: pb.ERROR_KIND_INPUT,
    RecipeError: pb.ERROR_KIND_RECIPE,
    ModelError: pb.ERROR_KIND_MODEL,
    UnsupportedModelError: pb.ERROR_KIND_UNSUPPORTED_MODEL,
    FingerprintError: pb.ERROR_KIND_FINGERPRINT,
    BitstreamError: pb.ERROR_KIND_BITSTREAM,
    TruncatedError: pb.ERROR_KIND_TRUNCATED,
    CorruptError: pb.ERROR_KIND_CORRUPT,
    VersionError: pb.ERROR_KIND_VERSION,
    NotHeldError: pb.ERROR_KIND_NOT_HELD,
    QuotaError: pb.ERROR_KIND_QUOTA,
    EndingError: pb.ERROR_KIND_ENDING,
    LostError: pb.ERROR_KIND_LOST,
}
_CLASSES = {kind: error for error, kind in KINDS.items()}


def kind_of(error: BaseException) -> str:
    """A short name for the kind of an error, such as ``not_held``; ``internal`` for what is not one of ours."""
    kind = next((KINDS[ancestor] for ancestor in type(error).__mro__ if ancestor in KINDS), pb.ERROR_KIND_INTERNAL)
    return pb.ErrorKind.Name(kind).removeprefix("ERROR_KIND_").lower()


def to_wire(error: BaseException) -> pb.AskReply:
    """The reply that reports ``error``. What is not one of ours stays in the cloud's log."""
    for ancestor in type(error).__mro__:
        if ancestor in KINDS:
            retry = getattr(error, "retry_seconds", 0.0)
            return pb.AskReply(error=pb.AskReply.Error(kind=KINDS[ancestor], message=str(error), retry_seconds=retry))
    message = "the cloud failed on this request through no fault of yours; its log says why"
    return pb.AskReply(error=pb.AskReply.Error(kind=pb.ERROR_KIND_INTERNAL, message=message))


def from_wire(error: pb.AskReply.Error) -> KVFerryError:
    """The exception that ``error`` reports; a kind this version does not know becomes a plain one."""
    raised = _CLASSES.get(error.kind, KVFerryError)(error.message or "the cloud refused without a word")
    if isinstance(raised, BusyError):
        raised.retry_seconds = error.retry_seconds
    return raised
