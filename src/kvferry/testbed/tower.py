"""Teach the vision tower alone: linear heads on the merger's hidden layer, one per group of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .attention import use_training_attention
from .pixels import patches
from .render import render
from .runlog import Stage
from .scenes import Scene, draw_scene
from .targets import GROUPS, IGNORE, SIZES, dense_labels
from .words import ASKED_DIRECTIONS, DIRECTIONS

_UNASKED = tuple(set(DIRECTIONS) - set(ASKED_DIRECTIONS))
HEADS_WIDTH = int((SIZES + 1).sum())


def speed_up(tower: nn.Module) -> None:
    """Let the patch embedding run as a matrix product: a convolution whose stride is its kernel is one."""
    embed: Any = tower.patch_embed
    embed.forward = lambda pixels: F.linear(pixels, embed.proj.weight.flatten(1))


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
    logits: list[torch.Tensor], labels: torch.Tensor, beside: float = 0.5
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


def draw_batch(rng: np.random.Generator, count: int, width: int, height: int) -> tuple[list[Scene], torch.Tensor]:
    """Some scenes of one size and their patches."""
    scenes = [draw_scene(rng, width, height) for _ in range(count)]
    return scenes, patches([render(scene) for scene in scenes])


def batch_labels(scenes: list[Scene]) -> torch.Tensor:
    """Dense labels of all tokens of all scenes, `[tokens, groups]`."""
    return torch.from_numpy(np.concatenate([dense_labels(scene) for scene in scenes]))


def scene_grids(scenes: list[Scene]) -> torch.Tensor:
    """`image_grid_thw` of scenes, `[scenes, 3]`."""
    return torch.tensor([[1, scene.height // 8, scene.width // 8] for scene in scenes])



def pick_size(rng: np.random.Generator, progress: float) -> tuple[int, int, int]:
    """Batch size, width and height at a point of a stage: small pictures first, a mixture at the end."""
    if progress < 0.3:
        return 96, 64, 64
    width, height = (int(side) for side in rng.choice((96, 128, 128, 192, 256), 2))
    return min(40, max(8, 32 * 128 * 128 // (width * height))), width, height


def train_tower(model: Any, folder: Path, *, seed: int, steps: int, rate: float, resume: bool) -> DenseHeads:
    """Pre-train a model's tower (all but its last matrix) with dense heads; returns the heads."""
    use_training_attention(model)
    tower = model.model.visual
    speed_up(tower)
    torch.manual_seed(seed)
    heads = DenseHeads(tower.merger.hidden_size)
    stage = Stage(folder, "tower", {"tower": tower, "heads": heads}, steps=steps, rate=rate, resume=resume)
    for step in stage:
        rng = np.random.default_rng((1, seed, step))
        scenes, pixels = draw_batch(rng, *pick_size(rng, step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            logits = heads(middle(tower, pixels, scene_grids(scenes)))
        loss, accuracy = dense_loss(logits, batch_labels(scenes), 0.0 if step < 0.25 * steps else 0.25)
        stage.step(loss)
        if step % 20 == 0:
            stage.log(loss=loss.item(), **{key: round(value, 3) for key, value in accuracy.items()})
    return heads
