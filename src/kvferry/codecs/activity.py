"""How large a token's next coefficient will be, from those already coded; in whole numbers, the same on every machine.

Some tokens are busy, most are background: where one coefficient is larger than calibration says, the next ones are
too. The backward adaptation of image and audio coders, for example S. M. LoPresto et al., "Image Coding Based on
Mixture Modeling of Wavelet Coefficients and a Fast Estimation-Quantization Framework" (DCC 1997).
"""

from __future__ import annotations

from decimal import Context, Decimal
from functools import cache

import numpy as np
import numpy.typing as npt

from kvferry.codecs.densities import laplace
from kvferry.codecs.frequencies import TOTAL

Numbers = npt.NDArray[np.int64]
_ONE = 1 << 16
_FARTHEST = 24
_LARGEST = 4


class Activity:
    """Ratio of the magnitudes seen to those expected, per token.

    Each coefficient weighs ``e / (1 + e)``, where ``e`` is the expected magnitude of its symbol: nearly nothing where
    zero was expected anyway. It counts at most four times what was expected. 1 is added to both sides of the ratio, so
    that few coefficients say little.
    """

    def __init__(self, tokens: int) -> None:
        self._seen = np.zeros(tokens, np.int64)
        self._expected = np.zeros(1, np.int64)

    def octaves(self) -> Numbers:
        """By how many eighths of an octave each token's next coefficient is larger than calibrated, ``[tokens]``."""
        ratio = ((self._seen + _ONE) << 16) // (self._expected + _ONE)
        octaves: Numbers = np.searchsorted(_edges(), ratio, side="right") - _FARTHEST
        return octaves

    def update(self, rows: npt.NDArray[np.uint8], symbols: npt.NDArray[np.int32]) -> None:
        """Learn from coefficients (``[m, tokens]``), for which calibration has these rows of the models.

        ``rows`` are ``[m, tokens]``, or ``[m, 1]`` where all tokens' are the same.
        """
        share = _shares()[rows]
        weight = _ONE - share
        magnitude = np.minimum(np.abs(symbols.astype(np.int64)), _LARGEST * _ONE)
        magnitude *= share
        self._seen += np.minimum(magnitude, _LARGEST * weight, out=magnitude).sum(0)
        self._expected = self._expected + weight.sum(0)


@cache
def _expected() -> Numbers:
    """Mean magnitude of a symbol in units of ``2**-16``, for each row of the family."""
    frequencies = laplace().frequencies
    reach = frequencies.shape[1] // 2
    mean: Numbers = frequencies @ np.abs(np.arange(-reach, reach + 1)) * _ONE // TOTAL
    return mean


@cache
def _shares() -> Numbers:
    """What a magnitude of one weighs, ``1 / (1 + e)`` in units of ``2**-16``, for each row of the family."""
    return _ONE * _ONE // (_ONE + _expected())


@cache
def _edges() -> Numbers:
    """Ratios in units of ``2**-16`` at which :meth:`Activity.octaves` goes one up: ``2 ** ((i - 0.5) / 8)``."""
    exact = Context(prec=40)
    powers = [exact.power(Decimal(2), Decimal(2 * i - 1) / 16) for i in range(1 - _FARTHEST, _FARTHEST + 1)]
    return np.array([int(exact.multiply(power, _ONE)) for power in powers])
