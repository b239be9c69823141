"""The language model learns to answer: from symbols first, then from what the tower sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kvferry.testbed.language import accuracy_by_kind
from kvferry.testbed.runlog import Stage
from kvferry.testbed.targets import dense_labels, multi_hot

from .data import Lesson, Lessons, Task
from .english import KINDS, MOST_IN_CAPTION
from .pupil import Plan, Pupil
from .seeing import BESIDE, load_steps
from .text import Texts

_SYMBOLS = 20_000
"""Added to the seed of symbolic lessons."""


def stays(pupil: Pupil, texts: Texts, step: int) -> torch.Tensor:
    """How far the update moves what the model says about a text (mean KL from the unchanged model, in nats)."""
    ids = texts.batch(step).to(pupil.device)
    with torch.no_grad(), pupil.update.off():
        taught = pupil.model(input_ids=ids).logits.float().log_softmax(-1)
    said = pupil.model(input_ids=ids).logits.float().log_softmax(-1)
    return F.kl_div(said, taught, log_target=True, reduction="none").sum(-1).mean()


def symbols(pupil: Pupil, lesson: Lesson, plan: Plan, seed: int) -> torch.Tensor | None:
    """What a perfect tower would give the language model of a lesson's pictures, and some noise."""
    if not lesson.scenes:
        return None
    generator = torch.Generator().manual_seed(seed)
    labels = multi_hot(np.concatenate([dense_labels(scene) for scene in lesson.scenes]))
    if torch.rand((), generator=generator) >= plan.beside:
        labels[:, BESIDE:] = 0
    told = torch.from_numpy(labels) @ pupil.vectors.cpu()
    noise = torch.randn(told.shape, generator=generator) * told.square().mean().sqrt()
    return (told + plan.noise * noise).to(pupil.device)


def train_answers(
    pupil: Pupil, folder: Path, plan: Plan, texts: Texts | None, *, seed: int, resume: bool, workers: int,
    symbolic: bool = False,
) -> None:
    """The low-rank update learns to answer: from symbols alone (stage ``symbol``), or with the projector from pictures.

    Every so many steps a text is read, which must be continued as the unchanged model would.
    """
    modules: dict[str, nn.Module] = {"update": pupil.update}
    if not symbolic:
        modules |= {"projector": pupil.projector, "seeing": pupil.seeing}
        pupil.tower.requires_grad_(True)
    name, steps, limit = (
        ("symbol", plan.symbol_steps, plan.symbol_seconds) if symbolic
        else ("answer", plan.answer_steps, plan.answer_seconds)
    )  # fmt: skip
    stage = Stage(
        folder, name, modules, steps=steps, rate=plan.answer_rate, resume=resume,
        faster={"projector": plan.projector, "seeing": plan.seeing}, limit=limit, last=0.5 if symbolic else 0.02,
    )  # fmt: skip
    rank, world = stage.together.rank, stage.together.world
    stage.together.share(stage.parameters)
    lessons = Lessons(pupil.prompts, plan.task, seed=seed + (_SYMBOLS if symbolic else 0), steps=steps * world)
    loader = load_steps(lessons, stage.done, workers, rank, world)
    recent: dict[str, list[float]] = {}
    for step in stage:
        lesson: Lesson = next(loader)
        with pupil.autocast():
            seen = symbols(pupil, lesson, plan, seed + step * world + rank) if symbolic else pupil.features(lesson)
            logits = pupil.answers(lesson.batch, seen)
        loss = F.cross_entropy(logits, lesson.batch.wanted.to(pupil.device))
        recent.setdefault("loss", []).append(loss.item())
        if texts and step % plan.every_text == 0:
            with pupil.autocast():
                moved = stays(pupil, texts, step * world + rank)
            recent.setdefault("stays", []).append(moved.item())
            loss = loss + plan.text_weight * moved
        stage.step(loss)
        for kind, share in accuracy_by_kind(logits.detach().cpu(), lesson.batch).items():
            recent.setdefault(kind, []).append(share)
        if step % 20 == 19:
            stage.log(**{kind: round(float(np.mean(values)), 3) for kind, values in sorted(recent.items())})
            recent.clear()
    pupil.tower.requires_grad_(False)


@torch.no_grad()
def validate(pupil: Pupil, task: Task, *, steps: int, seed: int = 0, split: str = "validation") -> dict[str, Any]:
    """Share of fresh questions whose every answer token and end are right (forced), by kind, and their number."""
    kinds = tuple(kind for kind in dict.fromkeys(task.kinds) if kind in KINDS)
    asked = replace(task, slots=8, kinds=kinds, most_in_caption=MOST_IN_CAPTION)
    lessons = Lessons(pupil.prompts, asked, seed=seed, steps=steps, split=split)
    right: dict[str, list[float]] = {}
    for step in range(steps):
        lesson = lessons[step]
        with pupil.autocast():
            logits = pupil.answers(lesson.batch, pupil.features(lesson)).cpu()
        good = torch.ones(len(lesson.batch.kinds))
        good[lesson.batch.questions[logits.argmax(-1) != lesson.batch.wanted]] = 0
        for kind, value in zip(lesson.batch.kinds, good.tolist(), strict=True):
            right.setdefault(kind, []).append(value)
    return {
        "kinds": {kind: {"n": len(x), "accuracy": round(float(np.mean(x)), 3)} for kind, x in sorted(right.items())},
        "mean": round(float(np.mean([np.mean(x) for x in right.values()])), 3),
    }


