"""What can go wrong, as a small tree. Every message ends in what the caller can do about it."""

from __future__ import annotations


class KVFerryError(Exception):
    """Base of every error this library raises on purpose. The CLI prints it in one line and exits with 2."""


class KVFerryWarning(UserWarning):
    """What is done is not quite what was asked for. The CLI prints it in one line on stderr."""


class InputError(KVFerryError, ValueError):
    """The caller's picture, question, number or file cannot be used."""


class RecipeError(InputError):
    """A recipe string does not parse, or asks for something that does not exist."""


class BudgetError(InputError):
    """A budget is too small for what must stay, or for what a bitstream takes at least.

    Where it is a fraction that is too small, ``smallest`` is the one that works for this prompt.
    """

    def __init__(self, message: str, smallest: float | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class EvidenceError(KVFerryError):
    """An observation of attention is missing, cannot be made, or overflowed."""


class DependencyError(KVFerryError):
    """A recipe needs a package that is not installed on this machine."""


class PluginError(KVFerryError):
    """A method from outside cannot be loaded, or has a name that another one has."""


class TrainingError(KVFerryError):
    """What was to be learned got no better by it; nothing was written."""


class ModelError(KVFerryError):
    """A model cannot be loaded."""


class UnsupportedModelError(ModelError):
    """A model, or a way of running it, that kvferry cannot serve correctly and therefore refuses."""


class BitstreamError(KVFerryError):
    """Bytes that are not a usable bitstream."""


class TruncatedError(BitstreamError):
    """The bitstream ends before its last frame."""


class CorruptError(BitstreamError):
    """A checksum, a length or a value in the bitstream is wrong."""


class VersionError(BitstreamError):
    """The bitstream is of another version of the format, or names what this version does not have."""


class FingerprintError(KVFerryError):
    """A cache made by one model was offered to another."""


class LinkError(KVFerryError):
    """The other end cannot be reached, went away, or did not answer in time."""


class AccessError(KVFerryError):
    """The cloud does not know who asks, or does not allow it this."""


class CancelledError(KVFerryError):
    """Whoever asked called the question off."""


class DeadlineError(LinkError):
    """The deadline passed before the answer was complete."""


class UnfamiliarPictureWarning(KVFerryWarning):
    """A model is shown a picture unlike all that it was trained on; said once in a process."""
