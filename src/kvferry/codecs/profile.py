"""What ``kvferry fit`` learns of a model's caches, as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError, safe_open

from kvferry.cache import PromptLayout
from kvferry.codecs.base import LIMIT
from kvferry.errors import CorruptError, InputError
from kvferry.lazy import torch
from kvferry.rope import Rotary

DIGEST = 4
OCTAVE = 8
"""Standard deviations are counted in eighths of an octave: ``2 ** (octaves / 8)``."""
VERSION = 3
"""Of the file: 3 with trees for bases, 2 where visual tokens are predicted from each other; else 1. A newer one is
refused."""
_ROTARY = ("scaling", "sections", "interleaved", "neighbours")


@dataclass(frozen=True, eq=False)
class Basis:
    """How a token's keys (un-rotated) and values of all layers and heads become few numbers, and back.

    ``c = vectors.T @ W (x - mean)``: ``W`` makes a unit of error cost the same in every direction, as far as that can
    be said block by block; the vectors are principal axes there. Error of size ``e`` in ``c`` is an error
    ``W^-1 vectors e`` in ``x``.

    Parameters
    ----------
    mean : float32 ``[p]``
        ``p = layers * kv_heads * 2 * head_dim``, in the order ``[layer, head, key or value, channel]``.
    weight : float32 ``[layers * kv_heads * 2, head_dim, head_dim]``
        Symmetric and positive: the diagonal blocks of ``W``.
    vectors : float32 ``[p, r]``
        Orthonormal columns, by falling standard deviation.
    octaves : int16 ``[r]``
        Standard deviation of each coefficient, see :data:`OCTAVE`.
    """

    mean: torch.Tensor
    weight: torch.Tensor
    vectors: torch.Tensor
    octaves: torch.Tensor

    def __post_init__(self) -> None:
        blocks, d = self.weight.shape[:2]
        p, r = self.vectors.shape
        if self.weight.shape != (blocks, d, d) or not blocks * d == p == len(self.mean) or len(self.octaves) != r:
            raise InputError("the parts of a basis do not fit each other; calibrate again")

    @cached_property
    def _unweight(self) -> torch.Tensor:
        inverse: torch.Tensor = torch.linalg.inv(self.weight)
        return inverse

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Coefficients ``[k, r]`` of ``x`` (``[k, p]``, the mean taken off)."""
        return blockwise(self.weight, x) @ self.vectors.to(x.device)

    def inverse(self, c: torch.Tensor) -> torch.Tensor:
        """``[k, p]`` of coefficients ``[k, r]``, without the mean."""
        return blockwise(self._unweight, c @ self.vectors.to(c.device).T)


def blockwise(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A block-diagonal matrix ``[blocks, d, d]`` times every row of ``x`` (``[k, blocks * d]``)."""
    blocks, d, _ = matrix.shape
    product: torch.Tensor = torch.einsum("bij,kbj->kbi", matrix.to(x.device), x.view(-1, blocks, d))
    return product.reshape(len(x), blocks * d)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A visual token's coefficients from those of its neighbours in the picture, each by itself:
    ``left * c[left] + above * c[above] + constant``.

    Parameters
    ----------
    weights : float32 ``[3, 3, r]``
        For tokens with a left neighbour, with one above, and with both: ``left``, ``above`` and ``constant``.
    octaves : int16 ``[3, r]``
        Standard deviation of what is left over, see :data:`OCTAVE`.
    """

    weights: torch.Tensor
    octaves: torch.Tensor

    def __post_init__(self) -> None:
        if self.weights.shape[:2] != (3, 3) or self.octaves.shape != (3, self.weights.shape[2]):
            raise InputError("the parts of a prediction do not fit each other; calibrate again")
        if not bool((self.weights[:, :2].abs().sum(1) <= 1).all()) or not bool(self.weights.isfinite().all()):
            raise InputError("a prediction whose errors would grow from token to token; calibrate again")


class AnyProfile:
    """What every profile says of itself."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    fingerprint: str
    rotary: tuple[Rotary | None, ...]
    shape: tuple[int, int, int]
    facts: dict[str, Any]

    def to_bytes(self) -> bytes:
        """One safetensors file; what is learned in float16."""
        return file_of(self, self.tensors(), self.version)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the file holds, besides how layers turn their keys."""
        return {}


class TransformProfile(AnyProfile):
    """What the ``transform`` codec reads: a :class:`Profile`, or a :class:`~kvferry.codecs.tree.TreeProfile`."""

    kind: ClassVar[str] = "transform"


@dataclass(frozen=True, eq=False)
class Profile(TransformProfile):
    """What the ``transform`` codec knows of one model's caches before it sees one.

    Parameters
    ----------
    fingerprint : str
        Of the model; it fits no other.
    visual, text : Basis
    words : int64 ``[i]``
        What :func:`words` gives for text tokens that were frequent in calibration, ascending.
    word_means : float32 ``[i, p]``
        Their means, which stand for ``text.mean`` where the token is one of them: text is known to both ends, and much
        of a text token's keys and values follows from the token alone.
    rotary : tuple of Rotary or None
        How each layer turns its keys, so that they can be turned back without the model.
    shape : (int, int, int)
        Layers, KV heads, head dimension.
    facts : dict
        How it was made: model, split, n, command, commit.
    prediction : Prediction, optional
        Of visual tokens from their neighbours, in the coefficients of ``visual``.
    """

    fingerprint: str
    visual: Basis
    text: Basis
    words: torch.Tensor
    word_means: torch.Tensor
    rotary: tuple[Rotary | None, ...]
    shape: tuple[int, int, int]
    facts: dict[str, Any]
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        layers, heads, dim = self.shape
        p = layers * heads * 2 * dim
        if self.prediction is not None and self.prediction.octaves.shape[1:] != self.visual.octaves.shape:
            raise InputError("a prediction of other coefficients than the profile's; calibrate again")
        if {len(self.visual.mean), len(self.text.mean), self.word_means.shape[1]} != {p} or len(self.rotary) != layers:
            raise InputError(f"a profile for {layers} layers of {heads} heads and {dim} channels does not hold them")

    def means(self, words: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """What is expected of each token, ``[k, p]``; ``words`` is int64, ``visual`` bool, both ``[k]``."""
        out = torch.where(visual[:, None], self.visual.mean, self.text.mean)
        if len(self.words):
            at = torch.searchsorted(self.words, words).clamp(max=len(self.words) - 1)
            known = (self.words[at] == words) & ~visual
            out[known] = self.word_means[at[known]]
        return out

    def tensors(self) -> dict[str, torch.Tensor]:
        """See :class:`AnyProfile`."""
        tensors = {"words": self.words.int(), "word_means": half(self.word_means)}
        if self.prediction is not None:
            tensors |= {f"prediction.{f.name}": getattr(self.prediction, f.name) for f in fields(Prediction)}
        return tensors | _parts("visual", self.visual) | _parts("text", self.text)

    def to_bytes(self) -> bytes:
        """See :class:`AnyProfile`; version 2 where visual tokens are predicted from each other."""
        return file_of(self, self.tensors(), 1 if self.prediction is None else 2)


@dataclass(frozen=True, eq=False)
class Axes:
    """Principal axes of one side, keys or values: ``c = vectors.T @ (x - mean)``.

    Parameters
    ----------
    mean : float32 ``[p]``
        ``p = layers * kv_heads * head_dim``, in that order.
    vectors : float32 ``[p, r]``
        Orthonormal columns, by falling standard deviation.
    octaves : int16 ``[r]``
        See :class:`Basis`.
    """

    mean: torch.Tensor
    vectors: torch.Tensor
    octaves: torch.Tensor

    def __post_init__(self) -> None:
        if self.vectors.shape != (len(self.mean), len(self.octaves)):
            raise InputError("the parts of a basis do not fit each other; calibrate again")


@dataclass(frozen=True, eq=False)
class PlainProfile(AnyProfile):
    """What the ``kvtc`` codec knows of one model's caches: principal axes of keys and of values, nothing else.

    Parameters
    ----------
    keys, values : Axes
    fingerprint, rotary, shape, facts
        As in :class:`Profile`.
    """

    kind: ClassVar[str] = "kvtc"

    fingerprint: str
    keys: Axes
    values: Axes
    rotary: tuple[Rotary | None, ...]
    shape: tuple[int, int, int]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        layers, heads, dim = self.shape
        if {len(self.keys.mean), len(self.values.mean)} != {layers * heads * dim} or len(self.rotary) != layers:
            raise InputError(f"a profile for {layers} layers of {heads} heads and {dim} channels does not hold them")

    def tensors(self) -> dict[str, torch.Tensor]:
        """See :class:`AnyProfile`."""
        return _parts("keys", self.keys) | _parts("values", self.values)


def to_rows(
    rotary: Sequence[Rotary | None], keys: torch.Tensor, values: torch.Tensor, where: torch.Tensor
) -> torch.Tensor:
    """One row per token, float32 ``[k, p]`` in the order of :class:`Basis`, keys turned back.

    Parameters
    ----------
    keys, values : ``[layers, kv_heads, k, head_dim]``
    where : int64 ``[axes, k]``
        Rotary positions.
    """
    turned = _turned(rotary, keys.float(), where, forwards=False)
    return torch.stack([turned, values.float()], 2).permute(3, 0, 1, 2, 4).flatten(1)


def from_rows(
    rotary: Sequence[Rotary | None], rows: torch.Tensor, shape: tuple[int, int, int], where: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo :func:`to_rows`: keys and values in bfloat16. ``shape`` is the profile's.

    Raises
    ------
    CorruptError
        What is no number: the payload's scales or symbols were beyond what an encoder writes.
    """
    layers, heads, dim = shape
    if bool(rows.isnan().any()):
        raise CorruptError("the keys and values decode to NaN, which no encoder writes; have them sent again")
    x = rows.clamp(-LIMIT, LIMIT).view(len(rows), layers, heads, 2, dim)
    keys, values = x.permute(3, 1, 2, 0, 4)
    return _turned(rotary, keys, where, forwards=True).bfloat16(), values.bfloat16()


def _turned(
    rotary: Sequence[Rotary | None], keys: torch.Tensor, where: torch.Tensor, *, forwards: bool
) -> torch.Tensor:
    """Keys of all layers, turned forwards or back; neighbouring layers that turn alike go together."""
    parts: list[torch.Tensor] = []
    start = 0
    for _, alike in groupby(rotary, _way):
        way, *others = alike
        some = keys[start : start + 1 + len(others)]
        start += len(some)
        parts.append(some if way is None else way.rotate(some, where) if forwards else way.unrotate(some, where))
    return torch.cat(parts)


def _way(way: Rotary | None) -> tuple[object, ...]:
    """Equal for layers that turn alike."""
    if way is None:
        return ()
    return way.inv_freq.tolist(), *(getattr(way, name) for name in _ROTARY)


def words(layout: PromptLayout) -> torch.Tensor:
    """Of every prompt token its id, doubled, and one more behind the first picture, int64 ``[n]``.

    Apart from each other because what stands before all pictures is the template, whose keys and values are always the
    same.
    """
    behind = np.logical_or.accumulate(layout.visual)
    return torch.from_numpy(2 * layout.token_ids.astype(np.int64) + behind)


def half(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float16, what is beyond it at its largest."""
    return x.clamp(-65504, 65504).half()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.is_floating_point() else x


def _parts(name: str, basis: Basis | Axes) -> dict[str, torch.Tensor]:
    """The tensors of a file that hold ``basis``."""
    parts = {f"{name}.{f.name}": getattr(basis, f.name) for f in fields(basis)}
    return {key: x if key.endswith(("octaves", "weight")) else half(x) for key, x in parts.items()}


def file_of(profile: AnyProfile, tensors: dict[str, torch.Tensor], version: int = 1) -> bytes:
    """A safetensors file of ``tensors`` and what every profile says of itself."""
    rotary = []
    for layer, r in enumerate(profile.rotary):
        if r is not None:
            tensors[f"inv_freq.{layer}"] = r.inv_freq
        rotary.append(r and {name: getattr(r, name) for name in _ROTARY})
    about: dict[str, Any] = {
        "fingerprint": profile.fingerprint,
        "shape": profile.shape,
        "rotary": rotary,
        "facts": profile.facts,
    }
    from safetensors.torch import save

    about["kind"] = profile.kind
    if version > 1:
        about["version"] = version
    return bytes(save({k: v.contiguous().clone() for k, v in tensors.items()}, {"kvferry": json.dumps(about)}))


def read(path: Path) -> tuple[AnyProfile, bytes]:
    """The profile in a file, and the first bytes of the file's SHA-256.

    Raises
    ------
    InputError
        There is no such file, or it is not a profile.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["kvferry"])
            tensors = {name: _wide(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        return _profile(about, tensors), hashlib.sha256(path.read_bytes()).digest()[:DIGEST]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        message = f"{path} is no profile ({error}); make one by `kvferry fit KIND MODEL --out {path}`"
        raise InputError(message) from None


def _profile(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AnyProfile:
    version = about.get("version", 1)
    if version > VERSION:
        raise ValueError(f"version {version}, of a newer kvferry")

    def part(kind: type[Any], name: str) -> Any:
        return kind(**{f.name: tensors[f"{name}.{f.name}"] for f in fields(kind)})

    def turning(layer: int, scaling: float, sections: list[int], interleaved: bool, neighbours: bool = False) -> Rotary:
        return Rotary(tensors[f"inv_freq.{layer}"], scaling, tuple(sections), interleaved, neighbours)

    rotary = tuple(r and turning(i, **r) for i, r in enumerate(about["rotary"]))
    layers, heads, dim = about["shape"]
    common = {"rotary": rotary, "shape": (layers, heads, dim), "facts": about["facts"]}
    if about.get("kind") == "capsule":
        from kvferry.codecs.capsule_profile import capsule_profile

        return capsule_profile(about["fingerprint"], tensors, common)
    if about.get("kind", Profile.kind) == PlainProfile.kind:
        return PlainProfile(about["fingerprint"], keys=part(Axes, "keys"), values=part(Axes, "values"), **common)
    if version > 2:
        from kvferry.codecs.tree import tree_profile

        return tree_profile(about["fingerprint"], tensors, common)
    return Profile(
        about["fingerprint"],
        visual=part(Basis, "visual"),
        text=part(Basis, "text"),
        words=tensors["words"].long(),
        word_means=tensors["word_means"],
        prediction=part(Prediction, "prediction") if version > 1 else None,
        **common,
    )
