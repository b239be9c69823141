"""What a cache can be for one model, as plain numbers that are checked before memory is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvferry.cache import Modality, PromptLayout
from kvferry.errors import CorruptError, FingerprintError

MAX_TOKENS = 1 << 22
"""Of a prompt, for any model."""


@dataclass(frozen=True)
class ModelBounds:
    """What a cache of one model can be; plain numbers, so that they can be told to another process.

    Parameters
    ----------
    fingerprint : str
    shapes : tuple of (int, int)
        KV heads and channels of every layer.
    vocabulary : int
    longest : int
        Rotary positions that the model has; 0 where it does not say.
    axes : int
        Rotary axes, 1 or 3.
    visual_ids : tuple of int
        Token ids that stand for pieces of pictures.
    visual_tokens : int
        Most of a prompt.
    pending : int
        Most prompt tokens that a prefill leaves to be fed.
    """

    fingerprint: str
    shapes: tuple[tuple[int, int], ...]
    vocabulary: int
    longest: int
    axes: int
    visual_ids: tuple[int, ...] = ()
    visual_tokens: int = 1 << 14
    pending: int = 1

    @property
    def tokens(self) -> int:
        """Of a prompt: pieces of a picture share positions, words do not."""
        return min(MAX_TOKENS, self.longest + self.visual_tokens) if self.longest else MAX_TOKENS

    def check(self, fingerprint: str, shapes: Sequence[tuple[int, int]], layout: PromptLayout, length: int) -> None:
        """Refuse a cache that is not of this model, before its first number.

        Parameters
        ----------
        shapes : sequence of (int, int)
            Heads and channels of keys, then values, of every layer.
        layout, length
            See :class:`kvferry.cache.KVCache`.

        Raises
        ------
        FingerprintError
            Of another model, or of other layers, heads or channels.
        CorruptError
            Its prompt is none that this model's prefill makes.
        """
        if fingerprint != self.fingerprint:
            raise FingerprintError(
                f"the cache was made by model {fingerprint[:12] or '(none named)'}, not by "
                f"{self.fingerprint[:12]}; load the model that made it"
            )
        if list(shapes) != [shape for shape in self.shapes for _ in range(2)]:
            raise FingerprintError(
                f"a cache of {len(shapes) // 2} layers and (heads, channels) {sorted(set(shapes))[:4]} does not fit "
                f"a model of {len(self.shapes)} layers and {sorted(set(self.shapes))}; load the model that made it"
            )
        self._check_layout(layout, len(layout) - length)

    def _check_layout(self, layout: PromptLayout, pending: int) -> None:
        if pending > self.pending:
            raise CorruptError(
                f"{pending} prompt tokens are left to be fed, where a prefill leaves at most {self.pending}; "
                "prefill them"
            )
        if int(layout.token_ids.max()) >= self.vocabulary:
            raise CorruptError(f"a token of the prompt is outside the model's vocabulary of {self.vocabulary}")
        if pending and bool(np.isin(layout.token_ids[-pending:], self.visual_ids).any()):
            raise CorruptError("a piece of a picture is left to be fed; prefill it")
        visual = int(layout.visual.sum())
        if visual > self.visual_tokens:
            raise CorruptError(f"{visual:,} visual tokens, more than {self.visual_tokens:,}; scale the pictures down")
        if visual and not self.visual_ids:
            raise CorruptError("visual tokens for a model that reads text only")
        self._check_positions(layout)

    def _check_positions(self, layout: PromptLayout) -> None:
        positions = layout.positions
        if len(positions) != self.axes:
            raise CorruptError(f"positions on {len(positions)} rotary axes, where this model has {self.axes}")
        last = positions if layout.modality[-1] != Modality.TEXT else positions[:, -1]
        if layout.next_position != int(last.max()) + 1:
            raise CorruptError(
                f"what follows the prompt is said to stand at {layout.next_position}, where its positions leave "
                f"{int(last.max()) + 1}"
            )
        if self.axes == 1 and not np.array_equal(positions[0], np.arange(len(layout))):
            raise CorruptError("rotary positions that do not count the prompt's tokens")
        text = len(layout) - int(layout.visual.sum())
        lowest, highest = int(positions.min()), int(positions.max())
        if lowest < 0 or (self.longest and max(highest + 1, text) > self.longest):
            raise CorruptError(
                f"a prompt of {text:,} words at positions {lowest:,} to {highest:,}, beyond the model's "
                f"{self.longest:,}"
            )
