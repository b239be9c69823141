"""A disk that is full: one sentence and an exit code, and what was there before is still there, whole."""

from __future__ import annotations

import json
import re
import resource
import subprocess
from pathlib import Path

import pytest

import kvferry
from kvferry.evaluate.records import drop_half_line
from tests.crossing.process import COMMAND, ENVIRONMENT

SOURCE = Path(kvferry.__file__).parent
WRITES = re.compile(r"\.write_(text|bytes)\(|open\([^)]*[\"'][wx]b?[\"']|\.savefig\((path|out)\b")
BESIDE = {
    "testbed": "training of the shipped models, in folders of its own",
    "wire/generate.py": "code from a schema, in a checkout",
    "files.py": "where it is done",
    "cli/ending.py": "the null device",
    "models/check/families.py": "the null device",
    "models/grown.py": "a model's folder, made under another name and renamed when it is whole",
}
"""Where a file is written in some other way, and why."""


def test_every_file_is_written_whole() -> None:
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if WRITES.search(path.read_text("utf-8"))
    }
    assert not {name for name in found if not any(name.startswith(beside) for beside in BESIDE)}


def small_files() -> None:
    """The kernel refuses to make a file larger than that, as it would on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def test_what_was_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "trace.up"
    out.write_text("1\n")
    command = [*COMMAND, "trace", "walk", "--low", "0.1", "--high", "9", "--seconds", "600", "--out", str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, preexec_fn=small_files, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.read_text() == "1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["trace.up"]
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == 0
    assert len(out.read_text()) > 2000


@pytest.mark.parametrize("json_", [True, False])
def test_nothing_more_fits_on_stdout(json_: bool) -> None:
    """A command that listens does not go on when nobody can learn where."""
    command = [*COMMAND, "coordinate", "--uplink", "1mbit", "--listen", "127.0.0.1:0", *["--json"] * json_]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert "the output (stdout): No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_serving_to_a_full_disk(model_folder: Path) -> None:
    command = [*COMMAND, "serve", "--model", str(model_folder), "--listen", "127.0.0.1:0", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_half_a_line_is_cut_off_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n" + '{"b": ')
    before = path.stat().st_ino
    drop_half_line(path)
    assert (path.read_text(), path.stat().st_ino) == ('{"a": 1}\n', before)
