"""Texts on which the grown model must go on saying what SmolLM2 says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvferry.testbed.words import IM_END, IM_START

from .build import SYSTEM
from .prompts import AFTER

_BEFORE = f"{IM_START}system\n{SYSTEM}{IM_END}\n"


class Texts:
    """Paragraphs with questions, as SQuAD has them, in the chat template.

    Parameters
    ----------
    path : Path
        JSON lines with ``context`` and ``questions: [{question, answers}]``.
    """

    def __init__(self, path: Path, tokenizer: Any, *, length: int = 192, rows: int = 1, seed: int = 0) -> None:
        self._tokenizer, self._length, self._rows, self._seed = tokenizer, length, rows, seed
        self._paragraphs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def batch(self, step: int) -> torch.Tensor:
        """Some texts cut to one length, ``[rows, length]``: paragraphs with a question, and questions by themselves."""
        rng = np.random.default_rng((self._seed, step))
        rows: list[list[int]] = []
        while len(rows) < self._rows:
            text = self._alone(rng) if rng.random() < 0.4 else self._about(rng)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= self._length:
                rows.append(ids[: self._length] if rng.random() < 0.5 else ids[-self._length :])
        return torch.tensor(rows)

    def _about(self, rng: np.random.Generator) -> str:
        paragraph, question, answer = self._pick(rng)
        return f"{_BEFORE}{IM_START}user\n{paragraph}\n{question}{AFTER}{answer}{IM_END}"

    def _alone(self, rng: np.random.Generator) -> str:
        """A conversation of questions without their paragraphs."""
        picked = (self._pick(rng) for _ in range(self._length // 12))
        turns = (f"{IM_START}user\n{question}{AFTER}{answer}{IM_END}\n" for _, question, answer in picked)
        return _BEFORE + "".join(turns)

    def _pick(self, rng: np.random.Generator) -> tuple[str, str, str]:
        paragraph = self._paragraphs[int(rng.integers(len(self._paragraphs)))]
        asked = paragraph["questions"][int(rng.integers(len(paragraph["questions"])))]
        return paragraph["context"], asked["question"], asked["answers"][0]
