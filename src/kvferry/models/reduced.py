"""What a model's image processor scales a picture to, so that a large one can be scaled where it is decoded."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from kvferry.pictures.apart import Reduced


class Reducer:
    """Says what a picture becomes first: ``(width, height, filter)``, or None where that is not known.

    Known it is of processors that scale a whole picture by Pillow to a size from which it is not scaled again, as those
    of the Qwen-VL families do without torchvision; tried once, on a small picture.

    Parameters
    ----------
    processor
        Transformers' image processor, if the model has one.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, width: int, height: int) -> Reduced | None:
        if not self._known:
            return None
        size = self._processor.size
        return self._scaled(width, height, size["shortest_edge"], size["longest_edge"])

    def _scaled(self, width: int, height: int, least: int, most: int) -> Reduced | None:
        processor = self._processor
        factor = processor.patch_size * processor.merge_size
        rule = vars(sys.modules[type(processor).__module__])["smart_resize"]
        try:
            tall, wide = rule(height, width, factor=factor, min_pixels=least, max_pixels=most)
            if rule(tall, wide, factor=factor, min_pixels=least, max_pixels=most) != (tall, wide):
                return None
        except ValueError:
            return None
        return int(wide), int(tall), int(processor.resample)

    @cached_property
    def _known(self) -> bool:
        """Whether a scaled picture is read as the picture itself, to the bit."""
        processor = self._processor
        if getattr(processor, "backend", "") != "pil" or not getattr(processor, "do_resize", False):
            return False
        try:
            side = processor.patch_size * processor.merge_size
            noise = np.random.default_rng(0).integers(0, 256, (5 * side + 3, 7 * side + 1, 3), np.uint8)
            size = {"shortest_edge": side * side, "longest_edge": 9 * side * side}
            whole = Image.fromarray(noise)
            reduced = self._scaled(whole.width, whole.height, size["shortest_edge"], size["longest_edge"])
            if reduced is None:
                return False
            part = whole.resize(reduced[:2], Image.Resampling(reduced[2]))
            read = [processor(images=[x], size=size, return_tensors="pt") for x in (whole, part)]
        except (AttributeError, KeyError, TypeError, ValueError):
            return False
        return all(torch.equal(read[0][name], read[1][name]) for name in read[0])
