"""Observations made of random numbers, for tests that need no model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from kvferry.analyze.observe import DROPS, FRACTIONS, Observation
from kvferry.analyze.source import Asked
from kvferry.analyze.watch import AttentionWatch
from kvferry.cache import KVCache, PromptLayout
from kvferry.evidence import Evidence, Prefilled
from kvferry.models.blockwise import Rule
from kvferry.rope import Rotary
from kvferry.selection import Selection
from tests.helpers import cache as random_cache
from tests.helpers import layout

SCORERS = ("one", "other")
ROTARY = Rotary(torch.tensor([1.0, 0.5, 0.2, 0.1]), sections=(2, 1, 1))


def attention_of(prompt: PromptLayout, layers: int, seed: int, even: bool = False) -> Any:
    """What an :class:`AttentionWatch` sees of random (or even) causal attention: 4 query heads on 2."""
    generator = torch.Generator().manual_seed(seed)
    watch = AttentionWatch()
    watch.start(prompt)
    for layer in range(layers):
        query, key = (torch.randn(h, len(prompt), 8, generator=generator) * (not even) for h in (4, 2))
        watch.observe(layer, query, key, Rule(1.0))
    return watch.layers


def choices_of(cache: KVCache, seed: int) -> dict[str, dict[float, Selection]]:
    """Random kept sets, different in every layer and head."""
    draw = np.random.default_rng(seed)
    heads = len(cache.layers[0].keys)
    found: dict[str, dict[float, Selection]] = {}
    for name in SCORERS:
        for fraction in FRACTIONS:
            keep = round(fraction * cache.length)
            positions = [
                torch.from_numpy(np.stack([np.sort(draw.permutation(cache.length)[:keep]) for _ in range(heads)]))
                for _ in cache.layers
            ]
            scores = tuple(torch.ones(heads, keep) for _ in positions)
            found.setdefault(name, {})[fraction] = Selection(tuple(positions), scores)
    return found


def observation(
    prompt: PromptLayout | None = None,
    *,
    seed: int = 0,
    layers: int = 3,
    even: bool = False,
    needs_image: bool | None = None,
    picture: bool = False,
    **changes: Any,
) -> Observation:
    """A prompt with one picture, unless ``prompt`` says otherwise."""
    prompt = layout(question=6 + seed % 5) if prompt is None else prompt
    cache = random_cache(prompt, layers=layers, seed=seed, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1 + len(DROPS), 11, generator=generator) if prompt.visual.any() else None
    images = (Image.radial_gradient("L"),) if picture else ()
    seen = Observation(
        asked=Asked(f"sample {seed}", images, "what?", needs_image),
        prefilled=Prefilled(cache, Evidence(), torch.zeros(11)),
        attention=attention_of(prompt, layers, seed, even),
        rotary=(ROTARY,) * layers,
        choices=choices_of(cache, seed),
        logits=logits,
    )
    return replace(seen, **changes)


def text_only(seed: int = 0) -> Observation:
    """A prompt without a picture."""
    return observation(layout(rows=0, columns=0, question=12), seed=seed)
