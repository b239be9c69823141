"""Keys, tokens, and the files that they lie in."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from kvferry.cli.app import app
from kvferry.errors import AccessError, InputError
from kvferry.files import write_whole
from kvferry.security import Credentials, ServerKeys, Tokens, is_loopback
from kvferry.security.keys import make_ca, make_edge, make_server
from kvferry.security.tls import check_listen
from kvferry.security.tokens import hash_of, new_token


def test_a_ca_and_what_it_signs(tmp_path: Path) -> None:
    """OpenSSL believes them for what they are for and for nothing else; keys are the owner's alone."""
    make_ca(tmp_path)
    make_server(tmp_path, ["cloud.example", "10.1.2.3"])
    make_edge(tmp_path, "camera-1")

    def believed(stem: str, *options: str) -> bool:
        command = ["openssl", "verify", "-x509_strict", "-CAfile", str(tmp_path / "ca.pem"), *options]
        return subprocess.run([*command, str(tmp_path / f"{stem}.pem")], capture_output=True).returncode == 0

    for option, value in (("-verify_hostname", "cloud.example"), ("-verify_hostname", "localhost"),
                          ("-verify_ip", "10.1.2.3"), ("-verify_ip", "127.0.0.1"), ("-verify_ip", "::1")):  # fmt: skip
        assert believed("server", "-purpose", "sslserver", option, value)
    assert not believed("server", "-verify_hostname", "other.example")
    assert not believed("server", "-purpose", "sslclient")
    assert believed("camera-1", "-purpose", "sslclient")
    assert not believed("camera-1", "-purpose", "sslserver")
    for key in tmp_path.glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    made = x509.load_pem_x509_certificate((tmp_path / "camera-1.pem").read_bytes())
    assert made.not_valid_before_utc < datetime.now(UTC) - timedelta(hours=23)  # a slow clock believes it too
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ca.key", "ca.pem", "camera-1.key", "camera-1.pem", "server.key", "server.pem",
    ]  # fmt: skip


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_ca(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="left as it is"):
        make_ca(tmp_path)
    with pytest.raises(InputError, match="no name for an edge"):
        make_edge(tmp_path, "ca")
    (tmp_path / "server.key").write_text("mine")
    with pytest.raises(InputError, match=r"server\.key is there already"):
        make_server(tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(InputError, match="keys"):
        make_server(tmp_path / "elsewhere")


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    write_whole(path, "first")
    path.chmod(0o640)
    (tmp_path / "link.json").symlink_to(path)
    write_whole(tmp_path / "link.json", "second")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("second", 0o640)
    assert (tmp_path / "link.json").is_symlink()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as refused:
        write_whole(path, "third")
    assert refused.value.filename == str(path)
    assert path.read_text() == "second"
    assert len(list(tmp_path.iterdir())) == 2


def test_tokens(tmp_path: Path) -> None:
    path, now = tmp_path / "tokens.toml", [1000.0]
    first = new_token(path, "camera-1", calls=2, bytes_per_minute=1000, model_seconds_per_minute=1.5)
    second = new_token(path, "lens", ("ask:image",), expires=datetime.fromtimestamp(2000, UTC))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first not in path.read_text()
    tokens = Tokens(path, lambda: now[0])
    caller = tokens.caller(f"Bearer {first}")
    assert (caller.name, caller.calls, caller.bytes_per_minute, caller.model_seconds_per_minute) == (
        "camera-1", 2, 1000, 1.5,
    )  # fmt: skip
    assert caller.may("describe")
    assert caller.may("ask:kv")
    assert not caller.may("share")
    lens = tokens.caller(f"bearer {second}")
    assert lens.may("ask:image")
    assert not any(map(lens.may, ("ask:kv", "describe")))
    for wrong in ("", first, "Basic " + first, f"Bearer {first}x", "Bearer " + hash_of(first), "Bearer \udc80"):
        with pytest.raises(AccessError):
            tokens.caller(wrong)
    now[0] = 2000.0
    with pytest.raises(AccessError, match="expired"):
        tokens.caller(f"Bearer {second}")
    assert first not in repr((tokens.caller(f"Bearer {first}"), Credentials(token=first)))


def test_the_entry_in_the_guide_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    (block,) = [x.split("```")[0] for x in page.split("```toml\n") if x.startswith("[[token]]")]
    (tmp_path / "tokens.toml").write_text(block)
    caller = Tokens(tmp_path / "tokens.toml", lambda: 0.0).caller("Bearer kvf_example")
    assert (caller.name, caller.scopes, caller.calls) == ("camera-1", ("ask:image", "describe"), 4)
    assert (caller.bytes_per_minute, caller.model_seconds_per_minute) == (50_000_000, 20.0)
    with pytest.raises(AccessError, match="expired"):
        Tokens(tmp_path / "tokens.toml", lambda: 1.9e9).caller("Bearer kvf_example")


def test_a_tokens_file_that_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens.toml"
    token = new_token(path, "a")
    good = path.read_text()
    tokens = Tokens(path)
    for text, why in (
        ("", "no tokens"),
        ("[[token]]\nname =", "no tokens file"),
        ("users = 3", "no tokens file"),
        (good + good, "two tokens a"),
        (good.replace("sha256", "token"), "a sha256"),
        (good + 'calls = "many"', "calls"),
        (good + "bytes_per_minute = -1", "bytes_per_minute"),
        (good.replace("ask", "dance"), "no scope"),
        (good.replace(hash_of(token), "12"), "64 hexadecimal"),
        (good + "expires = 2027-01-01", "zone"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=why):
            Tokens(path)
    tokens.reload()
    assert "stay as they were" in caplog.text
    assert tokens.caller(f"Bearer {token}").name == "a"
    with pytest.raises(InputError, match="token"):
        Tokens(tmp_path / "absent")


def test_the_command(tmp_path: Path) -> None:
    def keys(*words: str) -> str:
        done = CliRunner().invoke(app, ["keys", *words], catch_exceptions=True)
        return done.output if done.exception is None else f"{done.exception}"

    folder = str(tmp_path / "keys")
    assert "ca.key" in keys("ca", folder)
    assert "server.pem" in keys("server", folder, "--host", "cloud.example")
    assert json.loads(keys("edge", folder, "--name", "a", "--json"))["certificate"].endswith("a.pem")
    out = tmp_path / "a.token"
    assert "a.token" in keys("token", str(tmp_path / "tokens.toml"), "--name", "a", "--out", str(out), "--days", "9")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert Tokens(tmp_path / "tokens.toml").caller(f"Bearer {out.read_text()}").name == "a"
    assert keys("token", str(tmp_path / "tokens.toml"), "--name", "b").startswith("kvf_")
    for words, why in (
        (("kings", folder), "no keys of kind"),
        (("edge", folder), "--name"),
        (("ca", folder, "--name", "x"), "others none"),
        (("ca", folder, "--host", "x"), "--host is for a server"),
        (("token", str(tmp_path / "tokens.toml"), "--name", "c", "--out", str(out)), "left as it is"),
        (("token", str(tmp_path / "tokens.toml"), "--name", "a"), "a token a already"),
    ):
        assert why in keys(*words)


def test_where_plaintext_goes() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.9.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "cloud.example", "localhost.example")))
    for address in ("127.0.0.1:7421", "localhost:1", "[::1]:1"):
        Credentials(token="t").check_for(address)
        check_listen(address, None, False)
    with pytest.raises(InputError, match="--ca FILE"):
        Credentials().check_for("10.0.0.1:7421")
    Credentials(insecure=True).check_for("10.0.0.1:7421")
    with pytest.raises(InputError, match="not sent to 10"):
        Credentials(token="t", insecure=True).check_for("10.0.0.1:7421")
    Credentials(token="t", ca="system").check_for("10.0.0.1:7421")
    for listen in ("0.0.0.0:7421", "[::]:7421", "cloud.example:7421"):
        with pytest.raises(InputError, match="--cert and --key"):
            check_listen(listen, None, False)
        check_listen(listen, None, True)
        check_listen(listen, ServerKeys("a", "b"), False)


def test_credentials_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("kvf_x\n")
    found = Credentials.found(environment={"KVFERRY_CA": "c", "KVFERRY_TOKEN_FILE": str(tmp_path / "token")})
    assert (found.ca, found.token, found.insecure) == ("c", "kvf_x", False)
    both = {"KVFERRY_TOKEN": "kvf_y", "KVFERRY_TOKEN_FILE": "absent", "KVFERRY_INSECURE": "1"}
    assert Credentials.found(environment=both) == Credentials(token="kvf_y", insecure=True)
    assert Credentials.found(token_file=tmp_path / "token", environment=both).token == "kvf_x"
    for wrong in ({"KVFERRY_CERT": "c"}, {"KVFERRY_TOKEN": "a b"}, {"KVFERRY_TOKEN_FILE": "absent"}):
        with pytest.raises(InputError):
            Credentials.found(environment=wrong)
