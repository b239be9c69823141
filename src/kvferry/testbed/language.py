"""Train the language model: on symbolic pictures first, alone, then with the real tower before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .attention import WATCHER, use_training_attention
from .questions import MAKERS, Question, ask, ask_pair
from .runlog import Stage
from .scenes import Scene, draw_scene
from .slots import Batch, Guide, Packed, collate, pack
from .targets import WIDTH, dense_labels, multi_hot
from .words import IMAGE_PAD, TOKEN_ID

Pictures = list[tuple[Scene, ...]]


@dataclass(frozen=True)
class Task:
    """What a model is taught: kinds of questions (hard ones more often), the share of pairs, slots per picture."""

    kinds: tuple[str, ...] = (*MAKERS, *("number", "relation", "two_hop") * 4, *("count",) * 9)
    pairs: float = 0.16
    slots: int = 16


class SymbolicPicture(nn.Module):
    """A picture without a tower: every visual token is the sum of the vectors of its labels."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.vectors = nn.Linear(WIDTH, hidden)
        nn.init.normal_(self.vectors.weight, std=0.5)

    def forward(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """`[tokens, hidden]` of all scenes, one after another."""
        hot = np.concatenate([multi_hot(dense_labels(scene)) for scene in scenes])
        features: torch.Tensor = self.vectors(torch.from_numpy(hot))
        return features

    def disturbed(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """The same as a hesitant tower would see it: some labels missing, some noise."""
        hot = torch.from_numpy(np.concatenate([multi_hot(dense_labels(scene)) for scene in scenes]))
        hot = hot * (torch.rand_like(hot) > 0.02) * (1 + 0.1 * torch.randn_like(hot))
        features: torch.Tensor = self.vectors(hot)
        return features + 0.1 * torch.randn_like(features)


def draw_questions(rng: np.random.Generator, scenes: tuple[Scene, ...], task: Task) -> list[Question]:
    """As many different questions as there are slots, kinds as even as the scene allows."""
    found: dict[str, Question] = {}
    kinds = list(task.kinds)
    for _ in range(4 * task.slots):
        if len(found) == task.slots:
            break
        if len(scenes) == 2:
            question = ask_pair(rng, (scenes[0], scenes[1]))
        else:
            question = ask(rng, scenes[0], kinds[int(rng.integers(len(kinds)))])
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def draw_batch(
    rng: np.random.Generator, task: Task, count: int, width: int, height: int, *, guided: bool, pair: bool
) -> tuple[Pictures, Batch]:
    """Fresh scenes of one size with their questions, packed."""
    pictures: Pictures = []
    packed: list[Packed] = []
    kinds: list[list[str]] = []
    while len(pictures) < (max(1, count * 2 // 3) if pair else count):
        scenes = tuple(draw_scene(rng, width, height) for _ in range(2 if pair else 1))
        if questions := draw_questions(rng, scenes, task):
            pictures.append(scenes)
            packed.append(pack(scenes, questions, guided=guided))
            kinds.append([question.kind for question in questions])
    return pictures, collate(packed, kinds)


def answer_logits(model: Any, batch: Batch, features: torch.Tensor) -> torch.Tensor:
    """Logits at every answer token, `[answers, words]`; `features` are the picture tokens of the batch in order."""
    embedded = model.model.language_model.embed_tokens(batch.ids)
    embedded = embedded.masked_scatter((batch.ids == TOKEN_ID[IMAGE_PAD])[..., None], features.to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    logits: torch.Tensor = model.lm_head(hidden[batch.rows])
    return logits.float()


def accuracy_by_kind(logits: torch.Tensor, batch: Batch) -> dict[str, float]:
    """Share of questions whose every answer token is right, by kind."""
    right = torch.ones(len(batch.kinds))
    wrong = logits.argmax(-1) != batch.wanted
    right[batch.questions[wrong]] = 0
    kinds = np.array(batch.kinds)
    return {kind: float(right[torch.from_numpy(kinds == kind)].mean()) for kind in sorted(set(batch.kinds))}


def guide_layers(layers: int) -> dict[str, tuple[int, ...]]:
    """Which layers play which role: links inside notes and pictures, reading the question, looking up."""
    return {"link": (0,), "read": (1,), "look": (2, 3) if layers <= 4 else (3, 4)}


def _watch(guides: list[list[Guide]], layers: dict[str, tuple[int, ...]]) -> dict[int, tuple[list[int], list[Guide]]]:
    chosen: dict[int, tuple[list[int], list[Guide]]] = {}
    for b, group in enumerate(guides):
        for guide in group:
            for layer in layers[guide.role]:
                batch, kept = chosen.setdefault(layer, ([], []))
                batch.append(b)
                kept.append(guide)
    return chosen


def guided_forward(model: Any, batch: Batch, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the answers, and how far attention is from where it should look (mean -log attention)."""
    chosen = _watch(batch.guides, guide_layers(model.config.text_config.num_hidden_layers))
    rows = {
        layer: (torch.tensor(batches), torch.tensor([guide.row for guide in kept]))
        for layer, (batches, kept) in chosen.items()
    }
    WATCHER.look(rows)
    logits = answer_logits(model, batch, features)
    losses = []
    for layer, (_, kept) in chosen.items():
        weights = WATCHER.seen[layer]
        target = torch.zeros(weights.shape[0], weights.shape[2])
        for index, guide in enumerate(kept):
            target[index, list(guide.columns)] = 1
        losses.append(-(weights * target[:, None]).sum(-1).mean(-1).clamp_min(1e-6).log().mean())
    WATCHER.look({})
    return logits, torch.stack(losses).sum()


def pick_size(rng: np.random.Generator, progress: float) -> tuple[int, int, int]:
    """Batch size, width and height at a point of the symbolic stage."""
    if progress < 0.3:
        return 24, 96, 96
    if progress < 0.6:
        return 20, 144, 144
    width, height = (int(side) for side in rng.choice((160, 192, 208, 224, 240, 256), 2))
    return 12, width, height


def train_symbolic(
    model: Any, folder: Path, task: Task, *, seed: int, steps: int, rate: float, guided: bool, resume: bool
) -> SymbolicPicture:
    """Teach the language model on symbolic pictures; guidance has faded out after three quarters."""
    use_training_attention(model)
    torch.manual_seed(seed)
    symbols = SymbolicPicture(model.config.text_config.hidden_size)
    modules = {"language": model.model.language_model, "head": model.lm_head, "symbols": symbols}
    stage = Stage(folder, "symbolic", modules, steps=steps, rate=rate, resume=resume)
    for step in stage:
        rng = np.random.default_rng((2, seed, step))
        strength = 0.5 * min(1.0, max(0.0, (0.75 - step / steps) / 0.3)) if guided else 0.0
        size = pick_size(rng, step / steps)
        pair = bool(rng.random() < task.pairs)
        pictures, batch = draw_batch(rng, task, *size, guided=strength > 0, pair=pair)
        features = symbols.disturbed([scene for scenes in pictures for scene in scenes])
        with torch.autocast("cpu", torch.bfloat16):
            if strength > 0:
                logits, astray = guided_forward(model, batch, features)
            else:
                logits, astray = answer_logits(model, batch, features), torch.zeros(())
        loss = F.cross_entropy(logits, batch.wanted)
        stage.step(loss + strength * astray)
        if step % 20 == 0:
            stage.log(loss=loss.item(), astray=astray.item(), **accuracy_by_kind(logits, batch))
    return symbols
