"""What ``kvferry calibrate`` learns of a model's caches, and where both ends find it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kvferry.cache import PromptLayout
from kvferry.errors import FingerprintError, InputError
from kvferry.rope import Rotary

FOLDERS = "KVFERRY_PROFILES"
"""Environment variable: folders with profiles, separated like those of ``PATH``."""
SUFFIX = ".profile"
"""Not .safetensors, though it is one: a profile may lie beside the weights, whose digest is the model's fingerprint."""
DIGEST = 4
OCTAVE = 8
"""Standard deviations are counted in eighths of an octave: ``2 ** (octaves / 8)``."""


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
class Profile:
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
    """

    fingerprint: str
    visual: Basis
    text: Basis
    words: torch.Tensor
    word_means: torch.Tensor
    rotary: tuple[Rotary | None, ...]
    shape: tuple[int, int, int]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        layers, heads, dim = self.shape
        p = layers * heads * 2 * dim
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

    def to_bytes(self) -> bytes:
        """One safetensors file; basis and means in float16."""
        tensors = {"words": self.words.int(), "word_means": _half(self.word_means)}
        for name in ("visual", "text"):
            basis = getattr(self, name)
            for f in fields(Basis):
                value = getattr(basis, f.name)
                tensors[f"{name}.{f.name}"] = value if f.name in ("octaves", "weight") else _half(value)
        rotary = []
        for layer, r in enumerate(self.rotary):
            if r is not None:
                tensors[f"inv_freq.{layer}"] = r.inv_freq
            rotary.append(r and {"scaling": r.scaling, "sections": r.sections, "interleaved": r.interleaved})
        about = {"fingerprint": self.fingerprint, "shape": self.shape, "rotary": rotary, "facts": self.facts}
        return bytes(save({k: v.contiguous().clone() for k, v in tensors.items()}, {"kvferry": json.dumps(about)}))


def words(layout: PromptLayout) -> torch.Tensor:
    """Of every prompt token its id, doubled, and one more behind the first picture, int64 ``[n]``.

    Apart from each other because what stands before all pictures is the template, whose keys and values are always the
    same.
    """
    behind = np.logical_or.accumulate(layout.visual)
    return torch.from_numpy(2 * layout.token_ids.astype(np.int64) + behind)


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-65504, 65504).half()


def read(path: Path) -> tuple[Profile, bytes]:
    """The profile in a file, and the first bytes of the file's SHA-256.

    Raises
    ------
    InputError
        There is no such file, or it is not a profile.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["kvferry"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        bases = {
            name: Basis(**{f.name: _wide(tensors[f"{name}.{f.name}"]) for f in fields(Basis)})
            for name in ("visual", "text")
        }
        rotary = tuple(
            r and Rotary(tensors[f"inv_freq.{i}"], r["scaling"], tuple(r["sections"]), r["interleaved"])
            for i, r in enumerate(about["rotary"])
        )
        layers, heads, dim = about["shape"]
        profile = Profile(
            fingerprint=about["fingerprint"],
            **bases,
            words=tensors["words"].long(),
            word_means=_wide(tensors["word_means"]),
            rotary=rotary,
            shape=(layers, heads, dim),
            facts=about["facts"],
        )
        return profile, hashlib.sha256(path.read_bytes()).digest()[:DIGEST]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        message = f"{path} is no profile ({error}); make one by `kvferry calibrate MODEL --out {path}`"
        raise InputError(message) from None


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.is_floating_point() else x


_known: dict[tuple[str, bytes], Profile] = {}
_seen: set[Path] = set()


def add(path: Path) -> tuple[Profile, bytes]:
    """Read a profile and keep it for whoever encodes or decodes in this process."""
    profile, digest = read(path)
    _known[profile.fingerprint, digest] = profile
    return profile, digest


def for_encoding(path: str, fingerprint: str) -> tuple[Profile, bytes]:
    """The profile in a file, or without one any that is here for this model.

    Raises
    ------
    FingerprintError
        The file's profile was made for another model.
    InputError
        None is here.
    """
    if path:
        profile, digest = add(Path(path))
        if profile.fingerprint != fingerprint:
            raise FingerprintError(
                f"{path} was calibrated on another model than the one that made this cache; "
                "run `kvferry calibrate` for this one"
            )
        return profile, digest
    if has_profile(fingerprint):
        return next((profile, digest) for (model, digest), profile in _known.items() if model == fingerprint)
    raise InputError(
        "there is no profile for the model that made this cache; run `kvferry calibrate MODEL --out FILE` and name the "
        f"file in the recipe (transform@FILE), or put it into a folder that {FOLDERS} names"
    )


def has_profile(fingerprint: str) -> bool:
    """Whether a profile for this model is here."""
    _look_around()
    return any(model == fingerprint for model, _ in _known)


def for_decoding(fingerprint: str, digest: bytes) -> Profile:
    """The profile that a stream was encoded with; no path in a stream is ever opened."""
    if (fingerprint, digest) not in _known:
        _look_around()
    if (fingerprint, digest) not in _known:
        raise FingerprintError(
            f"this stream needs the profile {digest.hex()} of its model, which is not here; put the file that the "
            f"sender used into a folder that {FOLDERS} names"
        )
    return _known[fingerprint, digest]


def _look_around() -> None:
    """Read the profiles in the shipped models' folders and in those that the environment names."""
    package = Path(__file__).parents[1]
    folders = [Path(x) for x in os.environ.get(FOLDERS, "").split(os.pathsep) if x]
    for shipped in (package.parents[1] / "testbed", package / "shipped" / "testbed"):
        folders += [x for x in shipped.glob("*") if x.is_dir()]
    for folder in folders:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            if path in _seen or not _is_profile(path):
                continue
            add(path)
            _seen.add(path)


def _is_profile(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "kvferry" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
