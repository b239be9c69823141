"""The command line as scripts see it: streams, exit codes, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils.logging import disable_progress_bar

import kvferry
from kvferry import VLM
from kvferry.bitstream import inspect
from kvferry.cli import main
from tests.crossing.process import COMMAND, ENVIRONMENT, CloudProcess

QUESTION = "what colour is the circle?"


class Ran:
    """What a command printed and how it ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["kvferry", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ran:
    disable_progress_bar()  # a process of its own is told by its environment, before it imports transformers
    return Ran(capsys, monkeypatch)


def refused(result: tuple[int, str, str]) -> str:
    """The one sentence of a user's error."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("kvferry: ")
    assert err.count("\n") == 1
    return err


def test_ask(run: Ran, cloud: CloudProcess, vlm: VLM, model_folder: Path, picture: Path, tmp_path: Path) -> None:
    saved = tmp_path / "scene.kvf"
    options = ["--cloud", cloud.address, "--model", model_folder, "--recipe", "q2c@0.25|int4", "--uplink", "10mbit"]
    options += ["--tiers", 2]
    code, out, err = run("ask", picture, QUESTION, *options, "--save", saved)
    assert code == 0, err
    here = vlm.answer(kvferry.decompress(saved.read_bytes()))
    assert inspect(saved.read_bytes()).tiers == 2
    assert out == here + "\n"
    assert "q2c@0.25|int4" in err
    assert "on the wire" in err

    code, out, err = run("ask", picture, QUESTION, *options, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["text"] == here
    assert answer["bitstream_bytes"] == saved.stat().st_size < answer["wire_bytes_up"] < answer["bf16_bytes"]
    assert set(answer["seconds"]) == {"prefill", "encode", "send", "first_token", "total"}
    code, out, _ = run("inspect", saved, "--json")
    assert code == 0
    assert "q2c@0.25|int4" in json.dumps(json.loads(out))
    assert json.loads(out)["kept"] | {"scored": None} == answer["kept"] | {"scored": None}
    code, _, err = run("ask", picture, QUESTION, *options, "--recipe", "q2c@0.01|int4")
    assert (code, "note: in 2 of 2 layers the scorer chose no token" in err) == (0, True)
    assert set(answer["cloud"]) == {"decode", "queue", "prefill", "first_token", "total"}


def test_ask_two_processes(cloud: CloudProcess, picture: Path) -> None:
    """Also without a terminal nothing but the answer is on stdout."""
    command = [*COMMAND, "ask", str(picture), str(picture), QUESTION, "--cloud", cloud.address, "--mode", "image"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout.count("\n") == 1
    assert done.stderr.count("\n") == 1


def test_modes(run: Ran, cloud: CloudProcess, model_folder: Path, picture: Path) -> None:
    here = ["--cloud", cloud.address, "--model", model_folder, "--json"]
    answers = {}
    for mode in ("image", "image:50", "embeds:bf16", "scout:vlcache@0.5", "local"):
        code, out, err = run("ask", picture, QUESTION, *here, "--mode", mode)
        assert code == 0, err
        answers[mode] = json.loads(out)
        assert mode == ":".join(filter(None, [answers[mode]["mode"], answers[mode]["recipe"]]))
    assert answers["image"]["text"] == answers["embeds:bf16"]["text"] == answers["local"]["text"]
    assert answers["image:50"]["bitstream_bytes"] < answers["image"]["bitstream_bytes"]
    assert answers["local"]["payload_bytes_up"] == 0

    away = ["--cloud", "127.0.0.1:9", "--model", model_folder]
    code, out, err = run("ask", picture, QUESTION, *away, "--mode", "image", "--fallback")
    assert (code, out) == (0, answers["local"]["text"] + "\n")
    assert "answered here because" in err
    code, out, err = run("ask", QUESTION, *here[:-1], "--mode", "prompt")
    assert (code, bool(out.strip())) == (0, True)
    assert "prompt: 0 bytes" in err


def test_devices(run: Ran, cloud: CloudProcess, model_folder: Path, picture: Path, tmp_path: Path) -> None:
    here = ["--cloud", cloud.address, "--model", model_folder, "--device"]
    assert run("ask", picture, QUESTION, *here, "cpu")[0] == 0
    for words in (
        ["ask", picture, QUESTION, *here, "nowhere"],
        ["serve", "--model", model_folder, "--device", "nowhere"],
        ["profile", "--edge", model_folder, "--cloud", model_folder, "--device", "nowhere"],
    ):
        assert "no device 'nowhere'" in refused(run(*words))


def test_ship_first(run: Ran, cloud: CloudProcess, model_folder: Path, picture: Path) -> None:
    options = [
        "--cloud",
        cloud.address,
        "--model",
        model_folder,
        "--recipe",
        "knorm@0.5|int8",
        "--ship-first",
        "--json",
    ]
    code, out, _ = run("ask", picture, QUESTION, *options)
    assert code == 0
    assert json.loads(out)["recipe"] == "knorm@0.5|int8"


def test_follow(run: Ran, cloud: CloudProcess, vlm: VLM, model_folder: Path, picture: Path, tmp_path: Path) -> None:
    options = ["--cloud", cloud.address, "--model", model_folder, "--mode", "kv:knorm@0.5|int8", "--follow", "and now?"]
    first = kvferry.decompress(kvferry.compress(vlm.prefill([picture], QUESTION, recipe="knorm@0.5"), "knorm@0.5|int8"))
    said = vlm.resume(first, keep=True)
    assert said.cache is not None
    expected = [said.text, vlm.answer(said.cache, "and now?")]
    code, out, err = run("ask", picture, QUESTION, *options)
    assert (code, out.splitlines()) == (0, expected)
    assert len(err.splitlines()) == 2
    code, out, _ = run("ask", picture, QUESTION, *options, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [x["text"] for x in answers] == expected
    assert answers[1]["bitstream_bytes"] == 0 < answers[0]["bitstream_bytes"]
    assert "--save" in refused(run("ask", picture, QUESTION, *options, "--save", tmp_path / "x"))
    code, out, _ = run("ask", picture, QUESTION, *options, "--follow", f"@{picture} and here?", "--tiers", 4, "--json")
    assert code == 0
    sent = [json.loads(line)["bitstream_bytes"] for line in out.splitlines()]
    assert sent[1] == 0 < sent[0] < sent[2]
    assert "nowhere.png" in refused(run("ask", picture, QUESTION, *options, "--follow", "@nowhere.png and here?"))
    away = ["--cloud", "127.0.0.1:9", "--model", model_folder, "--follow", "and now?", "--fallback", "--json"]
    code, out, _ = run("ask", picture, QUESTION, *away)
    assert (code, [json.loads(line)["mode"] for line in out.splitlines()]) == (0, ["local", "local"])


def test_user_errors(
    run: Ran, cloud: CloudProcess, model_folder: Path, other_folder: Path, picture: Path, tmp_path: Path
) -> None:
    here = ["--cloud", cloud.address, "--model", model_folder]
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:300])
    assert "host:port" in refused(run("ask", picture, QUESTION, "--cloud", "nowhere", "--model", model_folder))
    assert "kvferry serve" in refused(run("ask", picture, QUESTION, "--cloud", "127.0.0.1:9", "--model", model_folder))
    assert "same model" in refused(run("ask", picture, QUESTION, "--cloud", cloud.address, "--model", other_folder))
    assert "absent.png" in refused(run("ask", "absent.png", QUESTION, *here))
    assert "cannot be decoded" in refused(run("ask", broken, QUESTION, *here))
    assert "empty" in refused(run("ask", picture, "", *here))
    assert "q2c" in refused(run("ask", picture, QUESTION, *here, "--recipe", "q3c@0.5|int8"))
    assert "(0, 1]" in refused(run("ask", picture, QUESTION, *here, "--recipe", "q2c@1.5|int8"))
    assert "mode" in refused(run("ask", picture, QUESTION, *here, "--mode", "telepathy"))
    assert "rate" in refused(run("ask", picture, QUESTION, *here, "--uplink", "quick"))
    assert "deadline" in refused(run("ask", picture, QUESTION, *here, "--deadline", "0"))
    assert "config.json" in refused(run("ask", picture, QUESTION, "--model", tmp_path))
    assert "cannot write" in refused(run("ask", picture, QUESTION, *here, "--save", tmp_path / "no" / "where.kvf"))
    assert "listen" in refused(run("serve", "--model", model_folder, "--listen", cloud.address))
    assert "host:port" in refused(run("serve", "--model", model_folder, "--listen", "7421"))
    assert "config.json" in refused(run("serve", "--model", tmp_path))


def test_usage_errors(run: Ran) -> None:
    for arguments in (["ask"], ["fly"], ["serve", "--port", "1"], ["ask", "a", "b", "--max-new-tokens", "0"]):
        code, _, err = run(*arguments)
        assert code == 2
        assert "Traceback" not in err


def test_help_is_light() -> None:
    script = (
        "import sys; sys.argv = ['kvferry', '--help']\n"
        "from kvferry.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'grpc', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("serve", "ask", "inspect", "demo", "analyze", "sweep", "report"):
        assert command in done.stdout


def test_version(run: Ran) -> None:
    assert run("--version") == (0, kvferry.__version__ + "\n", "")


def test_public_names() -> None:
    for name in kvferry.__all__:
        assert getattr(kvferry, name) is not None
    assert set(kvferry.__all__) == set(dir(kvferry))
    with pytest.raises(AttributeError, match="nothing"):
        _ = kvferry.nothing  # type: ignore[attr-defined]


def test_a_sweep_has_its_ceiling(run: Ran, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--recipe", "knorm@0.5|int4", "--split", "validation", "--protocols", "A", "--n", 1, "--processes", 1]
    code, said, err = run("sweep", "--model", "testbed/edge", "--check", "forced", *options, "--out", out, "--json")
    assert code == 0, err
    assert [row["recipe"] for row in json.loads(said)["A"]] == ["full|bf16", "knorm@0.5|int4"]
