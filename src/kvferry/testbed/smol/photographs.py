"""Photographs behind the scenes: those that installed packages hold, each in one split only; none is kept here."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from kvferry.testbed.backgrounds import Pixels

SOURCES: dict[str, tuple[tuple[str, str], ...]] = {
    "train": tuple(
        ("skimage", f"data/{name}")
        for name in (
            "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
            "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "rocket.jpg",
        )
    ),
    "calibration": (("skimage", "data/ihc.png"), ("skimage", "data/clock_motion.png")),
    "validation": (("skimage", "data/retina.jpg"), ("skimage", "data/cell.png")),
    "test": (("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"), ("imgaug", "quokka.jpg")),
}  # fmt: skip
"""Split -> (package, file in it). The training split's are those that the control model's tower has seen as well."""


@cache
def photographs(split: str) -> tuple[Image.Image, ...]:
    """The photographs of a split.

    Raises
    ------
    FileNotFoundError
        A package is not installed; the message says what to run.
    """
    found = []
    for package, name in SOURCES[split]:
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / name if spec and spec.origin else None
        if path is None or not path.is_file():
            raise FileNotFoundError(f"the {split} split needs the photographs of {package}; run: make smol")
        photograph = Image.open(path).convert("RGB")
        photograph.thumbnail((640, 640))
        found.append(photograph)
    return tuple(found)


def backdrop(split: str, rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A random crop of one of a split's photographs, a little muted, float32 ``[height, width, 3]`` in 0..255."""
    choices = photographs(split)
    photograph = choices[int(rng.integers(len(choices)))]
    scale = rng.uniform(0.4, 1.0) * min(photograph.width / width, photograph.height / height)
    w, h = max(1, int(width * scale)), max(1, int(height * scale))
    left, top = int(rng.integers(photograph.width - w + 1)), int(rng.integers(photograph.height - h + 1))
    crop = photograph.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    strength = rng.uniform(0.55, 0.9)
    return np.asarray(pixels * strength + (1 - strength) * pixels.mean(axis=(0, 1)), dtype=np.float32)
