"""How much a cloud lets itself be asked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any

from kvferry.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What one edge may ask of a cloud.

    Parameters
    ----------
    request_bytes : int
        Of a request's chunks together.
    memory_bytes : int
        That all open questions may take together beside what is held, as far as it can be told beforehand; one may
        take half of it.
    decode_seconds : float
        Of a processor, for taking apart what one question brings.
    request_seconds : float
        From start to last token, whatever the edge's own deadline.
    new_tokens : int
        Per answer.
    waiting : int
        Questions that may wait, or be on their way, beside those that the model works on.
    together : int
        Questions that the model works on at the same time: their answers are decoded together.
    calls : int
        Open questions; one more takes the place of one that sends nothing, or is told that the cloud is busy.
    peer_calls : int
        Open questions of one edge; edges that show neither token nor certificate are told apart by their address, but
        on loopback not at all.
    start_seconds, idle_seconds : float
        How long a call may say nothing before its start, and then before it has sent everything.
    resume_seconds : float
        How long a question waits for an edge whose connection broke.
    stuck_seconds : float
        A step of the model that takes longer turns health to NOT_SERVING, until it ends.
    held_bytes, session_bytes : int
        Of what is kept for further questions, for all sessions together and for one; 0 keeps nothing.
    session_seconds : float
        A session that is not used for so long is forgotten.
    """

    request_bytes: int = 512 * 1024 * 1024
    memory_bytes: int = 4 * 1024 * 1024 * 1024
    decode_seconds: float = 10.0
    request_seconds: float = 120.0
    new_tokens: int = 1024
    waiting: int = 16
    together: int = 16
    calls: int = 64
    peer_calls: int = 16
    start_seconds: float = 5.0
    idle_seconds: float = 30.0
    resume_seconds: float = 10.0
    stuck_seconds: float = 30.0
    held_bytes: int = 1024 * 1024 * 1024
    session_bytes: int = 256 * 1024 * 1024
    session_seconds: float = 600.0

    def but(self, given: Iterable[str]) -> Limits:
        """These with others in place of some, each as ``NAME=VALUE``.

        Raises
        ------
        InputError
            There is no such limit, or it cannot be that.
        """
        known, changed = asdict(self), dict[str, Any]()
        for text in given:
            name, _, value = text.partition("=")
            name = name.strip().replace("-", "_")
            if name not in known:
                near = get_close_matches(name, known, 1)
                if near:
                    raise InputError(f"there is no limit {name!r}; did you mean {near[0]}?")
                raise InputError(f"{text!r} is no limit; write NAME=VALUE, with one of {', '.join(known)}")
            kind = type(known[name])
            try:
                changed[name] = kind(value.strip().replace("_", ""))
            except ValueError:
                changed[name] = math.nan
            if not 0 < changed[name] < math.inf:
                what = "a whole number" if kind is int else "a number of seconds"
                raise InputError(f"{name} is {what} above 0, not {value!r}; write {name}={known[name]:g}")
        return replace(self, **changed)
