"""What every mode costs and how good its answers are, on this machine: the points that a policy chooses among."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from kvferry.bitstream.records import START
from kvferry.codecs.profile_store import has_profile
from kvferry.errors import DeadlineError, InputError
from kvferry.evaluate.metrics import ExactMatch, Metric
from kvferry.modes import Holdings, LocalMode, Mode, NotHeldError, Question, answer_here, parse_mode, receiver_kind
from kvferry.modes.kv import KVMode
from kvferry.modes.translate import TranslateMode
from kvferry.modes.translators import has_translator
from kvferry.pictures.apart import Reduce, open_wire_picture
from kvferry.policy import OperatingPoint
from kvferry.statistics import mean_interval
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from PIL import Image

    from kvferry.models import VLM

T = TypeVar("T")
CACHES = ("kv:full|int4", "kv:leaveout@0.1|int4")
PRESET = "kv:leaveout@0.15,budget=shared|transform:96"
"""For models with a profile of the transform codec."""
TRANSLATED = "translate:full|int8|zstd"
"""For another model of one family, where there is a translator."""
STEPS = f"{PRESET};leaveout@0.1|int4"
"""The smallest cache, and then a better one."""
PICTURES = ("image", "image:30")
HELD = ("image", "scout")
"""Kinds of mode that are measured a second time, with what they sent the first time held by the session."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of a cache's bytes that are measured where it travels in tiers."""
SIZE_LIMIT = 1 << 32
MAX_NEW_TOKENS = 16
"""As :meth:`kvferry.Edge.ask`."""


@dataclass(frozen=True)
class Case:
    """One question; without accepted answers, agreement with what the cloud's model says on the pictures counts."""

    images: Sequence[Any]
    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One question in one mode."""

    text: str
    nbytes: int
    edge_seconds: float
    compress_seconds: float
    decompress_seconds: float
    cloud_seconds: float
    prefill_seconds: float = 0.0
    parts: tuple[tuple[float, str | None], ...] = ()
    """Shares of the bytes of caches in tiers or steps with what was said from them, None where nothing could be."""


def usual_modes(edge: VLM, cloud: VLM) -> tuple[str, ...]:
    """What is worth measuring for a pair of models."""
    modes = list(PICTURES)
    if edge.fingerprint == cloud.fingerprint:
        modes += [*CACHES, *([PRESET, STEPS] if has_profile(cloud.fingerprint) else []), "embeds:int4"]
    elif edge.prompt_fingerprint == cloud.prompt_fingerprint:
        modes.append("scout")
        if has_translator(edge.fingerprint, cloud.fingerprint):
            modes.append(TRANSLATED)
    return (*modes, "local")


def measure(
    edge: VLM,
    cloud: VLM,
    modes: Sequence[str],
    cases: Sequence[Case],
    tiers: int = 1,
    on_case: Callable[[], object] = lambda: None,
    metric: Metric | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Iterator[OperatingPoint]:
    """One point per mode, and a second one where a session saves bytes.

    Each question goes through every mode's own sender and receiver, in this process; the first one once before it
    counts. Modes take turns at each question, so that a machine that gets busier slows all of them; ``on_case`` is
    called when one is done. Quality is the share of right answers with its 95 % (Wilson) interval, or the mean of what
    ``metric`` gives (exact match by default) with a bootstrap interval; bytes are the mean size of the messages up,
    seconds are medians, and the cloud's last until the end of the answer, since that is what an edge's deadline is
    about. Caches travel in ``tiers``; with more than one, and of caches in steps, answers from parts of their bytes are
    measured too, beginning with the smallest part from which every question had an answer.
    """
    if not cases:
        raise InputError("no questions to measure with; ask for at least one (--n)")
    parsed = [parse_mode(text) for text in modes]
    judge = metric or ExactMatch()
    wanted = [_wanted(cloud, case, max_new_tokens) for case in cases]
    taken: list[list[tuple[Measured, Measured | None]]] = [[] for _ in parsed]
    for number, case in enumerate((cases[0], *cases)):
        for mode, runs in zip(parsed, taken, strict=True):
            run = _twice(mode, edge, cloud, case, tiers, max_new_tokens)
            if number:
                runs.append(run)
        on_case()
    for mode, runs in zip(parsed, taken, strict=True):
        point = _point(mode, [first for first, _ in runs], wanted, tiers, judge)
        yield point
        later = [again for _, again in runs if again is not None]
        if later:
            held = _point(mode, later, wanted, tiers, judge)
            yield replace(held, needs=(*held.needs, "held_picture"))


def _wanted(cloud: VLM, case: Case, most: int) -> tuple[str, ...]:
    if case.answers:
        return case.answers
    return (answer_here(cloud, Question(case.images, case.question), most, None)[0].text,)


def _twice(
    mode: Mode | LocalMode, edge: VLM, cloud: VLM, case: Case, tiers: int, most: int
) -> tuple[Measured, Measured | None]:
    """The question, and where that makes a difference the same again in the same session."""
    asked = Question(case.images, case.question, tiers=tiers)
    if isinstance(mode, LocalMode):
        began = time.perf_counter()
        done, _ = answer_here(edge, asked, most, None)
        return Measured(done.text, 0, time.perf_counter() - began, 0.0, 0.0, 0.0), None
    repeats = mode.NAME in HELD and case.images and getattr(mode, "mask", 1) == 1
    session, holdings = _Session(), Holdings(hold=bool(repeats))
    first = _cross(mode, edge, cloud, asked, holdings, session, most)
    return first, _cross(mode, edge, cloud, asked, holdings, session, most) if repeats else None


def _cross(
    mode: Mode, edge: VLM, cloud: VLM, asked: Question, holdings: Holdings, session: _Session, most: int
) -> Measured:
    """Both halves of a mode, one after the other."""
    times = [time.perf_counter()]
    sender = mode.sender(edge, asked, holdings)
    start = sender.start()
    sender.prepare()
    encoded_before = sender.encode_seconds
    times.append(time.perf_counter())
    chunks = list(sender.chunks())
    times.append(time.perf_counter())
    receiver = receiver_kind(start.mode)(cloud, start, session, SIZE_LIMIT)
    for chunk in chunks:
        receiver.feed(chunk)
    receiver.finish()
    times.append(time.perf_counter())
    text = receiver.answer(most, lambda *_: None).text
    times.append(time.perf_counter())
    holdings.learn(session.done())
    messages = [pb.AskRequest(start=start), *(pb.AskRequest(chunk=pb.AskRequest.Chunk(data=x)) for x in chunks)]
    messages.append(pb.AskRequest(end=pb.AskRequest.End(bytes=sum(map(len, chunks)))))
    here, compress, decompress, there = (b - a for a, b in pairwise(times))
    nbytes = sum(message.ByteSize() for message in messages)
    seconds = here - encoded_before, compress + encoded_before, decompress, there, receiver.prefill_seconds
    parts = tuple(_parts(cloud, start, chunks, _cuts(mode, asked.tiers, chunks), most))
    return Measured(text, nbytes, *seconds, parts)


def _cuts(mode: Mode, tiers: int, chunks: Sequence[bytes]) -> list[int]:
    """After how many bytes an answer is asked for: at the end of each step but the last, else at each of the shares."""
    if not isinstance(mode, KVMode | TranslateMode):
        return []
    ends = list(accumulate(map(len, chunks)))
    if len(mode.recipes) == 1:
        return [round(share * ends[-1]) for share in SHARES] if tiers > 1 else []
    begins = [i for i, chunk in enumerate(chunks) if chunk.startswith(START)]
    return [ends[begin - 1] for begin in begins[1:]]


def _parts(
    cloud: VLM, start: pb.AskRequest.Start, chunks: Sequence[bytes], cuts: Sequence[int], most: int
) -> Iterator[tuple[float, str | None]]:
    """What the cloud says when only so many bytes are there."""
    total = sum(map(len, chunks))
    for cut in cuts:
        receiver, left = receiver_kind(start.mode)(cloud, start, _Session(), SIZE_LIMIT), cut
        for chunk in chunks:
            if left > 0:
                receiver.feed(chunk[:left])
            left -= len(chunk)
        try:
            receiver.settle()
        except DeadlineError:
            yield cut / total, None
        else:
            yield cut / total, receiver.answer(most, lambda *_: None).text


def _point(
    mode: Mode | LocalMode, runs: Sequence[Measured], wanted: Sequence[tuple[str, ...]], tiers: int, metric: Metric
) -> OperatingPoint:
    from kvferry.testbed.evaluate import interval

    scores = [metric.score(run.text, answers) or 0.0 for run, answers in zip(runs, wanted, strict=True)]
    quality = statistics.fmean(scores)
    if set(scores) <= {0.0, 1.0}:
        low, high = interval(int(sum(scores)), len(runs))
    else:
        found = mean_interval(scores)
        low, high = found.low, found.high

    def median(name: str) -> float:
        seconds: float = statistics.median(getattr(run, name) for run in runs)
        return round(seconds, 6)

    return OperatingPoint(
        str(mode),
        quality,
        math.ceil(statistics.fmean(run.nbytes for run in runs)),
        median("edge_seconds"),
        median("compress_seconds"),
        median("decompress_seconds"),
        median("cloud_seconds"),
        needs=mode.LEAVES,
        n=len(runs),
        interval=(min(low, quality), max(high, quality)),
        prefill_seconds=median("prefill_seconds"),
        tiers=tiers if isinstance(mode, KVMode | TranslateMode) else 1,
        anytime=tuple(_anytime(runs, wanted, metric)),
    )


def _anytime(
    runs: Sequence[Measured], wanted: Sequence[tuple[str, ...]], metric: Metric
) -> Iterator[tuple[float, float]]:
    """Shares from which every question had an answer, and how many of these were right."""
    for parts in zip(*(run.parts for run in runs), strict=True):
        known = [text for _, text in parts if text is not None]
        if len(known) == len(parts):
            scores = [metric.score(text, answers) or 0.0 for text, answers in zip(known, wanted, strict=True)]
            yield max(round(share, 3) for share, _ in parts), statistics.fmean(scores)


class _Session:
    """What a cloud keeps for one edge, without a limit."""

    def __init__(self) -> None:
        self._held: list[tuple[bytes, object]] = []

    def take(self, handle: int, kind: type[T]) -> T:
        """See :meth:`kvferry.modes.base.SessionStore.take`."""
        item = self._held[handle - 1][1] if 0 < handle <= len(self._held) else None
        if not isinstance(item, kind):
            raise NotHeldError("this session does not hold that; send it again")
        return item

    def put(self, digest: bytes, item: object, nbytes: int) -> None:
        """See :meth:`kvferry.modes.base.SessionStore.put`."""
        del nbytes
        self._held.append((digest, item))

    def drop(self, handle: int) -> None:
        """See :meth:`kvferry.modes.base.SessionStore.drop`."""
        if 0 < handle <= len(self._held):
            self._held[handle - 1] = (b"", None)

    def reserve(self, nbytes: int) -> None:
        """See :meth:`kvferry.modes.base.SessionStore.reserve`."""

    def open_picture(self, file: bytes, reduce: Reduce) -> Image.Image:
        """See :meth:`kvferry.modes.base.SessionStore.open_picture`."""
        return open_wire_picture(file, reduce)

    def done(self) -> pb.AskReply.Done:
        """What a cloud would say it holds."""
        handles = enumerate((digest for digest, _ in self._held), 1)
        holdings = [pb.AskReply.Holding(digest=digest, handle=handle) for handle, digest in handles]
        return pb.AskReply.Done(session=b"here", holdings=holdings)
