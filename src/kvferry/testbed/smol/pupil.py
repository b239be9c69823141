"""What is trained: SmolLM2 with a tower before it, its low-rank update, and how long each stage takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from kvferry.models.grown import WEIGHTS
from kvferry.testbed.attention import use_training_attention
from kvferry.testbed.slots import Batch
from kvferry.testbed.state import load_state
from kvferry.testbed.tower import DenseHeads, middle, speed_up
from kvferry.testbed.words import IMAGE_PAD

from .blocks import Blocks, use_blocks
from .build import RENAMED, build_tokenizer, grow
from .data import Lesson, Task
from .lowrank import LowRankUpdate
from .prompts import Prompts
from .vectors import label_vectors

_PAD = {name: token for token, name in RENAMED.items()}[IMAGE_PAD]


@dataclass(frozen=True)
class Plan:
    """How long and how fast each stage runs; steps of `answer` are pictures x slots questions each."""

    tower_steps: int = 3000
    tower_rate: float = 8e-4
    tower_seconds: float = math.inf
    tower_pixels: int = 16 * 128 * 128
    align_steps: int = 80
    match_steps: int = 700
    apart: float = 0.1
    """Weight of telling words apart, beside the squared error."""
    match_seconds: float = math.inf
    symbol_steps: int = 500
    symbol_seconds: float = math.inf
    noise: float = 0.3
    """Added to symbols, as a share of their power's root: what a projector leaves unexplained."""
    beside: float = 0.4
    """Share of symbolic lessons in which a thing's centre says what stands beside it: no tower is sure to."""
    answer_steps: int = 1500
    answer_rate: float = 1.5e-3
    answer_seconds: float = math.inf
    projector: float = 1.0
    seeing: float = 0.3
    """How quickly the tower's last matrix and the rest of it learn from answers, beside the update."""
    rank: int = 16
    layers: int | None = None
    """Of SmolLM2's, the first so many; all by default."""
    every_text: int = 5
    text_weight: float = 1.0
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
        self.projector: nn.Module = self.tower.merger.mlp[2]
        merger = self.tower.merger
        self.seeing = nn.ModuleList([self.tower.patch_embed, self.tower.blocks, merger.ln_q, merger.mlp[0]])
        self.words: Any = self.model.model.language_model
        self.update = LowRankUpdate(self.words.layers, plan.rank).to(self.device)
        self.heads = DenseHeads(self.tower.merger.hidden_size).to(self.device)
        self.vectors = label_vectors(self.tokenizer, self.words.embed_tokens.weight.cpu()).to(self.device)
        speed_up(self.tower)
        use_training_attention(self.model.model.visual)
        if self.device.type == "cpu":
            use_blocks(self.words)

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
        mask: Any = batch.mask.to(self.device)
        if self.device.type == "cpu":
            mask = {"full_attention": tuple(Blocks.of(segments) for segments in batch.segments)}
        hidden = self.words(
            inputs_embeds=embedded, attention_mask=mask, position_ids=batch.positions.to(self.device), use_cache=False,
        ).last_hidden_state  # fmt: skip
        rows = tuple(index.to(self.device) for index in batch.rows)
        logits: torch.Tensor = self.model.lm_head(hidden[rows])
        return logits.float()


def load_run(pupil: Pupil, run: Path) -> None:
    """The newest tower, update and projector of a run, where there are such: its states, else what it exported."""
    exported = run / "model" / WEIGHTS
    if exported.is_file() and not any((run / f"{name}.state").is_file() for name in ("symbol", "answer")):
        weights = load_file(exported)
        vision, words = "model.visual.", "model.language_model."
        tower = {name.removeprefix(vision): x for name, x in weights.items() if name.startswith(vision)}
        pupil.tower.load_state_dict(tower)
        pupil.update.take({name.removeprefix(words): x for name, x in weights.items() if name.startswith(words)})
    for name in ("tower", "match", "symbol", "answer"):
        path = run / f"{name}.state"
        if not path.is_file():
            continue
        state = load_state(path)["modules"]
        modules = {"tower": pupil.tower, "heads": pupil.heads, "update": pupil.update} | {
            "projector": pupil.projector, "seeing": pupil.seeing,
        }  # fmt: skip
        for key, weights in state.items():
            modules[key].load_state_dict(weights)
