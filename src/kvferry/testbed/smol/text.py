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
        """Some texts cut to one length, ``[rows, length]``: half from their beginning, half up to their end."""
        rng = np.random.default_rng((self._seed, step))
        rows: list[list[int]] = []
        while len(rows) < self._rows:
            paragraph = self._paragraphs[int(rng.integers(len(self._paragraphs)))]
            asked = paragraph["questions"][int(rng.integers(len(paragraph["questions"])))]
            user = f"{paragraph['context']}\n{asked['question']}"
            text = f"{IM_START}system\n{SYSTEM}{IM_END}\n{IM_START}user\n{user}{AFTER}{asked['answers'][0]}{IM_END}"
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= self._length:
                rows.append(ids[: self._length] if rng.random() < 0.5 else ids[-self._length :])
        return torch.tensor(rows)
