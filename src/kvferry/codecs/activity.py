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

from kvferry.codecs.densities import laplace, model_of
from kvferry.codecs.frequencies import ONE, TOTAL

Numbers = npt.NDArray[np.int64]
FARTHEST = 24
LARGEST = 4


class Activity:
    """Ratio of the magnitudes seen to those expected, per token.

    Each coefficient weighs ``e / (1 + e)``, where ``e`` is the expected magnitude of its symbol: nearly nothing where
    zero was expected anyway. It counts at most four times what was expected. 1 is added to both sides of the ratio, so
    that few coefficients say little.
    """

    def __init__(self, tokens: int) -> None:
        self._seen = np.zeros(tokens, np.int64)
        self._expected = np.zeros(tokens, np.int64)

    def octaves(self) -> Numbers:
        """By how many eighths of an octave each token's next coefficient is larger than calibrated, ``[tokens]``."""
        ratio = ((self._seen + ONE) << 16) // (self._expected + ONE)
        octaves: Numbers = np.searchsorted(edges(), ratio, side="right") - FARTHEST
        return octaves

    def groups(self, octaves: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Coefficients whose standard deviations calibration puts at ``octaves``, grouped by the models that suit.

        ``octaves`` are ``[m, tokens]``, or ``[m, 1]`` where all tokens' are the same.

        Returns
        -------
        order : int64 ``[m * tokens]``
            The coefficients' symbols, ``[m, tokens]`` and flat, in the order of their models.
        counts, which : int64 ``[groups]``
            How many symbols each model has, and which model that is.
        """
        models = model_of(octaves + self.octaves()).reshape(-1)
        counts = np.bincount(models)
        which = counts.nonzero()[0]
        return models.argsort(kind="stable"), counts[which], which

    def update(self, rows: npt.NDArray[np.uint8], symbols: npt.NDArray[np.int32]) -> None:
        """Learn from coefficients (``[m, tokens]``), for which calibration has these rows of the models.

        ``rows`` are ``[m, tokens]``, or ``[m, 1]`` where all tokens' are the same.
        """
        share = shares()[rows]
        weight = ONE - share
        magnitude = np.abs(symbols.astype(np.int64))
        magnitude *= share
        self._seen += np.minimum(magnitude, LARGEST * weight, out=magnitude).sum(0)
        self._expected += weight.sum(0)


@cache
def _expected() -> Numbers:
    """Mean magnitude of a symbol in units of ``2**-16``, for each row of the family."""
    frequencies = laplace().frequencies
    reach = frequencies.shape[1] // 2
    mean: Numbers = frequencies @ np.abs(np.arange(-reach, reach + 1)) * ONE // TOTAL
    return mean


@cache
def shares() -> Numbers:
    """What a magnitude of one weighs, ``1 / (1 + e)`` in units of ``2**-16``, for each row of the family."""
    return ONE * ONE // (ONE + _expected())


@cache
def edges() -> Numbers:
    """Ratios in units of ``2**-16`` at which :meth:`Activity.octaves` goes one up: ``2 ** ((i - 0.5) / 8)``."""
    exact = Context(prec=40)
    powers = [exact.power(Decimal(2), Decimal(2 * i - 1) / 16) for i in range(1 - FARTHEST, FARTHEST + 1)]
    return np.array([int(exact.multiply(power, ONE)) for power in powers])
