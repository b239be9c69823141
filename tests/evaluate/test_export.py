"""Parquet files hold what the JSON lines hold."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvferry.cli.app import app
from kvferry.errors import DependencyError, InputError
from kvferry.evaluate.export import META, export
from kvferry.evaluate.records import Outcome, read
from tests.evaluate.test_tables import lines as plain_lines
from tests.evaluate.test_tables import write
from tests.study.test_codec_tables import lines

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is in the extra 'eval'")


def test_every_row_and_its_provenance(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.jsonl", lines(n=7))
    done = CliRunner().invoke(app, ["export", str(raw), str(tmp_path / "a.parquet")])
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "a.parquet")
    head, back = read(raw)
    assert json.loads(table.schema.metadata[META]) == head
    assert table.num_rows == sum(len(x.outcomes) for x in back) == 7 * len(back[0].outcomes)
    for record in table.to_pylist()[::13]:
        (line,) = (x for x in back if x.index == record["index"])
        outcome = line.outcomes[record["row"]]
        assert (record["kind"], record["protocol"], record["tokens"]) == (line.kind, line.protocol, line.tokens)
        assert Outcome(*(record[name] for name in Outcome._fields)) == outcome


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    assert export(write(tmp_path / "b.jsonl", plain_lines(n=3)), tmp_path / "b.parquet") == 12
    table = pq.read_table(tmp_path / "b.parquet")
    assert table["kl"].null_count == table["attention"].null_count == 12
    assert table["correct"].to_pylist()[:2] == [True, False]


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write(tmp_path / "c.jsonl", plain_lines(n=1))
    with pytest.raises(InputError, match="no results at"):
        export(tmp_path / "none.jsonl", tmp_path / "c.parquet")
    with pytest.raises(InputError, match="choose another place"):
        export(raw, tmp_path / "nowhere" / "c.parquet")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match=r"kvferry\[eval\]"):
        export(raw, tmp_path / "c.parquet")
