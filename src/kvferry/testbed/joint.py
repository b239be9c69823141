"""Join the tower and the language model, and train them together on pictures; attention is never guided here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .attention import use_training_attention
from .language import SymbolicPicture, Task, accuracy_by_kind, answer_logits, draw_batch
from .pixels import patches
from .render import render
from .runlog import Stage
from .scenes import Scene, draw_scene
from .targets import COLUMN
from .tower import DenseHeads, batch_labels, dense_loss, middle, pick_size, scene_grids, speed_up
from .tower import draw_batch as draw_pictures

SIDES = (192, 208, 224, 240, 256)
_PAIR_SIDES = (192, 208)


def tower_features(model: Any, scenes: list[Scene]) -> torch.Tensor:
    """What the tower makes of the scenes' pictures, `[tokens, hidden]`."""
    features: torch.Tensor = model.model.visual.merger.mlp[2](tower_middle(model, scenes))
    return features


def tower_middle(model: Any, scenes: list[Scene]) -> torch.Tensor:
    """The same before the tower's last matrix, `[tokens, 4 * width]`."""
    return middle(model.model.visual, patches([render(scene) for scene in scenes]), scene_grids(scenes))


def token_weights(scenes: list[Scene]) -> torch.Tensor:
    """How much each visual token matters to a match, `[tokens]`: background 1, things 4, their centres 12."""
    labels = batch_labels(scenes)
    return 1 + 3 * (labels > 0).any(dim=1).float() + 8 * (labels[:, COLUMN["centre"]] > 0).float()


@torch.no_grad()
def fold_in(model: Any, symbols: SymbolicPicture, *, seed: int, scenes: int = 240) -> float:
    """Set the tower's last matrix so that its features come nearest to the symbolic ones (least squares).

    Returns the share of the symbolic features' (weighted) power that is explained.
    """
    use_training_attention(model)
    tower = model.model.visual
    speed_up(tower)
    rng = np.random.default_rng((3, seed))
    width = tower.merger.hidden_size + 1
    gram, cross = torch.zeros(width, width, dtype=torch.float64), None
    target_power, checks = 0.0, []
    for _ in range(scenes // 12):
        w, h = (int(side) for side in rng.choice(SIDES, 2))
        batch = [draw_scene(rng, w, h) for _ in range(12)]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = middle(tower, patches([render(scene) for scene in batch]), scene_grids(batch))
        weight = token_weights(batch).double().sqrt()[:, None]
        x = torch.cat([hidden.double(), torch.ones(len(hidden), 1, dtype=torch.float64)], dim=1) * weight
        y = symbols(batch).double() * weight
        gram += x.T @ x
        cross = x.T @ y if cross is None else cross + x.T @ y
        target_power += float((y**2).sum())
        checks.append((x, y))
    assert cross is not None
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    solution = torch.linalg.solve(gram + ridge, cross)
    last = tower.merger.mlp[2]
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])
    left = sum(float(((x @ solution - y) ** 2).sum()) for x, y in checks)
    return 1 - left / target_power


def train_match(
    model: Any, symbols: SymbolicPicture, folder: Path, *, seed: int, steps: int, rate: float, resume: bool
) -> None:
    """Bring the whole tower's features nearer to the symbolic ones, after `fold_in` and before `train_joint`."""
    use_training_attention(model)
    speed_up(model.model.visual)
    stage = Stage(folder, "match", {"tower": model.model.visual}, steps=steps, rate=rate, resume=resume)
    for step in stage:
        rng = np.random.default_rng((5, seed, step))
        scenes, pixels = draw_pictures(rng, *pick_size(rng, 1.0))
        with torch.no_grad():
            wanted, weight = symbols(scenes), token_weights(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.model.visual(pixels, grid_thw=scene_grids(scenes)).pooler_output
        apart = (weight[:, None] * (features.float() - wanted) ** 2).sum()
        loss = apart / (weight[:, None] * wanted**2).sum()
        stage.step(loss)
        if step % 10 == 0:
            stage.log(loss=loss.item())


def train_joint(
    model: Any,
    heads: DenseHeads,
    folder: Path,
    task: Task,
    *,
    seed: int,
    steps: int,
    rate: float,
    resume: bool,
    pictures: int = 12,
) -> None:
    """Language-modelling loss; in the first half the tower's dense heads still count a little, then nothing else."""
    use_training_attention(model)
    speed_up(model.model.visual)
    beside = float("relation" in task.kinds)
    stage = Stage(folder, "joint", {"model": model, "heads": heads}, steps=steps, rate=rate, resume=resume)
    for step in stage:
        rng = np.random.default_rng((4, seed, step))
        pair = bool(rng.random() < task.pairs)
        width, height = (int(side) for side in rng.choice(_PAIR_SIDES if pair else SIDES, 2))
        count = max(6, pictures * 192 * 192 // (width * height))
        drawn, batch = draw_batch(rng, task, count, width, height, guided=False, pair=pair)
        scenes = [scene for group in drawn for scene in group]
        early = max(0.0, 1 - 2 * step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower_middle(model, scenes)
            features = model.model.visual.merger.mlp[2](hidden)
            logits = answer_logits(model, batch, features)
            lessons = heads(hidden) if early > 0 else []
        loss = answers = F.cross_entropy(logits, batch.wanted)
        if early > 0:
            loss = loss + 0.03 * early * dense_loss(lessons, batch_labels(scenes), beside)[0]
        stage.step(loss)
        if step % 10 == 0:
            stage.log(loss=answers.item(), **accuracy_by_kind(logits, batch))
