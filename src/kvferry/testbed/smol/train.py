"""Train the model grown on SmolLM2: `python -m kvferry.testbed.smol.train --out RUN [--resume] [--device cuda]`.

Stages: `tower` (dense heads on photographs; attention is never guided), `answer` (the projector is set by least squares
to give the language model's own word vectors; then it and a low-rank update learn, by the language-modelling loss and
now and then a text on which the unchanged model is the teacher), `export` (RUN/model). A run that was stopped
goes on with `--resume`; `--fresh-tower` takes over a tower that was trained further, and aligns it again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kvferry.models.grown import WEIGHTS
from kvferry.testbed.attention import use_training_attention
from kvferry.testbed.joint import token_weights
from kvferry.testbed.language import accuracy_by_kind
from kvferry.testbed.runlog import Stage
from kvferry.testbed.slots import Batch
from kvferry.testbed.state import load_state
from kvferry.testbed.targets import multi_hot
from kvferry.testbed.tower import DenseHeads, dense_loss, middle, speed_up
from kvferry.testbed.words import IMAGE_PAD

from .build import LANGUAGE, RENAMED, TOWER, build_tokenizer, grow, write_folder
from .data import Lesson, Lessons, Look, Looks, Task
from .lowrank import LowRankUpdate
from .prompts import Prompts
from .text import Texts
from .vectors import label_vectors

STAGES = ("tower", "answer", "export")
_PAD = {name: token for token, name in RENAMED.items()}[IMAGE_PAD]
_ALIGN = 10_000
"""Added to the seed of the scenes that the projector is set on."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast each stage runs; steps of `answer` are pictures x slots questions each."""

    tower_steps: int = 3000
    tower_rate: float = 8e-4
    tower_seconds: float = math.inf
    tower_pixels: int = 16 * 128 * 128
    align_steps: int = 80
    answer_steps: int = 6000
    answer_rate: float = 4e-4
    answer_seconds: float = math.inf
    vision: float = 2.0
    rank: int = 16
    layers: int | None = None
    """Of SmolLM2's, the first so many; all by default."""
    every_text: int = 4
    text_weight: float = 1.0
    whole: bool = False
    """Whether the tower learns in the stage `answer` too: dear on a CPU, cheap beside a GPU's language model."""
    task: Task = field(default_factory=Task)


class Pupil:
    """The model in training, with what belongs to it."""

    def __init__(self, language: str, tower: str, plan: Plan, *, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.language = language
        self.model = grow(language, tower, plan.layers)
        self.tokenizer = build_tokenizer(language)
        self.prompts = Prompts(self.tokenizer)
        self.device = torch.device(device)
        self.model.requires_grad_(False).to(self.device)
        self.tower: Any = self.model.model.visual
        self.words: Any = self.model.model.language_model
        self.update = LowRankUpdate(self.words.layers, plan.rank).to(self.device)
        self.heads = DenseHeads(self.tower.merger.hidden_size).to(self.device)
        self.vectors = label_vectors(self.tokenizer, self.words.embed_tokens.weight.cpu()).to(self.device)
        speed_up(self.tower)
        use_training_attention(self.model.model.visual)

    def autocast(self) -> torch.autocast:
        """bfloat16 where the processor multiplies it quickly."""
        quick = self.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=quick)

    def middle(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """The tower's activations before its last matrix, `[tokens, 4 * width]`."""
        return middle(self.tower, pixels.to(self.device), grids.to(self.device))

    def features(self, lesson: Lesson) -> torch.Tensor | None:
        """What the language model sees of a lesson's pictures; None where there are none."""
        if not lesson.scenes:
            return None
        seen = self.middle(lesson.pixels, lesson.grids)
        features: torch.Tensor = self.tower.merger.mlp[2](seen)
        return features

    def answers(self, batch: Batch, features: torch.Tensor | None) -> torch.Tensor:
        """Logits at every answer token, float32 `[answers, vocabulary]`."""
        ids = batch.ids.to(self.device)
        embedded = self.words.embed_tokens(ids)
        if features is not None:
            embedded = embedded.masked_scatter((ids == _PAD)[..., None], features.to(embedded.dtype))
        hidden = self.words(
            inputs_embeds=embedded, attention_mask=batch.mask.to(self.device),
            position_ids=batch.positions.to(self.device), use_cache=False,
        ).last_hidden_state  # fmt: skip
        rows = tuple(index.to(self.device) for index in batch.rows)
        logits: torch.Tensor = self.model.lm_head(hidden[rows])
        return logits.float()


def load_steps(steps: Lessons | Looks, start: int, workers: int) -> Iterator[Any]:
    """Lessons from a step on, drawn ahead by other processes where there are some."""
    order = range(start, len(steps))
    return iter(DataLoader(steps, batch_size=None, sampler=order, num_workers=workers))


def train_tower(pupil: Pupil, folder: Path, plan: Plan, *, seed: int, resume: bool, workers: int) -> None:
    """The whole tower but its last matrix learns what is at each token, and beside it, from labels alone."""
    pupil.tower.requires_grad_(True)
    modules: dict[str, nn.Module] = {"tower": pupil.tower, "heads": pupil.heads}
    stage = Stage(
        folder, "tower", modules, steps=plan.tower_steps, rate=plan.tower_rate, resume=resume, faster={"heads": 3.0},
        limit=plan.tower_seconds,
    )  # fmt: skip
    looks = load_steps(Looks(pixels=plan.tower_pixels, seed=seed, steps=plan.tower_steps), stage.done, workers)
    for step in stage:
        look: Look = next(looks)
        with pupil.autocast():
            logits = pupil.heads(pupil.middle(look.pixels, look.grids))
        loss, accuracy = dense_loss(logits, look.labels.to(pupil.device), 1.0)
        stage.step(loss)
        if step % 20 == 0:
            stage.log(loss=loss.item(), **{key: round(value, 3) for key, value in accuracy.items()})
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
        y = (torch.from_numpy(multi_hot(look.labels.numpy())) @ pupil.vectors.cpu()).double() * weight
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


def stays(pupil: Pupil, texts: Texts, step: int) -> torch.Tensor:
    """How far the update moves what the model says about a text (mean KL from the unchanged model, in nats)."""
    ids = texts.batch(step).to(pupil.device)
    with torch.no_grad(), pupil.update.off():
        taught = pupil.model(input_ids=ids).logits.float().log_softmax(-1)
    said = pupil.model(input_ids=ids).logits.float().log_softmax(-1)
    return F.kl_div(said, taught, log_target=True, reduction="none").sum(-1).mean()


def train_answer(
    pupil: Pupil, folder: Path, plan: Plan, texts: Texts | None, *, seed: int, resume: bool, workers: int, fresh: bool
) -> None:
    """Low-rank update and projector together, on answers only."""
    taught = pupil.tower if plan.whole else pupil.tower.merger.mlp[2]
    taught.requires_grad_(True)
    modules: dict[str, nn.Module] = {"update": pupil.update, "vision": taught}
    stage = Stage(
        folder, "answer", modules, steps=plan.answer_steps, rate=plan.answer_rate, resume=resume,
        faster={"vision": plan.vision}, limit=plan.answer_seconds,
    )  # fmt: skip
    if fresh or (stage.done == 0 and not (folder / "model" / WEIGHTS).is_file()):
        print(f"aligned: {align(pupil, plan, seed=seed, workers=workers):.3f} of the power explained", flush=True)
    lessons = Lessons(pupil.prompts, plan.task, seed=seed, steps=plan.answer_steps)
    loader = load_steps(lessons, stage.done, workers)
    recent: dict[str, list[float]] = {}
    moved = 0.0
    for step in stage:
        lesson: Lesson = next(loader)
        with pupil.autocast():
            logits = pupil.answers(lesson.batch, pupil.features(lesson))
            apart = stays(pupil, texts, step) if texts and step % plan.every_text == 0 else torch.zeros(())
        moved = apart.item() if texts and step % plan.every_text == 0 else moved
        answers = F.cross_entropy(logits, lesson.batch.wanted.to(pupil.device))
        stage.step(answers + plan.text_weight * apart)
        for kind, share in accuracy_by_kind(logits.detach().cpu(), lesson.batch).items():
            recent.setdefault(kind, []).append(share)
        if step % 10 == 9:
            shares = {kind: round(float(np.mean(values)), 3) for kind, values in sorted(recent.items())}
            stage.log(loss=round(answers.item(), 3), stays=round(moved, 4), **shares)
            recent.clear()


@torch.no_grad()
def validate(pupil: Pupil, task: Task, *, steps: int, seed: int = 0, split: str = "validation") -> dict[str, Any]:
    """Share of fresh questions whose every answer token and end are right (forced), by kind, and their number."""
    lessons = Lessons(pupil.prompts, replace(task, slots=8, kinds=tuple(dict.fromkeys(task.kinds))), seed=seed,
                      steps=steps, split=split)  # fmt: skip
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


def load_run(pupil: Pupil, run: Path) -> None:
    """The newest tower, update and projector of a run, where there are such: its states, else what it exported."""
    exported = run / "model" / WEIGHTS
    if exported.is_file() and not (run / "answer.state").is_file():
        weights = load_file(exported)
        vision, words = "model.visual.", "model.language_model."
        tower = {name.removeprefix(vision): x for name, x in weights.items() if name.startswith(vision)}
        pupil.tower.load_state_dict(tower)
        pupil.update.take({name.removeprefix(words): x for name, x in weights.items() if name.startswith(words)})
    for name in ("tower", "answer"):
        path = run / f"{name}.state"
        if not path.is_file():
            continue
        state = load_state(path)["modules"]
        if name == "tower":
            kept = {key: x for key, x in state["tower"].items() if not key.startswith("merger.mlp.2")}
            pupil.tower.load_state_dict(kept, strict=False)
            pupil.heads.load_state_dict(state["heads"])
        else:
            pupil.update.load_state_dict(state["update"])
            whole = "patch_embed.proj.weight" in state["vision"]
            (pupil.tower if whole else pupil.tower.merger.mlp[2]).load_state_dict(state["vision"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--language", default=LANGUAGE, help="a Llama: folder, GGUF or name")
    parser.add_argument("--tower", default=TOWER, help="the Qwen2-VL whose tower to begin with")
    parser.add_argument("--text", type=Path, help="JSON lines, context and questions: what is said of them stays")
    parser.add_argument("--only", choices=STAGES, action="append", help="run this stage alone (may be repeated)")
    parser.add_argument("--validate", type=int, metavar="STEPS", help="only measure, on this many batches")
    parser.add_argument("--layers", type=int, help="only the first layers of the language model, for an edge")
    parser.add_argument("--rank", type=int, default=Plan.rank, help="of the update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=Task.pictures, help="a step")
    parser.add_argument("--slots", type=int, default=Task.slots, help="questions behind each picture")
    parser.add_argument("--steps", type=int, default=Plan.answer_steps, help="of the stage answer")
    parser.add_argument("--tower-steps", type=int, default=Plan.tower_steps)
    parser.add_argument("--rate", type=float, default=Plan.answer_rate, help="of learning, of the stage answer")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for the stage answer; its schedule fits in")
    parser.add_argument("--tower-minutes", type=float, default=math.inf)
    parser.add_argument("--tower-pictures", type=int, default=16, help="a step, if they were small")
    parser.add_argument("--align-steps", type=int, default=Plan.align_steps)
    parser.add_argument("--whole", action="store_true", help="the tower learns from answers too (for a GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on where a stopped run was")
    parser.add_argument("--fresh-tower", action="store_true", help="align anew: the tower was trained further")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = Task(pictures=arguments.pictures, slots=arguments.slots)
    plan = Plan(
        tower_steps=arguments.tower_steps,
        tower_seconds=60 * arguments.tower_minutes,
        tower_pixels=arguments.tower_pictures * 128 * 128,
        align_steps=arguments.align_steps,
        answer_steps=arguments.steps,
        answer_rate=arguments.rate,
        answer_seconds=60 * arguments.minutes,
        rank=arguments.rank,
        layers=arguments.layers,
        whole=arguments.whole,
        task=task,
    )
    pupil = Pupil(arguments.language, arguments.tower, plan, seed=arguments.seed, device=arguments.device)
    run, stages, seed = arguments.out, tuple(arguments.only or STAGES), arguments.seed
    load_run(pupil, run)
    if arguments.validate:
        print(json.dumps(validate(pupil, task, steps=arguments.validate), indent=1))
        return
    rows = max(1, task.pictures // 8)
    texts = Texts(arguments.text, pupil.tokenizer, rows=rows, seed=seed) if arguments.text else None
    if "tower" in stages:
        train_tower(pupil, run, plan, seed=seed, resume=arguments.resume, workers=arguments.workers)
    if "answer" in stages:
        train_answer(
            pupil, run, plan, texts, seed=seed, resume=arguments.resume, workers=arguments.workers,
            fresh=arguments.fresh_tower,
        )  # fmt: skip
    if "export" in stages:
        write_folder(pupil.model, pupil.tokenizer, pupil.update, pupil.language, run / "model")


if __name__ == "__main__":
    main()
