"""The loops of :mod:`kvferry.codecs.range_coder`, compiled by numba: the same bytes.

Only :mod:`kvferry.codecs.entropy` imports this module, where the package numba is installed.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, uint32, uint64

from kvferry.codecs.jit import kernel, read, written
from kvferry.codecs.range_coder import loops

_encode, _decode = loops(np.uint64)
_model = read(uint32, 2), read(int64, 1), read(int64, 1)

encode = kernel(int64(written(uint64, 1), written(uint32, 1), int64, *_model, read(int32, 1)))(_encode)
decode = kernel(int64(written(uint64, 1), read(uint32, 1), int64, *_model, written(int32, 1)))(_decode)
