"""What :func:`kvferry.models.compressing.compressing` tells about the prompts it compressed."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.errors import InputError


@dataclass(frozen=True)
class SequenceReport:
    """What became of one prompt.

    Parameters
    ----------
    prompt_tokens : int
        Without padding.
    kept : tuple of int
        Tokens a head keeps, per layer; the mean, rounded down, where heads differ.
    kept_per_head : tuple of tuple of int
        Per layer and head.
    """

    prompt_tokens: int = 0
    kept: tuple[int, ...] = ()
    kept_per_head: tuple[tuple[int, ...], ...] = ()


@dataclass
class Report:
    """What became of the cache of the prompts that were read last.

    For a single prompt, ``prompt_tokens``, ``kept`` and ``kept_per_head`` are at hand here too.

    Parameters
    ----------
    recipe : str
        In canonical form.
    sequences : tuple of SequenceReport
        One per sequence of the batch.
    bytes_before, bytes_after : int
        What the tensors of keys and values take in memory, in the model's dtype: of the whole batch, padding included.
    selections : int
        After how many passes something was evicted, the prompts' own selection apart; only with ``decoding=``.
    longest : int
        The most tokens that a head held after any pass since the prompts were read; only with ``decoding=``.
    """

    recipe: str = ""
    sequences: tuple[SequenceReport, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    selections: int = 0
    longest: int = 0

    @property
    def prompt_tokens(self) -> int:
        """See :class:`SequenceReport`."""
        return self._only.prompt_tokens

    @property
    def kept(self) -> tuple[int, ...]:
        """See :class:`SequenceReport`."""
        return self._only.kept

    @property
    def kept_per_head(self) -> tuple[tuple[int, ...], ...]:
        """See :class:`SequenceReport`."""
        return self._only.kept_per_head

    @property
    def _only(self) -> SequenceReport:
        if len(self.sequences) > 1:
            raise InputError(f"this report is of {len(self.sequences)} prompts; look at each in report.sequences")
        return self.sequences[0] if self.sequences else SequenceReport()
