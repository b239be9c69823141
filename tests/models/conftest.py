"""One untrained testbed model folder for the whole run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kvferry.models import VLM, load
from kvferry.testbed.build import Size, build_model, write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    size = Size(layers=2, hidden=64, heads=2, kv_heads=1, intermediate=96, tower_depth=1, tower_width=32, tower_heads=2)
    model = build_model(size)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "language_model" in name:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)
    write_folder(model, path)
    return path


@pytest.fixture(scope="session")
def vlm(folder: Path) -> VLM:
    return load(folder, dtype="float32")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (192, 208, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
