"""The transform codec against KVTC, and what each of its ingredients is worth.

``python benchmarks/transform.py --folder out/transform [--model testbed/cloud] [--calibrate 300] [--n 150]``
prints markdown. Profiles are made on *calibration* questions and kept in the folder, where a second run finds them;
sizes, accuracy and KL are of whole bitstreams on *validation* questions, protocol A. KL is to the same tokens in BF16,
so that it is the codec's alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvferry
from kvferry.analyze.source import drawn_questions
from kvferry.codecs.profile import Basis, Profile
from kvferry.evaluate.divergence import divergence
from kvferry.fit.kvtc import PlainCalibration
from kvferry.fit.transform import Calibration, make_basis
from kvferry.models import VLM
from kvferry.models.resume import stop_ids
from kvferry.recipe import Recipe, compress, decompress
from kvferry.testbed import samples

SELECTIONS = {"full": "full", "pruned": "leaveout@0.1,budget=shared"}
RATIOS = (24, 40, 64, 100, 160)
KVTC_RATIOS = (4, 8, 16, 32, 64)
WINDOWS = (0, 8)
ABLATED_RATIOS = (40, 100)
RANK = 192


@dataclass
class Row:
    """What one recipe did, question by question."""

    sizes: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


def make_profiles(vlm: VLM, selection: str, n: int, folder: Path) -> None:
    """All profiles for one selection, unless they are there."""
    if (folder / "kvtc.profile").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.parse(selection)
    ours, plain = Calibration(vlm, recipe, RANK, probes=4), PlainCalibration(vlm, recipe, 2 * RANK)
    for asked in drawn_questions("calibration", n).each():
        ours.add(asked)
        plain.add(asked)
    for name, profile in variants(ours, vlm):
        (folder / f"{name.replace(' ', '-')}.profile").write_bytes(profile.to_bytes())
    (folder / "kvtc.profile").write_bytes(plain.profile({"n": n, "recipe": selection}).to_bytes())


def variants(calibration: Calibration, vlm: VLM) -> Iterator[tuple[str, Profile]]:
    """The profile as it is, then without one ingredient each."""
    whole = calibration.profile({"n": calibration.n})
    yield "transform", whole
    (visual, _), (text, which) = calibration.rows(True), calibration.rows(False)
    off = {True: visual - visual.mean(0), False: text - whole.means(which, torch.zeros(len(which), dtype=torch.bool))}
    weights = {True: whole.visual.weight, False: whole.text.weight}
    mean = {True: visual.mean(0), False: text.mean(0)}

    def bases(weights: dict[bool, torch.Tensor], parts: torch.Tensor | None = None) -> dict[str, Any]:
        visual, text = (_in_parts(mean[kind], off[kind], weights[kind], parts) for kind in (True, False))
        return {"visual": visual, "text": text, "prediction": calibration.prediction(visual)}

    yield "no neighbours", replace(whole, prediction=None)
    blocks, dim = whole.visual.weight.shape[:2]
    alike = {kind: _even(weight) for kind, weight in weights.items()}
    yield "no sensitivity weights", replace(whole, **bases(alike))
    none = torch.zeros(0, dtype=torch.int64)
    bare = make_basis(mean[False], text - mean[False], weights[False], RANK)
    without = {"words": none, "word_means": torch.zeros(0, blocks * dim)}
    yield "no means of words", replace(whole, text=bare, **without)
    both = torch.cat([visual, text])
    one = make_basis(both.mean(0), both - both.mean(0), weights[True], RANK)
    common = {"visual": one, "text": one, "prediction": calibration.prediction(one)}
    yield "one basis and no means of words", replace(whole, **common, **without)
    side = torch.arange(blocks * dim) // dim % 2
    yield "keys and values apart", replace(whole, **bases(weights, side))
    layer = torch.arange(blocks * dim) // (blocks * dim // vlm.layers)
    yield "layers apart", replace(whole, **bases(weights, layer))


def _even(weight: torch.Tensor) -> torch.Tensor:
    """Every direction weighs the same, and all of them together what they did."""
    size = float(weight.pow(2).sum() / len(weight) / weight.shape[1]) ** 0.5
    return size * torch.eye(weight.shape[1]).expand_as(weight).contiguous()


def _in_parts(mean: torch.Tensor, off: torch.Tensor, weight: torch.Tensor, part: torch.Tensor | None) -> Basis:
    """A basis whose axes stay within one part of the channels each (``part`` says which, ``[p]``)."""
    whole = make_basis(mean, off, weight, off.shape[1])
    if part is None:
        return replace(whole, vectors=whole.vectors[:, :RANK].contiguous(), octaves=whole.octaves[:RANK])
    found = [make_basis(mean, off * (part == i), weight, int((part == i).sum())) for i in part.unique()]
    octaves = torch.cat([x.octaves for x in found])
    best = octaves.argsort(descending=True, stable=True)[:RANK]
    vectors = torch.cat([x.vectors for x in found], 1)[:, best]
    return replace(whole, vectors=vectors.contiguous(), octaves=octaves[best])


def recipes(selection: str, folder: Path) -> dict[tuple[str, str], str]:
    """Codec or ablation, and setting: recipe."""
    rows = {("bf16", ""): f"{selection}|bf16"}
    for window in WINDOWS:
        for ratio in KVTC_RATIOS:
            codec = f"kvtc:{ratio}@{folder}/kvtc.profile,window={window}|zstd"
            rows[f"kvtc, window of {window}, zstd", str(ratio)] = f"{selection}|{codec}"
    for path in sorted(folder.glob("*.profile"), key=lambda path: path.stem != "transform"):
        for ratio in () if path.stem == "kvtc" else RATIOS if path.stem == "transform" else ABLATED_RATIOS:
            rows[path.stem.replace("-", " "), str(ratio)] = f"{selection}|transform:{ratio}@{path}"
    return rows


def measure(vlm: VLM, rows: dict[tuple[str, str], str], n: int) -> dict[tuple[str, str], Row]:
    """Every recipe on every question."""
    out = {key: Row() for key in rows}
    requests = Recipe.parse(next(iter(rows.values())))
    for sample in samples("validation", n):
        prefilled = vlm.prefill(sample.images, sample.question, recipe=requests)
        wanted = vlm.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        blobs = [compress(prefilled, recipe) for recipe in rows.values()]
        logits = vlm.score_many([decompress(blob) for blob in blobs], wanted)
        for row, blob, found in zip(out.values(), blobs, logits, strict=True):
            best = found.argmax(-1).tolist()
            row.sizes.append(len(blob))
            row.right.append(best[:-1] == wanted and best[-1] in stop_ids(vlm.model))
            row.kl.append(divergence(logits[0], found))
    return out


def print_table(rows: dict[tuple[str, str], Row]) -> None:
    """Every row, then the bytes that each ablation takes at the KL of the whole codec."""
    print("| codec | ratio | bytes | accuracy | KL (nats) |\n|---|---:|---:|---:|---:|")
    for (name, ratio), row in rows.items():
        size, kl = np.mean(row.sizes), np.mean(row.kl)
        print(f"| {name} | {ratio} | {size:,.0f} | {np.mean(row.right):.1%} | {kl:.4f} |", flush=True)
    curves: dict[str, list[tuple[float, float]]] = {}
    for (name, _), row in rows.items():
        curves.setdefault(name, []).append((math.log(np.mean(row.kl) + 1e-9), math.log(np.mean(row.sizes))))
    whole = sorted(curves.pop("transform"))
    print("\n| instead of transform | bytes at its KL |\n|---|---:|")
    for name, points in curves.items():
        inside = [x for x in points if whole[0][0] <= x[0] <= whole[-1][0]]
        ratios = [math.exp(size - np.interp(kl, *zip(*whole, strict=True))) for kl, size in inside]
        if ratios and name != "bf16":
            print(f"| {name} | {' to '.join(f'{x:.2f}' for x in sorted({min(ratios), max(ratios)}))} times |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="testbed/cloud")
    parser.add_argument("--folder", type=Path, default=Path("out/transform"))
    parser.add_argument("--selection", choices=[*SELECTIONS, "both"], default="both")
    parser.add_argument("--calibrate", type=int, default=300)
    parser.add_argument("--n", type=int, default=150)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vlm = kvferry.load(arguments.model)
    for name, selection in SELECTIONS.items():
        if arguments.selection in (name, "both"):
            folder = arguments.folder / name
            make_profiles(vlm, selection, arguments.calibrate, folder)
            print(f"\n`{selection}`, {arguments.model}, {arguments.n} validation questions\n")
            print_table(measure(vlm, recipes(selection, folder), arguments.n))


if __name__ == "__main__":
    main()
