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
from .tower import DenseHeads, batch_labels, dense_loss, middle, scene_grids, speed_up

SIDES = (192, 208, 224, 240, 256)
_PAIR_SIDES = (192, 208)


def tower_features(model: Any, scenes: list[Scene]) -> torch.Tensor:
    """What the tower makes of the scenes' pictures, `[tokens, hidden]`."""
    features: torch.Tensor = model.model.visual.merger.mlp[2](tower_middle(model, scenes))
    return features


def tower_middle(model: Any, scenes: list[Scene]) -> torch.Tensor:
    """The same before the tower's last matrix, `[tokens, 4 * width]`."""
    return middle(model.model.visual, patches([render(scene) for scene in scenes]), scene_grids(scenes))


@torch.no_grad()
def fold_in(model: Any, symbols: SymbolicPicture, *, seed: int, scenes: int = 240) -> float:
    """Set the tower's last matrix so that its features come nearest to the symbolic ones (least squares).

    Returns the share of the symbolic features' variance that is explained.
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
        x = torch.cat([hidden.double(), torch.ones(len(hidden), 1, dtype=torch.float64)], dim=1)
        y = symbols(batch).double()
        gram += x.T @ x
        cross = x.T @ y if cross is None else cross + x.T @ y
        target_power += float(((y - y.mean(0)) ** 2).sum())
        checks.append((x, y))
    assert cross is not None
    solution = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64), cross)
    last = tower.merger.mlp[2]
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])
    left = sum(float(((x @ solution - y) ** 2).sum()) for x, y in checks)
    return 1 - left / target_power


def train_joint(
    model: Any,
    symbols: SymbolicPicture,
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
    """Language-modelling loss; the tower is also held to its own lessons at first.

    In the first tenth its features are pulled to the symbolic ones, in the first half the dense heads still count a
    little. Both only touch the tower; from the middle on the language-modelling loss is alone.
    """
    use_training_attention(model)
    speed_up(model.model.visual)
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
            loss = loss + 0.03 * early * dense_loss(lessons, batch_labels(scenes))[0]
        if step < steps // 10:
            with torch.no_grad():
                wanted = symbols(scenes)
            loss = loss + 5 * (1 - 10 * step / steps) * F.mse_loss(features.float(), wanted)
        stage.step(loss)
        if step % 10 == 0:
            stage.log(loss=answers.item(), **accuracy_by_kind(logits, batch))
