"""The demo end to end on a small untrained model: a real second process, a shaped link, a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from kvferry.cli.app import app
from kvferry.cli.demo import IMAGE, RECIPES


def test_demo_crosses_every_way_and_draws(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo.png"
    words = ["demo", "--model", str(model_folder), "--n", "1", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(done.stdout.splitlines()[-1])
    rows = {row["way"]: row for row in report["rows"]}
    assert list(rows) == [IMAGE, *RECIPES]
    sizes = [rows[recipe]["wire_bytes"] for recipe in RECIPES[:5]]
    assert sizes == sorted(sizes, reverse=True)
    assert 0.8 < rows["full|bf16"]["ratio_to_bf16"] < 1.01  # the last prompt token does not travel
    assert all(0 <= row["right_share"] <= 1 for row in rows.values())
    # A shaped link cannot be faster than its rate.
    assert rows["full|bf16"]["send_seconds"] >= 0.9 * rows["full|bf16"]["wire_bytes"] * 8 / 10e6
    with Image.open(out) as picture:
        assert np.asarray(picture.convert("L")).std() > 10
