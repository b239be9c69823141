"""Questions written to a folder are those of the split."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvferry.data import read_questions
from kvferry.testbed.smol import draw
from kvferry.testbed.smol.data import sample
from kvferry.testbed.smol.english import KINDS


def test_a_folder_of_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    n = len(KINDS)
    command = ["draw", str(tmp_path / "drawn"), "--split", "validation", "-n", str(n), "--start", str(n)]
    monkeypatch.setattr(sys, "argv", command)
    draw.main()
    path = Path(capsys.readouterr().out.splitlines()[-1])
    asked = list(read_questions(path).each())
    assert [one.kind for one in asked] == list(KINDS)
    for index, one in enumerate(asked, start=n):
        drawn = sample("validation", index)
        assert (one.question, one.answer, one.id) == (drawn.question, drawn.answer, f"validation-{index:05d}")
        assert one.needs_image == bool(drawn.images) == (one.kind != "text")
        assert len(one.images) == len(drawn.images)
        for name, picture in zip(one.images, drawn.images, strict=True):
            assert np.array_equal(np.asarray(Image.open(name)), np.asarray(picture))
