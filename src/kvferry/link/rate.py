"""How fast a link is."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from kvferry.errors import InputError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmg]?)(?:bit/s|bits?|bps)", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Rate:
    """A bit rate in bits per second (decimal prefixes, as links are sold).

    Raises
    ------
    InputError
        If it is not a positive, finite number.
    """

    bits_per_second: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bits_per_second) and self.bits_per_second > 0):
            raise InputError(f"a rate must be positive and finite, not {self.bits_per_second}")

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read ``10mbit``, ``500kbit``, ``1.5gbit``, ``10mbps`` or ``10 Mbit/s``; *bps* is bits per second."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise InputError(f"{text!r} is not a rate; write it like 10mbit, 500kbit or 1gbit (bits per second)")
        return cls(float(match[1]) * _UNITS[match[2].lower()])

    def __str__(self) -> str:
        for prefix in "gmk":
            if self.bits_per_second >= _UNITS[prefix]:
                return f"{self.bits_per_second / _UNITS[prefix]:g}{prefix}bit"
        return f"{self.bits_per_second:g}bit"

    def seconds(self, nbytes: int) -> float:
        """Time that ``nbytes`` bytes take at this rate."""
        return 8 * nbytes / self.bits_per_second
