"""Pictures to the patches that Qwen2-VL's tower takes, many at once; equal to the image processor's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .build import MERGE, PATCH


def patches(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures of one size as `[pictures * patches, 384]` float32 in the tower's order."""
    pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    mean, std = np.array(OPENAI_CLIP_MEAN, np.float32), np.array(OPENAI_CLIP_STD, np.float32)
    pixels = np.asarray((pixels / 255 - mean) / std, dtype=np.float32)
    count, height, width, _ = pixels.shape
    rows, columns = height // (PATCH * MERGE), width // (PATCH * MERGE)
    split = pixels.reshape(count, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    split = split.transpose(0, 1, 4, 2, 5, 7, 3, 6)
    twice = np.broadcast_to(split[:, :, :, :, :, :, None], (*split.shape[:6], 2, PATCH, PATCH))
    return torch.from_numpy(twice.reshape(-1, 3 * 2 * PATCH * PATCH).copy())


def grids(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """`image_grid_thw` of pictures whose sides are whole numbers of tokens, `[pictures, 3]`."""
    return torch.tensor([[1, picture.height // PATCH, picture.width // PATCH] for picture in pictures])
