"""The threshold of ``skip_visual``: its choice by hand, and the command from a model to a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from kvferry.cli.calibrate import calibrate_skip
from kvferry.errors import FingerprintError, InputError
from kvferry.fit.skip_visual import best_threshold, make_profile
from kvferry.models import load
from kvferry.recipe import compress, decompress
from kvferry.testbed import samples
from tests.models.conftest import folder

__all__ = ["folder"]

some = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@example([0.0], [5e-324])
@given(some, some)
def test_no_other_threshold_errs_less(text_only: list[float], visual: list[float]) -> None:
    words, pictures = np.array(text_only), np.array(visual)

    def error(threshold: float) -> float:
        return float(np.mean(pictures < threshold) + np.mean(words >= threshold))

    best = error(best_threshold(words, pictures))
    assert all(best <= error(t) + 1e-9 for t in [*text_only, *visual, 0.0, 0.25, 0.5, 0.75])


def test_apart_means_no_error() -> None:
    assert best_threshold(np.array([0.1, 0.2]), np.array([0.4, 0.9])) == pytest.approx(0.3)
    assert best_threshold(np.array([0.9]), np.array([0.1])) == 0.0


def run(*arguments: str) -> str:
    app = Typer()
    app.command()(calibrate_skip)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_from_a_model_to_a_recipe(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    printed = json.loads(run(str(folder), "--n", "14", "--out", str(out), "--json"))
    profile = json.loads(out.read_text())
    assert printed == profile | {"out": str(out)}
    vlm = load(folder)
    assert (profile["n"], profile["split"], profile["fingerprint"]) == (14, "calibration", vlm.fingerprint)
    assert profile["visual_mass"]["0"] <= profile["visual_mass"]["0.5"] <= profile["visual_mass"]["1"]

    (question,) = samples("validation", 1)
    recipe = f"knorm@0.5,modality=skip_visual@{out}|int8"
    seen = vlm.prefill(question.images, question.question, recipe=recipe)
    assert decompress(compress(seen, recipe)).recipe == "knorm@0.5,modality=skip_visual|int8"
    out.write_text(json.dumps(profile | {"threshold": 1.0}))
    kept = decompress(compress(seen, recipe))
    assert not kept.layout.visual[kept.layers[0].positions[0].numpy()].any()
    out.write_text(json.dumps(profile | {"fingerprint": "of another"}))
    with pytest.raises(FingerprintError, match="calibrate-skip"):
        compress(seen, recipe)


def test_what_cannot_be_calibrated(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        run(str(folder), "--out", str(tmp_path / "no" / "profile.json"))
    with pytest.raises(InputError, match="choose one of"):
        run(str(folder), "--split", "exam", "--out", str(tmp_path / "profile.json"))
    with pytest.raises(InputError, match="both sorts"):
        make_profile(load(folder), "calibration", [(True, 0.5)])
