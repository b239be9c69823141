"""A basis that scales: block by block, layer by layer, then all layers together, with nothing left out.

One matrix over all of a token's ``p`` numbers takes ``p r`` numbers for ``r`` axes: too many for all of them at the
shape of a 7B model, and whatever lies outside its axes is lost however many bits there are. Here small square matrices
turn more and more of the token into fewer and fewer numbers, as the levels of a wavelet packet do; every number that a
stage does not take goes on as it is, so that the whole is invertible and no quality is out of reach.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvferry.cache import PromptLayout, Role
from kvferry.codecs.profile import VERSION, TransformProfile, half
from kvferry.errors import InputError
from kvferry.lazy import torch
from kvferry.rope import Rotary

SINKS = 4
MOST_STARTS = 64
"""So many of a prompt's first tokens may be known exactly."""
CLASSES = ("context", "question", "template", "tail", "sinks", "visual")
"""Kinds of token that have a step each: text of the context; the question; the template before and behind the
question; the first :data:`SINKS` tokens; visual tokens."""
VISUAL = CLASSES.index("visual")
FIRST = CLASSES.index("sinks")


@dataclass(frozen=True, eq=False)
class Tree:
    """Turns a token's keys (un-rotated) and values of all layers and heads into as many coefficients, and back.

    1. Every block (one layer's head, keys or values): ``d`` numbers times ``leaves``, which weighs errors by how much
       they move the answer's logits and turns to principal axes.
    2. Every layer: the leading ``layers.shape[1] / blocks`` numbers of its blocks times ``layers``, orthogonal.
    3. All layers: the leading ``joint.shape[0] / layers`` numbers of each times ``joint``, orthogonal.

    Parameters
    ----------
    mean : float32 ``[p]``
        As in :class:`~kvferry.codecs.profile.Basis`.
    leaves : float32 ``[blocks, d, d]``
    layers : float32 ``[layers, n, n]``
    joint : float32 ``[j, j]``
    octaves : int16 ``[p]``
        Standard deviation of each coefficient, in the order that :meth:`forward` computes them: those of ``joint``,
        those that only ``layers`` turned, layer by layer, and those that only ``leaves`` turned, block by block.
    """

    mean: torch.Tensor
    leaves: torch.Tensor
    layers: torch.Tensor
    joint: torch.Tensor
    octaves: torch.Tensor

    def __post_init__(self) -> None:
        (blocks, d, _), (layers, n, _) = self.leaves.shape, self.layers.shape
        each, lead = blocks // layers, len(self.joint) // layers
        fits = each * layers == blocks and n % each == 0 and n // each <= d and lead * layers == len(self.joint)
        square = all(x.shape[-1] == x.shape[-2] for x in (self.leaves, self.layers, self.joint))
        if not (fits and square and lead <= n and len(self.mean) == len(self.octaves) == blocks * d):
            raise InputError("the parts of a tree do not fit each other; calibrate again")

    @cached_property
    def order(self) -> torch.Tensor:
        """Coefficients by falling standard deviation, int64 ``[p]``; integers decide, so that all machines agree."""
        return (-self.octaves.int()).argsort(stable=True)

    @cached_property
    def ranked(self) -> npt.NDArray[np.int64]:
        """:attr:`octaves` in that order, ``[p]``."""
        ranked: npt.NDArray[np.int64] = self.octaves[self.order].numpy().astype(np.int64)
        return ranked

    @cached_property
    def _back(self) -> torch.Tensor:
        inverse: torch.Tensor = torch.linalg.inv(self.leaves)
        return inverse

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """Layers, blocks of each, and how many of a block's and of a layer's numbers go on."""
        layers, each = len(self.layers), len(self.leaves) // len(self.layers)
        return layers, each, self.layers.shape[1] // each, len(self.joint) // layers

    def _reached(self, count: int) -> tuple[int, int]:
        """Up to which column of ``joint``, and of a layer's matrix, the ``count`` leading coefficients reach."""
        layers, _, _, lead = self._sizes
        j, n = len(self.joint), self.layers.shape[1]
        leading = self.order[:count]
        joint, rest = leading[leading < j], leading[(leading >= j) & (leading < j + layers * (n - lead))]
        most = int(((rest - j) % (n - lead)).max()) + 1 if len(rest) else 0
        return int(joint.max()) + 1 if len(joint) else 0, lead + most

    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """The ``count`` leading coefficients in :attr:`order`, ``[k, count]``, of ``x`` (``[k, p]``, the mean taken
        off)."""
        layers, each, taken, lead = self._sizes
        blocks, d, _ = self.leaves.shape
        y = torch.bmm(x.view(-1, blocks, d).transpose(0, 1), self.leaves.to(x.device)).view(layers, each, -1, d)
        j, n = self._reached(count)
        z = torch.bmm(y[..., :taken].transpose(1, 2).flatten(2), self.layers[:, :, :n].to(x.device))
        all_ = z[..., :lead].transpose(0, 1).flatten(1) @ self.joint[:, :j].to(x.device)
        all_ = torch.nn.functional.pad(all_, (0, len(self.joint) - j))
        z = torch.nn.functional.pad(z, (0, self.layers.shape[1] - n))
        rest = z[..., lead:].transpose(0, 1).flatten(1), y[..., taken:].permute(2, 0, 1, 3).flatten(1)
        return torch.cat([all_, *rest], 1)[:, self.order[:count].to(x.device)]

    def inverse(self, c: torch.Tensor) -> torch.Tensor:
        """``[k, p]`` of leading coefficients ``[k, count]``, the others 0; without the mean."""
        layers, each, taken, lead = self._sizes
        blocks, d, _ = self.leaves.shape
        k, n, j = len(c), self.layers.shape[1], len(self.joint)
        flat = c.new_zeros(k, blocks * d)
        flat[:, self.order[: c.shape[1]]] = c
        all_, some, rest = flat.split_with_sizes([j, layers * (n - lead), flat.shape[1] - j - layers * (n - lead)], 1)
        reached, most = self._reached(c.shape[1])
        first = (all_[:, :reached] @ self.joint[:, :reached].T).view(k, layers, lead)
        z = torch.cat([first, some.view(k, layers, n - lead)], 2).transpose(0, 1)[:, :, :most]
        y = torch.bmm(z, self.layers[:, :, :most].mT).view(layers, k, each, taken)
        whole = torch.cat([y.transpose(1, 2), rest.view(k, layers, each, d - taken).permute(1, 2, 0, 3)], 3)
        return torch.bmm(whole.reshape(blocks, k, d), self._back).transpose(0, 1).reshape(k, blocks * d)


@dataclass(frozen=True, eq=False)
class TreeProfile(TransformProfile):
    """What the ``transform`` codec knows of one model's caches, with bases that scale.

    Parameters
    ----------
    visual, text : Tree or None
        ``None`` where calibration had no such token.
    words : int64 ``[i]``
        What :func:`~kvferry.codecs.profile.words` gives for text tokens seen in calibration, ascending.
    word_means : float32 ``[i, m]``
        What is expected of them: their leading coefficients.
    starts : int64 ``[s]``
        Digests (:func:`starts`) of a template's first tokens, ascending.
    start_means : float32 ``[s, p]``
        Their keys and values, which depend on nothing else: exact.
    steps : int16 ``[6]``
        How much finer the step of each of :data:`CLASSES` is, in eighths of an octave.
    fingerprint, rotary, shape, facts
        As in :class:`~kvferry.codecs.profile.Profile`.
    """

    kind: ClassVar[str] = "transform"
    version: ClassVar[int] = VERSION

    fingerprint: str
    visual: Tree | None
    text: Tree | None
    words: torch.Tensor
    word_means: torch.Tensor
    starts: torch.Tensor
    start_means: torch.Tensor
    steps: torch.Tensor
    rotary: tuple[Rotary | None, ...]
    shape: tuple[int, int, int]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        layers, heads, dim = self.shape
        p = layers * heads * 2 * dim
        trees = [tree for tree in (self.visual, self.text) if tree is not None]
        widths = {len(tree.mean) for tree in trees} | {self.start_means.shape[1]}
        if not trees or widths != {p} or len(self.rotary) != layers or len(self.steps) != len(CLASSES):
            raise InputError(f"a profile for {layers} layers of {heads} heads and {dim} channels does not hold them")
        if len(self.words) != len(self.word_means) or len(self.starts) != len(self.start_means):
            raise InputError("means of other words than the profile's; calibrate again")

    @property
    def leading(self) -> Tree:
        """The basis that the step follows from: that of visual tokens, or of text where there were none."""
        tree = self.visual or self.text
        assert tree is not None
        return tree

    def tensors(self) -> dict[str, torch.Tensor]:
        """See :class:`~kvferry.codecs.profile.AnyProfile`."""
        tensors = {"steps": self.steps, "words": self.words.int(), "word_means": half(self.word_means)}
        tensors |= {"starts": self.starts, "start_means": half(self.start_means)}
        for name, tree in (("visual", self.visual), ("text", self.text)):
            for part in fields(Tree) if tree is not None else ():
                x: torch.Tensor = getattr(tree, part.name)
                tensors[f"{name}.{part.name}"] = half(x) if x.is_floating_point() else x
        return tensors


def tree_profile(fingerprint: str, tensors: dict[str, torch.Tensor], common: dict[str, Any]) -> TreeProfile:
    """The profile in a file's ``tensors``."""

    def tree(name: str) -> Tree | None:
        parts = {part.name: tensors.get(f"{name}.{part.name}") for part in fields(Tree)}
        there = {key: x for key, x in parts.items() if x is not None}
        return Tree(**there) if there else None

    means: dict[str, Any] = {name: tensors[name] for name in ("word_means", "start_means", "starts", "steps")}
    about = common | means | {"words": tensors["words"].long()}
    return TreeProfile(fingerprint, visual=tree("visual"), text=tree("text"), **about)


def numbers(layers: int, heads: int, dim: int, taken: int, lead: int) -> int:
    """How many numbers a tree holds, mean and standard deviations left out."""
    return 2 * layers * heads * dim**2 + layers * (2 * heads * taken) ** 2 + (layers * lead) ** 2


def classes(layout: PromptLayout) -> npt.NDArray[np.int64]:
    """Which of :data:`CLASSES` every prompt token is, ``[n]``."""
    asked = np.flatnonzero(layout.question)
    behind = np.arange(len(layout)) > (asked[-1] if len(asked) else len(layout))
    found = np.where(np.equal(layout.role, Role.SPECIAL), np.where(behind, 3, 2), 0)
    found[layout.question] = 1
    found[:SINKS] = 4
    found[layout.visual] = VISUAL
    return found.astype(np.int64)


def starts(layout: PromptLayout, most: int) -> npt.NDArray[np.int64]:
    """For each of the first ``most`` tokens a digest of it and all before it, int64; fewer where a picture begins.

    Causal attention makes keys and values of a prompt's beginning a function of these tokens.
    """
    pictures = np.flatnonzero(layout.visual)
    count = min(most, int(pictures[0]) if len(pictures) else len(layout))
    sha, found = hashlib.sha256(), []
    for token in layout.token_ids[:count].astype("<i4"):
        sha.update(token.tobytes())
        found.append(int.from_bytes(sha.digest()[:8], "little", signed=True))
    return np.array(found, np.int64)
