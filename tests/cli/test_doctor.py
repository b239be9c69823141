"""``kvferry doctor`` finds what is right and what is wrong on this machine."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvferry import __version__
from kvferry.cli import doctor as module
from kvferry.cli.app import app
from kvferry.security.keys import make_ca, make_server
from tests.crossing.process import CloudProcess


def examined(*words: str) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """Exit code, and what was found by check."""
    done = CliRunner().invoke(app, ["doctor", "--json", *words])
    told: dict[str, Any] = json.loads(done.stdout)
    found: dict[str, list[tuple[str, str]]] = {}
    for each in told["findings"]:
        found.setdefault(each["check"], []).append((each["status"], each["detail"]))
    assert (told["status"] == "fail") == (done.exit_code != 0)
    return done.exit_code, found


def test_a_healthy_machine(cloud: CloudProcess, tmp_path: Path) -> None:
    make_ca(tmp_path)
    make_server(tmp_path)
    words = ("--cloud", cloud.address, "--model", "testbed/edge", "--certificate", str(tmp_path / "server.pem"))
    code, found = examined(*words)
    assert code == 0, found
    assert {"python", "torch", "grpcio", "extras", "threads", "devices", "disk", "clock"} <= set(found)
    assert str(cloud.ready["fingerprint"])[:12] in found["cloud"][0][1]
    assert found["cloud version"] == [("ok", __version__)]
    assert found["cloud clock"][0][0] == "ok"
    assert "testbed/edge: /" in found["model"][0][1]
    assert found["certificate"][0][0] == "ok"
    assert "days" in found["certificate"][0][1]


def test_what_is_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no.pem").write_text("nothing")
    monkeypatch.setenv("KVFERRY_PROFILES", str(tmp_path / "profiles"))
    words = ("--cloud", "127.0.0.1:1", "--model", "testbed/none", "--certificate", str(tmp_path / "no.pem"))
    code, found = examined(*words, "--disk", str(tmp_path / "gone"))
    assert code == module.FAILED
    for check in ("cloud", "model", "certificate", "disk", "profiles"):
        assert [status for status, _ in found[check]] == ["fail"], check
    assert "see that `kvferry serve` runs there" in found["cloud"][0][1]


@pytest.mark.parametrize(("begins", "ends", "status"), [(-400, -2, "fail"), (2, 300, "fail"), (-300, 12, "warn")])
def test_certificates_that_have_ended_or_will(begins: int, ends: int, status: str, tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now, key = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloud")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now + timedelta(days=begins)).not_valid_after(now + timedelta(days=ends))
    path = tmp_path / "cloud.pem"
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    (finding,) = module.dates(path)
    assert finding.status == status, finding


def test_a_full_disk_a_wrong_clock_and_too_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_FREE", 1 << 62)
    assert [x.status for x in module.space([tmp_path])] == ["warn"]
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert [x.status for x in module.clock()] == ["fail"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set())
    assert "set OMP_NUM_THREADS=0" in next(iter(module.compute())).detail


def test_people_read_lines() -> None:
    done = CliRunner().invoke(app, ["doctor", "--model", "testbed/none"])
    assert done.exit_code == module.FAILED
    assert any(line.startswith("fail  model") for line in done.stdout.splitlines())
