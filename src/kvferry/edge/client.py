"""The device that asks."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import grpc

from kvferry.edge.answer import Answer, Seconds, check_answer_by, checked_deadline
from kvferry.edge.call import Crossing, OnSent
from kvferry.edge.checks import asked_of, check_talk, checked_mode, checked_rules, one_table
from kvferry.edge.conversation import Conversation, Opened
from kvferry.edge.line import Line
from kvferry.edge.membership import Membership
from kvferry.edge.pacing import Meter, Pacer
from kvferry.edge.pilot import LOOK_SHARE, Asked, Pilot, latest_start
from kvferry.edge.stream import Cancel, Stream
from kvferry.errors import DeadlineError, InputError, LinkError
from kvferry.link import Rate
from kvferry.modes import (
    DEFAULT_RECIPE,
    LocalMode,
    OnToken,
    ProtocolError,
    Question,
    answer_here,
    mode_name,
)
from kvferry.policy import Decision, PointTable, Way, explain
from kvferry.security import Credentials
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.messages import Messages
    from kvferry.models import VLM
    from kvferry.recipe import Recipe


class Edge:
    """A device that holds a model and asks a cloud, one question at a time.

    Parameters
    ----------
    vlm : VLM or None
        What the device holds, as :func:`kvferry.load` gives it: the cloud's own model for modes ``kv`` and ``embeds``,
        a smaller one of its family for ``scout``, any for ``local`` and masked pictures, none for ``image`` and
        ``prompt``.
    cloud : str
        ``host:port`` of a running ``kvferry serve``.
    uplink, downlink : str, Rate or None
        Emulate a link of this rate; None leaves the real one alone.
    delay_ms : float
        One-way delay of the emulated link, in milliseconds.
    deadline : float
        Seconds a question may take, all included.
    hold : bool
        Let the cloud keep pictures, embeddings, scenes and positions for further questions, in a session that only
        this object knows; what it holds does not cross again. What it has lost is sent again without further ado.
    points : path, str or PointTable, optional
        What ``kvferry profile`` measured for these two models; mode ``auto`` chooses among them.
    policy : str
        How it chooses: ``risk-aware``, ``greedy:0.8@ewma:0.3``, ``static:image``; see :mod:`kvferry.policy`.
    privacy : collection of str
        ``no-pixels``, ``no-embeds``: modes that would let them leave this device are refused.
    coordinator : str, optional
        ``host:port`` of a ``kvferry coordinate`` that shares this edge's uplink with other edges. While it is there,
        everything is sent at the rate that it grants, and ``auto`` takes the best point that fits into that; while it
        is away, all is as without one. Needs ``points``.
    keep_metadata : bool
        Picture files that leave this device keep their EXIF (place, time, camera) and all else that is in them.
        Without, only the picture leaves; see :func:`kvferry.pictures.files.file_of`.
    credentials : Credentials, optional
        TLS and token, for the cloud and for the coordinator. By default what ``KVFERRY_CA``, ``KVFERRY_TOKEN`` and so
        on say. Without TLS nothing is said to another machine than this, unless they are ``insecure``.
    reconnect_seconds : float
        Where the connection breaks under way, how long to try to go on by another one: bytes that have arrived are not
        sent again, words that were said are not said again. A cloud that has restarted is asked anew. 0 tries nothing.

    Examples
    --------
    >>> with Edge(kvferry.load("testbed/cloud"), uplink="10mbit") as edge:  # doctest: +SKIP
    ...     print(edge.ask(["scene.png"], "what colour is the circle?").text)
    """

    def __init__(
        self,
        vlm: VLM | None,
        cloud: str = "127.0.0.1:7421",
        *,
        uplink: str | Rate | None = None,
        downlink: str | Rate | None = None,
        delay_ms: float = 0.0,
        deadline: float = 30.0,
        hold: bool = True,
        points: str | Path | PointTable | None = None,
        policy: str = "risk-aware",
        privacy: Collection[str] = (),
        coordinator: str | None = None,
        keep_metadata: bool = False,
        credentials: Credentials | None = None,
        reconnect_seconds: float = 5.0,
    ) -> None:
        if not 0 <= reconnect_seconds <= 86_400:
            raise InputError(f"an edge tries to go on for 0 to 86,400 seconds, not {reconnect_seconds}")
        self._privacy = checked_rules(privacy)
        self._keep_metadata = keep_metadata
        if coordinator is not None and points is None:
            raise InputError("a coordinator shares the uplink by what each edge could send; pass points with it")
        self._vlm = vlm
        self._deadline = checked_deadline(deadline)
        table, way = None if points is None else one_table(points), Way.parse(policy)
        credentials = credentials or Credentials.found()
        if coordinator is not None:
            credentials.check_for(coordinator)
        self._line = Line(cloud, uplink, downlink, delay_ms, hold, credentials, reconnect_seconds)
        self._pilot = None if table is None else Pilot(table, way, self._line.translated)
        self._line.pilot = self._pilot
        if coordinator is not None and self._pilot is not None:
            meter, usable = Meter(), self._pilot.usable(vlm, self._privacy)
            member = Membership(coordinator, usable, self._deadline, meter, socket.gethostname(), credentials)
            self._line.membership, self._line.pacer = member, Pacer(lambda: member.bits_per_second, meter)

    def close(self) -> None:
        """Close the connection, leave the coordinator, and close the emulated link."""
        self._line.close()

    def __enter__(self) -> Edge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """What the cloud serves: its model's name and fingerprint, modes and limits."""
        try:
            reply = self._line.stub.Describe(pb.DescribeRequest(), timeout=self._deadline, metadata=self._line.metadata)
        except grpc.RpcError as error:
            raise self._line.translated(error, self._deadline) from None
        return {
            "kvferry_version": reply.kvferry_version,
            "model": reply.model,
            "fingerprint": reply.fingerprint,
            "has_vision": reply.has_vision,
            "modes": [mode_name(mode) for mode in reply.modes if mode in pb.Mode.values()],
            "max_request_bytes": reply.max_request_bytes,
            "max_request_seconds": reply.max_request_seconds,
            "queue_seconds": reply.queue_seconds,
            "unix_seconds": reply.unix_seconds,
        }

    def ask(
        self,
        images: Sequence[Any] | Any = (),
        question: str = "",
        *,
        messages: Messages | Sequence[Any] | None = None,
        recipe: str | Recipe = DEFAULT_RECIPE,
        mode: str = "kv",
        ship_first: bool = False,
        tiers: int = 1,
        fallback: Literal["local"] | None = None,
        max_new_tokens: int = 16,
        deadline: float | None = None,
        answer_by: float | None = None,
        privacy: Collection[str] | None = None,
        on_token: OnToken | None = None,
        on_sent: OnSent | None = None,
        keep: BinaryIO | None = None,
        cancel: Cancel | None = None,
    ) -> Answer:
        """Ask one question.

        Parameters
        ----------
        images : path, PIL image or array, or a list of them
            May be empty. What is read of them: :func:`kvferry.pictures.open_picture`.
        messages : sequence of mappings, optional
            Instead of a question, as in :meth:`kvferry.VLM.prefill`. A system prompt, earlier turns, and pictures
            between words cross in modes ``kv`` and ``local``.
        recipe : str or Recipe
            How to compress the cache, where ``mode`` is ``kv`` and does not say it.
        mode : str
            What crosses the wire, with options: ``kv:q2c@0.25|int4``, ``image``, ``image:60,mask=0.25``,
            ``embeds:int8``, ``scout:vlcache@0.25``, ``prompt`` or ``local``; see :data:`kvferry.modes.MODES`. ``auto``
            lets the edge's policy choose among its points, and answers here if ``local`` is one of them and the cloud
            cannot.
        ship_first : bool
            Protocol B, only for mode ``kv``: compress the scene without looking at the question, and ask it in the
            cloud. Further questions about the same pictures then cross alone.
        tiers : int
            In how many parts a cache travels, the most important tokens first; see :func:`kvferry.compress`. With
            ``auto``, 1 leaves this to the point, and so that where time is short the cloud answers from what is there.
        fallback : {"local"}, optional
            What to do where the cloud cannot be reached, goes away before it says a word, or is too busy: answer with
            the edge's own model. A deadline that has passed stays an error, since no time is left.
        deadline : float, optional
            Instead of the edge's own.
        answer_by : float, optional
            Seconds from now on after which the cloud no longer waits for more: it answers from the frames of a cache in
            tiers that have arrived (:attr:`Answer.share` says how much that was), or says that they are of no use. The
            way back and the answer itself take more time, and the way there is not counted.
        privacy : collection of str, optional
            Instead of the edge's own.
        on_token : callable, optional
            ``(token_id, text)`` of every token as it comes.
        on_sent : callable, optional
            ``(acknowledged, total)`` bytes as the cloud confirms them; the total is None while it is encoded.
        keep : binary file, optional
            Gets a copy of the sent bytes, once they have all been sent: in mode ``kv`` a bitstream that ``kvferry
            inspect`` reads (in steps: one after the other, which it does not).
        cancel : Cancel, optional
            Calls the question off from another thread.

        Raises
        ------
        CancelledError
            ``cancel`` was used.
        InputError, RecipeError, FingerprintError, BitstreamError
            This question cannot be answered; found here or by the cloud.
        LinkError, DeadlineError
            The cloud is away, went away, is too busy, or was too slow; in mode ``auto``, nothing can be in time.
        """
        began = time.perf_counter()
        seconds = self._deadline if deadline is None else checked_deadline(deadline)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is at least 1, not {max_new_tokens}")
        check_answer_by(answer_by, seconds)
        rules = self._privacy if privacy is None else checked_rules(privacy)
        asked = asked_of(images, question, messages, ship_first, tiers, self._keep_metadata)
        cancel = cancel or Cancel()
        on_token = cancel.heeded(on_token)
        self._check_fallback(fallback)
        with self._line.asking():
            before = self._line.carried
            opened = self._open(asked, mode, recipe, rules, began, seconds, in_parts=answer_by is None)
            why = opened.why
            if isinstance(opened.mode, LocalMode) or opened.sender is None:
                return replace(self._answer_here(asked, max_new_tokens, on_token, began, opened.why_local), why=why)
            crossing = Crossing(
                opened.sender, max_new_tokens, on_token, on_sent, began, seconds, keep is not None,
                opened.answer_by if answer_by is None else answer_by, self._line.pacer, self._line.rtt_seconds,
                cancel,
            )  # fmt: skip
            crossing.patient = fallback is None and not opened.or_here
            try:
                answer = self._line.cross(crossing, opened.mode, before)
            except (DeadlineError, ProtocolError):
                raise
            except LinkError as error:
                if (fallback is None and not opened.or_here) or crossing.first_token_at:
                    raise
                return replace(self._answer_here(asked, max_new_tokens, on_token, began, str(error)), why=why)
            if keep is not None:
                keep.write(crossing.sent)
            return replace(answer, why=why)

    def stream(self, images: Sequence[Any] | Any = (), question: str = "", **options: Any) -> Stream:
        """:meth:`ask`, in a thread: the pieces of the answer as they come, with ``cancel()`` and ``answer``.

        Examples
        --------
        >>> with edge.stream(["scene.png"], "what is it?") as pieces:  # doctest: +SKIP
        ...     for piece in pieces:
        ...         print(piece, end="")
        """
        return Stream(partial(self.ask, images, question, **options))

    def conversation(
        self,
        images: Sequence[Any] | Any,
        *,
        recipe: str | Recipe = DEFAULT_RECIPE,
        mode: str = "kv",
        ship_first: bool = False,
        tiers: int = 1,
        fallback: Literal["local"] | None = None,
        privacy: Collection[str] | None = None,
    ) -> Conversation:
        """Begin a conversation about the same pictures: every question is asked with the earlier ones and their
        answers in context.

        What the first question sends is all that is ever sent of the pictures: in mode ``kv`` a cache that was
        compressed for that question, on which all others must live (``ship_first`` compresses without any question).
        ``auto`` chooses a mode at the first question, and again where a picture joins.

        Parameters are those of :meth:`ask`. With ``fallback`` each turn that the cloud cannot answer is answered here,
        and the cloud is told of it with the next turn.

        Examples
        --------
        >>> talk = edge.conversation(["scene.png"], mode="kv:full|transform:80")  # doctest: +SKIP
        >>> talk.ask("what colour is the circle?").text, talk.ask("how many squares are there?").text  # doctest: +SKIP
        """
        rules = self._privacy if privacy is None else checked_rules(privacy)
        self._check_fallback(fallback)
        pictures = images if isinstance(images, list | tuple) else [images]

        def open_(images: Sequence[Any], question: str, began: float, seconds: float, in_parts: bool) -> Opened:
            asked = Question(images, question, ship_first, tiers, self._keep_metadata)
            opened = self._open(asked, mode, recipe, rules, began, seconds, in_parts=in_parts)
            return replace(opened, or_here=opened.or_here or fallback is not None)

        return Conversation(self._line, self._vlm, self._deadline, open_, pictures)

    def _open(
        self,
        asked: Question,
        mode: str,
        recipe: object,
        rules: frozenset[str],
        began: float,
        seconds: float,
        *,
        in_parts: bool = False,
    ) -> Opened:
        """Choose a mode, and tiers if it may be answered from parts, where that is left to the policy; make the edge's
        half of it."""
        why, why_local, or_here, answer_by = "", "", False, None
        if mode == "auto":
            decision, why_local = self._decide(asked, rules, began, seconds)
            point, why = decision.point, self._explained(decision)
            mode = point.mode
            if in_parts and asked.tiers == 1 and point.anytime:
                asked, answer_by = replace(asked, tiers=point.tiers), latest_start(decision, seconds)
            or_here = any(x.is_local for x in decision.points)
        chosen = checked_mode(mode, recipe, rules, asked.ship_first)
        check_talk(asked, chosen)
        sender = None if isinstance(chosen, LocalMode) else chosen.sender(self._vlm, asked, self._line.holdings)
        return Opened(asked, chosen, sender, why, why_local, or_here, answer_by)

    def _decide(self, asked: Question, privacy: frozenset[str], began: float, seconds: float) -> tuple[Decision, str]:
        """What to send, and why the cloud cannot be asked if it cannot."""
        if self._pilot is None:
            raise InputError("mode auto chooses among measured points; pass those of `kvferry profile` as points")

        def describe(request: pb.DescribeRequest, timeout: float) -> Any:
            line = self._line
            return line.stub.Describe.future(request, timeout=max(timeout, 0.0), metadata=line.metadata)

        known = Asked(asked, self._vlm, self._line.holdings, privacy)
        if (member := self._line.membership) is None:
            return self._pilot.choose(known, describe, began, seconds)
        share = member.share(LOOK_SHARE * seconds)
        if share is not None and share.resting and not share.bits_per_second:
            share = None  # nothing is kept for a question of its own, and what it is granted now is still on the way
        decision, why = self._pilot.choose(known, describe, began, seconds, share)
        member.plan(decision.context.deadline - decision.context.rtt_seconds - decision.context.queue_seconds)
        return decision, why

    def _explained(self, decision: Decision) -> str:
        """The reasons, and what the coordinator had to do with them."""
        if (member := self._line.membership) is None:
            return explain(decision)
        share = member.share()
        if share is None:
            return f"{explain(decision)}\n{member.why_alone or 'the coordinator is silent'}"
        granted = f"{share.bits_per_second / 1e6:.4g} Mbit/s, with {share.mode or 'nothing'} in mind"
        return f"{explain(decision)}\nthe coordinator grants {granted}; {share.members} agents on the uplink"

    def _check_fallback(self, fallback: str | None) -> None:
        if fallback is not None and self._vlm is None:
            raise InputError("fallback='local' needs a model on this side; load one, or leave the fallback out")

    def _answer_here(
        self, asked: Question, max_new_tokens: int, on_token: OnToken | None, began: float, why: str = ""
    ) -> Answer:
        """The edge's own model answers."""
        late = time.perf_counter() - began
        done, prefill = answer_here(self._vlm, asked, max_new_tokens, on_token)
        first = late + prefill + done.first_token_seconds
        total = time.perf_counter() - began
        seconds = Seconds(prefill=prefill, first_token=first, total=total)
        return Answer(done.text, "local", "", len(done.token_ids), seconds=seconds, why_local=why)
