"""From questions to a capsule's profile, on an untrained model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvferry.analyze.source import drawn_questions
from kvferry.cli.app import app
from kvferry.codecs.capsule import Capsule
from kvferry.codecs.capsule_profile import CapsuleProfile
from kvferry.codecs.profile import read
from kvferry.errors import InputError
from kvferry.fit import capsule as fit
from kvferry.models import VLM
from kvferry.recipe import compress, decompress
from kvferry.testbed import samples


@pytest.fixture(scope="module")
def examples(vlm: VLM) -> list[fit.Example]:
    asked = [x for x in drawn_questions("calibration", 6).each() if x.images]
    return [fit.example_of(vlm, vlm.prefill(x.images, x.question).cache, x.name) for x in asked]


def test_statistics_are_those_of_all_tokens(examples: list[fit.Example]) -> None:
    means, deviations = fit.statistics(examples)
    for side in ("keys", "values"):
        rows = torch.cat([x[side] for e in examples for *_, x in e.pictures], 1).double()  # type: ignore[index]
        assert means[side] == pytest.approx(rows.mean(1).float(), abs=1e-5)  # type: ignore[index]
        assert deviations[side] == pytest.approx(rows.std(1, correction=0).float(), rel=1e-3)  # type: ignore[index]


def test_components_of_one_grid_are_the_principal_ones(vlm: VLM, examples: list[fit.Example]) -> None:
    """Of several pictures of one grid no other basis of as many columns leaves less."""
    rows, columns, _ = examples[0].pictures[0]
    cut = [
        fit.Example(((4, 5, {k: x[:, :20] for k, x in e.pictures[0][2].items()}),)) for e in examples
    ]  # fmt: skip
    assert rows * columns >= 20
    means, deviations = fit.statistics(cut)
    eye = torch.eye(vlm.head_dim).expand(vlm.layers, vlm.kv_heads, -1, -1)
    bases = fit.components(cut, means, {"keys": eye, "values": eye}, fit.Plan(most=0.5))
    profile = CapsuleProfile(
        vlm.fingerprint, means, deviations, {}, bases, vlm.rotary, (vlm.layers, vlm.kv_heads, vlm.head_dim), {}
    )
    for layer in range(vlm.layers):
        off = torch.cat([e.pictures[0][2]["values"][layer].float() - means["values"][layer] for e in cut], 1)
        basis = profile.basis("values", layer, 4, 5, 10)
        best = float(torch.linalg.svdvals(off)[10:].square().sum())
        assert basis.T @ basis == pytest.approx(torch.eye(10), abs=1e-4)
        assert float((off - basis @ (basis.T @ off)).square().sum()) == pytest.approx(best, rel=1e-2, abs=1e-4)


def test_a_profile_by_command(folder: Path, vlm: VLM, tmp_path: Path) -> None:
    """Losses fall, the better error is kept, nothing else is left, and it encodes."""
    out = tmp_path / "c.profile"
    line = ["fit", "capsule", str(folder), "--n", "14", "--passes", "2", "--rate", "0.002", "--variants", "--json"]
    done = CliRunner().invoke(app, [*line, "--out", str(out)])
    assert done.exit_code == 0, done.exception
    assert [x.name for x in tmp_path.iterdir()] == ["c.profile"]
    profile, _ = read(out)
    facts = profile.facts
    assert facts["error"] == min(facts["held_out_kl"], key=facts["held_out_kl"].get)
    assert set(facts["losses"]) == {
        f"{side}, {error}" for side in ("keys", "values") for error in ("plain", "weighted")
    }
    for of in facts["losses"].values():
        assert min(of["held_out"]) < of["before"]
    (sample,) = samples("test", 1)
    prefilled = vlm.prefill(sample.images, sample.question)
    sizes = [len(compress(prefilled, f"full|capsule:{share}@{out}")) for share in (0.6, 0.4, 0.2)]
    assert sizes == sorted(sizes, reverse=True)
    assert vlm.answer(decompress(compress(prefilled, f"full|capsule@{out}|zstd")), max_new_tokens=2) is not None
    asked = vlm.prefill(sample.images)
    assert vlm.answer(decompress(compress(asked, f"full|capsule@{out}")), sample.question, max_new_tokens=2) is not None
    assert fit.carried(prefilled.cache, Capsule(1, codec="bf16", values="full"), profile).layers  # type: ignore[arg-type]


def test_too_few_prompts_are_counted(vlm: VLM, tmp_path: Path) -> None:
    asked = list(drawn_questions("calibration", 9).each())
    seen = sum(bool(x.images) for x in asked)
    with pytest.raises(InputError, match=f"needs at least {fit.FEWEST} calibration prompts, not {seen}"):
        fit.fit_capsule(vlm, asked, fit.Plan(), {}, tmp_path / "x.profile")
    assert not list(tmp_path.iterdir())


def test_nan_is_named(folder: Path, tmp_path: Path) -> None:
    from kvferry.models import load

    broken = load(folder)
    for parameter in broken.model.model.language_model.layers[1].self_attn.k_proj.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(InputError, match="hold NaN or infinity"):
        fit.fit_capsule(broken, drawn_questions("calibration", 12).each(), fit.Plan(), {}, tmp_path / "x.profile")
    assert not list(tmp_path.iterdir())
