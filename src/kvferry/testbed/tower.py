"""Teach the vision tower alone: linear heads on the merger's hidden layer, one per group of labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half

from .attention import training_attention, use_training_attention
from .build import MERGE
from .pixels import patches
from .render import render
from .runlog import Stage
from .scenes import LATTICE, Scene, draw_scene, neighbour
from .targets import GROUPS, IGNORE, SIZES, centre_cell, dense_labels, owners
from .words import ASKED_DIRECTIONS, DIRECTIONS

_UNASKED = tuple(set(DIRECTIONS) - set(ASKED_DIRECTIONS))
HEADS_WIDTH = int((SIZES + 1).sum())
IN_CACHE = 2**19
"""Attention entries per head that are worth computing at once; more of them leave the processor's cache."""
PATCHES = MERGE**2
"""Patches per visual token."""
SMALL, FINE, GUIDED = 0.3, 0.54, 0.6
"""Shares of the tower's lessons after which small pictures, finer lattices than scenes have, and guided attention
are over."""
GLANCING = 2
"""The block whose attention to neighbours is guided."""


def speed_up(tower: Any) -> None:
    """The same mathematics in fewer calls: patches by one matrix product, pictures of one size attended together."""
    embed = tower.patch_embed
    embed.forward = lambda pixels: F.linear(pixels, embed.proj.weight.flatten(1))
    for block in tower.blocks:
        block.attn.forward = partial(_attend_together, block.attn)
        block.attn.glance = None


def _attend_together(
    attention: Any,
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **others: Any,
) -> torch.Tensor:
    """`VisionAttention.forward` with one call for all pictures where they have equally many patches."""
    lengths = cu_seqlens.diff().tolist()
    if len(set(lengths)) > 1:
        result: torch.Tensor = type(attention).forward(
            attention, hidden, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **others
        )
        return result
    heads: int = attention.num_heads
    split = attention.qkv(hidden).view(len(lengths), lengths[0], 3, heads, -1)
    query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = (part.view(len(lengths), 1, lengths[0], -1) for part in position_embeddings)
    query, key = (part.float() * cos + rotate_half(part.float()) * sin for part in (query, key))
    if attention.glance is not None:
        attention.glance.look(query, key, attention.scaling)
    few = max(1, IN_CACHE // lengths[0] ** 2)
    groups = zip(query.split(few), key.split(few), value.split(few), strict=True)
    seen = torch.cat([training_attention(attention, q, k, v, None, attention.scaling)[0] for q, k, v in groups])
    mixed: torch.Tensor = attention.proj(seen.reshape(hidden.shape[0], -1))
    return mixed


@dataclass
class Glance:
    """Attention of one block that is worth learning first: from a thing's centre to its neighbour's.

    Head 0 looks left and head 1 right. `rows` are (picture, head, patch), each `[rows]`; `wanted` is bool
    `[rows, patches]`. `astray` is the mean -log attention on what is wanted, after a forward pass.
    """

    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    wanted: torch.Tensor
    astray: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def at(cls, scenes: list[Scene]) -> Glance | None:
        """For scenes of one size; None where nothing has a neighbour."""
        rows, targets = [], []
        for picture, scene in enumerate(scenes):
            for index, thing in enumerate(scene.things):
                for head, direction in enumerate(ASKED_DIRECTIONS):
                    other = neighbour(scene, index, direction)
                    if other is not None and other >= 0:
                        start = PATCHES * centre_cell(scene, thing)
                        rows += [(picture, head, start + part) for part in range(PATCHES)]
                        targets += [PATCHES * centre_cell(scene, scene.things[other])] * PATCHES
        if not rows:
            return None
        columns = torch.arange(PATCHES * len(owners(scenes[0])[0]))
        first = torch.tensor(targets)[:, None]
        picture_, head_, patch_ = torch.tensor(rows).unbind(1)
        return cls((picture_, head_, patch_), (columns >= first) & (columns < first + PATCHES))

    def look(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Measure how far attention is astray; queries and keys are `[pictures, heads, patches, channels]`."""
        picture, head, patch = self.rows
        some = (query[picture, head, patch] * scaling)[:, None]
        with torch.autocast("cpu", enabled=False):
            logits = (some @ key[picture, head].transpose(1, 2))[:, 0]
            mass = (logits.softmax(-1) * self.wanted).sum(-1)
        self.astray = -mass.clamp_min(1e-6).log().mean()


def middle(tower: Any, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The merger's hidden activations, `[tokens, 4 * width]`: all but the tower's last matrix."""
    found: list[torch.Tensor] = []
    hook = tower.merger.mlp[1].register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        tower(pixels, grid_thw=grid)
    finally:
        hook.remove()
    return found[0]


class DenseHeads(nn.Module):
    """One linear classifier per group on every visual token; thrown away after pre-training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, HEADS_WIDTH)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Logits per group, each `[tokens, labels + 1]`."""
        return list(self.linear(hidden).split((SIZES + 1).tolist(), dim=-1))


def dense_loss(
    logits: list[torch.Tensor], labels: torch.Tensor, beside: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy, tokens with something and tokens with nothing weighted alike; and accuracy on the former.

    `beside` weighs what a token should know of its neighbours.
    """
    losses, accuracy = [], {}
    for column, (name, group) in enumerate(zip(GROUPS, logits, strict=True)):
        if name.startswith(_UNASKED):
            continue
        wanted, weight = labels[:, column], beside if " " in name else 1.0
        each = F.cross_entropy(group.float(), wanted, ignore_index=IGNORE, reduction="none")
        some, none = wanted > 0, wanted == 0
        if bool(some.any()):
            losses.append(each[some].mean() * weight)
            accuracy[name] = float((group[some].argmax(-1) == wanted[some]).float().mean())
        losses.append(each[none].mean() * 0.5 * weight)
    return torch.stack(losses).sum(), accuracy


def draw_batch(
    rng: np.random.Generator, count: int, width: int, height: int, lattice: int
) -> tuple[list[Scene], torch.Tensor]:
    """Some scenes of one size and their patches."""
    scenes = [draw_scene(rng, width, height, lattice=lattice) for _ in range(count)]
    return scenes, patches([render(scene) for scene in scenes])


def batch_labels(scenes: list[Scene]) -> torch.Tensor:
    """Dense labels of all tokens of all scenes, `[tokens, groups]`."""
    return torch.from_numpy(np.concatenate([dense_labels(scene) for scene in scenes]))


def scene_grids(scenes: list[Scene]) -> torch.Tensor:
    """`image_grid_thw` of scenes, `[scenes, 3]`."""
    return torch.tensor([[1, scene.height // 8, scene.width // 8] for scene in scenes])


def pick_size(rng: np.random.Generator, progress: float) -> tuple[int, int, int, int]:
    """Batch size, width, height and lattice at a point of a stage: small tidy pictures first, then all sizes."""
    if progress < SMALL:
        return 96, 64, 64, (8, 4, 2, 1)[int(4 * progress / SMALL)]
    width, height = (int(side) for side in rng.choice((96, 128, 128, 192, 256), 2))
    return min(40, max(8, 32 * 128 * 128 // (width * height))), width, height, 1 if progress < FINE else LATTICE


def train_tower(
    model: Any, folder: Path, *, seed: int, steps: int, rate: float, neighbours: bool, guided: bool, resume: bool
) -> DenseHeads:
    """Pre-train a model's tower (all but its last matrix) with dense heads; returns the heads.

    With `neighbours`, a thing's centre also learns what stands beside it, and with `guided`, one block's attention
    to that is helped for a while after the small pictures.
    """
    use_training_attention(model)
    tower = model.model.visual
    speed_up(tower)
    torch.manual_seed(seed)
    heads = DenseHeads(tower.merger.hidden_size)
    stage = Stage(folder, "tower", {"tower": tower, "heads": heads}, steps=steps, rate=rate, resume=resume)
    for step in stage:
        rng = np.random.default_rng((1, seed, step))
        scenes, pixels = draw_batch(rng, *pick_size(rng, step / steps))
        done = step / steps
        strength = min(1.0, max(0.0, (GUIDED - done) / 0.1)) if guided and neighbours and done >= SMALL else 0.0
        glance = tower.blocks[GLANCING].attn.glance = Glance.at(scenes) if strength > 0 else None
        with torch.autocast("cpu", torch.bfloat16):
            logits = heads(middle(tower, pixels, scene_grids(scenes)))
        loss, accuracy = dense_loss(logits, batch_labels(scenes), float(neighbours and done >= SMALL))
        astray = glance.astray if glance else torch.zeros(())
        stage.step(loss + strength * astray)
        if step % 20 == 0:
            shares = {key: round(value, 3) for key, value in accuracy.items()}
            stage.log(loss=loss.item(), astray=astray.item(), **shares)
    return heads
