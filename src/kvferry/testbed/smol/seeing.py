"""The tower learns what is at each token, and its last matrix to say so in the language model's own word vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kvferry.testbed.joint import token_weights
from kvferry.testbed.runlog import Stage
from kvferry.testbed.targets import COLUMN, OFFSETS, SIZES, multi_hot
from kvferry.testbed.tower import dense_loss

from .data import Lessons, Look, Looks
from .pupil import Plan, Pupil

_ALIGN, _MATCH = 10_000, 11_000
"""Added to the seed of the scenes that the projector is set on, and that the tower says in word vectors."""
BESIDE = int(OFFSETS[COLUMN["left colour"]])
"""The first label of what stands beside a thing."""


def load_steps(steps: Lessons | Looks, start: int, workers: int, rank: int = 0, world: int = 1) -> Iterator[Any]:
    """Lessons from a step on, drawn ahead by other processes where there are some; every one of ``world`` pupils that
    learn together has its own.
    """
    order = range(start * world + rank, len(steps), world)
    return iter(DataLoader(steps, batch_size=None, sampler=order, num_workers=workers))


def train_tower(pupil: Pupil, folder: Path, plan: Plan, *, seed: int, resume: bool, workers: int) -> None:
    """The whole tower but its last matrix learns what is at each token, and beside it, from labels alone."""
    pupil.tower.requires_grad_(True)
    modules: dict[str, nn.Module] = {"tower": pupil.tower, "heads": pupil.heads}
    stage = Stage(
        folder, "tower", modules, steps=plan.tower_steps, rate=plan.tower_rate, resume=resume, faster={"heads": 3.0},
        limit=plan.tower_seconds,
    )  # fmt: skip
    rank, world = stage.together.rank, stage.together.world
    stage.together.share(stage.parameters)
    drawn = Looks(pixels=plan.tower_pixels, seed=seed, steps=plan.tower_steps * world)
    looks = load_steps(drawn, stage.done, workers, rank, world)
    for step in stage:
        look: Look = next(looks)
        with pupil.autocast():
            logits = pupil.heads(pupil.middle(look.pixels, look.grids))
        loss, accuracy = dense_loss(logits, look.labels.to(pupil.device), 1.0)
        stage.step(loss)
        if step % 20 == 0:
            stage.log(loss=loss.item(), **{key: round(value, 3) for key, value in accuracy.items()})
    pupil.tower.requires_grad_(False)


def wanted(pupil: Pupil, look: Look) -> torch.Tensor:
    """What the language model should be told at each token, ``[tokens, hidden]``: what is there, not what is beside."""
    labels = multi_hot(look.labels.numpy())
    labels[:, BESIDE:] = 0
    return torch.from_numpy(labels) @ pupil.vectors.cpu()


def mistaken(pupil: Pupil, told: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How badly words are told from others of their group by the language model's own vectors (mean cross-entropy).

    ``told`` is ``[tokens, hidden]``, ``labels`` ``[tokens, groups]``. Most of a word's vector is what all of a group
    share, so that a small squared error may still be the wrong word.
    """
    losses = []
    for column, (start, size) in enumerate(zip(OFFSETS.tolist(), SIZES.tolist(), strict=True)):
        there = labels[:, column] > 0
        if start >= BESIDE or size < 2 or not bool(there.any()):
            continue
        vectors = pupil.vectors[start : start + size]
        logits = told[there] @ (vectors - vectors.mean(0)).T
        losses.append(F.cross_entropy(logits, labels[there, column] - 1))
    return torch.stack(losses).mean() if losses else told.sum() * 0


def match(pupil: Pupil, folder: Path, plan: Plan, *, seed: int, resume: bool, workers: int) -> None:
    """The whole tower learns to say what is there in word vectors; a matrix behind it alone leaves words unsaid.

    The loss is the share of the vectors' (weighted) power that is left, and how badly words are told apart.
    """
    pupil.tower.requires_grad_(True)
    stage = Stage(
        folder, "match", {"tower": pupil.tower}, steps=plan.match_steps, rate=plan.tower_rate, resume=resume,
        limit=plan.match_seconds,
    )  # fmt: skip
    if stage.done == 0:
        print(f"aligned: {align(pupil, plan, seed=seed, workers=workers):.3f} of the power explained", flush=True)
    rank, world = stage.together.rank, stage.together.world
    stage.together.share(stage.parameters)
    drawn = Looks(pixels=plan.tower_pixels, seed=_MATCH + seed, steps=plan.match_steps * world)
    looks = load_steps(drawn, stage.done, workers, rank, world)
    for step in stage:
        look: Look = next(looks)
        with pupil.autocast():
            told = pupil.tower.merger.mlp[2](pupil.middle(look.pixels, look.grids)).float()
        y = wanted(pupil, look).to(told.device)
        weight = token_weights(look.scenes).to(told.device)[:, None]
        left = ((told - y).square() * weight).sum() / (y.square() * weight).sum()
        astray = mistaken(pupil, told, look.labels.to(told.device))
        stage.step(left + plan.apart * astray)
        if step % 20 == 0:
            stage.log(loss=left.item(), astray=astray.item())
    pupil.tower.requires_grad_(False)


@torch.no_grad()
def align(pupil: Pupil, plan: Plan, *, seed: int, workers: int = 0) -> float:
    """Set the tower's last matrix so that its features come nearest to sums of word vectors (least squares).

    Returns the share of the vectors' (weighted) power that is explained on scenes that had no part in it.
    """
    width = pupil.tower.merger.hidden_size + 1
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(width, pupil.vectors.shape[1], dtype=torch.float64)
    checks = []
    looks = Looks(pixels=plan.tower_pixels, seed=_ALIGN + seed, steps=plan.align_steps)
    for step, look in enumerate(load_steps(looks, 0, workers)):
        hidden = pupil.middle(look.pixels, look.grids).cpu().double()
        weight = token_weights(look.scenes).double().sqrt()[:, None]
        x = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], dim=1) * weight
        y = wanted(pupil, look).double() * weight
        if step < len(looks) * 5 // 6:
            gram += x.T @ x
            cross += x.T @ y
        else:
            checks.append((x, y))
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    solution = torch.linalg.solve(gram + ridge, cross)
    last = pupil.tower.merger.mlp[2]
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])
    left = sum(float(((x @ solution - y) ** 2).sum()) for x, y in checks)
    return 1 - left / sum(float((y**2).sum()) for _, y in checks)


