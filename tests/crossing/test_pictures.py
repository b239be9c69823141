"""A photograph as a phone stores it, over the wire: the right answer in every mode, and nothing private."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

import kvferry
from kvferry import VLM, Edge, InputError
from kvferry.modes.digests import file_digest
from kvferry.pictures import identify
from kvferry.testbed import Sample, samples
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from kvferry.wire.faults import from_wire
from tests.crossing.process import COMMAND, ENVIRONMENT, CloudProcess
from tests.pictures.test_files import XMP, exif, secrets
from tests.pictures.test_read import saved, stored

MODES = ("kv:full|bf16", "image", "image:90", "image:90,mask=0.5", "embeds", "scout:vlcache@0.5")


@pytest.fixture(scope="module", autouse=True)
def shipped() -> Iterator[CloudProcess]:
    with CloudProcess(Path("testbed/cloud")) as process:
        yield process


@pytest.fixture(scope="module")
def large() -> VLM:
    return kvferry.load("testbed/cloud")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Sample]]:
    """Questions with their picture as a phone stores it."""
    folder = tmp_path_factory.mktemp("photographs")
    found = []
    for sample, orientation in zip(samples("validation", 2, start=40, kinds=["colour", "glyph"]), (6, 8), strict=True):
        image, phone = sample.images[0], folder / f"{sample.index}.jpg"
        phone.write_bytes(
            saved(stored(image, orientation), "JPEG", quality=97, subsampling=0, exif=exif(orientation), xmp=XMP)
        )
        found.append((phone, sample))
    return found


def test_a_photograph_is_answered_as_if_upright(
    shipped: CloudProcess, large: VLM, asked: list[tuple[Path, Sample]]
) -> None:
    with Edge(large, shipped.address, deadline=100, hold=False) as edge:
        for phone, sample in asked:
            assert large.answer(large.prefill(phone, sample.question).cache) == sample.answer
            for mode in MODES:
                sent = io.BytesIO()
                answer = edge.ask(phone, sample.question, mode=mode, keep=sent)
                assert answer.text == sample.answer, mode
                assert not any(word in sent.getvalue() for word in (b"a maker", b"a secret", b"Exif", b"xmp"))
                if mode.startswith("image"):
                    assert secrets(sent.getvalue()) == []
                    assert Image.open(io.BytesIO(sent.getvalue())).size == sample.images[0].size


def test_metadata_crosses_where_it_is_asked_for(
    shipped: CloudProcess, large: VLM, asked: list[tuple[Path, Sample]], tmp_path: Path
) -> None:
    phone, sample = asked[0]
    with Edge(None, shipped.address, keep_metadata=True) as edge:
        sent = io.BytesIO()
        assert edge.ask(phone, sample.question, mode="image", keep=sent).text == sample.answer
        assert sent.getvalue() == phone.read_bytes()
    words = [*COMMAND, "ask", str(phone), sample.question, "--cloud", shipped.address, "--mode", "image"]
    out = tmp_path / "sent"
    subprocess.run([*words, "--save", out, "--keep-metadata"], check=True, capture_output=True, env=ENVIRONMENT)
    assert out.read_bytes() == phone.read_bytes()


def test_the_cloud_decodes_three_formats(shipped: CloudProcess) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (192, 192, 3), dtype=np.uint8))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n%%EOF\n"
    bomb = saved(Image.new("1", (9_000, 9_900)), "PNG")
    with grpc.insecure_channel(shipped.address) as channel:
        stub = service_pb2_grpc.FerryStub(channel)

        def ask(*files: bytes) -> pb.AskReply:
            items = [pb.AskRequest.Item(digest=_digest(file), size=len(file)) for file in files]
            start = pb.AskRequest.Start(mode=pb.MODE_IMAGE, question="what is it?", items=items, max_new_tokens=1)
            body = b"".join(files)
            messages = [pb.AskRequest(start=start), pb.AskRequest(chunk=pb.AskRequest.Chunk(data=body))]
            return list(stub.Ask(iter([*messages, pb.AskRequest(end=pb.AskRequest.End(bytes=len(body)))]), timeout=60))[
                -1
            ]

        for form in ("JPEG", "PNG", "WEBP"):
            assert ask(saved(image, form)).done.tokens == 1
        for form in ("TIFF", "GIF", "BMP", "AVIF", "PPM", "ICO", "JPEG2000", "EPS"):
            with pytest.raises(InputError, match="not an image that can be read"):
                raise from_wire(ask(saved(image, form)).error)
        with pytest.raises(InputError, match="not an image that can be read"):
            raise from_wire(ask(script).error)
        with pytest.raises(InputError, match="too much"):
            raise from_wire(ask(bomb, bomb).error)


def _digest(file: bytes) -> bytes:
    try:
        return file_digest(file, identify(file))
    except InputError:
        return os.urandom(32)
