"""Backgrounds: gradients, noise, stripes and crops of photographs, all muted and mostly redundant."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.float32]

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip
"""Pictures inside scikit-image's wheel; nothing is ever downloaded."""


@lru_cache(maxsize=1)
def photographs() -> tuple[Image.Image, ...]:
    """The bundled photographs that are on disk, small enough for crops; empty without scikit-image."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        return ()
    folder = Path(spec.origin).parent / "data"
    found = []
    for name in PHOTOGRAPHS:
        if (folder / name).is_file():
            photo = Image.open(folder / name).convert("RGB")  # as ever, without its profile: scenes must not change
            photo.thumbnail((640, 640))
            found.append(photo)
    return tuple(found)


def _gradient(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A straight ramp between two colours."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = np.cos(angle) * x / width + np.sin(angle) * y / height
    ramp = (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)
    low, high = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    return np.asarray(low + ramp[..., None] * (high - low), dtype=np.float32)


def _noise(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Smooth noise of two scales, like a wall or a cloud."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells, strength in ((3, 60.0), (14, 25.0)):
        coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(smooth, dtype=np.float32) - 127.5) * (strength / 130)
    return np.asarray(total + rng.uniform(60, 195, 3), dtype=np.float32)


def _stripes(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Soft stripes or a checked cloth."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(10, 40)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period)
    if rng.random() < 0.5:
        wave = wave * np.sin((np.sin(angle) * x - np.cos(angle) * y) * 2 * np.pi / period)
    return np.asarray(rng.uniform(60, 195, 3) + wave[..., None] * rng.uniform(5, 25, 3), dtype=np.float32)


def _photograph(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A random crop of a bundled photograph; noise where none is on disk."""
    photos = photographs()
    if not photos:
        return _noise(rng, width, height)
    photo = photos[int(rng.integers(len(photos)))]
    scale = rng.uniform(0.5, 1.0) * min(photo.width / width, photo.height / height)
    w, h = max(1, int(width * scale)), max(1, int(height * scale))
    left, top = int(rng.integers(photo.width - w + 1)), int(rng.integers(photo.height - h + 1))
    crop = photo.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.asarray(pixels * 0.6 + 0.4 * pixels.mean(axis=(0, 1)), dtype=np.float32)


def background(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """One background, float32 `[height, width, 3]` in 0..255, with a little grain."""
    draw = (_gradient, _noise, _stripes, _photograph, _photograph)[int(rng.integers(5))]
    pixels = draw(rng, width, height)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(0, 5)
    return np.clip(pixels + grain, 0, 255).astype(np.float32)
