"""Two untrained models of one family and different size, and translators between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import kvferry
from kvferry import VLM
from kvferry.testbed.build import Size, build_model, write_folder
from kvferry.translator import Translator, width
from tests.crossing.process import write_model, write_picture

SMALL = Size(
    layers=3, hidden=64, heads=2, kv_heads=1, intermediate=64, tower_depth=1, tower_width=64, tower_heads=2
)  # fmt: skip


@pytest.fixture(scope="session")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "large", gain=4.0)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    write_folder(build_model(SMALL, 3), folder)
    return folder


@pytest.fixture(scope="session")
def large(large_folder: Path) -> VLM:
    return kvferry.load(str(large_folder), dtype="float32")


@pytest.fixture(scope="session")
def small(small_folder: Path) -> VLM:
    return kvferry.load(str(small_folder), dtype="float32")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture(tmp_path_factory.mktemp("picture") / "scene.png")


def random_translator(small: VLM, large: VLM, hidden: int = 8, seed: int = 0) -> Translator:
    """One that has learned nothing; what it makes hangs on every number of the small model's cache."""
    p, q = width(small.bounds.shapes), width(large.bounds.shapes)
    draw = np.random.default_rng(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.from_numpy(draw.normal(size=shape).astype(np.float32))

    tensors = {
        "mean_in": some(p), "scale_in": some(p).abs() + 0.5, "mean_out": some(q), "scale_out": some(q).abs() + 0.5,
        "offset": some(q), "linear": some(p, q) / p**0.5, "into": some(p, hidden) / p**0.5,
        "into_offset": some(hidden), "out": some(hidden, q) / 3,
    }  # fmt: skip
    shapes = small.bounds.shapes, large.bounds.shapes
    return Translator(
        small.fingerprint, large.fingerprint, large.prompt_fingerprint, *shapes, small.rotary, tensors, {"n": 1}
    )


def identity(vlm: VLM) -> Translator:
    """From a model to itself: what the mode makes of it must be what the model makes itself."""
    p = width(vlm.bounds.shapes)
    zeros, ones = torch.zeros(p), torch.ones(p)
    tensors = {
        "mean_in": zeros, "scale_in": ones, "mean_out": zeros, "scale_out": ones, "offset": zeros,
        "linear": torch.eye(p), "into": torch.zeros(p, 0), "into_offset": torch.zeros(0), "out": torch.zeros(0, p),
    }  # fmt: skip
    shapes = vlm.bounds.shapes, vlm.bounds.shapes
    return Translator(vlm.fingerprint, vlm.fingerprint, vlm.prompt_fingerprint, *shapes, vlm.rotary, tensors)
