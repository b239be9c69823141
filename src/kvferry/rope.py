"""Rotary positions, forwards and back: keys can be stored un-rotated and turned again where they are used."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.errors import InputError
from kvferry.lazy import torch


@dataclass(frozen=True)
class Rotary:
    """How one layer turns its keys (RoPE, arXiv 2104.09864; M-RoPE, arXiv 2409.12191).

    Channel ``i`` is paired with channel ``i + r/2`` of the first ``r`` channels, or each with its neighbour; the others
    are left alone.

    Parameters
    ----------
    inv_freq : float32 ``[r / 2]``
        Radians per position of every pair; ``r`` may be smaller than the head dimension (partial rotary), and 0 in a
        layer that turns nothing (NoPE).
    scaling : float
        Length of a rotated vector relative to the original (YaRN and the like).
    sections : tuple of int
        M-RoPE: how many pairs turn with time, height and width; they sum to ``r / 2``. Empty for one axis.
    interleaved : bool
        Whether the axes take turns from pair to pair (Qwen3-VL), instead of standing in a row (Qwen2-VL).
    neighbours : bool
        Whether channels ``2i`` and ``2i + 1`` are a pair (Cohere, GLM), instead of ``i`` and ``i + r/2``.
    """

    inv_freq: torch.Tensor
    scaling: float = 1.0
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    neighbours: bool = False

    def __post_init__(self) -> None:
        pairs = len(self.inv_freq)
        if self.sections and (len(self.sections) != 3 or sum(self.sections) != pairs):
            raise InputError(f"mrope sections {list(self.sections)} must be three numbers that sum to {pairs}")

    def axis_of_pair(self) -> torch.Tensor:
        """Which position axis turns each pair, int64 ``[r / 2]``."""
        axis = torch.zeros(len(self.inv_freq), dtype=torch.int64)
        if self.interleaved:
            for which in (1, 2)[: len(self.sections)]:
                axis[which : self.sections[which] * 3 : 3] = which
        elif self.sections:
            axis = torch.arange(3).repeat_interleave(torch.tensor(self.sections))
        return axis

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Radians per token and pair: ``[1 or 3, ..., n]`` positions to float32 ``[..., n, r / 2]``."""
        freq = self.inv_freq.to(positions.device, torch.float32)
        turning = positions.to(torch.float32)
        if len(positions) == 1 or not self.sections:
            return turning[0].unsqueeze(-1) * freq
        if len(positions) != 3:
            raise InputError(f"positions must have 1 or 3 axes, not {len(positions)}")
        per_pair = turning[self.axis_of_pair().to(positions.device)]
        return per_pair.movedim(0, -1) * freq

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turn ``x`` to its positions.

        Parameters
        ----------
        x : ``[heads, n, d]``, any float dtype
        positions : ``[1 or 3, n]``, or ``[1 or 3, heads, n]`` where heads keep different tokens

        Returns
        -------
        The same shape and dtype; computed in float32.
        """
        return self._turn(x, positions, forwards=True)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`rotate`."""
        return self._turn(x, positions, forwards=False)

    def turn_by(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn every pair of ``x`` ``[..., d]`` by the angles of these cosines and sines ``[..., r / 2]``, in float32.

        The channels that take no part stay as they are; the dtype is that of ``x``.
        """
        turned = 2 * len(self.inv_freq)
        taking_part = x[..., :turned].float()
        if self.neighbours:
            first, second = taking_part[..., 0::2], taking_part[..., 1::2]
        else:
            first, second = taking_part.chunk(2, dim=-1)
        both = (first * cos - second * sin, second * cos + first * sin)
        whole = torch.stack(both, dim=-1).flatten(-2) if self.neighbours else torch.cat(both, dim=-1)
        return torch.cat([whole.to(x.dtype), x[..., turned:]], dim=-1)

    def _turn(self, x: torch.Tensor, positions: torch.Tensor, *, forwards: bool) -> torch.Tensor:
        turned = 2 * len(self.inv_freq)
        if x.shape[-1] < turned or positions.shape[-1] != x.shape[-2]:
            raise InputError(
                f"positions {list(positions.shape)} and {turned} rotary channels do not fit keys {list(x.shape)}"
            )
        angle = self.angles(positions.to(x.device))
        size = self.scaling if forwards else 1 / self.scaling
        return self.turn_by(x, angle.cos() * size, angle.sin() * (size if forwards else -size))
