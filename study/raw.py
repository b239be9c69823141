"""Raw files of studies: a first line that says what was run, then a line for each question; a second run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvferry.errors import InputError
from kvferry.evaluate.records import drop_half_line


def held(
    out: Path,
    head: dict[str, Any],
    read: Callable[[Path], tuple[dict[str, Any], Iterable[int]]],
    same: Callable[[dict[str, Any]], bool],
    what: str = "trial",
) -> set[int]:
    """Make a raw file with ``head``, or see which questions it holds already.

    Parameters
    ----------
    read : callable
        The first line of a file and the indices of its questions.
    same : callable
        Whether a file with this first line may be gone on with.
    what : str
        What differs where it may not.

    Raises
    ------
    InputError
        It holds the results of something else.
    """
    if not out.exists() or not out.stat().st_size:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(head) + "\n")
        return set()
    before, indices = read(out)
    if not same(before):
        raise InputError(f"{out} holds another {what}'s results; choose another --out or remove it")
    drop_half_line(out)
    return set(indices)
