"""A cache in the shape of Qwen2-VL-7B, and profiles that fit it, of synthetic statistics.

64 axes whose deviations halve every 8: sizes say nothing of real caches, speeds what turning and coding take.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs.profile import Axes, Basis, PlainProfile, Profile, from_rows
from kvferry.codecs.profile_store import FOLDERS
from kvferry.rope import Rotary

JOINT = ("full|transform:1000", "full|transform:4000", "full|kvtc:1000,window=0", "full|kvtc:1000,window=0|zstd")
SHAPE, TOKENS, RANK = (28, 4, 128), 512, 64
PRINT = "0123456789abcdef" * 2


def joint_cache() -> KVCache:
    """A cache drawn from its profiles, which lie where the codecs look for them."""
    side, generator = math.prod(SHAPE), torch.Generator().manual_seed(0)
    octaves, mean = torch.arange(24, 24 - RANK, -1).short(), torch.zeros(2 * side)
    vectors = torch.linalg.qr(torch.randn(2 * side, RANK, generator=generator))[0]
    weight = torch.eye(SHAPE[2]).expand(2 * side // SHAPE[2], -1, -1)
    basis, none = Basis(mean, weight, vectors, octaves), torch.zeros(0, dtype=torch.int64)
    halves = vectors.view(-1, 2, SHAPE[2], RANK).unbind(1)
    keys, values = (Axes(mean[:side], torch.linalg.qr(x.flatten(0, 1))[0], octaves) for x in halves)
    rotary = (Rotary(0.8 ** torch.arange(64).float()),) * SHAPE[0]
    common = {"rotary": rotary, "shape": SHAPE, "facts": {}}
    profiles = (
        Profile(PRINT, basis, basis, none, torch.zeros(0, 2 * side), **common),
        PlainProfile(PRINT, keys, values, **common),
    )
    folder = Path(tempfile.mkdtemp(prefix="kvferry-"))
    for profile in profiles:
        (folder / f"{profile.kind}.profile").write_bytes(profile.to_bytes())
    os.environ[FOLDERS] = str(folder)
    rows = (torch.randn(TOKENS, RANK, generator=generator) * 2 ** (octaves / 8)) @ vectors.T
    where = torch.arange(TOKENS)
    pairs = zip(*from_rows(rotary, rows, SHAPE, where[None]), strict=True)
    visual = np.ones(TOKENS, np.uint8)
    layout = PromptLayout(visual.astype(np.int32), visual, visual, where[None].int().numpy())
    index = where.expand(SHAPE[1], -1).contiguous()
    return KVCache(tuple(LayerCache(k, v, index) for k, v in pairs), layout, TOKENS, PRINT)
