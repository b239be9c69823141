"""A cloud's own limits, on a server in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from kvferry import VLM, Edge, InputError, KVFerryError
from kvferry.cloud import Limits
from kvferry.cloud.engine import Engine
from kvferry.cloud.gate import Gate
from kvferry.cloud.service import FerryService
from kvferry.security import Tokens
from kvferry.security.access import Access
from kvferry.wire import sealed, service_pb2_grpc
from kvferry.wire import service_pb2 as pb

QUESTION = "what colour is the circle?"


@contextmanager
def served(vlm: VLM, limits: Limits, tokens: Path | None = None) -> Iterator[str]:
    """The address of a server with these limits, that asks for these tokens."""
    ready: Future[str] = Future()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server, engine = grpc.aio.server(), Engine(limits.waiting, limits.together)
        access = Access(None if tokens is None else Tokens(tokens))
        gate = Gate(FerryService(vlm, engine, limits), access, limits)
        sealed.add_to_server(gate, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ready.set_result(f"127.0.0.1:{port}")
        await stop.wait()
        await server.stop(None)
        engine.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield ready.result(10)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_silent_edge(vlm: VLM) -> None:
    silence = threading.Event()

    def messages() -> Iterator[pb.AskRequest]:
        items = [pb.AskRequest.Item(size=100)]
        start = pb.AskRequest.Start(mode=pb.MODE_IMAGE, question=QUESTION, max_new_tokens=1, items=items)
        yield pb.AskRequest(start=start)
        silence.wait(10)

    with served(vlm, Limits(request_seconds=0.3)) as address, grpc.insecure_channel(address) as channel:
        replies = list(service_pb2_grpc.FerryStub(channel).Ask(messages(), timeout=20))
        silence.set()
    assert [reply.WhichOneof("part") for reply in replies] == ["accepted", "error"]
    assert replies[-1].error.kind == pb.ERROR_KIND_DEADLINE
    assert "0.3 s" in replies[-1].error.message


@pytest.mark.parametrize("uplink", [None, "4mbit"])
def test_refused_while_still_sending(vlm: VLM, picture: Path, uplink: str | None) -> None:
    with served(vlm, Limits(request_bytes=20_000)) as address, Edge(vlm, address, uplink=uplink) as edge:
        for _ in range(5):
            with pytest.raises(InputError, match="compress more"):
                edge.ask([picture], QUESTION, recipe="full|bf16")
            assert edge.ask([picture], QUESTION, recipe="q2c@0.05|int4").tokens == 16


def test_what_is_not_our_error_stays_in_the_log(vlm: VLM, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        """A model whose memory runs out."""

        name, fingerprint, has_vision, training = vlm.name, vlm.fingerprint, True, None
        bounds, tokenizer, visual_tokens, reduced = vlm.bounds, vlm.tokenizer, vlm.visual_tokens, vlm.reduced

        def prompt_of(self, *_: object) -> None:
            raise MemoryError("secret detail")

    cloud = served(Broken(), Limits())  # type: ignore[arg-type]
    with cloud as address, Edge(None, address) as edge, pytest.raises(KVFerryError) as refused:
        edge.ask([], QUESTION, mode="image")
    assert "its log says why" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "secret detail" in caplog.text
