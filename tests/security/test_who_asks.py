"""Clouds that ask who is there, on real sockets: TLS, mutual TLS, tokens, and sessions of one's own."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from kvferry import Edge, InputError, LinkError
from kvferry.cli.app import app
from kvferry.edge.membership import Membership
from kvferry.edge.pacing import Meter
from kvferry.errors import AccessError
from kvferry.modes.digests import file_digest
from kvferry.pictures import identify
from kvferry.policy import PointTable
from kvferry.security import Credentials
from kvferry.security.keys import make_ca, make_edge, make_server
from kvferry.security.tokens import new_token
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc
from tests.coordinator.agent import POINTS
from tests.coordinator.process import CoordinatorProcess
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_ca(folder)
    make_server(folder)
    make_edge(folder, "camera")
    make_ca(folder / "other")
    make_edge(folder / "other", "camera")
    make_server(folder / "other", ["elsewhere.example"])
    for name in ("a", "b"):
        (folder / f"{name}.token").write_text(new_token(folder / "tokens.toml", name))
    (folder / "only.token").write_text(new_token(folder / "tokens.toml", "only", ("ask:prompt", "share")))
    return folder


def tls(keys: Path) -> tuple[str, ...]:
    return ("--cert", str(keys / "server.pem"), "--key", str(keys / "server.key"))


@pytest.fixture(scope="module")
def named(model_folder: Path, keys: Path) -> Iterator[CloudProcess]:
    """It asks for a token, over TLS."""
    with CloudProcess(model_folder, *tls(keys), "--tokens", str(keys / "tokens.toml")) as process:
        yield process
        assert process.stop() == 0


def shown(keys: Path, name: str) -> Credentials:
    return Credentials(keys / "ca.pem", token=(keys / f"{name}.token").read_text())


def test_over_tls_with_a_token(named: CloudProcess, keys: Path, picture: Path) -> None:
    """Through an emulated link too, whose own address the certificate does not name."""
    for uplink in (None, "10mbit"):
        with Edge(None, named.address, uplink=uplink, credentials=shown(keys, "a")) as edge:
            assert edge.ask([picture], QUESTION, mode="image").tokens == 16
            assert edge.describe()["has_vision"]


def test_who_is_not_let_in(named: CloudProcess, keys: Path, picture: Path) -> None:
    ca = keys / "ca.pem"
    for credentials, error, why in (
        (Credentials(ca), AccessError, "asks for a token"),
        (Credentials(ca, token="kvf_guess"), AccessError, "does not know that token"),
        (Credentials(keys / "other" / "ca.pem", token="kvf_guess"), LinkError, "--ca"),
        (Credentials("system", token="kvf_guess"), LinkError, "--ca"),
        (Credentials(), LinkError, "cannot be reached"),
    ):
        with Edge(None, named.address, credentials=credentials, deadline=20) as edge:
            for call in (edge.describe, lambda edge=edge: edge.ask([picture], QUESTION, mode="image")):
                with pytest.raises(error, match=why):
                    call()
    with Credentials(ca).channel(named.address, ()) as channel:  # whoever only wants to know whether it is well
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    with Edge(None, named.address, credentials=shown(keys, "only")) as edge:
        assert edge.ask([], QUESTION, mode="prompt").tokens == 16
        for call in (edge.describe, lambda: edge.ask([picture], QUESTION, mode="image")):
            with pytest.raises(AccessError, match=r"only may not .* here \(only ask:prompt, share\)"):
                call()


def test_a_certificate_that_names_another_host(model_folder: Path, keys: Path) -> None:
    other = keys / "other"
    listening = ("--cert", str(other / "server.pem"), "--key", str(other / "server.key"))
    with CoordinatorProcess("10mbit", "127.0.0.1:0", *listening) as process:
        host, _, port = process.address.partition(":")
        for address, there in ((f"{host}:{port}", True), (f"127.0.0.2:{port}", False)):
            channel = Credentials(other / "ca.pem").channel(address, (), through=process.address)
            with channel:
                ready = grpc.channel_ready_future(channel)
                if there:
                    ready.result(10)
                else:
                    with pytest.raises(grpc.FutureTimeoutError):
                        ready.result(1)


def test_a_certificate_is_replaced(keys: Path, tmp_path: Path) -> None:
    """The next connection sees the new one; what is half there is passed over."""
    folder = tmp_path / "keys"
    shutil.copytree(keys, folder)
    with CoordinatorProcess("10mbit", "127.0.0.1:0", *tls(folder)) as process:

        def believed(ca: Path) -> bool:
            with Credentials(ca).channel(process.address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
                try:
                    grpc.channel_ready_future(channel).result(2)
                except grpc.FutureTimeoutError:
                    return False
                return True

        assert believed(keys / "ca.pem")
        (folder / "server.key").write_text("")
        assert believed(keys / "ca.pem")
        for name in ("server.pem", "server.key"):
            (folder / name).write_bytes((keys / "other" / name).read_bytes())
        assert believed(keys / "other" / "ca.pem")
        assert not believed(keys / "ca.pem")


def test_mutual_tls(keys: Path) -> None:
    """An edge without a certificate of this CA is not let in."""
    with CoordinatorProcess("10mbit", "127.0.0.1:0", *tls(keys), "--client-ca", str(keys / "ca.pem")) as process:
        whole = Credentials(keys / "ca.pem", keys / "camera.pem", keys / "camera.key")
        member = Membership(process.address, POINTS, 1.0, Meter(), "x", whole)
        assert member.share(10.0) is not None
        member.close()
        stranger = Credentials(keys / "ca.pem", keys / "other" / "camera.pem", keys / "other" / "camera.key")
        for credentials in (Credentials(keys / "ca.pem"), stranger):
            refused = Membership(process.address, POINTS, 1.0, Meter(), "x", credentials)
            assert refused.share(10.0) is None
            assert "UNAVAILABLE" in refused.why_alone
            refused.close()


def test_a_session_is_its_owners(named: CloudProcess, keys: Path, picture: Path) -> None:
    """Whoever learns a session's id gains nothing without the token that opened it."""
    data = picture.read_bytes()
    item = pb.AskRequest.Item(digest=file_digest(data, identify(data)), size=len(data))

    def say(name: str, session: bytes, item: pb.AskRequest.Item, data: bytes = b"") -> pb.AskReply:
        start = pb.AskRequest.Start(
            mode=pb.MODE_IMAGE, question=QUESTION, max_new_tokens=2, items=[item], session=session, hold=True
        )
        chunks = [pb.AskRequest(chunk=pb.AskRequest.Chunk(data=data))] if data else []
        end = pb.AskRequest(end=pb.AskRequest.End(bytes=len(data)))
        credentials = shown(keys, name)
        with credentials.channel(named.address, ()) as channel:
            call = service_pb2_grpc.FerryStub(channel).Ask(
                iter([pb.AskRequest(start=start), *chunks, end]), timeout=60, metadata=credentials.metadata()
            )
            return list(call)[-1]

    done = say("a", b"", item, data).done
    handle = pb.AskRequest.Item(handle=done.holdings[0].handle)
    assert say("a", done.session, handle).done.text == done.text
    stolen = say("b", done.session, handle)
    assert stolen.error.kind == pb.ERROR_KIND_NOT_HELD
    assert say("b", done.session, item, data).done.session != done.session
    assert say("a", done.session, handle).done.text == done.text


def test_tokens_are_read_again(named: CloudProcess, keys: Path) -> None:
    """On SIGHUP: a new one is let in, one that was taken out is not."""
    file, ca = keys / "tokens.toml", keys / "ca.pem"
    whole = file.read_text()
    new = Credentials(ca, token=new_token(file, "new"))
    with Edge(None, named.address, credentials=new) as edge:
        with pytest.raises(AccessError):
            edge.describe()
        named.process.send_signal(signal.SIGHUP)
        until(lambda: edge.describe())
        file.write_text(whole)
        named.process.send_signal(signal.SIGHUP)
        until(lambda: refused(edge))


def refused(edge: Edge) -> None:
    with pytest.raises(AccessError):
        edge.describe()


def until(works: Callable[[], object]) -> None:
    for _ in range(100):
        try:
            works()
            return
        except (AccessError, pytest.fail.Exception):
            time.sleep(0.05)
    works()


def test_a_coordinator_asks_too(keys: Path) -> None:
    options = (*tls(keys), "--tokens", str(keys / "tokens.toml"))
    with CoordinatorProcess("10mbit", "127.0.0.1:0", *options) as process:
        member = Membership(process.address, POINTS, 1.0, Meter(), "x", shown(keys, "only"))
        assert member.share(10.0) is not None
        member.close()
        refused = Membership(process.address, POINTS, 1.0, Meter(), "x", shown(keys, "a"))
        with pytest.raises(AccessError, match="may not share"):
            refused.share(10.0)
        refused.close()


def test_nothing_is_said_in_the_clear_to_another_machine() -> None:
    with pytest.raises(InputError, match="--ca FILE"):
        Edge(None, "192.0.2.1:7421")
    with pytest.raises(InputError, match="not sent"):
        Edge(None, "192.0.2.1:7421", credentials=Credentials(token="kvf_x", insecure=True))
    with pytest.raises(InputError, match=r"192\.0\.2\.1:7422.*--ca FILE"):
        Edge(None, "127.0.0.1:1", coordinator="192.0.2.1:7422", points=PointTable("x", POINTS))
    for words, why in (
        (["ask", "x", "--mode", "prompt", "--cloud", "192.0.2.1:7421"], "--ca FILE"),
        (["serve", "--listen", "0.0.0.0:0"], "--cert and --key"),
        (["coordinate", "--uplink", "1mbit", "--listen", "[::]:0"], "--cert and --key"),
        (["serve", "--cert", "absent.pem"], "--cert and --key together"),
        (["serve", "--cert", "absent.pem", "--key", "absent.key"], "cannot read key in absent.key"),
        (["serve", "--tokens", "absent.toml"], "cannot read tokens in absent.toml"),
    ):
        assert why in str(CliRunner().invoke(app, words).exception)


def test_no_secret_stands_in_a_process_list(named: CloudProcess, keys: Path) -> None:
    token = (keys / "a.token").read_text()
    line = Path(f"/proc/{named.process.pid}/cmdline").read_bytes().decode()
    assert token not in line
    assert "--token" not in CliRunner().invoke(app, ["ask", "--help"], terminal_width=200).output.replace(
        "--token-file", ""
    )
