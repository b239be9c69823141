"""Options from a TOML file, in real commands: what is typed wins over the file, the file over defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry import Edge
from kvferry.cli.app import app
from kvferry.cli.configured import VARIABLE
from tests.crossing.process import CloudProcess


def written(folder: Path, text: str) -> Path:
    path = folder / "kvferry.toml"
    path.write_text(text)
    return path


def refused(*words: str) -> str:
    return str(CliRunner().invoke(app, list(words)).exception)


def test_flags_win_over_the_file_and_the_file_over_defaults(model_folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path, '[serve]\nmodel = "nowhere/at-all"\nmax-bytes = 1234567\nmax_seconds = 33\n[ask]\n')
    with CloudProcess(model_folder, "--config", str(path), "--max-seconds", "44") as process:
        with Edge(None, process.address, deadline=30) as edge:
            told = edge.describe()
        assert process.stop() == 0
    assert (told["max_request_bytes"], told["max_request_seconds"]) == (1234567, 44.0)


def test_ask_reads_its_own_table(
    cloud: CloudProcess, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        f'[serve]\nverbose = true\n[ask]\ncloud = "{cloud.address}"\nmode = "image"\nmax-new-tokens = 3\njson = true\n'
    )
    monkeypatch.setenv(VARIABLE, str(written(tmp_path, text + 'follow = ["and where?"]\n')))
    done = CliRunner().invoke(app, ["ask", str(picture), "what is it?", "--mode", "image:60"])
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(x["mode"], x["recipe"], x["tokens"]) for x in answers] == [("image", "60", 3)] * 2


def test_a_model_typed_as_a_word_wins_too(model_folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path, '[serve]\nmodel = "testbed/cloud"\n')
    assert "no device 'nowhere'" in refused("serve", str(model_folder), "--config", str(path), "--device", "nowhere")
    assert "two models" in refused("serve", str(model_folder), "--model", "testbed/cloud", "--config", str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[serve]\nmax-secnds = 3", "[serve] has no option 'max-secnds'; did you mean 'max-seconds'?"),
        ("[serve]\nwords = []", "[serve] has no option 'words'"),
        ("[serve]\nconfig = 'x'", "[serve] has no option 'config'"),
        ("[server]\nmodel = 'x'", "not 'server'; did you mean 'serve'?"),
        ("model = 'x'", "tables [serve], [ask], not 'model'"),
        ("[serve]\nmax-waiting = 1.5", "[serve] max-waiting is a whole number, not 1.5"),
        ("[serve]\nmax-waiting = true", "max-waiting is a whole number, not True"),
        ("[serve]\nverbose = 'yes'", "verbose is true or false, not 'yes'"),
        ("[serve]\nmodel = 3", "model is a text in quotes, not 3"),
        ("[serve]\nmax-seconds = [1.0]", "max-seconds is a number, not [1.0]"),
        ("[serve]\nimport = 'x.py'", "import is a list of such: a text in quotes, not 'x.py'"),
        ("[serve]\nmax-seconds = 0.0", "max-seconds"),
        ("[serve]\nlisten = 'here'", "'here' is not an address"),
        ("[serve\n", "is not TOML"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(text: str, said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", "--config", str(written(tmp_path, text))])
    assert done.exit_code != 0
    assert said in f"{done.exception} {done.output}"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "name a file after --config" in refused("ask", "hm", "--config", str(tmp_path / "none.toml"))
