"""A small model's cache as a large one's: what ``kvferry fit translator`` learns of a pair of models, as a file.

Y. Fu et al., "Cache-to-Cache: Direct Semantic Communication Between Large Language Models" (arXiv 2510.03215, 2025)
project one model's cache into another's by an MLP for every layer. Here the second model has no cache of its own to mix
that with: the visual tokens' keys and values are the translation alone, and the text is read on top of them by the
second model itself (:mod:`kvferry.models.translated`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from kvferry.cache import LayerCache, PromptLayout
from kvferry.errors import CorruptError, InputError, UnsupportedModelError
from kvferry.lazy import torch
from kvferry.rope import Rotary

Shapes = tuple[tuple[int, int], ...]
"""KV heads and channels of every layer."""
SUFFIX = ".translator"
"""Not .safetensors, though it is one: it may lie beside the weights, whose digest is the model's fingerprint."""
VERSION = 1
LIMIT = 1e4
"""Nothing that is translated is larger: what arrives may be anything that decodes."""
CHUNK = 1024
"""Tokens that are translated at a time."""
_ROTARY = ("scaling", "sections", "interleaved", "neighbours")


def width(shapes: Shapes) -> int:
    """Numbers of a token's keys and values in all layers."""
    return sum(2 * heads * dim for heads, dim in shapes)


def rows_of(layers: Sequence[LayerCache], rotary: Sequence[Rotary | None], where: torch.Tensor) -> torch.Tensor:
    """One row per token, float32 ``[k, p]``: keys, turned back, then values, layer after layer.

    Parameters
    ----------
    layers : sequence of LayerCache
        All of them and all of their heads keep the same ``k`` tokens.
    where : int64 ``[axes, k]``
        Rotary positions of these.
    """
    parts = []
    for layer, way in zip(layers, turns(rotary), strict=True):
        keys = way.unrotate(layer.keys.float(), where)
        parts += [x.transpose(0, 1).flatten(1) for x in (keys, layer.values.float())]
    return torch.cat(parts, 1)


def layers_of(
    rows: torch.Tensor, shapes: Shapes, rotary: Sequence[Rotary | None], where: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Undo :func:`rows_of`: keys, turned to their positions, and values of every layer, ``[heads, k, channels]``."""
    sizes = [heads * dim for heads, dim in shapes for _ in range(2)]
    found = []
    parts = iter(torch.split(rows, sizes, 1))
    for (heads, dim), way in zip(shapes, turns(rotary), strict=True):
        keys, values = (next(parts).view(len(rows), heads, dim).transpose(0, 1) for _ in range(2))
        found.append((way.rotate(keys, where), values))
    return found


def turns(rotary: Sequence[Rotary | None]) -> list[Rotary]:
    """How every layer turns its keys.

    Raises
    ------
    UnsupportedModelError
        One does not by a fixed rotation.
    """
    known = [way for way in rotary if way is not None]
    if len(known) < len(rotary):
        raise UnsupportedModelError(
            "a translator turns keys back and forth, and a layer here has no fixed rotation (its frequencies follow "
            "from the prompt's length, or are unknown); send the picture (mode image)"
        )
    return known


@dataclass(frozen=True)
class Translator:
    """From the keys and values that one model has of a token to those that another has of it.

    ``y = mean_out + scale_out * (z W + b + gelu(z V + a) U)`` with ``z = (x - mean_in) / scale_in``: a ridge regression
    and a small network that adds what is not linear. ``W`` has zeros where a layer does not look.

    Parameters
    ----------
    source, target : str
        Fingerprints of the two models.
    prompts : str
        The prompt fingerprint that both have: tokenizer, template and patch grid.
    shapes : Shapes
        The source's.
    target_shapes : Shapes
    rotary : tuple of Rotary or None
        The source's, layer by layer.
    tensors : dict of str to float tensor
        ``mean_in``, ``scale_in`` ``[p]``, ``mean_out``, ``scale_out``, ``offset`` ``[q]``, ``linear`` ``[p, q]``,
        ``into`` ``[p, h]``, ``into_offset`` ``[h]``, ``out`` ``[h, q]``; ``h`` may be 0.
    facts : dict
        How it was made.
    digest : str
        First 32 digits of the file's SHA-256; empty before it is written.
    """

    source: str
    target: str
    prompts: str
    shapes: Shapes
    target_shapes: Shapes
    rotary: tuple[Rotary | None, ...]
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    def __post_init__(self) -> None:
        p, q, t = width(self.shapes), width(self.target_shapes), self.tensors
        hidden = t["into_offset"].shape[0]
        wanted = {
            "mean_in": (p,), "scale_in": (p,), "mean_out": (q,), "scale_out": (q,), "offset": (q,), "linear": (p, q),
            "into": (p, hidden), "into_offset": (hidden,), "out": (hidden, q),
        }  # fmt: skip
        if {name: tuple(x.shape) for name, x in t.items()} != wanted or len(self.rotary) != len(self.shapes):
            raise InputError(f"a translator from {p} to {q} numbers a token does not hold them")
        turns(self.rotary)

    @property
    def hidden(self) -> int:
        """Units of the network; 0 where it is a ridge regression alone."""
        return int(self.tensors["into_offset"].shape[0])

    @property
    def multiplications(self) -> int:
        """Per token."""
        p, q = width(self.shapes), width(self.target_shapes)
        return p * q + self.hidden * (p + q)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """``[k, p]`` of the source to ``[k, q]`` of the target, float32."""
        return apply(self.tensors, x)

    def __call__(
        self, layers: Sequence[LayerCache], layout: PromptLayout, rotary: Sequence[Rotary | None], index: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the target's layers, ``[heads, k, channels]``.

        Parameters
        ----------
        layers : sequence of LayerCache
            The source's, which keep the tokens ``index`` in all heads.
        rotary : sequence of Rotary
            The target's.
        index : int64 ``[k]``
            Where they stand in the prompt.

        Raises
        ------
        CorruptError
            The translation is no number.
        """
        where = torch.from_numpy(layout.positions[:, index.cpu().numpy()].astype(np.int64))
        found = torch.empty(len(index), width(self.target_shapes))
        for first in range(0, len(index), CHUNK):
            some = slice(first, first + CHUNK)
            part = [
                LayerCache(y.keys[:, some].cpu(), y.values[:, some].cpu(), y.positions[:, some].cpu()) for y in layers
            ]
            found[some] = self.rows(rows_of(part, self.rotary, where[:, some]))
        if bool(found.isnan().any()):
            raise CorruptError("the translated keys and values are no numbers; have the cache sent again")
        return layers_of(found.clamp(-LIMIT, LIMIT), self.target_shapes, rotary, where)

    def to_bytes(self) -> bytes:
        """One safetensors file; all numbers in float16 but the means and scales."""
        from safetensors.torch import save

        exact = ("mean_in", "scale_in", "mean_out", "scale_out")
        tensors = {k: x.float() if k in exact else x.clamp(-65504, 65504).half() for k, x in self.tensors.items()}
        for layer, way in enumerate(turns(self.rotary)):
            tensors[f"inv_freq.{layer}"] = way.inv_freq
        rotary = [{name: getattr(way, name) for name in _ROTARY} for way in turns(self.rotary)]
        about = {
            "kind": "translator", "version": VERSION, "source": self.source, "target": self.target,
            "prompts": self.prompts, "shapes": self.shapes, "target_shapes": self.target_shapes, "rotary": rotary,
            "facts": self.facts,
        }  # fmt: skip
        return bytes(save({k: x.contiguous().clone() for k, x in tensors.items()}, {"kvferry": json.dumps(about)}))


def apply(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The formula of :class:`Translator`; differentiable."""
    z = (x - tensors["mean_in"]) / tensors["scale_in"]
    y = z @ tensors["linear"] + tensors["offset"]
    if tensors["into_offset"].shape[0]:
        y = y + torch.nn.functional.gelu(z @ tensors["into"] + tensors["into_offset"]) @ tensors["out"]
    return y * tensors["scale_out"] + tensors["mean_out"]


def read(path: Path) -> Translator:
    """The translator in a file.

    Raises
    ------
    InputError
        There is no such file, or it is none.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["kvferry"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if about.get("kind") != "translator":
            raise ValueError(f"it is a {about.get('kind', 'transform')} profile")
        if about["version"] > VERSION:
            raise ValueError(f"version {about['version']}, of a newer kvferry")
        if not all(bool(x.isfinite().all()) for x in tensors.values()):
            raise ValueError("it holds NaN or infinity")
        ways = tuple(
            Rotary(tensors.pop(f"inv_freq.{i}"), **{**way, "sections": tuple(way["sections"])})
            for i, way in enumerate(about["rotary"])
        )
        own, target = (tuple((int(h), int(d)) for h, d in about[name]) for name in ("shapes", "target_shapes"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        pair = about["source"], about["target"], about["prompts"]
        return Translator(*pair, own, target, ways, tensors, about["facts"], digest)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path} is no translator ({error}); make one by `kvferry fit translator EDGE CLOUD --out {path}`"
        ) from None
