"""``link``, ``trace``, ``simulate`` and ``break-even`` as people and scripts run them."""

from __future__ import annotations

import json
import socket
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kvferry.cli.app import app
from kvferry.errors import InputError
from kvferry.link import parse_address, read_trace
from kvferry.link.trace import TRACES, mean_rate
from kvferry.policy import OperatingPoint, PointTable, write_points
from tests.cli.test_commands import Ran, refused, run
from tests.link.test_relay import count_then_tell, server

__all__ = ["run"]


def test_trace(run: Ran, tmp_path: Path) -> None:
    out = tmp_path / "x.up"
    words = ["trace", "gilbert-elliott", "--out", out, "--seconds", 30, "--high", 4, "--seed", 3]
    code, said, _ = run(*words)
    assert code == 0
    assert mean_rate(read_trace(out)) == pytest.approx(4e6 * float(said.split("at ")[1].split()[0]) / 4, rel=0.05)
    first = out.read_bytes()
    run(*words)
    assert out.read_bytes() == first
    assert run("trace", "walk", "--out", tmp_path / "y", "--low", 1, "--high", 3)[0] == 0
    assert run("trace", "shipped", "--out", tmp_path)[0] == 0
    assert (tmp_path / "walk.txt").read_bytes() == (TRACES / "walk.txt").read_bytes()
    assert "walk" in refused(run("trace", "earthquake", "--out", out))
    assert "0 < low" in refused(run("trace", "walk", "--out", out))
    assert "cannot write" in refused(run("trace", "walk", "--low", 1, "--out", tmp_path / "no" / "where"))


def test_link(run: Ran) -> None:
    """The command relays in this process's main thread while a client in another one talks through it."""
    said: list[str] = []

    def talk(address: str) -> None:
        with socket.create_connection(parse_address(address), timeout=10) as sock:
            sock.sendall(bytes(30_000))
            sock.shutdown(socket.SHUT_WR)
            said.append(sock.recv(100).decode())

    with server(count_then_tell) as target, pytest.MonkeyPatch.context() as patch:

        def announce(record: dict[str, object]) -> None:
            lines.append(record)
            if "address" in record:
                threading.Thread(target=talk, args=(record["address"],), daemon=True).start()

        lines: list[dict[str, object]] = []
        patch.setattr("kvferry.cli.link.print_json", announce)
        words = ["link", target, "--uplink", "trace:steady", "--seconds", "1.5", "--json"]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert said == ["30000"]
    assert lines[1] == {"uplink_bytes": 30_000, "downlink_bytes": 5}
    assert "steady" in refused(run("link", "127.0.0.1:9", "--uplink", "trace:absent", "--seconds", 0))


def simulate_json(run: Ran, *words: object) -> dict[str, dict[str, object]]:
    code, out, err = run("simulate", *words, "--json")
    assert (code, err) == (0, "")
    return {f"{row['way']} {row['allocation']}".strip(): row for row in json.loads(out)["rows"]}


def test_simulate(run: Ran, tmp_path: Path) -> None:
    png, html = tmp_path / "a" / "x.png", tmp_path / "x.html"
    words = ["--trace", "walk", "--trace", "20mbit", "--deadline", "3", "--requests", "400"]
    rows = simulate_json(run, *words, "--png", png, "--html", html)
    assert {"greedy", "risk-aware", "oracle", "static:kv:full|int4"} <= set(rows)
    for row in rows.values():
        assert row["on_time"]["low"] <= row["on_time"]["mean"] <= row["on_time"]["high"]
        assert row["of_oracle"]["mean"] <= 1 + 1e-9
        assert sum(row["modes"].values()) == pytest.approx(1)
    with Image.open(png) as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    parser, page = HTMLParser(), html.read_text()
    parser.feed(page)
    assert page.count("<tr>") == 1 + len(rows)
    assert "Theirs" in page
    assert "<script" not in page
    code, out, _ = run("simulate", *words, "--policy", "greedy:0.9@ewma:0.5")
    assert code == 0
    assert "greedy:0.9@ewma:0.5" in out
    assert "oracle" in out
    hopeless = simulate_json(run, "--trace", "300kbit", "--deadline", "1", "--requests", "200", "--policy", "greedy")
    assert hopeless["greedy"]["of_oracle"] is None


def test_simulate_agents(run: Ran, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.tsv").write_text("1\t500\n2\t500\n")
    words = [
        "--trace",
        tmp_path / "links",
        "--scale",
        "0.1",
        "--table",
        "qwen-3b",
        "--table",
        "qwen-14b",
        "--agents",
        4,
    ]
    rows = simulate_json(run, *words, "--deadline", "4", "--requests", 200, "--policy", "greedy")
    assert set(rows) == {"greedy equal", "greedy model_aware", "greedy quality", "oracle quality"}


def test_simulate_user_errors(run: Ran, tmp_path: Path) -> None:
    some = ["simulate", "--trace", "walk", "--requests", 10]
    assert "there are qwen-7b" in refused(run(*some, "--table", "gpt"))
    assert "policy" in refused(run(*some, "--policy", "brave"))
    assert "seconds" in refused(run(*some, "--deadline", "soon"))
    assert "deadline" in refused(run(*some, "--deadline", "0"))
    assert "allocation" in refused(run(*some, "--agents", 2, "--allocation", "fair"))
    assert "sync or poisson" in refused(run(*some, "--arrivals", "never"))
    assert "privacy" in refused(run(*some, "--privacy", "no-secrets"))
    assert "no traces" in refused(run("simulate", "--trace", tmp_path))
    assert "scaled" not in refused(run("simulate", "--trace", "absent.tsv"))
    (tmp_path / "bad.up").write_text("1\n0\n")
    assert "line 2" in refused(run("simulate", "--trace", tmp_path / "bad.up"))
    assert "scout-paper" in refused(run(*some, "--points", "absent"))
    with pytest.raises(InputError):
        read_trace(tmp_path / "bad.up")


def test_coordinate_user_errors(run: Ran) -> None:
    assert "10mbit" in refused(run("coordinate", "--uplink", "fast"))
    assert "steady" in refused(run("coordinate", "--uplink", "trace:absent"))
    assert "max_min" in refused(run("coordinate", "--uplink", "1mbit", "--method", "fair"))
    assert "lease" in refused(run("coordinate", "--uplink", "1mbit", "--lease", "0"))
    assert "host:port" in refused(run("coordinate", "--uplink", "1mbit", "--listen", "here"))


def test_break_even(run: Ran, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    points = tmp_path / "points.json"
    image = OperatingPoint("image", 0.9, 14_000, cloud_seconds=0.05, needs=("pixels",), prefill_seconds=0.04)
    table = PointTable("a to b", (image, OperatingPoint("kv:full|int4", 0.9, 60_000, 0.04, 0.01, 0.01, 0.01)))
    write_points((table,), points)
    words = ["break-even", "--out", out, "--model", "Qwen2-VL-2B", "--tokens", "1369,16384", "--points", points]
    code, said, _ = run(*words, "--json")
    assert code == 0
    maps = json.loads(said)["maps"]
    assert [(x.get("tokens"), x["edge_holds_cache"]) for x in maps] == [
        (1369, False), (16384, False), (None, False), (1369, True), (16384, True), (None, True)
    ]  # fmt: skip
    assert all(sum(x["areas"].values()) == pytest.approx(1) for x in maps)
    assert all(maps[i]["areas"]["image"] > maps[i + 3]["areas"]["image"] for i in range(3))
    with Image.open(out) as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    assert "Qwen2-VL-7B" in refused(run("break-even", "--out", out, "--model", "GPT"))
    for tokens, word in (("much", "numbers of tokens"), ("1,2,3,4,5", "at most 4"), ("0", "visual token")):
        assert word in refused(run("break-even", "--out", out, "--tokens", tokens))
    write_points((table, PointTable("c", table.points)), points)
    assert "holds 2 tables" in refused(run("break-even", "--out", out, "--points", points))
