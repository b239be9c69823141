"""``kvferry edge``: questions line by line, with a real cloud."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.crossing.process import COMMAND, ENVIRONMENT, CloudProcess

QUESTION = "what colour is the circle?"


def start(cloud: CloudProcess, *words: object, quiet: bool = True) -> subprocess.Popen[str]:
    words = (*words, "--cloud", cloud.address, "--max-new-tokens", 4, *(["--json"] if quiet else []))
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*COMMAND, "edge", *map(str, words)], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT
    )


def ask(process: subprocess.Popen[str], line: str) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def test_lines(cloud: CloudProcess, model_folder: Path, picture: Path) -> None:
    began = time.perf_counter()
    process = start(cloud, picture, "--model", model_folder, "--recipe", "q2c@0.5|int8")
    first = ask(process, QUESTION)
    after_first = time.perf_counter()
    second = ask(process, f"{picture}\t{QUESTION}")
    after_second = time.perf_counter()
    assert first["text"] == second["text"]
    assert first["images"] == second["images"] == [str(picture)]
    assert first["bitstream_bytes"] == second["bitstream_bytes"] > 0
    assert set(second["seconds"]) == {"prefill", "encode", "send", "first_token", "total"}
    assert after_second - after_first < (after_first - began) / 2  # nothing is loaded again
    wrong = ask(process, f"{picture.parent}/nowhere.png\t{QUESTION}")
    assert wrong["error"]["type"] == "InputError"
    talk = [{"role": "system", "content": "one word"}, {"role": "user", "content": QUESTION}]
    assert ask(process, json.dumps({"messages": talk}))["mode"] == "kv"
    assert ask(process, json.dumps({"question": QUESTION}))["text"] == first["text"]
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_watched_folder(cloud: CloudProcess, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(picture.read_bytes())
    words = ("--watch", tmp_path, "--question", QUESTION, "--mode", "image", "--count", 2)
    process = start(cloud, *words, quiet=False)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stderr.readline().startswith("ready after ")
    time.sleep(0.5)
    for name in ("a.png", "b.png"):
        shutil.copy(picture, tmp_path / name)
        found = json.loads(process.stdout.readline())
        assert found["images"] == [str(tmp_path / name)]
        assert (found["mode"], bool(found["text"])) == ("image", True)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_cloud_that_goes_away_does_not_end_it(model_folder: Path, picture: Path) -> None:
    with CloudProcess(model_folder) as cloud:
        process = start(cloud, picture, "--mode", "image", "--deadline", 5)
        assert ask(process, QUESTION)["text"]
        cloud.stop()
        assert ask(process, QUESTION)["error"]["type"] in ("LinkError", "DeadlineError")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
