"""An untrained model that several files calibrate."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.models import VLM, load
from kvferry.testbed.build import Size, build_model, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    size = Size(layers=2, hidden=64, heads=2, kv_heads=1, intermediate=96, tower_depth=1, tower_width=32, tower_heads=2)
    write_folder(build_model(size), path)
    return path


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    return load(folder)
