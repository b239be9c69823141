"""Messages, streams, cancelling and asyncio, with a real cloud in another process."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

import kvferry
from kvferry import VLM, CancelledError, DeadlineError, Edge, InputError, LinkError
from kvferry.edge import AsyncEdge, Cancel
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"
RECIPE = "q2c@0.5|int8"
LONG = 400
"""Tokens: some seconds."""


def talk(picture: Path) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "answer in one word"},
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "how many?"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": QUESTION},
    ]


def test_messages_cross(edge: Edge, vlm: VLM, picture: Path) -> None:
    prefilled = vlm.prefill(messages=talk(picture), recipe=RECIPE)
    expected = vlm.answer(kvferry.decompress(kvferry.compress(prefilled, RECIPE)), max_new_tokens=6)
    answer = edge.ask(messages=talk(picture), recipe=RECIPE, max_new_tokens=6)
    assert (answer.text, answer.mode) == (expected, "kv")
    here = edge.ask(messages=talk(picture), mode="local", max_new_tokens=6)
    assert here.text == vlm.answer(vlm.prefill(messages=talk(picture)), max_new_tokens=6)
    single = talk(picture)[1:2]
    assert edge.ask(messages=single, mode="image").text == edge.ask([picture], "how many?", mode="image").text
    with pytest.raises(InputError, match="mode image sends pictures and one question"):
        edge.ask(messages=talk(picture), mode="image")
    with pytest.raises(InputError, match="leave ship_first out"):
        edge.ask(messages=talk(picture), ship_first=True)
    with pytest.raises(InputError, match="pass one of the two"):
        edge.ask([], QUESTION, messages=single)


@pytest.mark.parametrize("mode", ["kv", "image", "local"])
def test_a_stream(edge: Edge, picture: Path, mode: str) -> None:
    whole = edge.ask([picture], QUESTION, mode=mode, recipe=RECIPE, max_new_tokens=8)
    with edge.stream([picture], QUESTION, mode=mode, recipe=RECIPE, max_new_tokens=8) as pieces:
        said = list(pieces)
        assert "".join(said) == pieces.answer.text == whole.text
        assert pieces.answer.tokens == 8
        assert list(pieces) == []
    assert len(said) > 1


def free_again(edge: Edge, picture: Path) -> float:
    """Seconds until the cloud answers the next question."""
    began = time.perf_counter()
    edge.ask([picture], QUESTION, mode="image", max_new_tokens=1)
    return time.perf_counter() - began


def test_cancelling_frees_the_cloud(edge: Edge, picture: Path) -> None:
    began = time.perf_counter()
    edge.ask([picture], QUESTION, mode="image", max_new_tokens=LONG)
    whole = time.perf_counter() - began
    pieces = edge.stream([picture], QUESTION, mode="image", max_new_tokens=LONG)
    next(pieces)
    pieces.cancel()
    with pytest.raises(CancelledError, match="called off"):
        list(pieces)
    assert free_again(edge, picture) < whole / 2
    pieces = edge.stream([picture], QUESTION, mode="image", max_new_tokens=LONG)
    next(pieces)
    del pieces  # nobody wants it
    assert free_again(edge, picture) < whole / 2


def test_cancelled_before_and_here(edge: Edge, picture: Path) -> None:
    cancel = Cancel()
    cancel.cancel()
    for mode in ("kv", "local"):
        with pytest.raises(CancelledError):
            edge.ask([picture], QUESTION, mode=mode, recipe=RECIPE, cancel=cancel)
    with pytest.raises(CancelledError):  # and not answered here instead
        edge.ask([picture], QUESTION, mode="image", fallback="local", cancel=cancel)
    assert edge.ask([picture], QUESTION, mode="image").text


def test_a_stream_that_fails(vlm: VLM, picture: Path) -> None:
    with Edge(vlm, "127.0.0.1:1") as edge, pytest.raises(LinkError, match="cannot be reached"):
        list(edge.stream([picture], QUESTION))


def test_asyncio(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    async def all_of_it() -> None:
        async with AsyncEdge(vlm, cloud.address, deadline=100) as edge:
            options: dict[str, Any] = {"mode": "image", "max_new_tokens": 8}
            one, other = await asyncio.gather(*(edge.ask([picture], QUESTION, **options) for _ in range(2)))
            assert one.text == other.text
            assert "".join([piece async for piece in edge.stream([picture], QUESTION, **options)]) == one.text
            assert (await edge.ask(messages=talk(picture), recipe=RECIPE)).mode == "kv"
            with pytest.raises(DeadlineError):
                await edge.ask([picture], QUESTION, mode="image", max_new_tokens=LONG, deadline=0.3)
            began = time.perf_counter()
            task = asyncio.ensure_future(edge.ask([picture], QUESTION, mode="image", max_new_tokens=LONG))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async for _ in edge.stream([picture], QUESTION, mode="image", max_new_tokens=LONG):
                break
            assert (await edge.ask([picture], QUESTION, **options)).text == one.text
            assert time.perf_counter() - began < 60
            with pytest.raises(InputError, match="there is no mode 'pigeon'"):
                async for _ in edge.stream([picture], QUESTION, mode="pigeon"):
                    pass
            assert (await edge.describe())["has_vision"]

    asyncio.run(all_of_it())
