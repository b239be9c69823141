"""What visual tokens' neighbours are worth to the transform codec, and other ways to use them.

``python benchmarks/neighbours.py [--model testbed/cloud] [--calibrate 200] [--n 100] [--questions 300]`` prints
markdown. The first table: other predictions than the codec's, with weights fitted to *calibration* caches, on
*validation* caches, each picture another; range-coded bytes of visual and text tokens, at equal error in the weighted
space. The second: whole bitstreams with the shipped profile, at equal KL to the same tokens in BF16, protocol A,
validation, 95 % bootstrap intervals over questions.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import kvferry
from kvferry.codecs import profile_store, stack
from kvferry.codecs.entropy import Encoder
from kvferry.codecs.profile import OCTAVE, Basis, Profile, to_rows, words
from kvferry.codecs.transform import _DEAD, _quantized, _step, _write
from kvferry.evaluate.divergence import divergence
from kvferry.models import VLM
from kvferry.recipe import Recipe, compress, decompress
from kvferry.testbed import samples

Numbers = npt.NDArray[np.float64]
SELECTIONS = ("full", "leaveout@0.1,budget=shared")
RATIOS = (24, 64, 96)
AROUND = (-3, 0, 3, 6)
RATIOS_OF_KL = (24, 32, 40, 52, 64, 80, 96, 130)
RIDGE = 1e-3


@dataclass(frozen=True)
class Scheme:
    """Neighbours as (rows, columns) away, and in which order tokens are coded: by rising ``down * y + x``, or those of
    a checkerboard's other colour first, which are not predicted."""

    neighbours: tuple[tuple[int, int], ...]
    down: int = 1
    checkerboard: bool = False
    constant: bool = True
    whole: bool = False
    """Whether every coefficient is predicted from all of the neighbours' and not from the same one only."""


CAUSAL = ((0, -1), (-1, 0))
SCHEMES = {
    "left and above": Scheme(CAUSAL),
    "without a constant": Scheme(CAUSAL, constant=False),
    "and both diagonals above": Scheme((*CAUSAL, (-1, -1), (-1, 1)), down=2),
    "left and above, from all of their coefficients": Scheme(CAUSAL, whole=True),
    "a checkerboard's half from four around": Scheme((*CAUSAL, (0, 1), (1, 0)), checkerboard=True),
}


@dataclass
class Tokens:
    """Visual tokens of many prompts, and which picture, row and column they stand at."""

    c: list[Numbers] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    text: list[Numbers] = field(default_factory=list)

    def near(self, scheme: Scheme) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Neighbours ``[n, offsets]`` (``n`` where there is none), which there are as bits, and turns."""
        at, none = {place: i for i, place in enumerate(self.places)}, len(self.places)
        y, x = np.array(self.places).T[1:]
        odd = (x + y) % 2
        beside = [[at.get((p, a + dy, b + dx), none) for dy, dx in scheme.neighbours] for p, a, b in self.places]
        near = np.where(odd[:, None] | (not scheme.checkerboard), beside, none)
        return (
            near,
            ((near < none) << np.arange(near.shape[1])).sum(1),
            odd if scheme.checkerboard else scheme.down * y + x,
        )


def collect(vlm: VLM, profile: Profile, split: str, n: int) -> dict[str, Tokens]:
    """Coefficients of what each selection keeps."""
    found = {selection: Tokens() for selection in SELECTIONS}
    pictures = 0
    for sample in samples(split, n):
        prefilled = vlm.prefill(sample.images, sample.question, recipe=Recipe.parse(SELECTIONS[1]))
        layout = prefilled.cache.layout
        grid = [(pictures + i, *place) for i, g in enumerate(layout.grids) for place in np.ndindex(*g[1:])]
        pictures += len(layout.grids)
        for selection, tokens in found.items():
            keys, values, where = stack(Recipe.parse(selection).keep(prefilled).layers)
            index = where.numpy()
            visual = torch.from_numpy(layout.visual[index])
            rows = to_rows(vlm.rotary, keys, values, torch.from_numpy(layout.positions[:, index].astype(np.int64)))
            off = rows - profile.means(words(layout)[index], visual)
            tokens.c.append(profile.visual.forward(off[visual]).double().numpy())
            tokens.text.append(profile.text.forward(off[~visual]).double().numpy())
            tokens.places += [grid[i] for i in (layout.visual.cumsum() - 1)[index[layout.visual[index]]]]
    return found


class Predictor:
    """Least squares, all tokens' that have the neighbours; every set of tokens weighs the same."""

    def __init__(self, scheme: Scheme, sets: Iterable[Tokens]) -> None:
        self.scheme, self._fitted = scheme, {}
        self._sets = [(np.concatenate([*s.c, np.zeros((1, s.c[0].shape[1]))]), *s.near(scheme)[:2]) for s in sets]

    def of(self, pattern: int) -> tuple[Numbers, npt.NDArray[np.int64]]:
        """Weights ``[inputs, r]`` (``[inputs, r, r]`` from all), and octaves of what is left over, ``[r]``."""
        if pattern not in self._fitted:
            inputs, targets, shares = [], [], []
            for c, near, patterns in self._sets:
                mine = np.flatnonzero((patterns & pattern) == pattern)
                inputs.append(self.inputs(c, near[mine], pattern))
                targets.append(c[mine])
                shares.append(np.full(len(mine), 1 / len(c)))
            self._fitted[pattern] = self._fit(*map(np.concatenate, (inputs, targets, shares)))
        return self._fitted[pattern]

    def inputs(self, c: Numbers, near: npt.NDArray[np.int64], pattern: int) -> Numbers:
        """Of tokens with neighbours ``near``, ``[m, inputs, r]``; 1 is one of them where there is a constant."""
        slots = [i for i in range(near.shape[1]) if pattern >> i & 1]
        ones = np.ones((len(near), int(self.scheme.constant), c.shape[1]))
        return np.concatenate([c[near[:, slots]], ones], 1)

    def guess(self, inputs: Numbers, weights: Numbers) -> Numbers:
        """``[m, r]``."""
        if self.scheme.whole:
            return inputs.reshape(len(inputs), -1) @ weights
        return np.einsum("mir,ir->mr", inputs, weights)

    def _fit(self, x: Numbers, y: Numbers, share: Numbers) -> tuple[Numbers, npt.NDArray[np.int64]]:
        share = share / share.sum()
        if self.scheme.whole:
            flat = x.reshape(len(x), -1)
            squares = flat.T @ (share[:, None] * flat)
            squares += RIDGE * np.diagonal(squares).mean() * np.eye(len(squares))
            weights = np.linalg.solve(squares, flat.T @ (share[:, None] * y))
        else:
            squares = np.einsum("nir,njr,n->rij", x, x, share) + 1e-9 * np.eye(x.shape[1])
            weights = np.linalg.solve(squares, np.einsum("nir,nr,n->ri", x, y, share)[..., None])[..., 0].T
        left_over = np.sqrt((share[:, None] * (y - self.guess(x, weights)) ** 2).sum(0))
        return weights, np.rint(OCTAVE * np.log2(np.maximum(left_over, 2.0**-20))).astype(np.int64)


def coded(tokens: Tokens, basis: Basis, step: int, predictor: Predictor | None) -> tuple[int, float]:
    """Range-coded bytes and squared error of visual tokens."""
    c, size, octaves = np.concatenate(tokens.c), 2 ** (step / OCTAVE), basis.octaves.numpy().astype(np.int64)
    alive, known, symbols = octaves - step >= _DEAD, np.zeros((len(c) + 1, len(octaves))), np.zeros(c.shape, np.int32)
    every = np.repeat(octaves[:, None], len(c), 1)
    near, patterns, turn = tokens.near(predictor.scheme if predictor else Scheme(()))
    for when, pattern in np.unique(np.stack([turn, patterns]), axis=1).T if predictor else [(None, 0)]:
        mine = np.flatnonzero((turn == when) & (patterns == pattern)) if predictor else np.arange(len(c))
        guess = np.zeros((len(mine), len(octaves)))
        if predictor and pattern:
            weights, narrower = predictor.of(pattern)
            guess = predictor.guess(predictor.inputs(known, near[mine], pattern), weights)
            every[:, mine] = narrower[:, None]
        found = _quantized((c[mine] - guess) / size)
        found[:, ~alive] = 0
        symbols[mine] = found
        known[mine] = guess + found * size
    encoder = Encoder()
    _write(encoder, np.ascontiguousarray(symbols[:, alive].T), every[alive] - step)
    return len(encoder.finish()), float(((c - known[:-1]) ** 2).sum())


def plain_text(tokens: Tokens, basis: Basis, step: int) -> tuple[int, float]:
    """The same of text tokens, which have no neighbours."""
    return coded(Tokens(tokens.text, [(i, 0, 0) for i in range(sum(map(len, tokens.text)))]), basis, step, None)


def schemes_table(vlm: VLM, profile: Profile, calibrate: int, n: int) -> None:
    """The first table."""
    seen, new = (collect(vlm, profile, split, k) for split, k in (("calibration", calibrate), ("validation", n)))
    middle = [_step(profile.visual, float(ratio)) for ratio in RATIOS]
    steps = sorted({step + more for step in middle for more in AROUND})
    text = {s: np.array([plain_text(x, profile.text, step) for step in steps]) for s, x in new.items()}
    plain = {s: text[s] + [coded(x, profile.visual, step, None) for step in steps] for s, x in new.items()}
    columns = " | ".join(f"{s}, {ratio}" for s in SELECTIONS for ratio in RATIOS)
    print(f"| predicted from | {columns} |\n|---|{'---:|' * len(SELECTIONS) * len(RATIOS)}")
    for name, scheme in SCHEMES.items():
        predictor, cells = Predictor(scheme, seen.values()), []
        for s, tokens in new.items():
            curve = text[s] + [coded(tokens, profile.visual, step, predictor) for step in steps]
            size, error = np.log(curve[curve[:, 1].argsort()]).T
            for step in middle:
                was = plain[s][steps.index(step)]
                cells.append(math.exp(np.interp(math.log(was[1]), error, size)) / was[0] - 1)
        print(f"| {name} | {' | '.join(f'{x:+.1%}' for x in cells)} |", flush=True)


def at_equal_kl(curves: Sequence[Numbers]) -> list[float]:
    """By how much the second's bytes differ at each KL of the first; both ``[ratios, questions, (bytes, KL)]``."""
    (was, kl), (size, other) = (np.log(x.mean(1) + 1e-9).T for x in curves)
    order = other.argsort()
    inside = (kl >= other.min()) & (kl <= other.max())
    return np.where(inside, np.exp(np.interp(kl, other[order], size[order]) - was) - 1, np.nan).tolist()


def bitstreams_table(vlm: VLM, profile: Profile, questions: int) -> None:
    """The second table."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "without.profile", Path(folder) / "with.profile"]
        files[0].write_bytes(replace(profile, prediction=None).to_bytes())
        files[1].write_bytes(profile.to_bytes())
        print(
            "\n| recipe | bytes without | bytes with | KL without | KL with | bytes at equal KL |\n|---|" + "---:|" * 5
        )
        for selection in SELECTIONS:
            recipes = [f"{selection}|transform:{ratio}@{file}" for file in files for ratio in RATIOS_OF_KL]
            found: list[list[tuple[int, float]]] = [[] for _ in recipes]
            plain = Recipe.parse(f"{selection}|bf16")
            for sample in samples("validation", questions):
                prefilled = vlm.prefill(sample.images, sample.question, recipe=plain)
                wanted = vlm.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
                blobs = [compress(prefilled, recipe) for recipe in (plain, *recipes)]
                exact, *logits = vlm.score_many([decompress(blob) for blob in blobs], wanted)
                for row, blob, one in zip(found, blobs[1:], logits, strict=True):
                    row.append((len(blob), divergence(exact, one)))
            curves = np.array(found).reshape(2, len(RATIOS_OF_KL), questions, 2)
            draws = np.random.default_rng(0).integers(questions, size=(500, questions))
            low, high = np.nanpercentile([at_equal_kl(curves[:, :, draw]) for draw in draws], [2.5, 97.5], axis=0)
            for i, (ratio, gain) in enumerate(zip(RATIOS_OF_KL, at_equal_kl(curves), strict=True)):
                (a, p), (b, q) = curves[:, i].mean(1)
                there = "outside" if math.isnan(gain) else f"{gain:+.1%} [{low[i]:+.1%}, {high[i]:+.1%}]"
                print(f"| {selection}, {ratio} | {a:,.0f} | {b:,.0f} | {p:.4f} | {q:.4f} | {there} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="testbed/cloud")
    parser.add_argument("--profile", default="", help="another one than the shipped")
    parser.add_argument("--calibrate", type=int, default=200)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--questions", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vlm = kvferry.load(arguments.model)
    profile, _ = profile_store.for_encoding(Profile, arguments.profile, vlm.fingerprint)
    schemes_table(vlm, profile, arguments.calibrate, arguments.n)
    bitstreams_table(vlm, profile, arguments.questions)


if __name__ == "__main__":
    main()
