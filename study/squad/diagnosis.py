"""Whether few layers suffer from few bits, and how many singular values hold a layer's energy, on validation texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvferry.analyze.energy import top_energy
from kvferry.codecs.mixed import PARTS
from kvferry.evaluate.sweep import carry
from kvferry.fit.diagnose import decide
from kvferry.models import VLM
from kvferry.recipe import Recipe
from study.squad.asking import BATCH
from study.squad.board import Board
from study.squad.prompts import Prompt
from study.squad.reading import Reader
from study.squad.saying import Asking, cache_answers, ends_of, full_answers
from study.squad.texts import Text

Floats = npt.NDArray[np.float64]
SPARED = 4
"""One layer in so many is spared in the profile ``mixed``."""


@dataclass(frozen=True)
class Damage:
    """Of ``n`` questions. ``kl`` and ``changed`` ``[n, 1 + layers]``: nats a token, and whether the full cache's answer
    changed, with all layers in few bits, then with each alone; ``energy`` ``[n, 2, layers]``: what the top 5 % of the
    singular values of keys and values hold."""

    kl: Floats
    changed: Floats
    energy: Floats


def measure(vlm: VLM, prompt: Prompt, text: Text, bits: int) -> Iterable[tuple[Floats, Floats, Floats]]:
    """The rows of :class:`Damage` for every question of a text."""
    ids, ends = prompt.before(vlm.tokenizer, text.words), ends_of(vlm)
    reader = Reader(vlm, ids, ())
    for question in text.questions:
        asked = prompt.asked(vlm.tokenizer, question.text)
        prefilled = reader.read(asked, len(asked), len(ids) + len(asked) - 1)
        full = carry(prefilled, Recipe.parse("full|bf16")).cache
        coarse = carry(prefilled, Recipe.parse(f"full|int{bits}")).cache
        visible = torch.ones(1, vlm.layers, vlm.kv_heads, full.length, dtype=torch.bool)
        (asking,) = full_answers(Board(vlm, full.layers, visible), [Asking(full.length, (asked[-1],))], ends)
        caches = [coarse]
        for layer in range(vlm.layers):
            layers = [*full.layers]
            layers[layer] = coarse.layers[layer]
            caches.append(replace(full, layers=tuple(layers)))
        said = [
            x for i in range(0, len(caches), BATCH) for x in cache_answers(vlm, caches[i : i + BATCH], asking, ends)
        ]
        sides = [[x.keys for x in full], [x.values for x in full]]
        energy = np.stack([
            top_energy(torch.stack([x.transpose(0, 1).flatten(1).float() for x in side])) for side in sides
        ])  # fmt: skip
        yield (
            np.array([x.kl for x in said]),
            np.array([float(x.ids != asking.along) for x in said]),
            energy.reshape(2, -1),
        )


def found(damage: Damage, bits: int) -> dict[str, Any]:
    """The sources' recipe, with a changed answer for a loss; and the layers by their own KL."""
    losses, kl = damage.changed.mean(0), damage.kl.mean(0)
    pattern, bottlenecks = decide(float(losses[0]), losses[1:].tolist())
    order = np.argsort(-kl[1:]).tolist()
    return {
        "bits": bits, "pattern": pattern, "bottlenecks": list(bottlenecks), "n": len(damage.kl),
        "losses": losses.tolist(), "order": order, "kl": damage.kl.round(6).tolist(),
        "changed": damage.changed.tolist(), "energy": damage.energy.round(4).tolist(),
    }  # fmt: skip


def profile(fingerprint: str, widths: Sequence[int]) -> dict[str, Any]:
    """For the codec ``mixed@FILE``."""
    return {"fingerprint": fingerprint, "bits": {part: list(widths) for part in PARTS}}


def write_profiles(folder: Path, fingerprint: str, order: Sequence[int], bits: int) -> None:
    """``protected.json``: the worst layer at 16 bits; ``mixed.json``: the worst quarter at 8."""
    layers = len(order)
    for name, spared, width in (("protected", 1, 16), ("mixed", max(1, layers // SPARED), 8)):
        widths = [width if layer in order[:spared] else bits for layer in range(layers)]
        (folder / f"{name}.json").write_text(json.dumps(profile(fingerprint, widths)) + "\n")
