"""How loops are compiled by numba, for :mod:`kvferry.codecs.kernels` and :mod:`kvferry.codecs.range_kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import types


def read(kind: Any, axes: int) -> Any:
    """An array in C order that is only read."""
    return types.Array(kind, axes, "C", readonly=True)


def written(kind: Any, axes: int) -> Any:
    """An array in C order that is written, too."""
    return types.Array(kind, axes, "C")


def kernel(*signatures: Any) -> Callable[[Any], Any]:
    """Compile for ``signatures``, and keep the code on disk: beside its file or in the user's cache, if writable.

    Kept code is made anew when the function's own file changes, not for a constant of another file's.
    """

    def decorate(function: Any) -> Any:
        try:
            return njit(list(signatures), cache=True, nogil=True, error_model="numpy")(function)
        except RuntimeError:
            return njit(list(signatures), nogil=True, error_model="numpy")(function)

    return decorate
