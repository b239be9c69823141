"""A mistake on the command line is answered before PyTorch is imported, in one sentence or one JSON object."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import kvferry
from tests.bitstream import golden

WITHOUT = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "matplotlib", "numba"):
            raise SystemExit(f"{name} was imported")

sys.meta_path.insert(0, Forbidden())
from kvferry.cli import main
while True:
    line = sys.stdin.readline()
    if not line:
        break
    sys.argv = ["kvferry", *__import__("json").loads(line)]
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    print(f"\\x00{code}", file=sys.stderr, flush=True)
"""
"""Commands one after the other, in a process that cannot import PyTorch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    Image.new("RGB", (8, 8)).save(folder / "scene.png")
    Image.new("RGB", (1000, 2)).save(folder / "narrow.png")
    (folder / "words.txt").write_text("no picture")
    (folder / "empty").mkdir()
    talk = [{"role": "system", "content": "one word"}, {"role": "user", "content": "what colour?"}]
    (folder / "talk.json").write_text(json.dumps(talk))
    return folder


ASK = ["ask", "scene.png", "what colour?"]
MISTAKES: list[tuple[list[str], str]] = [
    (["ask", "scene.png"], "there is no question, only a picture (scene.png); write picture files, then"),
    (["ask", "elsewhere.jpg"], "there is no question"),
    (["ask", "scene.png", "scene.png"], "there is no question, only 2 files"),
    (["ask", "what colour?", "scene.png"], "the question comes last, but 'scene.png' is a file"),
    (["ask", "scene.png", " "], "the question is empty"),
    (["ask", "scene.png", "what", "colour?"], "there is no picture at what"),
    (["ask", "nowhere.png", "what colour?"], "there is no picture at nowhere.png"),
    (["ask", "words.txt", "what colour?"], "words.txt is not an image"),
    (["ask", "empty", "what colour?"], "it is a folder"),
    (["ask", "narrow.png", "what colour?"], "too narrow"),
    ([*ASK, "--follow", "@nowhere.png and now?"], "there is no picture at nowhere.png"),
    ([*ASK, "--follow", "scene.png"], "a further turn asks nothing"),
    ([*ASK, "--mode", "pigeon"], "there is no mode 'pigeon'"),
    ([*ASK, "--mode", "image:400"], "a JPEG quality is 1 to 95"),
    ([*ASK, "--mode", "kv:snapk@0.2"], "did you mean 'snapkv'?"),
    ([*ASK, "--mode", "image", "--no-pixels"], "is not allowed here"),
    ([*ASK, "--mode", "auto"], "--points"),
    ([*ASK, "--mode", "image", "--ship-first"], "only a cache ships before its question"),
    ([*ASK, "--recipe", "snapkv@2|int4"], "must lie in (0, 1]"),
    ([*ASK, "--recipe", "snapkv@0.2|int4,bits=3"], "no option 'bits'"),
    ([*ASK, "--cloud", "nohost"], "is not an address"),
    ([*ASK, "--cloud", "127.0.0.1:1"], "cannot be reached"),
    ([*ASK, "--coordinator", "x"], "is not an address"),
    ([*ASK, "--uplink", "fast"], "is not a rate"),
    ([*ASK, "--policy", "lazy"], "lazy"),
    ([*ASK, "--deadline", "-1"], "a deadline is"),
    ([*ASK, "--answer-by", "60"], "answer_by is"),
    ([*ASK, "--model", "nowhere/at/all"], "there is no model at nowhere/at/all"),
    ([*ASK, "--model", "empty"], "is not a model folder"),
    ([*ASK, "--device", "gpu"], "there is no device 'gpu'"),
    ([*ASK, "--dtype", "int3"], "is not a dtype"),
    ([*ASK, "--import", "nowhere.py"], "there is no file"),
    ([*ASK, "--save", "empty"], "it is a folder"),
    ([*ASK, "--save", "nowhere/a.kvf"], "there is no folder nowhere"),
    (["sweep", "--out", "empty"], "it is a folder"),
    (["tune", "testbed/cloud", "--out", "words.txt/a.json"], "no folder that can be written in"),
    ([*ASK, "--messages", "words.txt"], "leave words and --follow out"),
    (["ask", "--messages", "words.txt"], "is not JSON"),
    (["ask", "--messages", "talk.json", "--mode", "image"], "mode image sends pictures and one question"),
    (["edge", "nowhere.png"], "there is no picture at nowhere.png"),
    (["edge", "--watch", "nowhere", "--question", "what?"], "there is no folder nowhere"),
    (["edge", "--watch", "empty"], "needs a --question"),
    (["edge", "--watch", "empty", "--video", "a.mp4", "--question", "what?"], "two sources"),
    (["edge", "--video", "a.mp4", "--question", "what?"], "there is no video a.mp4"),
    (["edge", "--question", "what?"], "questions come from stdin"),
    (["edge", "--mode", "pigeon"], "there is no mode 'pigeon'"),
    (["edge", "--cloud", "127.0.0.1:1"], "cannot be reached"),
    (["serve", "--listen", "7421"], "is not an address"),
    (["serve", "--model", "testbed/none"], "there is no model at testbed/none"),
    (["sweep", "--recipe", "snapkv"], "needs the fraction"),
    (["sweep", "--fractions", "a"], "is not a comma-separated list"),
    (["sweep", "--selections", "nobody"], "there is no selection 'nobody'"),
    (["eval", "testbed/cloud", "--task", "nothing"], "there is no task 'nothing'"),
    (["eval", "nowhere/at/all", "--task", "testbed"], "there is no model"),
    (["tune", "testbed/cloud", "--protocol", "C"], "--protocol is A or B"),
    (["tune", "testbed/cloud", "--recipe", "full|int9"], "there is no codec 'int9'"),
    (["calibrate", "testbed/cloud", "--recipe", "tiny@none.json"], "no presets in none.json"),
    (["fit", "transform", "testbed/cloud", "--recipe", "tiny@none.json"], "no presets in none.json"),
    (["fit", "kvtc", "nowhere/at/all"], "there is no model"),
    (["fit", "kvtc", "testbed/cloud", "--out", "empty"], "it is a folder"),
    (["profile", "--mode", "pigeon"], "there is no mode 'pigeon'"),
    (["profile", "--edge", "nowhere/at/all"], "there is no model"),
    (["analyze", "empty"], "is not a model folder"),
    (["inspect", "nowhere"], "cannot read nowhere"),
    (["inspect", "words.txt"], ""),
    (["link", "nohost"], "is not an address"),
]


def test_mistakes_are_answered_without_pytorch(folder: Path) -> None:
    given = "".join(json.dumps(words) + "\n" for words, _ in MISTAKES)
    given += "".join(json.dumps([*words, "--json"]) + "\n" for words, _ in MISTAKES)
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=folder, input=given, capture_output=True, text=True, timeout=120
    )
    *said, rest = ran.stderr.split("\x00")
    codes = [each.partition("\n")[0] for each in [*said[1:], rest]]
    errors = [said[0], *(each.partition("\n")[2] for each in said[1:])]
    assert codes == ["2"] * (2 * len(MISTAKES)), ran.stderr
    objects = [json.loads(line)["error"] for line in ran.stdout.splitlines()]
    assert len(objects) == len(MISTAKES)
    for (words, expected), error, found in zip(MISTAKES, errors[: len(MISTAKES)], objects, strict=True):
        assert error.startswith("kvferry: "), words
        assert expected in error, words
        assert error.count("\n") == 1, words
        assert expected in found["message"], words
        assert issubclass(getattr(kvferry, found["type"]), kvferry.KVFerryError), words
    assert not any(errors[len(MISTAKES) :])


RESULTS = Path(__file__).parents[2] / "study" / "results"
READ_ONLY: list[list[str]] = [
    *[[name, "--help"] for name in sorted({words[0] for words, _ in MISTAKES} - {"pigeon"})],
    *[["inspect", str(golden.DATA / f"{name}.kvf"), *also] for name in golden.STREAMS for also in ([], ["--json"])],
    ["export", str(RESULTS / "eval-cloud.jsonl"), "answers.csv"],
    ["compare", str(RESULTS / "eval-cloud.jsonl"), str(RESULTS / "eval-cloud.jsonl")],
    ["keys", "token", "tokens", "--name", "a"],
]
"""Commands that look at no model and at no cache's numbers."""


def test_what_looks_at_no_model_needs_no_pytorch(folder: Path) -> None:
    given = "".join(json.dumps(words) + "\n" for words in READ_ONLY)
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=folder, input=given, capture_output=True, text=True, timeout=120
    )
    codes = [each.partition("\n")[0] for each in ran.stderr.split("\x00")[1:]]
    assert dict(zip(map(" ".join, READ_ONLY), codes, strict=True)) == dict.fromkeys(map(" ".join, READ_ONLY), "0")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kvferry.cli", *words]


def test_one_answers_soon(folder: Path) -> None:
    before = os.times()
    ran = subprocess.run(command(*ASK, "--mode", "pigeon"), cwd=folder, capture_output=True, text=True)
    after = os.times()
    assert (ran.returncode, ran.stdout) == (2, "")
    worked = after.children_user - before.children_user + after.children_system - before.children_system
    assert worked < 2, f"{worked:.2f} s of a processor"  # with PyTorch it is 4 and more


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ask", "--json"], "there is nothing to ask"),
        (["inspect", "--json"], "Missing argument"),
        (["--json"], "No such option: --json"),
        (["pigeon", "--json"], "No such command 'pigeon'"),
        (["fit", "pigeon", "--json"], "No such command 'pigeon'"),
        (["fit", "kvtc", "--structure", "tree", "--json"], "No such option: --structure"),
        (["sweep", "--n", "x", "--json"], "Invalid value for '--n'"),
        (["sweep", "--pigeon", "--json"], "No such option: --pigeon"),
        (["simulate", "--agents", "0", "--json"], "Invalid value for '--agents'"),
    ],
)
def test_usage_errors_are_json_too(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvferry.cli import main

    monkeypatch.setattr(sys, "argv", ["kvferry", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert err == ""
    error = json.loads(out)["error"]
    assert error["type"] == "InputError"
    assert expected in error["message"]


def test_nobody_reads(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(command("--help"), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux'")
def test_no_room_for_the_output() -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command("--version"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("kvferry: the output (stdout): No space left on device")
    assert ran.stderr.count("\n") == 1


def attend() -> None:
    """A process that was started in the background ignores Ctrl-C, and so would those that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupted() -> None:
    words = command("link", "127.0.0.1:1", "--uplink", "1mbit", "--json")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=attend)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert b"Traceback" not in err, err
    assert process.returncode in (0, 130), err
