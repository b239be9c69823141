"""A file of questions about drawn pictures whose answers are those of a small untrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kvferry.models import VLM, load
from kvferry.testbed import samples
from kvferry.testbed.build import Size, build_model, write_folder

QUESTIONS = ("what is red ?", "how many shapes ?", "is it blue ?")


def write_small_model(path: Path) -> Path:
    """Two layers whose answers depend on the picture."""
    size = Size(layers=2, hidden=64, heads=2, kv_heads=1, intermediate=96, tower_depth=1, tower_width=32, tower_heads=2)
    model = build_model(size)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "language_model" in name:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)
    write_folder(model, path)
    return path


def own_rows(model: Path, folder: Path, n: int = 4, longest: int = 4) -> list[dict[str, Any]]:
    """Two questions on each picture, with all that the full cache says under protocol A and B."""
    vlm: VLM = load(model)
    rows: list[dict[str, Any]] = []
    for index in range(n):
        (drawn,) = samples("validation", 1, start=index // 2)
        name = f"{index // 2}.png"
        drawn.images[0].save(folder / name)
        question = QUESTIONS[index % len(QUESTIONS)]
        before = vlm.prefill(drawn.images[:1]).cache
        said = [
            vlm.answer(vlm.prefill(drawn.images[:1], question).cache, max_new_tokens=longest),
            vlm.answer(before, question, max_new_tokens=longest),
        ]
        rows.append({"image": name, "question": question, "answers": said, "kind": f"kind {index % 2}"})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
