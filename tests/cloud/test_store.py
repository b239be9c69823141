"""What outlives a cloud's memory is what was put in, or is not held: in a folder, and in a real Redis."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kvferry
from kvferry import VLM, Edge, InputError, LinkError
from kvferry.cache import KVCache
from kvferry.cloud.limits import Limits
from kvferry.cloud.sessions import Sessions
from kvferry.cloud.store import Backing, Store, open_store
from kvferry.cloud.store.files import Files
from kvferry.cloud.store.items import Entry, pack, unpack
from kvferry.cloud.store.seal import Keyed, Summed
from kvferry.errors import CorruptError, DependencyError
from kvferry.models.embeds import VisualEmbeds
from kvferry.modes import NotHeldError
from tests.crossing.process import CloudProcess

REDIS = shutil.which("redis-server") or shutil.which("valkey-server")
KEY = bytes(range(32))
HOUR = 3600.0
QUESTION = "what colour is the circle?"


class Redis:
    """The distribution's server, on a port of this machine."""

    def __init__(self, folder: Path) -> None:
        assert REDIS is not None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        words = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        self.process = subprocess.Popen([REDIS, *words], stdout=subprocess.DEVNULL)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.02)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    if REDIS is None:
        pytest.skip("there is no redis-server or valkey-server on this machine")
    server = Redis(tmp_path)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "store.key"
    path.write_text(KEY.hex() + "\n")
    return path


@pytest.fixture(params=["files", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, key: Path) -> Iterator[Store]:
    where = str(tmp_path / "store") if request.param == "files" else request.getfixturevalue("redis").url
    store, _ = open_store(where, key, HOUR, 1 << 20)
    yield store
    store.close()


def entry(item: object = b"picture", owner: str = "camera", fingerprint: str = "model") -> Entry:
    return Entry(item, bytes(32), 7, owner, fingerprint)


def cache_of(vlm: VLM, picture: Path, recipe: str) -> KVCache:
    blob = kvferry.compress(vlm.prefill([Image.open(picture)], QUESTION, recipe=recipe), recipe)
    return kvferry.decompress(blob)


@pytest.mark.parametrize("recipe", ["full|bf16", "knorm@0.3,budget=head|int4"])
def test_a_cache_comes_back_as_it_was(recipe: str, vlm: VLM, picture: Path) -> None:
    """Of heads of unequal length too; it gives the same answer."""
    cache = cache_of(vlm, picture, recipe)
    packed = pack(entry(cache))
    assert packed is not None
    back = unpack(packed)
    assert (back.digest, back.nbytes, back.owner, back.fingerprint) == (bytes(32), 7, "camera", "model")
    found = back.item
    assert isinstance(found, KVCache)
    assert found.recipe == cache.recipe
    for one, other in zip(cache, found, strict=True):
        assert one.counts == other.counts
        assert one.keys.dtype == other.keys.dtype
        assert all(torch.equal(getattr(one, x), getattr(other, x)) for x in ("keys", "values", "positions"))
    assert vlm.answer(found) == vlm.answer(cache)


def test_other_things_come_back_too() -> None:
    mask = np.array([[True, False], [False, True]])
    embeds = VisualEmbeds(torch.randn(4, 8).to(torch.bfloat16), (1, 4, 4))
    for item in (b"picture", b"", mask, embeds):
        packed = pack(entry(item))
        assert packed is not None
        found = unpack(packed).item
        assert type(found) is type(item)
        if isinstance(item, VisualEmbeds):
            assert isinstance(found, VisualEmbeds)
            assert torch.equal(found.embeds, item.embeds)
            assert found.grid == item.grid
        else:
            assert np.array_equal(found, item) if isinstance(item, np.ndarray) else found == item
    assert pack(entry(object())) is None


@pytest.mark.parametrize("seal", [Summed(), Keyed(KEY)], ids=["summed", "keyed"])
def test_not_one_byte_may_be_another(seal: Summed | Keyed) -> None:
    blob = seal.close(b"what is held", b"session:3")
    assert seal.open(blob, b"session:3") == b"what is held"
    for at in range(len(blob)):
        bad = bytearray(blob)
        bad[at] ^= 1
        with pytest.raises(CorruptError):
            seal.open(bytes(bad), b"session:3")
    for cut in range(len(blob)):
        with pytest.raises(CorruptError):
            seal.open(blob[:cut], b"session:3")
    with pytest.raises(CorruptError):
        seal.open(blob, b"session:4")


def test_whoever_has_no_key_reads_and_writes_nothing() -> None:
    blob = Keyed(KEY).close(b"what is held", b"")
    assert b"held" not in blob
    for other in (Keyed(bytes(32)), Summed()):
        with pytest.raises(CorruptError):
            other.open(blob, b"")
    with pytest.raises(CorruptError):
        Keyed(KEY).open(Summed().close(b"forged", b""), b"")


def test_a_store_keeps_counts_and_forgets(store: Store) -> None:
    session = "ab" * 32
    store.put(session, 5, b"nobody reserved it")
    assert store.get(session, 5) is None
    assert store.reserve(session, 10) == 1
    assert store.reserve(session, 10) == 11
    store.put(session, 3, b"three")
    store.put(session, 3, b"anew")
    assert (store.get(session, 3), store.get(session, 4), store.get("cd" * 32, 3)) == (b"anew", None, None)
    store.drop(session, 3)
    store.drop(session, 3)
    assert store.get(session, 3) is None


def sessions(store: Store, fingerprint: str = "model", limits: Limits | None = None) -> tuple[Sessions, Backing]:
    """Those of a process that has just begun."""
    backing = Backing(store, Keyed(KEY), fingerprint)
    return Sessions(limits or Limits(), backing=backing), backing


def written(backing: Backing) -> None:
    backing._writer.submit(lambda: None).result(20)


def test_a_session_survives_the_process(store: Store) -> None:
    before, backing = sessions(store)
    session, first = before.put(b"", b"a" * 32, b"first", 5, "camera")
    assert before.put(session, b"b" * 32, b"second", 6, "camera") == (session, first + 1)
    written(backing)
    after, backing = sessions(store)
    assert after.take(session, first, bytes, "camera") == b"first"
    assert after.put(session, b"a" * 32, b"first", 5, "camera") == (session, first)
    _, third = after.put(session, b"c" * 32, b"third", 5, "camera")
    assert third > first + 1  # the second is not in this memory, and its handle is still its own
    assert after.take(session, first + 1, bytes, "camera") == b"second"
    after.drop(session, first, "camera")
    written(backing)
    last, _ = sessions(store)
    assert last.take(session, third, bytes, "camera") == b"third"
    with pytest.raises(NotHeldError):
        last.take(session, first, bytes, "camera")


def test_what_is_not_theirs_is_not_held(store: Store) -> None:
    before, backing = sessions(store)
    session, handle = before.put(b"", b"a" * 32, b"mine", 4, "camera")
    written(backing)
    for owner, name, number, model in (
        ("", session, handle, "model"),
        ("other", session, handle, "model"),
        ("camera", bytes(16), handle, "model"),
        ("camera", session, handle + 1, "model"),
        ("camera", session, handle, "another"),
    ):
        after, _ = sessions(store, model)
        with pytest.raises(NotHeldError):
            after.take(name, number, bytes, owner)
    assert sessions(store)[0].take(session, handle, bytes, "camera") == b"mine"


def test_what_memory_has_no_room_for_is_in_the_store(store: Store) -> None:
    small, backing = sessions(store, limits=Limits(held_bytes=3000, session_bytes=3000))
    session, first = small.put(b"", b"a" * 32, bytes(1500), 1500)
    small.put(session, b"b" * 32, bytes(1500), 1500)
    written(backing)
    assert small.nbytes <= 3000
    assert small.take(session, first, bytes) == bytes(1500)
    assert small.nbytes <= 3000


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.kv"))


def test_broken_files_are_not_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Files(tmp_path / "store", HOUR, 1 << 20)
    before, backing = sessions(store)
    session, handle = before.put(b"", b"a" * 32, b"picture", 7)
    _, other = before.put(session, b"b" * 32, b"another", 7)
    written(backing)
    one, two = files(tmp_path / "store")
    assert (one.stat().st_mode & 0o77, one.parent.stat().st_mode & 0o77) == (0, 0)
    os.replace(one, two)  # under another's name
    after, _ = sessions(store)
    for number in (handle, other):
        with pytest.raises(NotHeldError):
            after.take(session, number, bytes)
    assert "an entry was changed, or sealed with another key" in caplog.text
    assert session.hex() not in caplog.text + "".join(str(x) for x in tmp_path.rglob("*"))


def test_a_count_that_is_broken_is_not_gone_on_with(tmp_path: Path) -> None:
    """No handle is ever given out twice: better none."""
    store = Files(tmp_path / "store", HOUR, 1 << 20)
    before, backing = sessions(store)
    session, handle = before.put(b"", b"a" * 32, b"picture", 7)
    written(backing)
    next(iter((tmp_path / "store").glob("*/next"))).write_text("")
    after, _ = sessions(store)
    assert after.take(session, handle, bytes) == b"picture"
    assert after.put(session, b"b" * 32, b"another", 7)[0] != session


def test_a_full_disk_is_said_and_not_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The system's own limit on files stands for a disk that is full."""
    store = Files(tmp_path / "store", HOUR, 1 << 30)
    before, backing = sessions(store)
    session, first = before.put(b"", b"a" * 32, bytes(10), 10)
    written(backing)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        _, second = before.put(session, b"b" * 32, bytes(200_000), 200_000)
        written(backing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "what is held is not stored: File too large" in caplog.text
    assert before.take(session, second, bytes) == bytes(200_000)
    assert len([path for path in (tmp_path / "store").rglob("*") if path.is_file()]) == 3  # lock, count, the first
    after, _ = sessions(store)
    assert after.take(session, first, bytes) == bytes(10)
    with pytest.raises(NotHeldError):
        after.take(session, second, bytes)


def test_files_make_room_and_age(tmp_path: Path) -> None:
    store = Files(tmp_path, HOUR, 1000)
    names = [letter * 64 for letter in "abc"]
    for name in names[:2]:
        store.reserve(name, 1)
        store.put(name, 1, bytes(400))
    store.get(names[0], 1)
    store.reserve(names[2], 1)
    store.put(names[2], 1, bytes(400))
    assert [store.get(name, 1) is not None for name in names] == [True, False, True]
    store.put(names[2], 2, bytes(2000))
    assert store.get(names[2], 2) is None
    assert store.nbytes == 800
    old = time.time() - 2 * HOUR
    os.utime(tmp_path / names[0] / "next", (old, old))
    store.close()
    again = Files(tmp_path, HOUR, 1000)
    assert [again.get(name, 1) is not None for name in names] == [False, False, True]
    assert again.nbytes == 400
    assert not (tmp_path / names[0]).exists()


def test_redis_ages_and_is_tampered_with(redis: Redis, key: Path) -> None:
    import redis as library

    store, _ = open_store(redis.url, key, 0.2, 0)
    store.reserve("ab" * 32, 1)
    store.put("ab" * 32, 1, b"x")
    assert store.get("ab" * 32, 1) == b"x"
    until = time.monotonic() + 20
    while library.Redis.from_url(redis.url).keys() and time.monotonic() < until:
        time.sleep(0.05)
    assert store.get("ab" * 32, 1) is None
    lasting, _ = open_store(redis.url, key, HOUR, 0)
    before, backing = sessions(lasting)
    session, handle = before.put(b"", b"a" * 32, b"picture", 7)
    written(backing)
    direct = library.Redis.from_url(redis.url)
    (name,) = direct.keys()
    blob = direct.hget(name, str(handle))
    assert isinstance(blob, bytes)
    assert b"picture" not in blob
    assert session.hex() not in name.decode()
    direct.hset(name, str(handle), blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(NotHeldError):
        sessions(lasting)[0].take(session, handle, bytes)


def test_a_redis_that_dies_is_only_a_store_that_holds_nothing(
    redis: Redis, key: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = open_store(redis.url, key, HOUR, 0)
    here, backing = sessions(store)
    session, handle = here.put(b"", b"a" * 32, b"picture", 7)
    redis.process.kill()
    redis.process.wait()
    caplog.set_level(logging.WARNING)
    assert here.take(session, handle, bytes) == b"picture"
    other, number = here.put(b"", b"b" * 32, b"another", 7)
    assert here.take(other, number, bytes) == b"another"
    with pytest.raises(NotHeldError):
        here.take(bytes(16), 1, bytes)
    written(backing)
    assert "the store's server failed (ConnectionError)" in caplog.text
    with pytest.raises(LinkError, match="does not answer"):
        open_store(redis.url, key, HOUR, 0)


def test_what_cannot_be_a_store_is_refused(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--store-key"):
        open_store("redis://127.0.0.1:1/0", None, HOUR, 0)
    with pytest.raises(LinkError, match=r"127.0.0.1:1/0 does not answer") as ended:
        open_store("redis://me:secret@127.0.0.1:1/0", key, HOUR, 0)
    assert "secret" not in str(ended.value)
    with pytest.raises(InputError, match="a folder, or a URL of redis://"):
        open_store("s3://bucket", None, HOUR, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep sessions in"):
        open_store(str(tmp_path / "file"), None, HOUR, 0)
    Files(tmp_path / "store", HOUR, 1)
    for text in ("", "00", "zz" * 32, "ab" * 31):
        key.write_text(text)
        with pytest.raises(InputError, match=r"openssl rand -hex 32|kvferry keys"):
            open_store(str(tmp_path / "store"), key, HOUR, 1)
    monkeypatch.setitem(sys.modules, "redis", None)
    key.write_text(KEY.hex())
    with pytest.raises(DependencyError, match=r"kvferry\[redis\]"):
        open_store("redis://127.0.0.1:1/0", key, HOUR, 0)


def test_one_process_has_a_folder(tmp_path: Path) -> None:
    code = "import sys; from kvferry.cloud.store import open_store; open_store(sys.argv[1], None, 1, 1)"
    held = Files(tmp_path, HOUR, 1)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "another cloud keeps its sessions in" in done.stderr
    held.close()


@pytest.mark.parametrize("kind", ["files", "redis"])
def test_an_edge_sends_nothing_again_to_a_cloud_that_was_restarted(
    kind: str, model_folder: Path, vlm: VLM, picture: Path, tmp_path: Path, key: Path, request: pytest.FixtureRequest
) -> None:
    """Real processes: a scene's cache, a picture and embeddings are held beyond the end of the one that held them."""
    where = str(tmp_path / "store") if kind == "files" else request.getfixturevalue("redis").url
    options = ("--store", where, "--store-key", str(key))
    asks = ({"mode": "kv:knorm@0.5|int8", "ship_first": True}, {"mode": "image"}, {"mode": "embeds:int8"})
    with CloudProcess(model_folder, *options) as first, Edge(vlm, first.address, deadline=100) as edge:
        before = [edge.ask([picture], QUESTION, **how) for how in asks]  # type: ignore[arg-type]
        assert all(answer.bitstream_bytes for answer in before)
        assert first.stop() == 0
        with CloudProcess(model_folder, *options, "--listen", first.address) as second:
            assert second.address == first.address
            after = [edge.ask([picture], QUESTION, **how) for how in asks]  # type: ignore[arg-type]
            assert second.stop() == 0
    assert [answer.text for answer in after] == [answer.text for answer in before]
    assert [answer.bitstream_bytes for answer in after] == [0, 0, 0]
