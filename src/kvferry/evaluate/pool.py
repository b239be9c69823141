"""Jobs in several processes, and a file of results that can be continued."""

from __future__ import annotations

import json
import multiprocessing as mp
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from kvferry.errors import InputError, KVFerryError
from kvferry.evaluate.records import Scribe, drop_half_line, kind_of, read_records
from kvferry.files import write_whole

Job = TypeVar("Job")
Done = TypeVar("Done")

AHEAD = 4
"""Jobs that wait for each process; more would only hold their data in memory."""


def begin(
    out: Path, head: dict[str, Any], fixed: Sequence[str], absent: Mapping[str, Any] | None = None
) -> set[tuple[int, str]]:
    """Make a results file, or see what it already holds: indices and protocols.

    Parameters
    ----------
    head : dict
        Its first line; the first key says what was run and holds its plan.
    fixed : sequence of str
        Parts of the plan in which a continued run must agree.
    absent : mapping, optional
        What a part counts as where an older file does not name it.

    Raises
    ------
    InputError
        ``out`` holds the results of another plan or of another model.
    """
    what = next(iter(head))
    if not out.exists() or not out.stat().st_size:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(head) + "\n")
        return set()
    before, records = read_records(out, what) if kind_of(out) == what else ({}, [])
    asked = dict(absent or {}) | before.get(what, {})
    if not before or any(asked[k] != head[what][k] for k in fixed) or before["fingerprint"] != head["fingerprint"]:
        raise InputError(f"{out} holds another {what}'s results; choose another --out or remove it")
    drop_half_line(out)
    return {(record["index"], record["protocol"]) for record in records}


def written(out: Path, lines: Iterable[Done]) -> Iterator[Done]:
    """The same lines, each appended to ``out`` before the next is asked for."""
    with Scribe(out) as scribe:
        for line in lines:
            scribe.write(line)
            yield line


def in_processes(
    start: Callable[[], None], job: Callable[[Job], Done], jobs: Iterable[Job], processes: int
) -> Iterator[Done]:
    """``job`` of each of the jobs as they get done; ``start`` runs first in each process. One is this one.

    Raises
    ------
    KVFerryError
        A process died.
    """
    if processes <= 1:
        start()
        yield from map(job, jobs)
        return
    left = iter(jobs)
    pool = ProcessPoolExecutor(processes, mp.get_context("spawn"), initializer=start)
    try:
        running: set[Future[Done]] = {pool.submit(job, each) for each in islice(left, AHEAD * processes)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(job, each) for each in islice(left, len(done))}
            yield from (each.result() for each in done)
    except BrokenProcessPool:
        raise KVFerryError("a worker process died; run the same command again to go on where it stopped") from None
    finally:
        pool.shutdown(cancel_futures=True)
