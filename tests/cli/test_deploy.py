"""What deploy/ holds fits this version: its configuration, its command lines, its unit and its image's description."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from kvferry.cli.app import app
from tests.docs.blocks import ROOT

DEPLOY = ROOT / "deploy"
HARDENED = 25
"""Tenths of systemd's exposure level (0 to 100); 20 is what the unit has with the user it names."""
COMMANDS: Any = typer.main.get_command(app)


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of a `kvferry serve` line whose configuration is that of deploy/."""
    command, *options = [
        str(DEPLOY / "kvferry.toml") if word == "/etc/kvferry/kvferry.toml" else word for word in words
    ]
    made: dict[str, Any] = COMMANDS.get_command(None, command).make_context(command, options).params
    return made


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "kvferry.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_the_configuration_is_one_that_serve_reads() -> None:
    options = parsed(["serve", "--config", "/etc/kvferry/kvferry.toml"])
    assert (options["listen"], options["log_format"], options["max_seconds"]) == ("0.0.0.0:7421", "json", 60.0)
    assert all(str(options[name]).startswith("/etc/kvferry/") for name in ("cert", "key", "tokens"))
    assert not options["insecure"]
    assert options["metrics"].startswith("127.0.0.1:")


def test_the_unit_is_sound(tmp_path: Path) -> None:
    """As systemd sees it; programs and users that are not here are replaced by some that are."""
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("no systemd-analyze on this machine")
    text = (DEPLOY / "kvferry.service").read_text()
    path = tmp_path / "kvferry.service"
    path.write_text(text.replace("/opt/kvferry/bin/kvferry", "/bin/true").replace("=kvferry\n", "=daemon\n"))
    done = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    level = [analyze, "security", "--offline=true", f"--threshold={HARDENED}", str(path)]
    done = subprocess.run(level, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:]


def test_the_unit_runs_what_there_is() -> None:
    keys = unit()
    program, *words = shlex.split(keys["ExecStart"][0])
    assert program == "/opt/kvferry/bin/kvferry"
    assert parsed(words)["listen"] == "0.0.0.0:7421"
    assert "MemoryDenyWriteExecute" not in keys
    assert keys["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_the_image_is_made_of_what_is_here() -> None:
    lines = dockerfile()
    kinds = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in lines} == kinds
    assert {value.split()[0] for name, value in lines if name == "FROM"} == {"python:3.11-slim"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sources = [value.split()[:-1] for name, value in lines if name == "COPY" and not value.startswith("--from")]
    for source in (each for copied in sources for each in copied):
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in ignored, source
    values = dict(lines)
    assert values["USER"] == "kvferry"
    assert [name for name, _ in lines].index("USER") > [name for name, _ in lines].index("RUN")
    assert yaml.safe_load(values["ENTRYPOINT"]) == ["kvferry"]
    assert parsed(yaml.safe_load(values["CMD"]))["listen"].endswith(values["EXPOSE"])
    code = yaml.safe_load(values["HEALTHCHECK"].partition("CMD ")[2])[2]
    assert f"http://{parsed(yaml.safe_load(values['CMD']))['metrics']}/metrics" in code
    compile(code, "HEALTHCHECK", "exec")
    extras = re.findall(r'"\.\[([\w,-]+)\]"', values["RUN"] + "".join(v for n, v in lines if n == "RUN"))
    assert "metrics" in extras[0].split(",")


def test_the_composition() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    cloud = services["cloud"]
    assert (ROOT / cloud["build"]["dockerfile"]).exists()
    options = parsed(cloud["command"])
    assert cloud["ports"] == [f"7421:{options['listen'].rpartition(':')[2]}"]
    assert not any("9464" in port for port in cloud["ports"])
    mounted = {volume.split(":")[1] for volume in cloud["volumes"]}
    assert mounted == {str(options[name]) for name in ("cert", "key", "tokens")}
    assert cloud["read_only"]
    assert cloud["cap_drop"] == ["ALL"]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"]
    assert scraped == [{"targets": [f"cloud:{options['metrics'].rpartition(':')[2]}"]}]
    for service in services.values():
        for volume in service.get("volumes", []):
            where = DEPLOY / volume.split(":")[0]
            assert where.exists() or where.parent.name == "keys", volume
