"""What comes back over the wire is what the same model says in this process."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

import kvferry
from kvferry import VLM, Edge
from kvferry.bitstream import inspect
from kvferry.summary import summarise_cache
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"
RECIPES = [
    "full|bf16", "q2c@0.25|int4", "snapkv@0.5|int8|zstd", "random@0.1|bf16", "none|int8",
    "snapkv@0.3,budget=head,modality=text_preserving,merge=lookm|int4|zstd", "q2c,budget=pyramid:3,bytes=30000|int8",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_cache_crosses(edge: Edge, vlm: VLM, picture: Path, recipe: str) -> None:
    prefilled = vlm.prefill([picture], QUESTION, recipe=recipe)
    blob = kvferry.compress(replace(prefilled, cache=replace(prefilled.cache, model_name="")), recipe)
    pieces: list[str] = []
    kept = io.BytesIO()
    answer = edge.ask([picture], QUESTION, recipe=recipe, on_token=lambda _, text: pieces.append(text), keep=kept)
    assert answer.text == vlm.answer(kvferry.decompress(blob))
    assert "".join(pieces) == answer.text
    assert kept.getvalue() == blob
    assert (answer.mode, answer.recipe, answer.tokens) == ("kv", recipe, 16)
    assert answer.bitstream_bytes == len(blob) < answer.payload_bytes_up < len(blob) + 1000
    assert answer.bf16_bytes == prefilled.cache.full_bf16_bytes
    assert answer.kept == summarise_cache(kvferry.decompress(blob))
    assert answer.wire_bytes_up is None
    assert answer.note == ""


def test_an_answer_says_when_no_scorer_chose(edge: Edge, picture: Path) -> None:
    answer = edge.ask([picture], QUESTION, recipe="snapkv@0.01|int8")
    assert answer.note.startswith("in 2 of 2 layers the scorer chose no token")
    assert answer.as_dict()["note"] == answer.note


def test_cache_crosses_in_tiers(edge: Edge, vlm: VLM, picture: Path) -> None:
    recipe, kept = "snapkv@0.5|int8|zstd", io.BytesIO()
    prefilled = vlm.prefill([picture], QUESTION, recipe=recipe)
    answer = edge.ask([picture], QUESTION, recipe=recipe, tiers=3, keep=kept)
    assert answer.text == vlm.answer(kvferry.decompress(kvferry.compress(prefilled, recipe)))
    assert max(frame.tier for frame in inspect(kept.getvalue()).frames) == 2
    with pytest.raises(kvferry.InputError, match="1 to 64 tiers"):
        edge.ask([picture], QUESTION, recipe=recipe, tiers=65)


def test_scene_ships_before_the_question(edge: Edge, vlm: VLM, picture: Path) -> None:
    scene = vlm.prefill([picture], recipe="knorm@0.5|int8")
    here = vlm.answer(kvferry.decompress(kvferry.compress(scene, "knorm@0.5|int8")), question=QUESTION)
    assert edge.ask([picture], QUESTION, recipe="knorm@0.5|int8", ship_first=True).text == here


def test_picture_crosses_as_it_is(edge: Edge, vlm: VLM, picture: Path) -> None:
    answer = edge.ask([picture], QUESTION, mode="image")
    assert answer.text == vlm.answer(vlm.prefill([picture], QUESTION).cache)
    assert answer.bitstream_bytes == picture.stat().st_size
    assert answer.cloud.prefill > 0
    assert answer.bf16_bytes is None
    assert answer.kept is None


def test_two_pictures(edge: Edge, vlm: VLM, picture: Path) -> None:
    images = [picture, Image.new("RGB", (192, 192), "red")]
    here = vlm.answer(kvferry.decompress(kvferry.compress(vlm.prefill(images, QUESTION), "full|int8")))
    assert edge.ask(images, QUESTION, recipe="full|int8").text == here
    assert edge.ask(images, QUESTION, mode="image").tokens == 16


def test_image_mode_needs_no_model_here(cloud: CloudProcess, picture: Path) -> None:
    with Edge(None, cloud.address) as edge:
        assert edge.ask([Image.open(picture)], QUESTION, mode="image").tokens == 16
        with pytest.raises(kvferry.InputError, match="mode image"):
            edge.ask([picture], QUESTION)


def test_shaped_link_counts_and_slows(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    with Edge(vlm, cloud.address, uplink="2mbit", delay_ms=20) as edge:
        sent: list[tuple[int, int | None]] = []
        answer = edge.ask([picture], QUESTION, recipe="full|bf16", on_sent=lambda *x: sent.append(x))
        assert answer.wire_bytes_up is not None
        assert answer.bitstream_bytes < answer.wire_bytes_up < 1.05 * answer.bitstream_bytes + 1000
        assert answer.wire_bytes_down is not None
        assert 0 < answer.wire_bytes_down < 5000
        line_seconds = 8 * answer.bitstream_bytes / 2e6 + 0.04
        assert 0.95 * line_seconds < answer.seconds.send < line_seconds + 10
        assert answer.seconds.send < answer.seconds.first_token <= answer.seconds.total
        assert sent[-1] == (answer.bitstream_bytes, answer.bitstream_bytes)
        again = edge.ask([picture], QUESTION, recipe="full|bf16")
        assert again.text == answer.text


def test_many_edges_at_once(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        with Edge(vlm, cloud.address) as edge:
            recipe = RECIPES[number % 2]
            texts[number] = edge.ask([picture], QUESTION, recipe=recipe).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert len({texts[i] for i in (0, 2, 4, 6)}) == len({texts[i] for i in (1, 3, 5, 7)}) == 1


def test_describe(edge: Edge, vlm: VLM, cloud: CloudProcess) -> None:
    described = edge.describe()
    assert described["fingerprint"] == vlm.fingerprint == cloud.ready["fingerprint"]
    assert described["modes"] == ["kv", "image", "embeds", "scout", "prompt", "translate"]
    assert described["has_vision"]
    assert described["model"] == "cloud", "not where it lies on the other machine"


def test_health_and_reflection(cloud: CloudProcess) -> None:
    with grpc.insecure_channel(cloud.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "kvferry.v1.Ferry"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = next(reflection.ServerReflectionInfo(iter([asked]), timeout=10))
        assert "kvferry.v1.Ferry" in [service.name for service in reply.list_services_response.service]
